"""Stage ``validate``: a model, its baseline and held-out text in, ``report.json`` out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nexus_cli.config.shared import TextData
from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.data.document import TokenizedDocument
from nexus_cli.core.distributed import World
from nexus_cli.core.evaluate.compare import TextResult, summarise
from nexus_cli.core.evaluate.perplexity import Subject, score
from nexus_cli.core.evaluate.windows import batches, collated, plan
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ArtifactError, CheckFailed, ConfigError
from nexus_cli.io import console
from nexus_cli.io.report import FILENAME, FORMAT, read_report, to_json, write_report
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import chat, validate_plan, validate_report, validate_store
from nexus_cli.pipeline.out_of_memory import memory_on
from nexus_cli.pipeline.stage import stage
from nexus_cli.pipeline.text import load_tokenized
from nexus_cli.pipeline.validate_checks import Check, structure, switched_off
from nexus_cli.pipeline.validate_models import Changes, Choice, changes, choose
from nexus_cli.pipeline.world import open_world

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "use a smaller --set runtime.batch_size or --set window, or --baseline self: one copy in memory"
)
OUT_OF_MEMORY_CHAT = "begin again with a shorter conversation, or name another --device"


@dataclass(frozen=True)
class Mode:
    """What a call does beside its settings.

    Attributes:
        check: Run the checks and write the report.
        chat: Talk to the model afterwards.
        json: Print the report as JSON and no table.
    """

    check: bool = True
    chat: bool = False
    json: bool = False


def run(
    config: ValidateConfig,
    workspace: Workspace,
    *,
    mode: Mode | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Check the model, write ``report.json``, print it, and chat if asked.

    Raises:
        CheckFailed: a check failed; the report is written first.
        ConfigError: chat was asked of several ranks.
    """
    console.configure()
    mode = mode or Mode()
    if config.store is not None:
        if mode.chat:
            raise ConfigError("a teacher store does not talk", hint="give --chat without it")
        validate_store.run(config, workspace, as_json=mode.json, dry_run=dry_run)
        return
    choice = choose(config, workspace)
    if dry_run:
        validate_plan.describe(config, workspace, choice, mode.check)
        return
    world = open_world(config.runtime.device)
    if mode.chat and world.size > 1:
        raise ConfigError("--chat needs one process", hint="run it without accelerate launch")
    if mode.check:
        _check(config, workspace, choice, world, force=force, as_json=mode.json)
    if mode.chat:
        named = choice.kind == "named"
        compare = named or config.baseline is not None
        with memory_on(world.device, OUT_OF_MEMORY_CHAT):
            chat.run(choice, compare=compare, config=config, world=world)


def _check(
    config: ValidateConfig,
    workspace: Workspace,
    choice: Choice,
    world: World,
    *,
    force: bool,
    as_json: bool,
) -> None:
    with stage(
        "validate",
        config,
        workspace,
        main=FILENAME,
        inputs=choice.inputs,
        output=config.output,
        world=world,
        force=force,
    ) as out:
        path = config.output or workspace.stage_dir("validate") / FILENAME
        if out is not None:
            with memory_on(world.device, OUT_OF_MEMORY):
                made = _report(config, choice, world)
            if world.is_main:
                write_report(out.main, made)
                out.add(out.main, format=FORMAT)
    report: dict[str, Any] = world.from_main(lambda: read_report(path))
    if as_json:
        console.result(to_json(report).rstrip())
    else:
        validate_report.show(report)
    if failed := [check for check in report["checks"] if not check["passed"]]:
        what = "; ".join(f"{c['check']} is {c['value']}, not {c['threshold']}" for c in failed)
        raise CheckFailed(f"validation failed: {what}", hint=f"the report is {path}")


def _report(config: ValidateConfig, choice: Choice, world: World) -> dict[str, object]:
    found = changes(choice)
    dtype = frozen_dtype(config.dtype, world.device)
    checks = structure(choice, found)
    with _subjects(choice, found, config, dtype, world, checks) as (model, baseline):
        results: dict[str, tuple[TextResult, dict[str, object]]] = {}
        for name, text in (("domain", config.domain), ("general", config.general)):
            if config.compute_perplexity and text is not None:
                results[name] = _score(config, choice, text, (model, baseline), world)
    if config.max_degradation is not None:
        checks.append(_degradation(results["general"][0], config.max_degradation))
    return validate_report.build(config, choice, checks, results, world, dtype)


@contextmanager
def _subjects(
    choice: Choice,
    found: Changes | None,
    config: ValidateConfig,
    dtype: torch.dtype,
    world: World,
    checks: list[Check],
) -> Iterator[tuple[Subject, Subject]]:
    """Load what is compared, running the check of the switched-off model on the way.

    Against ``self`` the base is not loaded, and the check is one of closed gates. A base whose
    every tensor is in the model too is dropped after the check: with its shared experts off
    the model is that base, which the check has just shown.
    """
    load = partial(
        load_model,
        device=world.device,
        dtype=dtype,
        experts_backend=config.runtime.experts_backend,
    )
    model = load(choice.model.path)
    base = None
    if choice.loaded_base is not None:
        base = load(choice.loaded_base.path)
    checks += switched_off(model, base, found, seed=config.seed, device=world.device)
    off = Subject(model, shared_experts=False)
    if choice.kind == "self":
        yield Subject(model), off
    elif choice.kind == "base" and found is not None and not (found.frozen or found.routers):
        del base
        yield Subject(model), off
    elif choice.baseline == choice.base and base is not None:
        yield Subject(model), Subject(base)
    else:
        del base
        assert choice.baseline is not None
        other = load(choice.baseline.path)
        yield Subject(model), Subject(other)


def _score(
    config: ValidateConfig,
    choice: Choice,
    text: TextData,
    subjects: tuple[Subject, Subject],
    world: World,
) -> tuple[TextResult, dict[str, object]]:
    """One text: windows shared out over the ranks, sums of all of them."""
    loaded = world.from_main(
        lambda: load_tokenized(
            text,
            choice.model.path,
            default_split="held-out",
            max_documents=config.max_documents,
            num_processes=config.runtime.num_processes,
        )
    )
    documents = [_without_end(d, config.score_end, loaded.pad_id) for d in loaded.documents]
    model, baseline = subjects
    groups = batches(
        plan(documents, window=config.window, stride=config.stride),
        max_tokens=config.runtime.batch_size * config.window,
    )[world.rank :: world.size]
    names = ", ".join(source.name for source in text.sources)
    sums_DX = score(
        model,
        baseline,
        console.progress(collated(groups, documents), f"scoring {names}", total=len(groups)),
        num_documents=len(documents),
        top_k=model.model.config.num_experts_per_tok,
        device=world.device,
    )
    try:
        result = summarise(
            world.sum_(sums_DX).cpu().numpy(),
            validate_report.bytes_of(documents),
            resamples=config.resamples,
            level=config.level,
            seed=config.seed,
        )
    except ValueError as error:
        raise ArtifactError(
            f"{names}: {error}", hint="chats are scored on the assistant's tokens alone"
        ) from error
    return result, {"digest": loaded.digest, **loaded.report.as_dict()}


def _without_end(document: TokenizedDocument, score_end: bool, end: int) -> TokenizedDocument:
    """Plain text without its end-of-text token, if that is not to be scored."""
    if score_end or document.is_chat or not len(document) or document.input_ids[-1] != end:
        return document
    return validate_report.without_end(document)


def _degradation(result: TextResult, limit: float) -> Check:
    change = 100 * (result.perplexity.model / result.perplexity.base - 1)
    return Check("general perplexity, change in percent", change, limit, change <= limit)
