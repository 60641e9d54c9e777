"""The whole model against transformers' own GPT-OSS, and the laws that training leans on."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.surgery import trainable_names
from nexus_cli.core.train.precision import promote
from nexus_cli.errors import ArtifactError


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 8000, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return load_model(tiny_model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def converted(tiny_converted_dir):
    return load_model(tiny_converted_dir, dtype=torch.float32)


def stock(path, dtype):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    # transformers 5.17 leaves dequantised experts in bf16, whatever dtype is asked for
    return model.float() if dtype == torch.float32 else model


@torch.no_grad()
def test_float32_logits_equal_stock_transformers(tiny, tiny_model_dir, ids):
    ours, theirs = tiny(input_ids=ids), stock(tiny_model_dir, torch.float32)(input_ids=ids)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_is_as_near_to_the_truth_as_stock_transformers(tiny, tiny_model_dir, ids):
    """Stock rounds before it adds a bias and we after, so bits differ; neither is nearer."""
    truth = tiny(input_ids=ids).logits
    ours = load_model(tiny_model_dir, dtype=torch.bfloat16)(input_ids=ids).logits.float()
    theirs = stock(tiny_model_dir, torch.bfloat16)(input_ids=ids).logits.float()
    assert (ours - truth).norm() < 1.2 * (theirs - truth).norm()


@torch.no_grad()
def test_router_logits_are_those_of_stock_transformers(tiny, tiny_model_dir, ids):
    ours = tiny.model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    theirs = stock(tiny_model_dir, torch.float32).model(
        input_ids=ids, use_cache=False, output_router_logits=True
    )
    assert len(ours) == 2
    for mine, other in zip(ours, theirs.router_logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_gradient_to_the_embeddings_equals_stock_transformers(tiny, tiny_model_dir, ids):
    def gradient(model):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.model(
            inputs_embeds=embedded, use_cache=False
        ).last_hidden_state.sin().sum().backward()
        return embedded.grad

    expected = gradient(stock(tiny_model_dir, torch.float32))
    torch.testing.assert_close(gradient(tiny), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_attention_does_not_cross_documents_in_a_packed_sequence(tiny, ids):
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None].expand(2, -1)
    packed = tiny.model(input_ids=ids, position_ids=positions, use_cache=False)
    alone = tiny.model(input_ids=ids[:, 15:], use_cache=False)
    torch.testing.assert_close(packed.last_hidden_state[:, 15:], alone.last_hidden_state)


@torch.no_grad()
def test_without_shared_experts_the_converted_model_is_the_base_bit_for_bit(tiny, converted, ids):
    base = tiny.model(input_ids=ids, use_cache=False).last_hidden_state
    off = converted.model(input_ids=ids, use_cache=False, shared_experts=False).last_hidden_state
    assert torch.equal(off, base)


@torch.no_grad()
def test_the_loss_is_cross_entropy_whatever_the_config_says_of_auxiliary_losses(tiny, ids):
    assert tiny.config.router_aux_loss_coef == 0.9
    out = tiny(input_ids=ids, labels=ids, output_router_logits=True)
    logits = out.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without(converted, ids):
    cached = converted.generate(ids[:1, :20], max_new_tokens=8, do_sample=False, use_cache=True)
    plain = converted.generate(ids[:1, :20], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_two_forward_and_backward_passes_are_bit_equal(converted, ids):
    def run():
        names = trainable_names(converted)
        promote(converted, names)
        hidden = converted.model(input_ids=ids, use_cache=False).last_hidden_state
        parameters = [p for p in converted.parameters() if p.requires_grad]
        return hidden, *torch.autograd.grad(hidden.sin().sum(), parameters)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_only_the_allow_list_trains(converted):
    names = trainable_names(converted, train_router=True)
    promote(converted, names)
    free = [name for name, p in converted.named_parameters() if p.requires_grad]
    assert free == names
    assert all(".shared_expert." in name or ".router." in name for name in names)
    assert len(names) == 2 * (7 + 2)


def test_gates_stay_in_float32_in_a_bfloat16_model(tiny_converted_dir):
    model = load_model(tiny_converted_dir, dtype=torch.bfloat16)
    expert = model.model.layers[0].mlp.shared_expert
    assert expert.output_gate.dtype == torch.float32
    assert expert.down_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.experts.down_proj_blocks.dtype == torch.uint8


def damaged(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return target


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny_model_dir, tmp_path):
    def lose(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        shard = index["weight_map"].pop("model.norm.weight")
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / shard)
        del tensors["model.norm.weight"]
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        path.write_text(json.dumps(index))

    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        load_model(damaged(tiny_model_dir, tmp_path / "m", lose))


def test_a_dequantised_copy_is_refused(tiny_model_dir, tmp_path):
    def forget(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        del config["quantization_config"]
        path.write_text(json.dumps(config))

    with pytest.raises(ArtifactError, match="MXFP4"):
        load_model(damaged(tiny_model_dir, tmp_path / "m", forget))
