"""``nexus validate --precomputed-teacher``: is a store whole, and does its teacher agree?"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.distill.store_teacher import stored_batch
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.errors import ArtifactError, CheckFailed, ConfigError
from nexus_cli.io import console
from nexus_cli.io.location import locate
from nexus_cli.io.report import to_json, write_report
from nexus_cli.io.teacher_store.quantise import RATIO_STEPS
from nexus_cli.io.teacher_store.reader import TeacherStore, open_store
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.inputs import Artifact, model_input
from nexus_cli.pipeline.out_of_memory import memory_on
from nexus_cli.pipeline.teacher_rows import Question, ask
from nexus_cli.pipeline.validate_checks import Check
from nexus_cli.pipeline.world import open_world

# Shape letters in this file: R rows, K kept entries, M held positions.

log = logging.getLogger(__name__)

FORMAT = "nexus.store_report/1"
FILENAME = "store_report.json"
MAX_SUM_ERROR = {"codes": 1e-6, "float32": 3e-5}  # made to sum to one, and as the teacher gave it
MAX_NLL_ERROR = 1e-3  # nats
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ROWS_AT_ONCE = 32
_NLL_STEPS = 64  # within a factor of two: six bits of mantissa
_OUT_OF_MEMORY = "use a smaller --set store_rows, or name another --device"


def run(
    config: ValidateConfig, workspace: Workspace, *, as_json: bool = False, dry_run: bool = False
) -> None:
    """Read every byte of the store, ask its teacher again about some rows, and report.

    Raises:
        CheckFailed: a check failed; the report is written first.
        ArtifactError: the store cannot be opened, or the model is not its teacher.
        ConfigError: its teacher is not where it was.
    """
    assert config.store is not None
    store = open_store(locate(config.store))
    teacher = _teacher(config, store) if config.store_rows else None
    if dry_run:
        _describe(config, store, teacher)
        return
    world = open_world(config.runtime.device)
    if world.size > 1:
        raise ConfigError("a store is checked by one process", hint="run it without a launcher")
    damaged = store.verify()
    if damaged:
        log.warning("shards that differ from the manifest: %s", ", ".join(damaged))
    checks = [Check("shards whose hash is not the manifest's", len(damaged), 0, not damaged)]
    figures: dict[str, Any] = {}
    if not damaged:
        checks += _contents(store, figures)
        if teacher is not None:
            with memory_on(world.device, _OUT_OF_MEMORY):
                checks += _live(config, store, teacher, world, figures)
    path = config.output or workspace.stage_dir("validate") / FILENAME
    report = _report(store, teacher, checks, figures)
    write_report(path, report)
    if as_json:
        console.result(to_json(report).rstrip())
    else:
        _show(report)
    if failed := [check for check in checks if not check.passed]:
        what = "; ".join(f"{check.check} is {check.value:.3g}" for check in failed)
        raise CheckFailed(f"validation failed: {what}", hint=f"the report is {path}")


def _teacher(config: ValidateConfig, store: TeacherStore) -> Artifact:
    """The model that spoke, where the store says it was or where the user says it is."""
    name = config.checkpoint or store.plan.teacher_name
    try:
        teacher = model_input(name)
    except ConfigError as error:
        raise ConfigError(
            f"the teacher {name} is not there",
            hint="name it with --model, or leave it out with --set store_rows=0",
        ) from error
    if teacher.digest != store.plan.teacher:
        raise ArtifactError(
            f"{teacher.path} is not the teacher that {store.folder.shown} was made with",
            hint="name that one with --model, or leave it out with --set store_rows=0",
        )
    return teacher


def _contents(store: TeacherStore, figures: dict[str, Any]) -> list[Check]:
    """Probabilities, nll and numbers of entries of every row."""
    manifest, plan = store.manifest, store.plan
    worst, nll_sum = 0.0, 0.0
    counts_K = np.zeros(plan.top_k + 1, np.int64)
    starts = range(0, len(store), _ROWS_AT_ONCE)
    for start in console.progress(list(starts), "rows read"):
        kept = store.rows(range(start, min(start + _ROWS_AT_ONCE, len(store)))).kept
        if not len(kept):
            continue
        mass_M = np.exp(kept.logprobs_MK.astype(np.float64)).sum(1)
        mass_M += np.exp(kept.tails_MT[:, 0].astype(np.float64))
        worst = max(worst, float(np.abs(mass_M - 1).max()))
        nll_sum += float(kept.nll_M.sum(dtype=np.float64))
        counts_K += np.bincount(np.isfinite(kept.logprobs_MK).sum(1), minlength=plan.top_k + 1)
    held = int(counts_K.sum())
    if not held:
        return [Check("positions that hold a distribution", 0, 1, False)]
    figures["entries"] = _distribution(counts_K)
    figures["teacher_perplexity"] = math.exp(nll_sum / held)
    nll = manifest.teacher_nll or 0.0
    difference, limit = nll_sum / held - nll, _nll_limit(nll, held)
    return [
        _below(
            "largest difference of a sum of probabilities from 1", worst, MAX_SUM_ERROR[plan.values]
        ),
        _below("mean nll read less the one written, nats", difference, limit),
    ]


def _live(
    config: ValidateConfig,
    store: TeacherStore,
    teacher: Artifact,
    world: World,
    figures: dict[str, Any],
) -> list[Check]:
    """Ask the teacher again about rows spread over the store."""
    plan = store.plan
    model = load_model(
        teacher.path,
        device=world.device,
        dtype=getattr(torch, plan.dtype),
        experts_backend=config.runtime.experts_backend,
    )
    sample_R = np.unique(np.linspace(0, len(store) - 1, config.store_rows).round().astype(np.int64))
    question = Question(plan.top_k, plan.top_p, plan.min_k, experts=plan.experts[0] > 0)
    parts = [
        _compare(model, store, sample_R[start : start + plan.batch_size], question)
        for start in console.progress(
            list(range(0, len(sample_R), plan.batch_size)), "teacher batches"
        )
    ]
    sums = np.sum(parts, axis=0)
    held = max(sums[0], 1)
    figures["live"] = {
        "rows": len(sample_R),
        "targets": int(sums[0]),
        "same_likeliest_token": sums[3] / held,
        "routing_agreement": sums[4] / held if plan.experts[0] else None,
    }
    stored, live = sums[1] / held, sums[2] / held
    name = "mean nll of the live teacher less the stored one, nats"
    return [_below(name, live - stored, _nll_limit(stored, held))]


def _compare(
    model: NexusGptOssForCausalLM,
    store: TeacherStore,
    index_R: NDArray[np.int64],
    question: Question,
) -> list[float]:
    """Sums: positions, nll stored and live, same likeliest tokens, share of same experts."""
    stored = store.rows(index_R).kept
    answer = ask(model, stored_batch(store, index_R), question)
    answer.wait()
    live = answer.rows().kept
    same = float((stored.ids_MK[:, 0] == live.ids_MK[:, 0]).sum())
    routed = 0.0
    if stored.experts_MLA is not None and live.experts_MLA is not None:
        both = stored.experts_MLA[..., :, None] == live.experts_MLA[..., None, :]
        routed = float(both.any(-1).mean((1, 2)).sum())
    return [float(len(stored)), float(stored.nll_M.sum()), float(live.nll_M.sum()), same, routed]


def _nll_limit(nll: float, held: float) -> float:
    """What a difference of means may be, with three deviations of what the codes' rounding makes.

    A token that is kept has its code's step, another one that of its nll.
    """
    step = max(1 / RATIO_STEPS, nll / _NLL_STEPS)
    return MAX_NLL_ERROR + 3 * step / math.sqrt(12 * held)


def _below(name: str, value: float, limit: float) -> Check:
    return Check(name, value, limit, bool(abs(value) <= limit))


def _distribution(counts_K: NDArray[np.int64]) -> dict[str, Any]:
    """Mean, quantiles and counts of the number of kept entries."""
    held = counts_K.sum()
    places = np.searchsorted(np.cumsum(counts_K), [max(1, math.ceil(q * held)) for q in QUANTILES])
    return {
        "mean": float((counts_K * np.arange(len(counts_K))).sum() / held),
        "quantiles": dict(zip(map(str, QUANTILES), map(int, places), strict=True)),
        "at_most": float(counts_K[-1] / held),
    }


def _report(
    store: TeacherStore, teacher: Artifact | None, checks: list[Check], figures: Mapping[str, Any]
) -> dict[str, Any]:
    manifest, plan = store.manifest, store.plan
    tokens = manifest.num_rows * plan.seq_len
    return {
        "format": FORMAT,
        "store": {
            "path": store.folder.shown,
            "digest": manifest.digest,
            "ended_early": manifest.ended_early,
            "plan": plan.model_dump(mode="json"),
        },
        "teacher": None if teacher is None else str(teacher.path),
        "checks": [asdict(check) for check in checks],
        "figures": {
            "rows": manifest.num_rows,
            "tokens": tokens,
            "targets": manifest.num_targets,
            "bytes": manifest.num_bytes,
            "bytes_per_token": manifest.num_bytes / max(tokens, 1),
            "bytes_per_target": manifest.num_bytes / max(manifest.num_targets, 1),
            **figures,
        },
    }


def _show(report: Mapping[str, Any]) -> None:
    path, figures = report["store"]["path"], report["figures"]
    console.result_table(
        path,
        ("check", "value", "threshold", "passed"),
        [
            (
                c["check"],
                f"{c['value']:.3g}",
                f"{c['threshold']:.3g}",
                "yes" if c["passed"] else "NO",
            )
            for c in report["checks"]
        ],
    )
    rows: list[tuple[str, object]] = [
        ("sequences", f"{figures['rows']:,}"),
        ("targets", f"{figures['targets']:,} of {figures['tokens']:,} tokens"),
        (
            "size",
            f"{figures['bytes'] / 2**20:,.1f} MiB, {figures['bytes_per_token']:.1f} bytes a token, "
            f"{figures['bytes_per_target']:.1f} a target",
        ),
    ]
    if entries := figures.get("entries"):
        spread = " / ".join(str(value) for value in entries["quantiles"].values())
        rows += [
            ("entries kept a target", f"{entries['mean']:.1f}; quartiles {spread}"),
            ("teacher perplexity", f"{figures['teacher_perplexity']:.3f}"),
        ]
    if live := figures.get("live"):
        said = f"{live['same_likeliest_token']:.2%} of {live['targets']:,} targets"
        rows.append(("live teacher, same likeliest token", said))
        if live["routing_agreement"] is not None:
            rows.append(("live teacher, same experts", f"{live['routing_agreement']:.2%}"))
    console.result_table("what it holds", ("what", "value"), rows)


def _describe(config: ValidateConfig, store: TeacherStore, teacher: Artifact | None) -> None:
    console.result_table(
        "nexus validate would check",
        ("what", "value"),
        [
            ("teacher store", store.folder.shown),
            ("bytes to read", f"{store.manifest.num_bytes:,}"),
            ("sequences", f"{len(store):,}"),
            ("teacher", "not asked" if teacher is None else teacher.path),
            ("asked again about", f"{min(config.store_rows, len(store)):,} sequences"),
        ],
    )
