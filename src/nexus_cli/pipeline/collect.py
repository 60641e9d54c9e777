"""Stage ``collect``: a model and text in, statistics of its routers out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_cli.config.collect import CollectConfig
from nexus_cli.core.router.moments import RouterMoments
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.io import console, model_dir, router_probs
from nexus_cli.io.atomic import write_atomic
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.collect_dry_run import describe
from nexus_cli.pipeline.collect_partial import PartialStatistics
from nexus_cli.pipeline.collect_plan import CollectPlan, make_plan
from nexus_cli.pipeline.collect_run import CollectJob, run_batches
from nexus_cli.pipeline.disk import room_for
from nexus_cli.pipeline.inputs import model_input
from nexus_cli.pipeline.out_of_memory import memory_on
from nexus_cli.pipeline.router_statistics import save_moments
from nexus_cli.pipeline.stage import StageOutput, stage
from nexus_cli.pipeline.world import open_world

log = logging.getLogger(__name__)

REPORT_FORMAT = "nexus.collection/1"
OUT_OF_MEMORY = "use a smaller batch, such as --set runtime.batch_size=8"


def run(
    config: CollectConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Write ``router_probs.npz`` and ``collection_report.json``.

    The main rank chooses the text; all ranks run it. A killed run continues where its last
    partial statistics were saved, on any number of ranks.

    Raises:
        NexusError: the model, the text or the device is not there, or damaged.
        ArtifactError: a router of the model produces NaN.
    """
    console.configure()
    model = model_input(config.model)
    shape = model_dir.read_shape(model.path)
    if dry_run:
        describe(config, workspace, model, shape)
        return
    world = open_world(config.runtime.device)
    with stage(
        "collect",
        config,
        workspace,
        main="router_probs.npz",
        inputs={"model": model},
        output=config.output,
        world=world,
        force=force,
    ) as out:
        partial = None if out is None else _collect(CollectJob(config, model, shape, world), out)
    if partial is not None and world.is_main:
        partial.discard()  # only now are the statistics committed


def _collect(job: CollectJob, out: StageOutput) -> PartialStatistics:
    world = job.world
    plan = world.from_main(lambda: make_plan(job.config, job.model, job.shape))
    if job.shape.num_shared_experts:
        log.info("%s has a shared expert; it runs as it is, shared expert included", job.model.path)
    folder = out.main.with_name(f".{out.main.name}.partial")
    partial = PartialStatistics(folder, plan.digest, world)
    started = time.monotonic()
    with memory_on(world.device, OUT_OF_MEMORY):
        own, new_tokens = run_batches(job, plan, partial)
    seconds = time.monotonic() - started
    parts = world.gather_objects((own.moments, new_tokens))
    if world.is_main:
        moments = parts[0][0]
        for other, _ in parts[1:]:
            moments = moments + other
        run_now = sum(tokens for _, tokens in parts)
        _write(job, plan, moments, _report(job, plan, moments, run_now, seconds), out)
        _tell(out.main, plan, run_now, seconds)
    return partial


def _write(
    job: CollectJob,
    plan: CollectPlan,
    moments: RouterMoments,
    report: Mapping[str, Any],
    out: StageOutput,
) -> None:
    beside = out.main.with_name("collection_report.json")
    with room_for(out.main):
        save_moments(out.main, moments, _metadata(job, plan))
        write_atomic(beside, json.dumps(report, indent=1).encode())
    out.add(out.main, format=router_probs.FORMAT)
    out.add(beside, format=REPORT_FORMAT)


def _metadata(job: CollectJob, plan: CollectPlan) -> dict[str, Any]:
    """Only what the same command writes again: equal runs give equal files."""
    return {
        "model": str(job.model.path),
        "model_fingerprint": job.model.digest,
        "num_shared_experts": job.shape.num_shared_experts,
        "plan": plan.digest,
        "text": plan.text_digest,
        "sequences": len(plan.sequences),
    }


def _report(
    job: CollectJob, plan: CollectPlan, moments: RouterMoments, run_now: int, seconds: float
) -> dict[str, Any]:
    return {
        "format": REPORT_FORMAT,
        "model": str(job.model.path),
        "model_fingerprint": job.model.digest,
        "shared_experts": job.shape.num_shared_experts,
        **plan.report,
        "tokens_counted": moments.body.tokens,
        "first_tokens_counted": moments.first.tokens,
        "batches": len(plan.batches),
        "ranks": job.world.size,
        "device": str(job.world.device),
        "dtype": str(frozen_dtype(job.config.dtype, job.world.device)).removeprefix("torch."),
        "seconds": seconds,
        "tokens_per_second": run_now / max(seconds, 1e-9),
    }


def _tell(path: Path, plan: CollectPlan, run_now: int, seconds: float) -> None:
    chosen = plan.report["coverage"]["selected"]
    console.result(
        f"{path}: {chosen['tokens']:,} tokens of {chosen['documents']:,} texts; they hold "
        f"{chosen['token_types']:,} token types, which make up "
        f"{chosen['distribution_covered']:.1%} of all candidate text; "
        f"{run_now / max(seconds, 1e-9):,.0f} tokens/s"
    )
