"""Experts read and averaged slice by slice, against decoding all of them."""

import json
import shutil
import threading

import pytest
import torch

from nexus_cli.core.model.gpt_oss import initialise, slices
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import dequantize_mxfp4
from nexus_cli.core.model.gpt_oss.mxfp4 import add_mxfp4_, decode_columns
from nexus_cli.core.model.gpt_oss.slices import ExpertReader, expert_bytes
from nexus_cli.errors import ArtifactError
from nexus_cli.io import model_dir, tensor_files

PLACES = [(0, 5), (0, 1), (1, 7), (0, 5)]
FIELDS = ("gate_IH", "gate_bias_I", "up_IH", "up_bias_I", "down_HI", "down_bias_H")


@pytest.fixture
def reader(tiny_model_dir):
    return ExpertReader(tiny_model_dir, model_dir.read_shape(tiny_model_dir))


def test_every_byte_at_every_scale_is_added_as_it_is_decoded():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1).repeat(1, 16)
    total = torch.zeros(255, 512)
    add_mxfp4_(total, blocks, scales)
    finite = scales[:, :1] < 253  # above, 6 * 2^126 and more are infinite in float32
    expected = dequantize_mxfp4(blocks, scales, torch.float64).float()
    assert torch.equal(total[finite[:, 0]], expected[finite[:, 0]])
    add_mxfp4_(total, blocks, scales)
    assert torch.equal(total[finite[:, 0]], 2 * expected[finite[:, 0]])


def test_the_scale_that_is_no_number_makes_none():
    total = torch.zeros(1, 32)
    codes = torch.zeros(1, 1, 16, dtype=torch.uint8)
    add_mxfp4_(total, codes, torch.tensor([[255]], dtype=torch.uint8))
    assert not torch.isfinite(total).any()


@pytest.mark.parametrize("rows", [7, 512])
def test_the_average_is_the_mean_of_the_decoded_experts_bit_for_bit(reader, monkeypatch, rows):
    monkeypatch.setattr(slices, "ROWS", rows)
    average = initialise.read_average(reader, PLACES)
    experts = [reader.expert(*place) for place in PLACES]
    for name in FIELDS:
        total = getattr(experts[0], name).clone()
        for expert in experts[1:]:
            total += getattr(expert, name)
        assert torch.equal(getattr(average, name), total / len(PLACES)), name


def test_an_average_of_nothing_is_refused(reader):
    with pytest.raises(ValueError, match="no expert"):
        initialise.read_average(reader, [])


def test_only_the_bytes_of_the_named_experts_are_read(reader, monkeypatch):
    read = []
    real = tensor_files.read_into

    def count(shard, begin, into):
        read.append(len(into))
        real(shard, begin, into)

    monkeypatch.setattr(tensor_files, "read_into", count)
    initialise.read_average(reader, PLACES)
    assert sum(read) == len(PLACES) * expert_bytes(reader.shape)


@pytest.mark.parametrize(("layers", "experts"), [(24, 32), (36, 128)], ids=["20B", "120B"])
def test_an_expert_of_the_real_models_is_13_megabytes(layers, experts):
    sizes = {"num_layers": layers, "num_experts": experts, "top_k": 4, "vocab_size": 201_088}
    sizes |= {"hidden_size": 2880, "intermediate_size": 2880, "num_shared_experts": 0}
    shape = model_dir.ModelShape(model_type="gpt_oss", shared_intermediate_size=2880, **sizes)
    assert expert_bytes(shape) == 3 * 2880 * 2880 * 17 // 32 + 2 * 3 * 2880


def test_torch_has_its_threads_back_and_none_is_left(reader):
    before = torch.get_num_threads(), threading.active_count()
    initialise.read_average(reader, PLACES)
    assert (torch.get_num_threads(), threading.active_count()) == before


def test_a_shard_that_is_cut_short_while_it_is_read_is_named(tiny_model_dir, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model_dir, folder)
    reader = ExpertReader(folder, model_dir.read_shape(folder))
    shard = folder / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ArtifactError, match=r"00001-of-00001\.safetensors is truncated"):
        initialise.read_average(reader, [(0, 0), (1, 7)])
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*No such file"):
        initialise.read_average(reader, [(1, 7)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_local_experts": 16},
            r"\[8, 64, 2, 16\]; by its config\.json .* U8 \[16, 64, 2, 16\]",
        ),
        ({"hidden_size": 96}, r"config\.json"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\."),
    ],
)
def test_shards_of_other_sizes_than_the_config_says_are_refused(
    tiny_model_dir, tmp_path, change, message
):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message) as caught:
        ExpertReader(folder, model_dir.read_shape(folder))
    assert caught.value.hint


def test_chosen_columns_are_those_of_the_whole_weight():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (40, 6, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 254, (40, 6), dtype=torch.uint8, generator=generator)
    columns = torch.randperm(192, generator=generator)[:50]
    whole = dequantize_mxfp4(blocks, scales, torch.float32)
    assert torch.equal(decode_columns(blocks, scales, columns), whole[:, columns])
