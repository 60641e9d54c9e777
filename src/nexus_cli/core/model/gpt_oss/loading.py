"""Load a GPT-OSS model, original or converted, with its experts packed as they are on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import (
    NexusGptOssConfig,
    NexusGptOssForCausalLM,
)
from nexus_cli.errors import ArtifactError
from nexus_cli.io import model_dir


def load_config(path: Path) -> NexusGptOssConfig:
    """The config of a base or converted model, as ours.

    Raises:
        ArtifactError: not of the GPT-OSS family, or its experts are not packed as MXFP4.
    """
    shape = model_dir.read_shape(path)
    values: dict[str, Any] = model_dir.read_config(path)
    quantization = values.pop("quantization_config", None)
    if shape.model_type == model_dir.BASE_TYPE:
        if (quantization or {}).get("quant_method") != "mxfp4":
            raise ArtifactError(
                f"{path} does not hold MXFP4 experts",
                hint="use the original checkpoint, not a dequantised copy of it",
            )
        values["num_shared_experts"] = 0
    for key in ("model_type", "auto_map", "architectures"):
        values.pop(key, None)
    return NexusGptOssConfig(**values)


def load_model(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> NexusGptOssForCausalLM:
    """The model in evaluation mode, every parameter frozen.

    Args:
        path: a GPT-OSS folder, a converted one, or a training checkpoint.
        device: where the weights go.
        dtype: of everything but the packed experts (uint8) and the gates (float32).

    Raises:
        ArtifactError: weights are missing, unknown or of another shape.
    """
    config = load_config(path)
    model_dir.weight_map(path)
    disable_progress_bar()
    load: Any = NexusGptOssForCausalLM.from_pretrained  # its return type depends on a flag
    model, found = load(
        path,
        config=config,
        dtype=dtype,
        device_map={"": torch.device(device)},
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}:
        first = {kind: keys[:3] for kind, keys in wrong.items()}
        raise ArtifactError(f"{path}: the weights do not fit the config: {first}")
    model.requires_grad_(False)
    model.eval()
    loaded: NexusGptOssForCausalLM = model
    return loaded


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its chat template."""
    if not (path / "tokenizer.json").is_file():
        raise ArtifactError(f"{path} has no tokenizer.json", hint="download the model's tokenizer")
    # AutoTokenizer would read config.json first, whose type it does not know.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    loaded: PreTrainedTokenizerFast = tokenizer
    return loaded
