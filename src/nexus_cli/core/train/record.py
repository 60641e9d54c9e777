"""What a step measured, as one metrics record and one log line."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_cli.core.distill.losses import RouterDrift
from nexus_cli.core.distributed import World

GIB = 2**30


def reduce_sums(sums: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Add named sums up over the ranks, in one exchange; the results are on the CPU.

    The order of the names is fixed, so that the ranks add like to like.
    """
    names = sorted(sums)
    flat = torch.cat([sums[name].double().reshape(-1) for name in names])
    sizes = [sums[name].numel() for name in names]
    parts = torch.split(world.sum_(flat).cpu(), sizes)
    return {name: part.reshape(sums[name].shape) for name, part in zip(names, parts, strict=True)}


def add_sums(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add ``more`` onto ``total``, in place."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def loss_metrics(
    sums: Mapping[str, Tensor], sources: Sequence[str], num_layers: int
) -> dict[str, Any]:
    """Means over tokens from a step's reduced sums, under their names in ``metrics.jsonl``."""
    metrics: dict[str, Any] = {"loss": float(sums["loss"])}
    metrics |= _means(sums, slice(None))
    if "router_kl" in sums:
        metrics["router_kl"] = _ratio(sums["router_kl"], sums["router_kl_count"])
    metrics |= {name: float(sums[name]) for name in ("load_balance", "router_z") if name in sums}
    if "agreement" in sums:
        count = sums["kd_count_K"].sum()
        metrics["agreement"] = _ratio(sums["agreement"], count)
        metrics["teacher_entropy"] = _ratio(sums["teacher_entropy"], count)
    if "drift" in sums:
        metrics |= RouterDrift(sums["drift"], num_layers).metrics()
    if len(sources) > 1:
        each = {name: _means(sums, slice(k, k + 1)) for k, name in enumerate(sources)}
        metrics["sources"] = {name: means for name, means in each.items() if means}
    return {name: value for name, value in metrics.items() if value is not None}


def _means(sums: Mapping[str, Tensor], which: slice) -> dict[str, float]:
    means = {
        name: _ratio(sums[f"{name}_K"][which].sum(), sums[f"{name}_count_K"][which].sum())
        for name in ("ce", "kd")
    }
    return {name: value for name, value in means.items() if value is not None}


def _ratio(total: Tensor, count: Tensor) -> float | None:
    return float(total / count) if float(count) > 0 else None


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def gate_mean_abs(masters: Mapping[str, Tensor]) -> float:
    """Mean of ``|g|`` over the layers: how open the shared experts' gates are."""
    gates = [gate for name, gate in masters.items() if name.endswith("output_gate")]
    return float(torch.cat([gate.detach().flatten() for gate in gates]).abs().mean())


def log_line(record: Mapping[str, Any], max_steps: int) -> str:
    """One line a reader can follow: ``step 20/100 loss 2.31 ce ... tok/s``."""
    shown = [f"step {record['step']}/{max_steps}"]
    for name, style in LINE:
        if (value := record.get(name)) is not None:
            shown.append(f"{name} {value:{style}}")
    if record.get("ce") is not None:
        shown.append(f"ppl {math.exp(min(record['ce'], 50.0)):.2f}")
    if record.get("tokens_per_second") is not None:
        shown.append(f"tok/s {record['tokens_per_second']:,.0f}")
    return "  ".join(shown)


LINE = (  # with z: what rounds to zero has no sign
    ("loss", "z.4f"),
    ("ce", "z.4f"),
    ("kd", "z.5f"),
    ("router_kl", "z.5f"),
    ("grad_norm", ".3g"),
    ("learning_rate", ".3g"),
    ("gate_mean_abs", ".3g"),
)
