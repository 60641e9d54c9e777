"""Load a GPT-OSS model, original or converted, with its experts packed as they are on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine
from nexus_cli.core.model.gpt_oss.engine.policy import Backend, kernels_run_on, shape_refused
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import (
    NexusGptOssConfig,
    NexusGptOssForCausalLM,
)
from nexus_cli.core.model.gpt_oss.streaming import fits, load
from nexus_cli.errors import ArtifactError, ConfigError
from nexus_cli.io import model_dir, tensor_files
from nexus_cli.io.tensor_files import Tensor as Stored


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
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    experts_backend: Backend = "auto",
) -> NexusGptOssForCausalLM:
    """The model in evaluation mode, every parameter frozen.

    The weights are streamed to a GPU, and mapped on the CPU: the host holds no copy of them. In
    bfloat16 on a CUDA device its layers run through the engine; everywhere else as plain PyTorch.

    Args:
        path: a GPT-OSS folder, a converted one, or a training checkpoint.
        device: where the weights go.
        dtype: of everything but the packed experts (uint8) and the gates (float32); float32 or
            bfloat16.
        experts_backend: how the engine multiplies with packed experts.

    Raises:
        ConfigError: a backend of the engine is asked for where the engine does not run, or the
            model's shape is none that its kernels hold.
        ArtifactError: weights are missing, unknown, damaged or of another shape.
    """
    device = torch.device(device)
    fast = runs_engine(device, dtype) and kernels_run_on(device)
    if not fast and experts_backend not in ("auto", "torch"):
        raise ConfigError(
            f"the experts' backend {experts_backend} runs in bfloat16 on an NVIDIA GPU from Ampere "
            "on with triton installed, not in "
            f"{str(dtype).removeprefix('torch.')} on {device}",
            hint="leave out --experts-backend, or use --device cuda",
        )
    config = load_config(path)
    if fast and (refused := shape_refused(config)) is not None:
        raise ConfigError(
            f"{path} has {refused}: the engine cannot run it on {device}",
            hint="--set dtype=float32 runs the plain model there, slowly; so does --device cpu",
        )
    stored = tensor_files.tensors(path)
    model = _without_weights(config, path, dtype)
    wanted = dict(model.named_parameters())
    absent = wanted.keys() - stored.keys()
    _check(path, wanted, stored, absent - _tied(model, stored.keys()))
    present = {name: tensor for name, tensor in wanted.items() if name not in absent}
    for name, tensor in load(present, stored, device).items():
        _replace(model, name, tensor)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    # Made again rather than read: its frequencies are in no file.
    model.model.rotary_emb = GptOssRotaryEmbedding(config=model.config).to(device)
    model.requires_grad_(False)
    model.eval()
    model.generation_config = _generation_config(path)
    if fast:
        attach_engine(model, experts_backend=experts_backend)
    return model


def runs_engine(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the layers of a model that is loaded so run through the engine."""
    return device.type == "cuda" and dtype == torch.bfloat16


def _without_weights(
    config: NexusGptOssConfig, path: Path, dtype: torch.dtype
) -> NexusGptOssForCausalLM:
    """The model on the meta device: shapes and dtypes alone."""
    config.dtype = dtype
    config.name_or_path = str(path)
    config._attn_implementation = "eager"
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), init.no_init_weights(), init.no_tie_weights():
            return NexusGptOssForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)


def _tied(model: NexusGptOssForCausalLM, stored: Collection[str]) -> set[str]:
    """Parameters that may be absent, because the one that they are tied to is there."""
    pairs = [pair for tied in model.all_tied_weights_keys.items() for pair in (tied, tied[::-1])]
    return {one for one, other in pairs if other in stored}


def _check(
    path: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, Stored], missing: Iterable[str]
) -> None:
    held: set[str] = set()
    later: set[str] = set()
    for shard in {tensor.shard for tensor in stored.values()}:
        keys = model_dir.read_header(shard).keys() - {"__metadata__"}
        held |= keys
        # Stock transformers takes the last file that holds a key, whatever the index says.
        later |= {key for key in keys & stored.keys() if shard.name > stored[key].shard.name}
    found = {
        "missing_keys": missing,
        "unexpected_keys": (held | stored.keys()) - wanted.keys(),
        "mismatched_keys": [
            name for name in wanted.keys() & stored.keys() if not fits(wanted[name], stored[name])
        ],
        "keys_in_a_later_shard_too": later,
    }
    if wrong := {kind: sorted(keys)[:3] for kind, keys in found.items() if keys}:
        raise ArtifactError(f"{path}: the weights do not fit the config: {wrong}")


def _replace(model: torch.nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))


def _generation_config(path: Path) -> GenerationConfig:
    """What ``generate`` does by default: of its own file, or of what the config says about it."""
    own = (path / "generation_config.json").is_file()
    source = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    read: Any = GenerationConfig.from_pretrained
    config: GenerationConfig = read(path, local_files_only=True, **source)
    return config


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its chat template."""
    if not (path / "tokenizer.json").is_file():
        raise ArtifactError(f"{path} has no tokenizer.json", hint="download the model's tokenizer")
    # AutoTokenizer would read config.json first, whose type it does not know.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    loaded: PreTrainedTokenizerFast = tokenizer
    return loaded
