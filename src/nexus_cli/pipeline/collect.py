"""Stage ``collect``: a model and text in, statistics of its routers out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nexus_cli.config.collect import CollectConfig
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.core.router.accumulate import MomentAccumulator
from nexus_cli.core.router.batching import TokenBatch, make_batch, padded_length
from nexus_cli.core.router.moments import RouterMoments
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ArtifactError
from nexus_cli.io import console, model_dir, router_probs
from nexus_cli.io.atomic import write_atomic
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.collect_dry_run import describe
from nexus_cli.pipeline.collect_partial import PartialStatistics, Progress
from nexus_cli.pipeline.collect_plan import CollectPlan, make_plan
from nexus_cli.pipeline.disk import room_for
from nexus_cli.pipeline.forward_memory import keep_decoded
from nexus_cli.pipeline.inputs import Artifact, model_input
from nexus_cli.pipeline.out_of_memory import memory_on
from nexus_cli.pipeline.router_statistics import save_moments
from nexus_cli.pipeline.stage import StageOutput, stage
from nexus_cli.pipeline.world import open_world

log = logging.getLogger(__name__)

REPORT_FORMAT = "nexus.collection/1"
OUT_OF_MEMORY = "use a smaller batch, such as --set runtime.batch_size=8"


@dataclass(frozen=True)
class _Job:
    """What every step of the stage needs to know."""

    config: CollectConfig
    model: Artifact
    shape: ModelShape
    world: World


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
        partial = None if out is None else _collect(_Job(config, model, shape, world), out)
    if partial is not None and world.is_main:
        partial.discard()  # only now are the statistics committed


def _collect(job: _Job, out: StageOutput) -> PartialStatistics:
    world = job.world
    plan = world.from_main(lambda: make_plan(job.config, job.model, job.shape))
    if job.shape.num_shared_experts:
        log.info("%s has a shared expert; it runs as it is, shared expert included", job.model.path)
    folder = out.main.with_name(f".{out.main.name}.partial")
    partial = PartialStatistics(folder, plan.digest, world)
    started = time.monotonic()
    with memory_on(world.device, OUT_OF_MEMORY):
        own, new_tokens = _run_batches(job, plan, partial)
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
    job: _Job,
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


def _run_batches(job: _Job, plan: CollectPlan, partial: PartialStatistics) -> tuple[Progress, int]:
    """This rank's statistics, earlier ones included, and the tokens that it ran now."""
    world, shape, config = job.world, job.shape, job.config
    empty = RouterMoments.zeros(shape.num_layers, shape.num_experts, shape.top_k, config.reservoir)
    before, done = partial.load(empty)
    left = [number for number in range(len(plan.batches)) if number not in done]
    mine = left[world.rank :: world.size]
    if not mine:
        return before, 0
    dtype = frozen_dtype(config.dtype, world.device)
    network = load_model(
        job.model.path,
        device=world.device,
        dtype=dtype,
        experts_backend=config.runtime.experts_backend,
    )
    keep_decoded(network, _largest_batch(plan), world.device)
    accumulator = MomentAccumulator(before.moments, world.device)
    counted = set(before.batches)
    saved = time.monotonic()
    with closing(_ahead(lambda number: _make_batch(plan, number, config.seed), mine)) as batches:
        for number in console.progress(mine, "batches"):
            _run_batch(network, next(batches), accumulator, world.device)
            counted.add(number)
            if time.monotonic() - saved >= config.runtime.checkpoint_seconds:
                partial.save(Progress(_moments(accumulator, job), frozenset(counted)))
                saved = time.monotonic()
    tokens = sum(len(plan.sequences[index]) for number in mine for index in plan.batches[number])
    return Progress(_moments(accumulator, job), frozenset(counted)), tokens


def _largest_batch(plan: CollectPlan) -> int:
    """Tokens of the first batch, padding included; no other has more."""
    first = plan.batches[0]
    return len(first) * padded_length(max(len(plan.sequences[index]) for index in first))


def _ahead(
    make: Callable[[int], TokenBatch], numbers: Sequence[int]
) -> Generator[TokenBatch, None, None]:
    """Batches in order; while one is used, the next is made."""
    with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as pool:
        upcoming = pool.submit(make, numbers[0])
        for number in numbers[1:]:
            batch = upcoming.result()
            upcoming = pool.submit(make, number)
            yield batch
        yield upcoming.result()


def _make_batch(plan: CollectPlan, number: int, seed: int) -> TokenBatch:
    indices = plan.batches[number]
    sequences = [plan.sequences[index] for index in indices]
    return make_batch(sequences, indices, pad_id=plan.pad_id, seed=seed)


def _run_batch(
    network: NexusGptOssForCausalLM,
    batch: TokenBatch,
    accumulator: MomentAccumulator,
    device: torch.device,
) -> None:
    """Count one batch; on a GPU, queue the work."""
    with torch.inference_mode():
        batch = batch.to(device)
        output = network.model(
            input_ids=batch.input_ids_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
            output_router_logits=True,
        )
        accumulator.add(output.router_logits, batch.body_N, batch.first_B, batch.keys_N)


def _moments(accumulator: MomentAccumulator, job: _Job) -> RouterMoments:
    try:
        return accumulator.moments()
    except ValueError as error:
        raise ArtifactError(
            f"{job.model.path}: {error}", hint="try --set dtype=float32, or check the weights"
        ) from error


def _metadata(job: _Job, plan: CollectPlan) -> dict[str, Any]:
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
    job: _Job, plan: CollectPlan, moments: RouterMoments, run_now: int, seconds: float
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
