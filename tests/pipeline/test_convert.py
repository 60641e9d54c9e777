"""A converted folder: what it holds, who can load it, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.model.gpt_oss.export import NEXUS_SHARD, write_model_directory
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4
from nexus_cli.errors import ArtifactError, ResourceError, WorkspaceError
from nexus_cli.io import model_dir
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert

USAGE = [[1, 9, 3, 0, 2, 5, 4, 0], [7, 1, 0, 2, 8, 3, 4, 5]]
CHOSEN = [[1, 5, 3], [4, 0, 7]]


@pytest.fixture
def stats(tiny_model_dir, tmp_path):
    path = tmp_path / "pca_stats.json"
    document = {
        "format": "nexus.pca_stats/1",
        "model_fingerprint": model_dir.fingerprint(tiny_model_dir),
        "num_layers": 2,
        "num_experts": 8,
        "top_k": 3,
        "layers": {
            f"layer_{i}": {"top_expert_indices": CHOSEN[i], "usage": USAGE[i]} for i in range(2)
        },
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def converted(tiny_model_dir, tmp_path):
    def run(**settings):
        settings = {"init_strategy": "pca_topK"} | settings
        settings = {"model": str(tiny_model_dir), "output": tmp_path / "out"} | settings
        convert.run(ConvertConfig(**settings), Workspace(tmp_path / "workspace"))
        return settings["output"]

    return run


def dense(folder, layer, expert):
    """One expert's tensors, read in the plainest way."""
    tensors = {}
    for shard in folder.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    prefix = f"model.layers.{layer}.mlp.experts."
    weight = {
        name: dequantize_mxfp4(
            tensors[f"{prefix}{name}_blocks"], tensors[f"{prefix}{name}_scales"], torch.float32
        )[expert]
        for name in ("gate_up_proj", "down_proj")
    }
    return weight | {
        "gate_up_proj_bias": tensors[prefix + "gate_up_proj_bias"][expert].float(),
        "down_proj_bias": tensors[prefix + "down_proj_bias"][expert].float(),
    }


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("pca_topK", [[(0, 1), (0, 5), (0, 3)], [(1, 4), (1, 0), (1, 7)]]),
        ("pca_top2", [[(0, 1), (0, 5)], [(1, 4), (1, 0)]]),
        ("top1", [[(0, 1)], [(1, 4)]]),
        ("top1_average", [[(0, 1)], [(0, 1)]]),
        ("top4_average", [[(0, 1), (0, 5), (0, 6), (0, 2)], [(1, 4), (1, 0), (1, 7), (1, 6)]]),
    ],
)
def test_each_strategy_averages_the_experts_it_names(
    converted, stats, tiny_model_dir, strategy, places
):
    tensors = load_file(converted(pca_stats=stats, init_strategy=strategy) / NEXUS_SHARD)
    for layer in range(2):
        sources = [dense(tiny_model_dir, *place) for place in places[layer]]
        mean = {name: torch.stack([s[name] for s in sources]).mean(0) for name in sources[0]}
        prefix = f"model.layers.{layer}.mlp.shared_expert."
        expected = {
            "gate_proj.weight": mean["gate_up_proj"][0::2],
            "up_proj.weight": mean["gate_up_proj"][1::2],
            "down_proj.weight": mean["down_proj"],
            "gate_proj.bias": mean["gate_up_proj_bias"][0::2],
            "up_proj.bias": mean["gate_up_proj_bias"][1::2],
            "down_proj.bias": mean["down_proj_bias"],
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[prefix + name], tensor.bfloat16())


def test_a_copied_expert_computes_what_the_routed_one_does(converted, stats):
    """Independent of layouts: the shared expert's output equals the routed expert's, alone."""
    folder = converted(pca_stats=stats, init_strategy="top1", start="scaled", output_scale=1.0)
    moe = load_model(folder, dtype=torch.float32).model.layers[0].mlp
    x = torch.randn(6, 64)
    only = torch.ones(6, 1), torch.full((6, 1), 1)
    with torch.no_grad():
        torch.testing.assert_close(
            moe.shared_expert(x), moe.experts(x, *only), rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("start", ["gate", "zero-down"])
@torch.no_grad()
def test_a_converted_model_starts_as_the_base_bit_for_bit(converted, tiny_model_dir, start):
    ids = torch.randint(0, 8000, (2, 24))
    base = load_model(tiny_model_dir, dtype=torch.bfloat16)(input_ids=ids).logits
    folder = converted(init_strategy="random", start=start)
    assert torch.equal(load_model(folder, dtype=torch.bfloat16)(input_ids=ids).logits, base)


@torch.no_grad()
def test_the_scaled_start_moves_the_model(converted, tiny_model_dir):
    ids = torch.randint(0, 8000, (1, 24))
    base = load_model(tiny_model_dir, dtype=torch.float32)(input_ids=ids).logits
    folder = converted(init_strategy="random", start="scaled", output_scale=5.0)
    assert not torch.equal(load_model(folder, dtype=torch.float32)(input_ids=ids).logits, base)


def test_the_original_shards_are_linked_and_never_rewritten(converted, tiny_model_dir):
    folder = converted(init_strategy="random")
    for shard in tiny_model_dir.glob("model-*.safetensors"):
        assert (folder / shard.name).stat().st_ino == shard.stat().st_ino
    copied = converted(init_strategy="random", copy_shards=True, output=folder.parent / "copied")
    for shard in tiny_model_dir.glob("model-*.safetensors"):
        assert (copied / shard.name).stat().st_ino != shard.stat().st_ino
        assert (copied / shard.name).read_bytes() == shard.read_bytes()


def test_a_hub_cache_of_relative_symbolic_links_converts(converted, tiny_model_dir, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_model_dir.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder = converted(model=str(snapshot), init_strategy="random")
    load_model(folder)
    assert not any(file.is_symlink() for file in folder.iterdir())


STOCK = """
import sys
sys.modules["nexus_cli"] = None  # importing it raises ImportError
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("it loaded without trust_remote_code")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
assert type(model).__name__ == "NexusGptOssForCausalLM", type(model)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("to be or not to be", return_tensors="pt").input_ids
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[2])
model.generate(ids, max_new_tokens=4, do_sample=False)
"""


def test_stock_transformers_loads_the_folder_alone_and_only_with_trust(converted, tmp_path):
    folder = converted(init_strategy="random", start="scaled", output_scale=2.0)
    logits = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", STOCK, str(folder), str(logits)],
        check=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    from nexus_cli.core.model.gpt_oss.loading import load_tokenizer

    ids = load_tokenizer(folder)("to be or not to be", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = load_model(folder, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(torch.load(logits, weights_only=True), ours)


def test_a_trained_router_in_the_new_shard_wins_over_the_original(converted, tmp_path):
    folder = converted(init_strategy="random")
    name = "model.layers.0.mlp.router.weight"
    trained = load_file(folder / NEXUS_SHARD) | {name: torch.full((8, 64), 0.5).bfloat16()}
    write_model_directory(tmp_path / "checkpoint", folder, trained)
    model = load_model(tmp_path / "checkpoint")
    assert (model.model.layers[0].mlp.router.weight == 0.5).all()
    logits = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "checkpoint"), str(logits)],
        check=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    from nexus_cli.core.model.gpt_oss.loading import load_tokenizer

    ids = load_tokenizer(folder)("to be or not to be", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = load_model(tmp_path / "checkpoint", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(torch.load(logits, weights_only=True), ours)


def test_a_router_trained_before_stays_when_only_the_shared_expert_is_written(converted, tmp_path):
    folder = converted(init_strategy="random")
    name = "model.layers.0.mlp.router.weight"
    shared = load_file(folder / NEXUS_SHARD)
    router = {name: torch.full((8, 64), 0.5).bfloat16()}
    write_model_directory(tmp_path / "first", folder, shared | router)
    moved = {key: tensor + 1 for key, tensor in shared.items()}
    write_model_directory(tmp_path / "second", tmp_path / "first", moved)
    stored = load_file(tmp_path / "second" / NEXUS_SHARD)
    assert stored.keys() == moved.keys() | router.keys()
    model = load_model(tmp_path / "second").model.layers[0].mlp
    assert (model.router.weight == 0.5).all()
    assert model.shared_expert.output_gate == 1


def test_no_shared_expert_is_a_model_like_the_base(converted):
    folder = converted(init_strategy="random", num_shared_experts=0)
    assert model_dir.read_shape(folder).num_shared_experts == 0
    assert not (folder / NEXUS_SHARD).exists()
    load_model(folder)


@pytest.mark.parametrize("width", [16, 80])
@torch.no_grad()
def test_other_widths_than_an_experts_work(converted, stats, width):
    folder = converted(pca_stats=stats, shared_intermediate_size=width)
    expert = load_model(folder).model.layers[0].mlp.shared_expert
    assert expert.gate_proj.weight.shape == (width, 64)


@torch.no_grad()
def test_a_wider_shared_expert_computes_the_same_as_one_of_the_experts_width(converted, stats):
    narrow = converted(pca_stats=stats, start="scaled")
    wide = converted(
        pca_stats=stats,
        start="scaled",
        shared_intermediate_size=80,
        output=narrow.parent / "wide",
    )
    ids = torch.randint(0, 8000, (1, 16))
    first, second = (
        load_model(f, dtype=torch.float32)(input_ids=ids).logits for f in (narrow, wide)
    )
    torch.testing.assert_close(first, second)


def test_a_missing_pca_stage_names_the_command(converted):
    with pytest.raises(WorkspaceError) as caught:
        converted()
    assert "nexus pca" in caught.value.hint


def test_a_folder_that_is_not_ours_is_never_replaced(converted, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a model that nexus wrote"):
        converted(init_strategy="random")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_failed_conversion_leaves_nothing(converted, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nexus_cli.core.model.gpt_oss.export.write_shard", full)
    with pytest.raises(ResourceError, match=r"cannot write .*No space left"):
        converted(init_strategy="random")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*.tmp"))


def test_a_new_shard_is_as_readable_as_the_files_beside_it(converted):
    folder = converted(init_strategy="random")
    modes = {(folder / name).stat().st_mode for name in (NEXUS_SHARD, "config.json")}
    assert len(modes) == 1


def test_a_second_run_is_up_to_date_and_other_settings_need_force(converted):
    folder = converted(init_strategy="random")
    first = (folder / NEXUS_SHARD).stat().st_mtime_ns
    converted(init_strategy="random")
    assert (folder / NEXUS_SHARD).stat().st_mtime_ns == first
    with pytest.raises(WorkspaceError, match="seed"):
        converted(init_strategy="random", seed=7)


def test_a_truncated_shard_is_refused(converted, tiny_model_dir, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    shard = broken / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        converted(model=str(broken), init_strategy="random")


def test_a_dry_run_writes_nothing(tiny_model_dir, tmp_path, capsys):
    config = ConvertConfig(model=str(tiny_model_dir), init_strategy="random")
    convert.run(config, Workspace(tmp_path / "w"), dry_run=True)
    assert "12,546" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()
