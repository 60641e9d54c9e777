"""Run the chosen text through the model, and count what its routers and experts do."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from nexus_cli.config.collect import CollectConfig
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import NexusGptOssForCausalLM
from nexus_cli.core.model.gpt_oss.observe import down_norms, observe_experts
from nexus_cli.core.router.accumulate import MomentAccumulator
from nexus_cli.core.router.batching import TokenBatch, make_batch, padded_length
from nexus_cli.core.router.moments import RouterMoments
from nexus_cli.core.router.units import UnitAccumulator
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ArtifactError
from nexus_cli.io import console
from nexus_cli.io.model_dir import ModelShape
from nexus_cli.pipeline.collect_partial import PartialStatistics, Progress
from nexus_cli.pipeline.collect_plan import CollectPlan
from nexus_cli.pipeline.forward_memory import keep_decoded
from nexus_cli.pipeline.inputs import Artifact


@dataclass(frozen=True)
class CollectJob:
    """What every step of the stage needs to know."""

    config: CollectConfig
    model: Artifact
    shape: ModelShape
    world: World


def run_batches(
    job: CollectJob, plan: CollectPlan, partial: PartialStatistics
) -> tuple[Progress, int]:
    """This rank's statistics, earlier ones included, and the tokens that it ran now.

    Raises:
        ArtifactError: a router or an expert of the model produces NaN.
    """
    world, shape, config = job.world, job.shape, job.config
    empty = RouterMoments.zeros(
        shape.num_layers,
        shape.num_experts,
        shape.top_k,
        config.reservoir,
        shape.intermediate_size if config.units else None,
    )
    before, done = partial.load(empty)
    left = [number for number in range(len(plan.batches)) if number not in done]
    mine = left[world.rank :: world.size]
    if not mine:
        return before, 0
    network = load_model(
        job.model.path,
        device=world.device,
        dtype=frozen_dtype(config.dtype, world.device),
        experts_backend=config.runtime.experts_backend,
    )
    counters = _Counters(before.moments, network, world.device)
    keep_decoded(network, _largest_batch(plan), world.device)
    counted = set(before.batches)

    def progress() -> Progress:
        return Progress(_moments(counters, job), frozenset(counted))

    saved = time.monotonic()
    with closing(_ahead(lambda number: _make_batch(plan, number, config.seed), mine)) as batches:
        for number in console.progress(mine, "batches"):
            _run_batch(network, next(batches), counters, world.device)
            counted.add(number)
            if time.monotonic() - saved >= config.runtime.checkpoint_seconds:
                partial.save(progress())
                saved = time.monotonic()
    tokens = sum(len(plan.sequences[index]) for number in mine for index in plan.batches[number])
    return progress(), tokens


class _Counters:
    """Running statistics of routers and, where they are wanted, of hidden units."""

    def __init__(
        self, before: RouterMoments, network: NexusGptOssForCausalLM, device: torch.device
    ) -> None:
        """Continue from ``before``; the experts of ``network`` are still packed."""
        self._routers = MomentAccumulator(before, device)
        self._units: UnitAccumulator | None = None
        if before.units_LEI is not None:
            units = self._units = UnitAccumulator(before.units_LEI, down_norms(network))
            observe_experts(network, [units.layer(i) for i in range(units.num_layers)])

    def expect(self, batch: TokenBatch) -> None:
        """Say which tokens of the forward pass that follows are counted."""
        if self._units is not None:
            self._units.count(batch.input_ids_BS.numel(), batch.body_N)

    def add(self, router_logits: Sequence[torch.Tensor], batch: TokenBatch) -> None:
        """Count the forward pass."""
        self._routers.add(router_logits, batch.body_N, batch.first_B, batch.keys_N)

    def moments(self) -> RouterMoments:
        """All that was counted, on the host."""
        found = self._routers.moments()
        if self._units is None:
            return found
        return replace(found, units_LEI=self._units.contributions())


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
    counters: _Counters,
    device: torch.device,
) -> None:
    """Count one batch; on a GPU, queue the work."""
    with torch.inference_mode():
        batch = batch.to(device)
        counters.expect(batch)
        output = network.model(
            input_ids=batch.input_ids_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
            output_router_logits=True,
        )
        counters.add(output.router_logits, batch)


def _moments(counters: _Counters, job: CollectJob) -> RouterMoments:
    try:
        return counters.moments()
    except ValueError as error:
        raise ArtifactError(
            f"{job.model.path}: {error}", hint="try --set dtype=float32, or check the weights"
        ) from error
