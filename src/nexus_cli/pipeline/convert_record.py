"""``conversion_metadata.json``: what a converted model was made from, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.io import manifest, model_dir
from nexus_cli.io.base_identity import base_record
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.pca_stats import PcaStats
from nexus_cli.pipeline.convert_choice import Choice, Place
from nexus_cli.pipeline.convert_plan import Plan, width_of
from nexus_cli.pipeline.inputs import Artifact


def conversion_record(
    config: ConvertConfig, model: Artifact, shape: ModelShape, choice: Choice | None, plan: Plan
) -> dict[str, Any]:
    """The file's content; ``docs/model.md`` says what each entry means."""
    return {
        "format": "nexus.conversion/1",
        "base": base_record(model.path, model.digest),
        "init_strategy": config.init_strategy,
        "start": config.start,
        "output_scale": config.output_scale if config.start == "scaled" else None,
        "seed": config.seed,
        "experts": choice.places if choice is not None else None,
        "router_statistics": _statistics(choice) if choice is not None else None,
        "shared_parameters": plan.parameters,
        "num_layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "shared_expert_intermediate_size": width_of(config, shape),
        "architecture": {
            "base_model_type": shape.model_type,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "experts_per_token": shape.top_k,
            "num_shared_experts": config.num_shared_experts,
            "vocab_size": shape.vocab_size,
        },
        "quantization": {
            # The base's own words: they leave config.json, or its loader would replace ours.
            "base": model_dir.read_config(model.path).get("quantization_config"),
            "shared_experts": "bfloat16",
            "output_gates": "float32",
        },
        "validation": {
            # The first two are checks, which passed: a conversion that fails one leaves no folder.
            "packed_experts_complete": True,
            "shared_experts_finite": True,
            # Not checked: a property of the start, which docs/model.md derives.
            "equals_base_at_start": config.start != "scaled" or not config.num_shared_experts,
        },
        "environment": manifest.environment(),
        "converted": manifest.now().isoformat(timespec="seconds"),
    }


def _statistics(choice: Choice) -> dict[str, Any]:
    """Which statistics chose the experts, and what share of the routing those have."""
    shares = _shares(choice.stats, choice.places)
    return {
        "path": str(choice.source.path),
        "sha256": choice.source.digest,
        "method": choice.stats.method,
        "tokens": choice.stats.tokens,
        "top_k": choice.stats.top_k,
        "model_fingerprint": choice.stats.model_fingerprint,
        "usage_of_experts": {
            "mean": sum(shares) / len(shares),
            "least": min(shares),
            "most": max(shares),
        },
    }


def _shares(stats: PcaStats, places: Sequence[Sequence[Place]]) -> list[float]:
    """For each layer, what part of their own layers' usage its experts have."""
    whole = [sum(layer) or 1.0 for layer in stats.usage]
    return [sum(stats.usage[at][e] / whole[at] for at, e in chosen) for chosen in places]
