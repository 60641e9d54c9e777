import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_cli import embedded
from nexus_cli.core.model.gpt_oss import streaming
from nexus_cli.core.model.gpt_oss.export import write_model_directory
from nexus_cli.core.model.gpt_oss.loading import load_config, load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.errors import ArtifactError

INDEX = "model.safetensors.index.json"


def reference(path, dtype):
    """The same folder through transformers' own loader."""
    model = NexusGptOssForCausalLM.from_pretrained(
        path,
        config=load_config(path),
        dtype=dtype,
        device_map={"": torch.device("cpu")},
        attn_implementation="eager",
        local_files_only=True,
    )
    return model.requires_grad_(False).eval()


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_equal(ours, theirs):
    for kind in ("named_parameters", "named_buffers"):
        a, b = (list(getattr(model, kind)(remove_duplicate=False)) for model in (ours, theirs))
        assert [name for name, _ in a] == [name for name, _ in b]
        for (name, x), (_, y) in zip(a, b, strict=True):
            assert (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device), name
            assert torch.equal(bits(x), bits(y)), name
            assert x.requires_grad == y.requires_grad, name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation == "eager"
    assert ours.name_or_path == str(theirs.name_or_path)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    rotary = ours.model.rotary_emb, theirs.model.rotary_emb
    assert len({module.attention_scaling for module in rotary}) == 1
    assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy to change."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def rewrite(shard, change):
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def reindex(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("piece", [64, 1000 * 64, streaming.PIECE])
def test_a_model_is_what_transformers_loads(tiny_model_dir, dtype, piece, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", piece)
    assert_equal(load_model(tiny_model_dir, dtype=dtype), reference(tiny_model_dir, dtype))


def test_the_embedded_model_is_what_transformers_loads(dtype):
    path = embedded.MODEL_DIR
    ours = load_model(path, dtype=dtype)
    assert_equal(ours, reference(path, dtype))
    assert ours.generation_config.eos_token_id is not None


def test_a_converted_model_is_what_transformers_loads(tiny_converted_dir, dtype):
    ours = load_model(tiny_converted_dir, dtype=dtype)
    assert_equal(ours, reference(tiny_converted_dir, dtype))
    assert ours.model.layers[0].mlp.shared_expert.output_gate.dtype == torch.float32


def test_a_trained_router_wins_over_the_original(tiny_converted_dir, tmp_path, dtype):
    name = "model.layers.1.mlp.router.weight"
    trained = torch.full((8, 64), 1 / 3)  # fp32: it is rounded on the way, as stock does
    write_model_directory(tmp_path / "trained", tiny_converted_dir, {name: trained})
    ours = load_model(tmp_path / "trained", dtype=dtype)
    assert_equal(ours, reference(tmp_path / "trained", dtype))
    assert torch.equal(ours.get_parameter(name), trained.to(dtype))


def test_without_a_generation_config_the_models_own_is_used(folder):
    (folder / "generation_config.json").unlink()
    assert_equal(load_model(folder), reference(folder, torch.bfloat16))


@pytest.mark.parametrize("kept", ["both", "other", "source", "target"])
def test_tied_weights_are_tied_as_in_transformers(folder, kept):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    source, target = "model.embed_tokens.weight", "lm_head.weight"
    first, second = (folder / f"model-0000{i}-of-00001.safetensors" for i in (0, 1))
    if kept == "source":
        rewrite(second, lambda tensors: tensors.pop(target))
        reindex(folder, lambda files: files.pop(target))
    elif kept == "target":
        rewrite(first, lambda tensors: tensors.pop(source))
        reindex(folder, lambda files: files.pop(source))
    elif kept == "both":
        copied = load_file(first)[source]
        rewrite(second, lambda tensors: tensors.update({target: copied}))
    ours = load_model(folder)
    assert_equal(ours, reference(folder, torch.bfloat16))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (kept != "other")


def test_a_lone_file_without_an_index_loads(folder):
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_equal(load_model(folder), reference(folder, torch.bfloat16))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({NORM: torch.ones(63)}, r"mismatched_keys.*model\.norm\.weight"),
        ({NORM: torch.ones(64, dtype=torch.uint8)}, r"mismatched_keys.*model\.norm\.weight"),
        ({NORM: torch.ones(64, dtype=torch.int32)}, r"mismatched_keys.*model\.norm\.weight"),
        ({"model.norm.bias": torch.ones(64)}, r"unexpected_keys.*model\.norm\.bias"),
    ],
    ids=["shape", "bytes", "integers", "unknown"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, kind):
    shard = folder / "model-00001-of-00001.safetensors"
    rewrite(shard, lambda tensors: tensors.update(change))
    with pytest.raises(ArtifactError, match=f"do not fit the config.*{kind}"):
        load_model(folder)


def test_a_missing_tensor_is_named(folder):
    rewrite(folder / "model-00001-of-00001.safetensors", lambda tensors: tensors.pop(NORM))
    reindex(folder, lambda files: files.pop(NORM))
    with pytest.raises(ArtifactError, match=r"missing_keys.*model\.norm\.weight"):
        load_model(folder)


def test_packed_bytes_are_never_made_of_floats(folder):
    name = "model.layers.0.mlp.experts.down_proj_scales"
    shard = folder / "model-00000-of-00001.safetensors"
    rewrite(shard, lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(ArtifactError, match=r"mismatched.*down_proj_scales"):
        load_model(folder)


def test_a_key_that_stock_would_read_from_a_later_shard_is_refused(folder):
    # The index says one file, and transformers takes another: two models under one name.
    name = "model.layers.0.mlp.router.bias"
    shard = folder / "model-00001-of-00001.safetensors"
    rewrite(shard, lambda tensors: tensors.update({name: torch.ones(8)}))
    with pytest.raises(ArtifactError, match=r"later_shard.*layers\.0\.mlp\.router\.bias"):
        load_model(folder)


def test_a_truncated_shard_is_refused(folder):
    shard = folder / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="truncated"):
        load_model(folder)


def test_a_header_that_gives_a_tensor_too_few_bytes_is_refused(folder):
    shard = folder / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    offsets = header["model.norm.weight"]["data_offsets"]
    offsets[0] += 2
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    shard.write_bytes(data[:8] + changed[:length] + data[8 + length :])
    with pytest.raises(ArtifactError, match=r"mismatched.*model\.norm\.weight"):
        load_model(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "shard").write_bytes(bytes(12))
    piece = streaming._Piece(tmp_path / "shard", 8, torch.uint8, torch.empty(8, dtype=torch.uint8))
    with pytest.raises(ArtifactError, match="4 bytes are missing"):
        streaming._read(piece, piece.target_N)


def test_an_error_of_one_reader_ends_all_of_them(tiny_model_dir, monkeypatch):
    asked = []

    def fail(piece, _):
        asked.append(piece)
        raise ArtifactError("no")

    monkeypatch.setattr(streaming, "_read", fail)
    with pytest.raises(ArtifactError, match="no"):
        load_model(tiny_model_dir, dtype=torch.float32)
    assert len(asked) <= streaming.READERS


def test_on_the_cpu_what_is_not_cast_is_the_mapped_file(folder):
    before = {shard: shard.read_bytes() for shard in folder.glob("*.safetensors")}
    model = load_model(folder)
    blocks = model.model.layers[0].mlp.experts.gate_up_proj_blocks
    assert blocks.untyped_storage().nbytes() == blocks.numel()  # to save it is not to save the file
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert {shard: shard.read_bytes() for shard in before} == before


def test_a_shard_that_cannot_be_read_is_an_error(tmp_path):
    piece = streaming._Piece(tmp_path, 0, torch.uint8, torch.empty(8, dtype=torch.uint8))
    with pytest.raises(ArtifactError, match="cannot read"):
        streaming._read(piece, piece.target_N)
