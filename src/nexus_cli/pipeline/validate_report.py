"""The report of ``nexus validate``: as JSON for machines, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.data.document import TokenizedDocument
from nexus_cli.core.distributed import World
from nexus_cli.core.evaluate.compare import TextResult
from nexus_cli.core.model.gpt_oss.export import NEXUS_SHARD
from nexus_cli.io import console, manifest, tensor_files
from nexus_cli.io.report import FORMAT
from nexus_cli.pipeline.validate_checks import Check
from nexus_cli.pipeline.validate_models import Choice

BOS = (
    "as in training: plain text follows the start-of-text token, chats the template; "
    "the first token is never scored"
)


def build(
    config: ValidateConfig,
    choice: Choice,
    checks: Sequence[Check],
    results: Mapping[str, tuple[TextResult, Mapping[str, Any]]],
    world: World,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The report, as ``nexus.report/1`` has it."""
    tokens = {name: result.tokens for name, (result, _) in results.items()}
    return {
        "format": FORMAT,
        "model": {"path": str(choice.model.path), "fingerprint": choice.model.digest},
        "baseline": {
            "kind": choice.kind,
            "path": None if choice.baseline is None else str(choice.baseline.path),
            "fingerprint": None if choice.baseline is None else choice.baseline.digest,
            "reason": choice.reason,
        },
        "checks": [asdict(check) for check in checks],
        "settings": {
            "window": config.window,
            "stride": config.stride,
            "bos": BOS,
            "score_end": config.score_end,
            "dtype": str(dtype).removeprefix("torch."),
            "device": world.device.type,
            "ranks": world.size,
            "scored_tokens": tokens,
            "interval_level": config.level,
            "resamples": config.resamples,
            "seed": config.seed,
            "environment": manifest.environment(),
        },
        "sets": {name: _set(*found) for name, found in results.items()},
        "summary": _summary(choice, {name: result for name, (result, _) in results.items()}),
    }


def _set(result: TextResult, text: Mapping[str, Any]) -> dict[str, Any]:
    return {**asdict(result), "text": dict(text)}


def _summary(choice: Choice, results: Mapping[str, TextResult]) -> dict[str, Any]:
    """The figures that a reader wants first; ``null`` for what was not measured."""
    found = tensor_files.tensors(choice.model.path)
    trained = {n: t for n, t in found.items() if t.shard.name == NEXUS_SHARD}
    domain, general = results.get("domain"), results.get("general")
    summary: dict[str, Any] = {
        "domain_perplexity": _perplexity(domain),
        "general_perplexity": _perplexity(general),
        "kl_to_base": None if general is None else general.kl,
        "trained_parameters": tensor_files.num_parameters(trained),
        "total_parameters": tensor_files.num_parameters(found),
    }
    if domain is not None and domain.value_perplexity is not None:
        summary["argument_value_perplexity"] = asdict(domain.value_perplexity)
    return summary


def _perplexity(result: TextResult | None) -> dict[str, float] | None:
    return None if result is None else asdict(result.perplexity)


def bytes_of(documents: Sequence[TokenizedDocument]) -> NDArray[np.int64]:
    """UTF-8 bytes of each document's targets."""
    return np.array([document.num_bytes for document in documents], dtype=np.int64)


def without_end(document: TokenizedDocument) -> TokenizedDocument:
    """The document without its last token: a control token, so no byte is lost."""
    return replace(
        document,
        input_ids=document.input_ids[:-1],
        loss_mask=document.loss_mask[:-1],
        value_mask=document.value_mask[:-1],
    )


def show(report: Mapping[str, Any]) -> None:
    """Print the report as tables."""
    settings = report["settings"]
    checks = [
        (c["check"], _number(c["value"]), _number(c["threshold"]), "yes" if c["passed"] else "NO")
        for c in report["checks"]
    ]
    console.result_table(
        f"{report['model']['path']} against {report['baseline']['reason']}",
        ("check", "value", "threshold", "passed"),
        checks,
    )
    sets = report["sets"]
    if sets:
        rows = [row for name, found in sets.items() for row in _rows(name, found)]
        window = f"window {settings['window']}, stride {settings['stride']}, {settings['dtype']}"
        title = f"Held-out text ({window}; {settings['bos']})"
        console.result_table(title, ("measure", "base", "model", "difference"), rows)
    trained, total = (report["summary"][f"{k}_parameters"] for k in ("trained", "total"))
    console.result(f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})")


def _rows(name: str, found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    base, model = found["perplexity"]["base"], found["perplexity"]["model"]
    delta = found["delta_nll"]
    interval = "" if delta["low"] is None else f" ({delta['low']:+.4f} .. {delta['high']:+.4f})"
    counts = f"{found['tokens']:,} tokens in {found['documents']:,} documents"
    rows = [
        (f"{name}: {counts}", "", "", ""),
        ("  perplexity", _number(base), _number(model), _percent(base, model)),
        ("  loss, nats a token", "", "", f"{delta['mean']:+.4f}{interval}"),
    ]
    if found["bits_per_byte"]:
        bits = found["bits_per_byte"]
        rows.append(("  bits a byte", _number(bits["base"]), _number(bits["model"]), ""))
    if found["value_perplexity"]:
        value = found["value_perplexity"]
        cells = (_number(value["base"]), _number(value["model"]), _percent(**value))
        rows.append((f"  perplexity of {found['value_tokens']:,} argument-value tokens", *cells))
    return [
        *rows,
        ("  KL(base || model), nats a token", "", "", _number(found["kl"])),
        ("  same most likely token", "", "", f"{found['top1_agreement']:.2%}"),
        ("  routed experts in common", "", "", f"{found['router_agreement']:.2%}"),
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"


def _percent(base: float | None, model: float | None) -> str:
    return "" if base is None or model is None else f"{model / base - 1:+.2%}"
