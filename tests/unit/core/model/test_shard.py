"""A shard written tensor by tensor is the one that safetensors writes at once."""

import weakref

import pytest
import torch
from safetensors.torch import save_file

from nexus_cli.core.model.gpt_oss.shard import TensorStream, layout_bytes, write_shard

LAYOUTS = {
    "a shared expert": {
        "model.layers.10.mlp.shared_expert.down_proj.weight": torch.randn(6, 7).bfloat16(),
        "model.layers.10.mlp.shared_expert.output_gate": torch.tensor([0.2]),
        "model.layers.2.mlp.shared_expert.down_proj.bias": torch.randn(7).bfloat16(),
        "model.layers.2.mlp.shared_expert.output_gate": torch.tensor([0.1]),
    },
    "every dtype": {
        name: torch.arange(6).view(2, 3).to(dtype)
        for name, dtype in {
            "u": torch.uint8,
            "h": torch.float16,
            "b": torch.bfloat16,
            "f": torch.float32,
            "d": torch.float64,
        }.items()
    },
    "not contiguous": {"a": torch.randn(4, 6).T, "b": torch.randn(8)[::2]},
    "a number, nothing, and a name that is not ASCII": {
        "x": torch.tensor(1.5),
        "none": torch.empty(0, 3),
        "größe": torch.ones(1),
    },
    "no tensor": {},
}


@pytest.mark.parametrize("tensors", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("backwards", [False, True])
def test_it_is_what_save_file_writes_byte_for_byte(tmp_path, tensors, backwards):
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "whole", metadata={"format": "pt"})
    items = list(tensors.items())[:: -1 if backwards else 1]
    layout = {name: tensor.to("meta") for name, tensor in items}
    write_shard(tmp_path / "streamed", TensorStream(layout, iter(items)))
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert layout_bytes(layout) == sum(tensor.nbytes for tensor in whole.values())


def test_a_tensor_is_free_before_the_next_but_one_is_made(tmp_path):
    alive = weakref.WeakSet()

    def made():
        for name in "abcdef":
            tensor = torch.ones(3)
            alive.add(tensor.untyped_storage())
            assert len(alive) <= 2
            yield name, tensor

    layout = {name: torch.empty(3, device="meta") for name in "abcdef"}
    write_shard(tmp_path / "shard", TensorStream(layout, made()))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("a", torch.ones(2))], "lacks b"),
        ([("a", torch.ones(3)), ("b", torch.ones(2))], "a is not as the layout says"),
        ([("a", torch.ones(2).half()), ("b", torch.ones(2))], "a is not as the layout says"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "a is not as the layout says"),
        ([("c", torch.ones(2))], "c is not as the layout says"),
    ],
)
def test_a_stream_that_is_not_its_layout_is_refused(tmp_path, items, message):
    layout = {name: torch.empty(2, device="meta") for name in "ab"}
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "shard", TensorStream(layout, items))


def test_a_dtype_that_no_checkpoint_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        write_shard(tmp_path / "s", TensorStream.of({"a": torch.ones(1, dtype=torch.complex64)}))
