"""Stage ``precompute``: a teacher and text in, a teacher store out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.core.data.blocks import PackedBlocks, collate
from nexus_cli.core.data.order import mixture_order
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ConfigError, ResourceError
from nexus_cli.io import console, model_dir, teacher_store
from nexus_cli.io.hashing import sha256_file, sha256_json
from nexus_cli.io.manifest import Output
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.io.teacher_shards import StoreRows, concatenate
from nexus_cli.io.teacher_store import ShardRecord, StoreManifest, StorePlan
from nexus_cli.io.teacher_writer import StoreWriter
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.forward_memory import keep_decoded
from nexus_cli.pipeline.inputs import Artifact, model_input
from nexus_cli.pipeline.out_of_memory import memory_on
from nexus_cli.pipeline.precompute_dry_run import describe
from nexus_cli.pipeline.stage import StageOutput, stage
from nexus_cli.pipeline.teacher_rows import Answer, ask
from nexus_cli.pipeline.text import TextBlocks, load_blocks
from nexus_cli.pipeline.world import open_world

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "use a smaller --batch-size or --seq-len, or name another --device"
ROWS_A_SHARD = 256
MIN_SHARDS = 16  # where there are as many batches: work for several ranks, little lost by a kill


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
    order_N = _order(config, text.blocks)
    plan = _plan(config, teacher, shape, text, order_N, world)
    writer = StoreWriter(out.directory, plan)
    world.from_main(lambda: writer.prepare(force=force))
    with memory_on(world.device, OUT_OF_MEMORY):
        records = _write_shards(config, teacher, text.blocks, order_N, writer, world)
    gathered = world.gather_objects(records)
    if world.is_main:
        manifest = writer.finish(list(chain.from_iterable(gathered)))
        out.add(out.directory / teacher_store.FILENAME, format=teacher_store.FORMAT)
        # The shards were hashed as they were written; their size shows if one is lost.
        out.files[teacher_store.SHARDS] = Output(
            format=teacher_store.FORMAT,
            sha256=manifest.digest,
            bytes=sum(shard.bytes for shard in manifest.shards),
        )
        _report(out.directory, manifest)


def _order(config: PrecomputeConfig, blocks: PackedBlocks) -> NDArray[np.int64]:
    """The blocks to store, in mixture order, up to where the mixture would repeat one."""
    order_N = mixture_order(
        config.data.seed,
        blocks.blocks_per_source,
        [source.weight for source in config.data.sources],
        config.num_steps * config.batch_size,
    )
    _, first = np.unique(order_N, return_index=True)
    repeats_N = np.ones(len(order_N), dtype=np.bool_)
    repeats_N[first] = False
    if not repeats_N.any():
        return order_N
    end = int(repeats_N.argmax())
    source = config.data.sources[int(blocks.source_N[order_N[end]])]
    log.warning("%s has no more text after %d sequences of the mixture", source.name, end)
    return order_N[:end]


def _plan(
    config: PrecomputeConfig,
    teacher: Artifact,
    shape: ModelShape,
    text: TextBlocks,
    order_N: NDArray[np.int64],
    world: World,
) -> StorePlan:
    batches_a_shard = min(
        max(1, ROWS_A_SHARD // config.batch_size), math.ceil(config.num_steps / MIN_SHARDS)
    )
    return StorePlan(
        teacher=teacher.digest,
        teacher_name=config.model,
        tokenizer=sha256_file(teacher.path / "tokenizer.json"),
        data_digest=sha256_json([text.digest, order_N.tolist()]),
        sources=tuple(source.name for source in config.data.sources),
        vocab_size=shape.vocab_size,
        top_k=config.top_k,
        precision=config.precision,
        dtype=str(frozen_dtype(config.dtype, world.device)).removeprefix("torch."),
        compression=config.compression,
        seq_len=config.data.seq_len,
        batch_size=config.batch_size,
        requested_steps=config.num_steps,
        num_rows=len(order_N),
        rows_per_shard=batches_a_shard * config.batch_size,
    )


def _write_shards(
    config: PrecomputeConfig,
    teacher: Artifact,
    blocks: PackedBlocks,
    order_N: NDArray[np.int64],
    writer: StoreWriter,
    world: World,
) -> list[ShardRecord]:
    """This rank's shards: every ``world.size``-th. Those that are there are kept."""
    plan = writer.plan
    found = {shard: writer.find(shard) for shard in range(world.rank, plan.num_shards, world.size)}
    records = [record for record in found.values() if record is not None]
    missing = [shard for shard, record in found.items() if record is None]
    if records:
        log.info("%d of %d shards are there already", len(records), len(found))
    if not missing:
        return records
    model = load_model(
        teacher.path,
        device=world.device,
        dtype=frozen_dtype(config.dtype, world.device),
        experts_backend=config.runtime.experts_backend,
    )
    keep_decoded(model, plan.batch_size * plan.seq_len, world.device)
    if model.config.num_shared_experts:
        log.info("%s has a shared expert, which takes part in what the teacher says", config.model)
    rows: list[StoreRows] = []
    for shard, span, answer in _answers(model, blocks, order_N, plan, missing):
        rows.append(answer.rows())
        if span.stop == plan.shard_rows(shard).stop:
            records.append(writer.write(shard, concatenate(rows)))
            rows.clear()
    return records


def _answers(
    model: NexusGptOssForCausalLM,
    blocks: PackedBlocks,
    order_N: NDArray[np.int64],
    plan: StorePlan,
    shards: Sequence[int],
) -> Iterator[tuple[int, range, Answer]]:
    """One batch behind: a GPU works on the next one while an answer is laid out and written."""
    before: tuple[int, range, Answer] | None = None
    for shard, span in console.progress(list(_batches(plan, shards)), "teacher batches"):
        answer = ask(model, collate(blocks, order_N[span.start : span.stop]), plan.top_k)
        if before is not None:
            yield before
        before = shard, span, answer
    if before is not None:
        yield before


def _batches(plan: StorePlan, shards: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Shard and rows of every batch: the same batches however the shards are dealt."""
    for shard in shards:
        span = plan.shard_rows(shard)
        for start in range(span.start, span.stop, plan.batch_size):
            yield shard, range(start, min(start + plan.batch_size, span.stop))


def _report(folder: Path, manifest: StoreManifest) -> None:
    size = sum(shard.bytes for shard in manifest.shards)
    tokens = manifest.plan.num_rows * manifest.plan.seq_len
    nll = manifest.teacher_nll
    perplexity = "no targets" if nll is None else f"teacher perplexity {math.exp(nll):.3f}"
    console.result(
        f"{folder}: {manifest.plan.num_rows:,} sequences, {manifest.num_targets:,} targets of "
        f"{tokens:,} tokens, {size / 2**20:,.1f} MiB ({size / tokens:.1f} bytes a token), "
        f"{perplexity}"
    )


def _require_complete(folder: Path) -> None:
    """Say that the text ran out, also when the stage is found finished."""
    manifest = teacher_store.open_store(folder).manifest
    if manifest.complete:
        return
    plan = manifest.plan
    raise ResourceError(
        f"the text ran out after {plan.num_rows:,} of {plan.requested_steps * plan.batch_size:,} "
        f"sequences ({manifest.actual_steps:,} of {plan.requested_steps:,} steps); "
        f"the store at {folder} is whole and usable with that size",
        hint=f"train on it: nexus train-offline --precomputed-teacher {folder}; "
        f"or add text with --data, and --force",
    )
