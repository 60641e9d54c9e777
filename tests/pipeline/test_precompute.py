import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple

import numpy as np
import pytest
import torch

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.core.distill.head import head_loss
from nexus_cli.core.distill.store_teacher import StoreTeacher, stored_batch
from nexus_cli.core.distill.teacher import DenseSignal
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError, WorkspaceError
from nexus_cli.io.teacher_store import open_store
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import precompute

# Shape letters: B sequences, S positions, N = B * S, K kept entries, V vocabulary.

SEQ_LEN = 32


def write_text(path, num_documents, seed):
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(num_documents):
            words = [f"{'abcdefgh'[i % 8]}{i}" for i in rng.integers(500, size=40)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return {
        "large": write_text(folder / "large.jsonl", 40, 0),
        "small": write_text(folder / "small.jsonl", 6, 1),
    }


@pytest.fixture(scope="module")
def settings(tiny_model_dir, text):
    """Settings of a store of 12 sequences in 6 shards."""

    def make(**changes):
        data = {"sources": f"{text['large']}@all,{text['small']}@all", "seq_len": SEQ_LEN}
        values = {
            "model": str(tiny_model_dir),
            "data": data | changes.pop("data", {}),
            "num_steps": 6,
            "batch_size": 2,
            "top_k": 5,
            "runtime": {"device": "cpu"},
        }
        return PrecomputeConfig(**values | changes)

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A workspace with a finished store."""
    workspace = Workspace(tmp_path_factory.mktemp("finished"))
    precompute.run(settings(), workspace)
    return workspace


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir, device="cpu", dtype=torch.float32)


def shards_of(folder):
    return [(shard.file, shard.sha256) for shard in open_store(folder).manifest.shards]


def test_the_store_holds_what_the_model_says_of_the_text(finished, model):
    store = open_store(finished.stage_dir("precompute"))
    assert len(store) == 12
    rows = store.rows(range(12))
    with torch.no_grad():
        logits_BSV = model(
            input_ids=torch.from_numpy(rows.input_ids_BS).long(),
            position_ids=torch.from_numpy(rows.position_ids_BS).long(),
            use_cache=False,
        ).logits
    logp_BSV = torch.log_softmax(logits_BSV.double(), -1).numpy()
    best_BSK = np.argsort(-logp_BSV, axis=-1)[..., :5]
    next_BS = np.roll(rows.input_ids_BS, -1, axis=1)
    counted = 0
    for b, s in np.ndindex(12, SEQ_LEN - 1):
        if not rows.loss_mask_BS[b, s + 1]:
            assert np.isnan(rows.tail_BS[b, s])
            continue
        counted += 1
        assert rows.ids_BSK[b, s].tolist() == best_BSK[b, s].tolist()
        expected_K = logp_BSV[b, s, best_BSK[b, s]]
        np.testing.assert_allclose(rows.logprobs_BSK[b, s], expected_K, atol=4e-3)
        tail = np.log1p(-np.exp(expected_K).sum())
        np.testing.assert_allclose(rows.tail_BS[b, s], tail, atol=4e-3)
        nll = -logp_BSV[b, s, next_BS[b, s]]
        np.testing.assert_allclose(rows.nll_BS[b, s], nll, atol=1e-4)
    assert counted == store.manifest.num_targets > 300
    assert store.manifest.complete


def test_sources_take_turns_by_their_weights_and_none_is_repeated(finished, text):
    store = open_store(finished.stage_dir("precompute"))
    rows = store.rows(range(12))
    assert sorted(np.bincount(rows.source_B)) == [6, 6]
    assert len({row.tobytes() for row in rows.input_ids_BS}) == 12
    names = [name.partition("@")[0] for name in store.plan.sources]
    assert names == [str(text["large"]), str(text["small"])]


def test_training_from_a_store_of_the_whole_vocabulary_is_training_with_the_teacher(
    settings, model, tmp_path
):
    config = settings(
        num_steps=2, top_k=model.config.vocab_size, precision="float32", compression="none"
    )
    precompute.run(config, Workspace(tmp_path))
    store = open_store(tmp_path / "precompute")
    batch = stored_batch(store, [2, 0, 3])
    with torch.no_grad():
        hidden_BSH = model.model(
            input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
        ).last_hidden_state
    teacher_NH = hidden_BSH.flatten(0, 1)
    student_NH = teacher_NH + 0.1 * torch.randn(teacher_NH.shape)
    labels_BS = batch.input_ids_BS.roll(-1, 1)
    weight_BS = batch.loss_mask_BS.roll(-1, 1).float()
    weight_BS[:, -1] = 0
    losses = []
    for signal_ in (DenseSignal(teacher_NH), StoreTeacher(store).signal(batch)):
        hidden_NH = student_NH.clone().requires_grad_()
        weight_N = weight_BS.flatten() / weight_BS.sum()
        head_VH = model.lm_head.weight
        loss = head_loss(hidden_NH, head_VH, labels_BS.flatten(), weight_N, weight_N, signal_)
        loss.total.backward()
        losses.append((loss.total, hidden_NH.grad))
    assert losses[0][0] > 0
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[1][1], losses[0][1], rtol=1e-3, atol=1e-7)


def test_a_finished_store_is_not_made_again_and_other_settings_are_refused(
    settings, finished, monkeypatch
):
    def no_model(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(precompute, "load_model", no_model)
    precompute.run(settings(), finished)
    with pytest.raises(WorkspaceError, match="top_k"):
        precompute.run(settings(top_k=4), finished)


def test_text_that_runs_out_is_an_error_and_leaves_a_usable_store(settings, text, tmp_path):
    folder = tmp_path / "store"
    sources = f"{text['large']}@all,{text['small']}@all"
    config = settings(num_steps=1000, output=folder, data={"sources": sources})
    for _ in range(2):
        with pytest.raises(ResourceError, match=r"ran out after \d+ of 2,000 sequences"):
            precompute.run(config, Workspace(tmp_path / "w"))
    store = open_store(folder)
    assert not store.manifest.complete
    rows = store.rows(range(len(store)))
    assert store.manifest.actual_steps == len(store) // 2
    assert len({row.tobytes() for row in rows.input_ids_BS}) == len(store)
    large, small = np.bincount(rows.source_B)
    assert abs(large - small) <= 1, "the mixture keeps its proportions to the end"


def test_a_sequence_count_that_is_no_multiple_of_anything_is_kept_whole(settings, text, tmp_path):
    config = settings(num_steps=1000, batch_size=5, data={"sources": f"{text['small']}@all"})
    with pytest.raises(ResourceError, match="ran out"):
        precompute.run(config, Workspace(tmp_path))
    store = open_store(tmp_path / "precompute")
    assert len(store) % 5
    assert len(store.rows(range(len(store)))) == len(store)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from nexus_cli.config.precompute import PrecomputeConfig
    from nexus_cli.io.teacher_writer import StoreWriter
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import precompute

    write = StoreWriter.write
    written = []

    def dying(self, shard, rows):
        if len(written) == 2:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        written.append(shard)
        return write(self, shard, rows)

    StoreWriter.write = dying
    precompute.run(PrecomputeConfig.model_validate_json({config!r}), Workspace(Path({root!r})))
"""


def test_a_killed_run_continues_and_ends_with_the_rows_of_an_unbroken_one(
    settings, finished, tmp_path, monkeypatch
):
    config = settings()
    code = textwrap.dedent(KILLED).format(config=config.model_dump_json(), root=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = tmp_path / "precompute"
    assert len(list((folder / "shards").glob("0*.parquet"))) == 2
    with pytest.raises(ArtifactError, match="unfinished"):
        open_store(folder)

    asked = []
    ask = precompute.ask
    monkeypatch.setattr(precompute, "ask", lambda *args: asked.append(1) or ask(*args))
    precompute.run(config, Workspace(tmp_path))
    assert len(asked) == 4, "two of six batches were there already"
    assert shards_of(folder) == shards_of(finished.stage_dir("precompute"))


TWO_RANKS = """
    import sys
    from pathlib import Path
    from nexus_cli.config.precompute import PrecomputeConfig
    from nexus_cli.core.distributed import open_world
    from nexus_cli.io.teacher_writer import StoreWriter
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import precompute

    world = open_world("cpu")
    assert world.size == 2, world
    write = StoreWriter.write

    def noting(self, shard, rows):
        Path({notes!r}, f"{{shard}}-{{world.rank}}").touch()
        return write(self, shard, rows)

    StoreWriter.write = noting
    precompute.run(PrecomputeConfig.model_validate_json({config!r}), Workspace(Path({root!r})))
"""


def test_two_ranks_make_the_store_of_one(settings, finished, tmp_path):
    script, notes = tmp_path / "two_ranks.py", tmp_path / "notes"
    notes.mkdir()
    script.write_text(
        textwrap.dedent(TWO_RANKS).format(
            config=settings().model_dump_json(), root=str(tmp_path), notes=str(notes)
        )
    )
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    written = {name.name for name in notes.iterdir()}
    assert written == {"0-0", "2-0", "4-0", "1-1", "3-1", "5-1"}
    ours, theirs = (
        open_store(folder) for folder in (tmp_path / "precompute", finished.stage_dir("precompute"))
    )
    assert ours.plan == theirs.plan
    for name in ("input_ids_BS", "ids_BSK", "logprobs_BSK", "tail_BS", "source_B"):
        actual, expected = (getattr(store.rows(range(12)), name) for store in (ours, theirs))
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_lost_shard_alone_is_made_again(settings, tmp_path, monkeypatch):
    config, folder = settings(num_steps=3), tmp_path / "precompute"
    precompute.run(config, Workspace(tmp_path))
    before = shards_of(folder)
    (folder / "shards" / "00001.parquet").unlink()
    asked = []
    ask = precompute.ask
    monkeypatch.setattr(precompute, "ask", lambda *args: asked.append(1) or ask(*args))
    precompute.run(config, Workspace(tmp_path))
    assert len(asked) == 1
    assert shards_of(folder) == before


def test_force_replaces_a_store_made_with_other_settings(settings, tmp_path):
    precompute.run(settings(num_steps=2), Workspace(tmp_path))
    precompute.run(settings(num_steps=1, top_k=3), Workspace(tmp_path), force=True)
    store = open_store(tmp_path / "precompute")
    assert (len(store), store.plan.top_k) == (2, 3)
    assert len(list((tmp_path / "precompute" / "shards").iterdir())) == 1


def test_the_shared_expert_of_a_converted_teacher_takes_part(
    settings, tiny_converted_dir, tmp_path, caplog
):
    caplog.set_level("INFO", logger="nexus_cli")
    with caplog.at_level("INFO"):
        propagate(
            caplog,
            lambda: precompute.run(
                settings(num_steps=1, model=str(tiny_converted_dir)), Workspace(tmp_path)
            ),
        )
    assert "takes part" in caplog.text


def propagate(caplog, act):
    """The package's log does not reach the root logger, where caplog listens."""
    import logging

    logger = logging.getLogger("nexus_cli")
    logger.addHandler(caplog.handler)
    try:
        act()
    finally:
        logger.removeHandler(caplog.handler)


def test_a_dry_run_says_what_and_writes_nothing(settings, tmp_path, capsys):
    precompute.run(settings(), Workspace(tmp_path), dry_run=True)
    said = capsys.readouterr().out
    assert "12 x 32 tokens" in said
    assert "5 of 8,256 tokens" in said
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_does_not_fit_is_refused_before_it_starts(settings, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 0, 100))
    with pytest.raises(ResourceError, match="no room"):
        precompute.run(settings(), Workspace(tmp_path), dry_run=True)


def test_more_entries_than_the_vocabulary_has_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="has 8256 tokens"):
        precompute.run(settings(top_k=9000), Workspace(tmp_path))


def test_a_teacher_that_gives_no_numbers_is_refused(settings, model, tmp_path, monkeypatch):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(torch.nan)
    monkeypatch.setattr(precompute, "load_model", lambda *_, **__: broken)
    with pytest.raises(ArtifactError, match="not numbers"):
        precompute.run(settings(num_steps=1), Workspace(tmp_path))


@pytest.mark.parametrize("place", ["load_model", "ask"])
def test_a_full_device_is_said_with_its_numbers(settings, tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(precompute, place, full)
    with pytest.raises(ResourceError, match=r"on cpu: 3\.00 GiB were asked for; ") as caught:
        precompute.run(settings(), Workspace(tmp_path))
    assert "--batch-size" in caught.value.hint
