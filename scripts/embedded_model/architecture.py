"""The embedded model's shape: the real GPT-OSS configuration, shrunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

NUM_LAYERS = 4
NUM_EXPERTS = 32
WIDTH = 192


def config_fields(num_tokens: int, special_ids: dict[str, int]) -> dict[str, Any]:
    """Every field of ``config.json``, the same ones as openai/gpt-oss-20b's.

    Args:
        num_tokens: of the tokenizer; the vocabulary is padded to a multiple of 64.
        special_ids: ``eos`` and ``pad``.
    """
    kinds = ["sliding_attention", "full_attention"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": special_ids["eos"],
        "experts_per_token": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": WIDTH,
        "layer_types": [kinds[layer % 2] for layer in range(NUM_LAYERS)],
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 6,
        "num_experts_per_tok": 4,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": 2,
        "num_local_experts": NUM_EXPERTS,
        "output_router_logits": False,
        "pad_token_id": special_ids["pad"],
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": -(-num_tokens // 64) * 64,
    }


def build_model(fields: dict[str, Any], device: torch.device) -> GptOssForCausalLM:
    """A stock, dense, bf16 model of this shape with fresh weights, for training.

    The router starts at the width's natural scale rather than at 0.02, so that routing is
    decided by the input from the first step.
    """
    config = GptOssConfig.from_dict({k: v for k, v in fields.items() if k != "quantization_config"})
    config.use_cache = False
    config._attn_implementation = "eager"  # the one that trains attention sinks exactly
    with torch.device(device):
        model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            nn.init.normal_(parameter, std=WIDTH**-0.5)
        elif "down_proj" in name or "o_proj" in name:
            parameter.data /= (2 * NUM_LAYERS) ** 0.5
        if name.endswith("sinks") or name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model.to(torch.bfloat16)
