"""The model classes, for use from Python.

Importing this module lets the Auto classes of transformers load a model that Nexus wrote
without ``trust_remote_code``.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from nexus_cli.core.model.gpt_oss.loading import load_model, load_tokenizer
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import (
    GptOssSharedExpert,
    NexusGptOssConfig,
    NexusGptOssForCausalLM,
    NexusGptOssModel,
    dequantize_mxfp4,
)

__all__ = [
    "GptOssSharedExpert",
    "NexusGptOssConfig",
    "NexusGptOssForCausalLM",
    "NexusGptOssModel",
    "dequantize_mxfp4",
    "load_model",
    "load_tokenizer",
]

AutoConfig.register(NexusGptOssConfig.model_type, NexusGptOssConfig, exist_ok=True)
AutoModelForCausalLM.register(NexusGptOssConfig, NexusGptOssForCausalLM, exist_ok=True)
