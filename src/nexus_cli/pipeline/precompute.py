"""Stage ``precompute``: a teacher and text in, a teacher store out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.core.data.blocks import PackedBlocks, collate
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ConfigError, ResourceError
from nexus_cli.io import console, model_dir
from nexus_cli.io.location import locate
from nexus_cli.io.manifest import Output
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.teacher_store.manifest import (
    FILENAME,
    FORMAT,
    SHARDS,
    ShardRecord,
    StoreManifest,
    StorePlan,
)
from nexus_cli.io.teacher_store.reader import open_store
from nexus_cli.io.teacher_store.writer import DiskFullError, StoreWriter
from nexus_cli.io.workspace import Workspace
from nexus_cli.io.write_behind import WriteBehind
from nexus_cli.pipeline.forward_memory import keep_decoded
from nexus_cli.pipeline.inputs import Artifact, model_input
from nexus_cli.pipeline.out_of_memory import memory_on
from nexus_cli.pipeline.precompute_dry_run import describe
from nexus_cli.pipeline.precompute_plan import order, store_plan, vocabulary_ranks
from nexus_cli.pipeline.stage import StageOutput, stage
from nexus_cli.pipeline.teacher_rows import Answer, Question, ask
from nexus_cli.pipeline.text import load_blocks
from nexus_cli.pipeline.world import open_world

log = logging.getLogger(__name__)

CONTINUE = "free some space and run the same command again; it continues there"
OUT_OF_MEMORY = "use a smaller --batch-size or --seq-len, or name another --device"
_SEEDS = 1_000_003  # apart, so that runs of neighbouring seeds draw other tails


def run(
    config: PrecomputeConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Write the store of ``num_steps`` batches to ``precompute/`` or where ``output`` says.

    Batches are formed before they are dealt to the ranks, and a shard's rows do not depend on
    who writes it, so any number of ranks makes the same store. A killed run continues after its
    whole shards.

    Raises:
        ConfigError: more entries are to be kept than the vocabulary has.
        ResourceError: the text ran out (the store is usable, at its true size), or the disk.
        WorkspaceError: the folder holds shards of another run.
    """
    console.configure()
    teacher = model_input(config.model)
    shape = model_dir.read_shape(teacher.path)
    if config.top_k > shape.vocab_size:
        raise ConfigError(
            f"top_k is {config.top_k}, but the teacher has {shape.vocab_size} tokens",
            hint="use a smaller --top-k",
        )
    folder = (config.output or workspace.stage_dir("precompute")).expanduser()
    if dry_run:
        describe(config, teacher, shape, folder)
        return
    world = open_world(config.runtime.device)
    with stage(
        "precompute",
        config,
        workspace,
        main=".",
        inputs={"model": teacher},
        output=config.output,
        world=world,
        force=force,
        whole_directory=True,
    ) as out:
        if out is not None:
            _write_store(config, workspace, teacher, shape, world, out, force=force)
    _require_complete(folder)


def _write_store(
    config: PrecomputeConfig,
    workspace: Workspace,
    teacher: Artifact,
    shape: ModelShape,
    world: World,
    out: StageOutput,
    *,
    force: bool,
) -> None:
    text = load_blocks(
        config.data,
        teacher.path,
        default_split="train",
        num_blocks=config.num_steps * config.batch_size,
        cache_dir=workspace.root / "cache" / "text",
        num_processes=config.runtime.num_processes,
        world=world,
    )
    order_N = order(config, text.blocks)
    ranks = vocabulary_ranks(text.blocks, order_N, shape.vocab_size)
    plan = store_plan(config, teacher, shape, text, order_N, ranks, world.device)
    writer = StoreWriter(out.directory, plan, ranks)
    world.from_main(lambda: writer.prepare(force=force))
    with memory_on(world.device, OUT_OF_MEMORY):
        written = _write_shards(config, teacher, text.blocks, order_N, writer, world)
    everyone = world.gather_objects(written)
    records = [record for rank in everyone for record in rank.records]
    full = next((rank.full for rank in everyone if rank.full is not None), "the disk is full")
    if not records:
        raise ResourceError(full, hint=CONTINUE)
    manifest = world.from_main(lambda: writer.finish(records))
    if world.is_main:
        _report(out.directory, manifest)
    if manifest.ended_early == "disk":
        raise ResourceError(
            f"{full}; {_size_of(manifest)}, and the store at {out.directory} is usable with that "
            "size",
            hint=CONTINUE,
        )
    if world.is_main:
        out.add(out.directory / FILENAME, format=FORMAT)
        # The shards were hashed as they were written; their size shows if one is lost.
        out.files[SHARDS] = Output(format=FORMAT, sha256=manifest.digest, bytes=manifest.num_bytes)


@dataclass(frozen=True)
class Written:
    """What one rank wrote.

    Attributes:
        records: its shards, those too that were there already.
        full: what to say if its disk was full.
    """

    records: list[ShardRecord]
    full: str | None = None


def _write_shards(
    config: PrecomputeConfig,
    teacher: Artifact,
    blocks: PackedBlocks,
    order_N: NDArray[np.int64],
    writer: StoreWriter,
    world: World,
) -> Written:
    """This rank's shards: every ``world.size``-th. Those that are there are kept."""
    plan = writer.plan
    found = {shard: writer.find(shard) for shard in range(world.rank, plan.num_shards, world.size)}
    records = [record for record in found.values() if record is not None]
    missing = [shard for shard, record in found.items() if record is None]
    if records:
        log.info("%d of %d shards are there already", len(records), len(found))
    if not missing:
        return Written(records)
    model = load_model(
        teacher.path,
        device=world.device,
        dtype=frozen_dtype(config.dtype, world.device),
        experts_backend=config.runtime.experts_backend,
    )
    keep_decoded(model, plan.batch_size * plan.seq_len, world.device)
    if model.config.num_shared_experts:
        log.info("%s has a shared expert, which takes part in what the teacher says", config.model)
    started = perf_counter()
    try:
        with WriteBehind() as behind:
            for shard, span, answer in _answers(model, blocks, order_N, writer, missing, config):
                behind.run(partial(_write, writer, records, shard, span, answer))
    except DiskFullError as error:
        return Written(records, str(error))
    seconds = perf_counter() - started  # the last shard's end is waited for too
    tokens = plan.seq_len * sum(len(plan.shard_rows(shard)) for shard in missing)
    log.info(
        "%s tokens a second; the teacher waited for the disk %.1f%% of the time",
        f"{tokens / seconds:,.0f}",
        100 * behind.waited / seconds,
    )
    return Written(records)


def _write(
    writer: StoreWriter, records: list[ShardRecord], shard: int, span: range, answer: Answer
) -> None:
    writer.add(span, answer.rows())
    if span.stop == writer.plan.shard_rows(shard).stop:
        records.append(writer.close(shard))


def _answers(
    model: NexusGptOssForCausalLM,
    blocks: PackedBlocks,
    order_N: NDArray[np.int64],
    writer: StoreWriter,
    shards: Sequence[int],
    config: PrecomputeConfig,
) -> Iterator[tuple[int, range, Answer]]:
    """One batch behind: a GPU works on the next one while an answer comes to the host."""
    question = Question(
        top_k=config.top_k,
        top_p=config.top_p,
        min_k=writer.plan.min_k,
        tail_samples=config.tail_samples,
        experts=config.experts,
    )
    before: tuple[int, range, Answer] | None = None
    for shard, span in console.progress(list(_batches(writer.plan, shards)), "teacher batches"):
        if writer.stopped:
            return
        batch = collate(blocks, order_N[span.start : span.stop])
        answer = ask(model, batch, question, seed=config.data.seed * _SEEDS + span.start)
        if before is not None:
            before[2].wait()
            yield before
        before = shard, span, answer
    if before is not None:
        before[2].wait()
        yield before


def _batches(plan: StorePlan, shards: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Shard and rows of every batch: the same batches however the shards are dealt."""
    for shard in shards:
        span = plan.shard_rows(shard)
        for start in range(span.start, span.stop, plan.batch_size):
            yield shard, range(start, min(start + plan.batch_size, span.stop))


def _report(folder: Path, manifest: StoreManifest) -> None:
    tokens, nll = manifest.num_rows * manifest.plan.seq_len, manifest.teacher_nll
    perplexity = "no targets" if nll is None else f"teacher perplexity {math.exp(nll):.3f}"
    kept = "" if manifest.mean_k is None else f"{manifest.mean_k:.1f} entries kept a target, "
    console.result(
        f"{folder}: {manifest.num_rows:,} sequences, {manifest.num_targets:,} targets of "
        f"{tokens:,} tokens, {kept}{manifest.num_bytes / 2**20:,.1f} MiB "
        f"({manifest.num_bytes / max(tokens, 1):.1f} bytes a token), {perplexity}"
    )


def _size_of(manifest: StoreManifest) -> str:
    plan = manifest.plan
    return (
        f"{manifest.num_rows:,} of {plan.requested_steps * plan.batch_size:,} sequences "
        f"({manifest.actual_steps:,} of {plan.requested_steps:,} steps)"
    )


def _require_complete(folder: Path) -> None:
    """Say that the text ran out, also when the stage is found finished."""
    manifest = open_store(locate(folder)).manifest
    if manifest.ended_early is None:
        return
    raise ResourceError(
        f"the text ran out after {_size_of(manifest)}; "
        f"the store at {folder} is whole and usable with that size",
        hint=f"train on it: nexus train-offline --precomputed-teacher {folder}; "
        f"or add text with --data, and --force",
    )
