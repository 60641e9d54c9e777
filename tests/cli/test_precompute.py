import json

import pytest

from nexus_cli.io.location import locate
from nexus_cli.io.teacher_store.reader import open_store


def test_the_line_of_the_spec_writes_a_store_without_a_workspace_named(
    nexus, tiny_model_dir, tmp_path
):
    done = nexus(
        "precompute",
        "--teacher-model",
        tiny_model_dir,
        "--output-dir",
        "teacher_outputs/",
        "--num-steps",
        2,
        "--batch-size",
        4,
        "--seq-len",
        64,
        "--data",
        "bundled-general",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "8 sequences" in done.stdout
    store = open_store(locate(tmp_path / "teacher_outputs"))
    assert (len(store), store.plan.seq_len, store.plan.batch_size) == (8, 64, 4)
    plan = store.plan
    assert (plan.top_k, plan.top_p, plan.min_k, plan.values) == (32, 0.98, 4, "codes")
    assert f"{store.manifest.num_bytes / 512:.1f} bytes a token" in done.stdout


def test_text_that_runs_out_exits_with_5_and_says_how_far_it_came(nexus, tiny_model_dir, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"short text {i} " * 9}) + "\n" for i in range(9)))
    done = nexus(
        "precompute", "--teacher-model", tiny_model_dir, "--num-steps", 50, "--batch-size", 2,
        "--seq-len", 64, "--data", f"{text}@all", "--top-k", 8, "--top-p", 1,
        "--compression", "snappy",
        "--workspace", tmp_path / "w",
    )  # fmt: skip
    assert done.returncode == 5
    assert "of 50 steps" in done.stderr
    assert "nexus train-offline --precomputed-teacher" in done.stderr
    assert "Traceback" not in done.stderr
    store = open_store(locate(tmp_path / "w" / "precompute"))
    assert len(store) > 0
    assert store.manifest.mean_k == 8


@pytest.mark.parametrize(
    "flag", [("--compression", "lz77"), ("--top-k", "0"), ("--top-p", "1.1"), ("--top-p", "0")]
)
def test_a_value_that_is_no_setting_exits_with_2(nexus, flag, tmp_path):
    done = nexus("precompute", *flag, "--workspace", tmp_path)
    assert done.returncode == 2
    assert "precompute." in done.stderr
