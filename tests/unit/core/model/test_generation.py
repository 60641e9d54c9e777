"""What transformers' ``generate`` leans on, by whatever name its version gives the cache."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache
from transformers.models.gpt_oss import modeling_gpt_oss as stock

from nexus_cli.core.model.gpt_oss import modeling_nexus_gpt_oss as ours
from nexus_cli.core.model.gpt_oss.loading import load_model


@pytest.fixture(scope="module")
def model(tiny_converted_dir):
    return load_model(tiny_converted_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 8000, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["GptOssModel", "GptOssForCausalLM"])
def test_whatever_stock_takes_by_name_ours_takes_by_that_name(name):
    """transformers 5.24 renamed an argument, and what it then passed went into ``**kwargs``."""
    theirs = inspect.signature(getattr(stock, name).forward).parameters
    mine = inspect.signature(getattr(ours, f"Nexus{name}").forward).parameters
    handed_on = {"output_router_logits"}  # to the model beneath
    assert theirs.keys() - mine.keys() <= handed_on


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_continues_the_sequence_by_either_of_its_names(model, ids, name):
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :30], **{name: cache})
    continued = model(input_ids=ids[:, 30:], **{name: cache}).logits
    whole = model(input_ids=ids, use_cache=False).logits[:, 30:]
    torch.testing.assert_close(continued, whole)


@torch.no_grad()
def test_the_output_holds_the_cache_under_the_name_of_this_transformers(model, ids):
    cache = DynamicCache(config=model.config)
    assert getattr(model(input_ids=ids, cache=cache), ours.CACHE) is cache
    assert cache.get_seq_length() == 40


def test_two_caches_are_refused(model, ids):
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="either cache or past_key_values"):
        model(input_ids=ids, cache=cache, past_key_values=cache)


@torch.no_grad()
def test_a_prompt_padded_on_the_left_generates_what_it_does_alone(model, ids):
    short, options = ids[:, :9], {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    alone = model.generate(short, **options)[0, 9:]
    padding = torch.full((1, 31), model.config.pad_token_id)
    batch = torch.cat((ids, torch.cat((padding, short), dim=1)))
    mask = torch.ones_like(batch)
    mask[1, :31] = 0
    padded = model.generate(batch, attention_mask=mask, **options)[1, 40:]
    assert torch.equal(padded, alone)
