"""An adapter's folder: what it holds, the model that it makes, and what it is refused for."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_cli.core.model.gpt_oss import adapter as adapters
from nexus_cli.core.model.gpt_oss.adapter import apply_adapter, read_adapter, write_adapter
from nexus_cli.core.model.gpt_oss.export import nexus_tensors, write_model_directory
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.surgery import trainable_names
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError
from nexus_cli.io import model_dir
from nexus_cli.io.hashing import sha256_file

SHARD = "nexus-trained.safetensors"
GATE = "model.layers.0.mlp.shared_expert.output_gate"


def routers_of(folder):
    found = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        found |= {k: t for k, t in load_file(shard).items() if ".router." in k}
    return found


@pytest.fixture(scope="module")
def trained(tiny_converted_dir, tmp_path_factory):
    """Checkpoints with open gates: routers as they were, all trained, and biases alone."""
    root = tmp_path_factory.mktemp("trained")
    tensors = {
        name: torch.full_like(value, 0.7) if name.endswith("output_gate") else value
        for name, value in nexus_tensors(tiny_converted_dir).items()
    }
    moved = {name: value + 0.25 for name, value in routers_of(tiny_converted_dir).items()}
    biases = {name: value for name, value in moved.items() if name.endswith("bias")}
    for kind, routers in {"frozen": {}, "router": moved, "bias": biases}.items():
        write_model_directory(root / kind, tiny_converted_dir, tensors | routers)
    (root / "frozen" / "LICENSE").write_text("as you like")
    return root


@pytest.fixture
def folder(trained, tmp_path):
    """An adapter that a test may damage."""
    write_adapter(tmp_path / "adapter", trained / "router")
    return tmp_path / "adapter"


def rewrite(folder, change):
    """Change the tensors, and let the config name the file as it is then."""
    file = folder / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "nexus_adapter.json").read_text())
    config["tensors"] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    (folder / "nexus_adapter.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["frozen", "router", "bias"])
@torch.no_grad()
def test_there_and_back_is_the_same_model(trained, tiny_model_dir, tmp_path, kind):
    whole = trained / kind
    write_adapter(tmp_path / "adapter", whole)
    apply_adapter(tmp_path / "again", tiny_model_dir, read_adapter(tmp_path / "adapter"))
    again = tmp_path / "again"
    assert (tmp_path / "adapter" / "adapter.safetensors").read_bytes() == (
        whole / SHARD
    ).read_bytes()
    for name in (SHARD, "config.json", "conversion_metadata.json", model_dir.INDEX):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    assert model_dir.fingerprint(again) == model_dir.fingerprint(whole)
    for shard in tiny_model_dir.glob("model-*.safetensors"):
        assert (again / shard.name).stat().st_ino == shard.stat().st_ino
    ids = torch.arange(48).view(2, 24) * 37
    logits = [load_model(p, dtype=torch.float32)(input_ids=ids).logits for p in (whole, again)]
    assert torch.equal(*logits)
    base = load_model(tiny_model_dir, dtype=torch.float32)(input_ids=ids).logits
    assert not torch.equal(logits[1], base)


def test_it_holds_what_may_train_in_the_dtypes_of_a_checkpoint_and_nothing_else(
    trained, folder, tiny_model_dir
):
    model = load_model(trained / "router", dtype=torch.bfloat16)
    wanted = {
        name: (torch.float32 if name.endswith("output_gate") else torch.bfloat16, parameter.shape)
        for name, parameter in model.named_parameters()
        if name in set(trainable_names(model, train_router=True))
    }
    held = load_file(folder / "adapter.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in held.items()} == wanted
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors",
        "local_base.json",
        "nexus_adapter.json",
    ]
    config = json.loads((folder / "nexus_adapter.json").read_text())
    assert config["format"] == "nexus.adapter/2"
    assert config["base"] == {
        "name": tiny_model_dir.name,
        "revision": None,
        "fingerprint": model_dir.fingerprint(tiny_model_dir),
    }
    local = json.loads((folder / "local_base.json").read_text())
    assert local == {"path": str(tiny_model_dir)}
    assert config["tensors"]["sha256"] == sha256_file(folder / "adapter.safetensors")
    assert config["conversion"]["init_strategy"] == "random"
    assert config["environment"]["nexus-cli"]


def test_tensors_given_win_over_those_of_the_model_and_licences_travel(trained, tmp_path):
    opened = {GATE: torch.tensor([3.0])}
    write_adapter(tmp_path / "adapter", trained / "frozen", opened)
    held, before = (
        load_file(tmp_path / "adapter" / "adapter.safetensors"),
        nexus_tensors(trained / "frozen"),
    )
    assert held[GATE].item() == 3.0
    assert held.keys() == before.keys()
    assert all(torch.equal(held[name], before[name]) for name in held if name != GATE)
    assert (tmp_path / "adapter" / "LICENSE").read_text() == "as you like"


def test_two_adapters_of_a_model_are_equal_byte_for_byte(trained, folder, tmp_path):
    write_adapter(tmp_path / "other", trained / "router")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


@pytest.mark.parametrize("other", [{"seed": 5}, {"num_local_experts": 4}], ids=["bytes", "sizes"])
def test_another_base_is_refused(folder, make_tiny_model, tmp_path, other):
    base = make_tiny_model(tmp_path / "other", **other)
    with pytest.raises(ArtifactError, match=r"is not the model that .* was made from") as caught:
        apply_adapter(tmp_path / "out", base, read_adapter(folder))
    assert "--base" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_converted_model_is_no_base(folder, trained, tmp_path):
    with pytest.raises(ArtifactError, match="is not the model"):
        apply_adapter(tmp_path / "out", trained / "frozen", read_adapter(folder))


def flip_the_last_byte(file: Path):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_the_last_byte, "is not the file whose sha256"),
        (truncate, r"has \d+ bytes, and nexus_adapter.json names \d+"),
        (Path.unlink, "is missing"),
    ],
    ids=["one byte", "truncated", "missing"],
)
def test_a_damaged_file_of_tensors_is_named(folder, damage, words):
    damage(folder / "adapter.safetensors")
    with pytest.raises(ArtifactError, match=rf"adapter\.safetensors {words}"):
        read_adapter(folder)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(GATE), f"lacks the tensor {GATE}"),
        (drop("model.layers.1.mlp.router.bias"), "lacks the tensor model.layers.1.mlp.router.bias"),
        (put("lm_head.weight", torch.zeros(2)), "holds lm_head.weight, which Nexus does not train"),
        (put(GATE.replace("0", "2"), torch.zeros(1)), "and has 2 layers"),
        (put(GATE, torch.zeros(1).bfloat16()), rf"holds {GATE} as BF16 \[1\], not F32 \[1\]"),
        (put("model.layers.0.mlp.router.bias", torch.zeros(4).bfloat16()), r"\[4\], not BF16 \[8"),
    ],
    ids=["gate gone", "half a router", "frozen tensor", "layer too many", "dtype", "shape"],
)
def test_tensors_that_do_not_fit_the_config_are_refused(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=words):
        read_adapter(folder)


def test_a_header_that_lies_is_refused(folder):
    file = folder / "adapter.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    rewritten = json.loads((folder / "nexus_adapter.json").read_text())
    rewritten["tensors"]["sha256"] = sha256_file(file)
    (folder / "nexus_adapter.json").write_text(json.dumps(rewritten))
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"format": "nexus.adapter/2"}', '{"peft_type": "LORA"}']
)
def test_a_config_of_another_format_is_refused(folder, content):
    (folder / "nexus_adapter.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"not a nexus\.adapter/2 file"):
        read_adapter(folder)


def test_sizes_that_are_not_the_base_s_are_refused(folder, tiny_model_dir, tmp_path):
    config = json.loads((folder / "nexus_adapter.json").read_text())
    config["shape"]["num_experts"] = 4
    (folder / "nexus_adapter.json").write_text(json.dumps(config))
    rewrite(folder, lambda t: t.update({n: x[:4].clone() for n, x in t.items() if ".router." in n}))
    with pytest.raises(ArtifactError, match="is not the model"):
        apply_adapter(tmp_path / "out", tiny_model_dir, read_adapter(folder))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_shared_expert_has_no_adapter(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match="no shared expert"):
        write_adapter(tmp_path / "adapter", tiny_model_dir)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metadata", [None, "{}", '{"base": {"path": 3}}', '{"base": "x"}'])
def test_a_model_that_does_not_name_its_base_has_no_adapter(trained, tmp_path, metadata):
    model = tmp_path / "model"
    shutil.copytree(trained / "frozen", model)
    (model / "conversion_metadata.json").unlink()
    if metadata is not None:
        (model / "conversion_metadata.json").write_text(metadata)
    with pytest.raises(ArtifactError, match=r"does not name (its|the) base"):
        write_adapter(tmp_path / "adapter", model)
    assert not (tmp_path / "adapter").exists()


def test_a_tensor_that_nexus_does_not_train_gets_into_no_adapter(trained, tmp_path):
    with pytest.raises(ArtifactError, match=r"holds model\.norm\.weight"):
        write_adapter(
            tmp_path / "adapter", trained / "frozen", {"model.norm.weight": torch.ones(64)}
        )
    assert not list(tmp_path.iterdir())


def test_only_an_adapter_is_replaced(folder, trained, tmp_path):
    write_adapter(folder, trained / "frozen")
    assert not [k for k in load_file(folder / "adapter.safetensors") if ".router." in k]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is not an adapter"):
        write_adapter(tmp_path / "notes", trained / "frozen")
    (folder / "nexus_adapter.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ArtifactError, match=r"not a nexus\.adapter/2 file"):
        write_adapter(folder, trained / "frozen")


def test_a_full_disk_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "write_shard", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_adapter(tmp_path / "adapter", trained / "frozen")
    assert not list(tmp_path.iterdir())
