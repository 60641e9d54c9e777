"""Stage ``plot``: metrics and a validation report in, figures and one HTML page out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nexus_cli.config.plot import PlotConfig
from nexus_cli.errors import ArtifactError, WorkspaceError
from nexus_cli.io import console, manifest
from nexus_cli.io.atomic import write_atomic
from nexus_cli.io.hashing import sha256_json
from nexus_cli.io.metrics import STDIN, find_metrics, read_metrics
from nexus_cli.io.report import FILENAME as REPORT
from nexus_cli.io.report import read_report
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.inputs import Artifact
from nexus_cli.pipeline.plotting.draw import COLOURS, draw_figure, draw_single
from nexus_cli.pipeline.plotting.page import Section, flatten, write_page
from nexus_cli.pipeline.plotting.panels import Figure, figures, note_if_empty
from nexus_cli.pipeline.plotting.result import draw_result
from nexus_cli.pipeline.plotting.series import Run, extract
from nexus_cli.pipeline.stage import stage

TRAININGS = ("train", "train-offline")
PAGE = "report.html"
COLUMNS = ("held-out text", "before", "after", "change")
PERPLEXITIES = {
    "domain_perplexity": "perplexity, domain",
    "argument_value_perplexity": "perplexity, argument values of tool calls",
    "general_perplexity": "perplexity, general",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """Where a run's metrics are, and where its settings may be."""

    name: str
    metrics: Path | None  # None: stdin


def run(
    config: PlotConfig, workspace: Workspace, *, force: bool = False, dry_run: bool = False
) -> None:
    """Draw every run, and write ``report.html`` beside the figures.

    Figures are cheap and follow a training that may still be going on, so what is there is
    always drawn anew; ``force`` changes nothing.

    Raises:
        WorkspaceError: there is nothing to draw.
        ArtifactError: a file is not what it should be.
    """
    del force
    console.configure()
    sources = _sources(config, workspace)
    report_path = _report_path(config, workspace)
    if not sources and report_path is None:
        raise WorkspaceError(
            f"{workspace.root} has no training and no validation to draw",
            hint="run `nexus train`, or name a run with --log-file",
        )
    if dry_run:
        _describe(config, workspace, sources, report_path)
        return
    runs = [_read(source) for source in sources]
    report = None if report_path is None else read_report(report_path)
    if report is None and not any(found.records for found in runs):
        raise ArtifactError(
            f"nothing to draw: no records of a training in {', '.join(s.name for s in sources)}",
            hint="give --log-file the folder of a training run that has begun",
        )
    inputs = {
        source.name: Artifact(source.metrics or Path(STDIN), sha256_json(list(found.records)))
        for source, found in zip(sources, runs, strict=True)
    }
    if report_path is not None:
        inputs["validate"] = Artifact(report_path, sha256_json(report))
    with stage(
        "plot",
        config,
        workspace,
        main=PAGE,
        inputs=inputs,
        output=None if config.output is None else config.output / PAGE,
        force=True,
    ) as out:
        if out is None:
            return
        written = _draw(runs, report, config.smooth_window, out.directory)
        for path in written:
            out.add(path, f"nexus.figure/{path.suffix[1:]}")
    if report is not None:
        _tell(report["summary"])
    console.result(f"report: {out.main}\nfigures: {out.directory}/*.png ({_count_png(written)})")


def _count_png(written: Sequence[Path]) -> int:
    return sum(path.suffix == ".png" for path in written)


def _tell(summary: Mapping[str, Any]) -> None:
    """The few figures that say what was learned and what was lost."""
    rows: list[tuple[str, str, str, str]] = []
    for name, label in PERPLEXITIES.items():
        pair = summary.get(name) or {}
        if pair.get("base") is not None and pair.get("model") is not None:
            change = f"{pair['model'] / pair['base'] - 1:+.1%}"
            rows.append((label, f"{pair['base']:.3f}", f"{pair['model']:.3f}", change))
    if summary.get("kl_to_base") is not None:
        rows.append(("KL to the base, general text", "", f"{summary['kl_to_base']:.4f}", ""))
    trained, total = summary["trained_parameters"], summary["total_parameters"]
    rows.append(("trained parameters", "", f"{trained:,}", f"{trained / total:.2%} of all"))
    console.result_table("What was learned, and what was kept", COLUMNS, rows)


def _sources(config: PlotConfig, workspace: Workspace) -> list[_Source]:
    """The runs that the user named, or the workspace's trainings that have begun."""
    if config.log_file:
        paths = [None if name == STDIN else find_metrics(Path(name)) for name in config.log_file]
    else:
        folders = (workspace.stage_dir(name) for name in TRAININGS)
        paths = [find_metrics(folder) for folder in folders if any(folder.glob("*.jsonl"))]
    return [_Source(*pair) for pair in zip(_labels(paths), paths, strict=True)]


def _labels(paths: Sequence[Path | None]) -> list[str]:
    """The shortest ends of the runs' folders that tell them apart."""
    folders = [("stdin",) if path is None else path.resolve().parent.parts for path in paths]
    for depth in range(1, 1 + max(map(len, folders), default=0)):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts[-1:])} ({n})" for n, parts in enumerate(folders, start=1)]


def _read(source: _Source) -> Run:
    records = read_metrics(STDIN if source.metrics is None else source.metrics)
    if not records:
        log.warning("%s has no records yet", source.metrics or "stdin")
    return Run(source.name, records, _settings(source, records))


def _settings(source: _Source, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """From the run's manifest, or while it has none from its ``start`` event."""
    if source.metrics is not None:
        folder = source.metrics.parent.resolve()
        places = (
            folder / manifest.FILENAME,
            folder.with_name(f"{folder.name}.{manifest.FILENAME}"),
        )
        for place in places:
            if (found := manifest.read(place)) is not None:
                return flatten({"command": found.command, **found.config})
    for record in records:
        if record.get("event") == "start":
            return flatten({k: v for k, v in record.items() if k not in ("step", "event")})
    return {}


def _report_path(config: PlotConfig, workspace: Workspace) -> Path | None:
    if config.report is not None:
        return config.report
    path = workspace.stage_dir("validate") / REPORT
    return path if path.is_file() else None


def _draw(
    runs: Sequence[Run], report: dict[str, Any] | None, window: int, folder: Path
) -> list[Path]:
    """Every figure, the result and the page; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    result = [] if report is None else draw_result(report, folder)
    written, sections, notes = [*result], [], _notes(runs)
    with TemporaryDirectory() as scratch:
        for figure in figures(runs) if runs else []:
            left_out = [note for p in figure.panels if (note := note_if_empty(p, runs))]
            panels = tuple(p for p in figure.panels if note_if_empty(p, runs) is None)
            notes += [f"left out: {note}" for note in left_out]
            if not panels:
                continue
            full = Figure(figure.name, figure.title, panels)
            written += draw_figure(full, runs, window, folder)
            pictures = [
                (draw_single(p, runs, window, Path(scratch) / f"{p.name}.svg"), p.title)
                for p in panels
            ]
            sections.append(Section(figure.title, pictures))
        text = write_page(runs, COLOURS, sections, notes, report, result[0] if result else None)
    for note in notes:
        log.info("%s", note)
    page = folder / PAGE
    write_atomic(page, text.encode())
    return [*written, page]


def _notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the curves should know."""
    notes = []
    for run in runs:
        loss = extract(run.records, "loss")
        if len(loss.gaps):
            first = f"{loss.gaps[0]:.0f}"
            notes.append(
                f"{run.label}: the loss was not a finite number at {len(loss.gaps)} steps, first "
                f"at step {first} (red crosses)"
            )
        if not len(loss):
            notes.append(f"{run.label}: no training step was recorded yet")
    return notes


def _describe(
    config: PlotConfig, workspace: Workspace, sources: Sequence[_Source], report: Path | None
) -> None:
    rows = [(source.name, source.metrics or "stdin") for source in sources]
    if report is not None:
        rows.append(("validation", report))
    rows.append(("smoothing", f"mean over {config.smooth_window} steps"))
    rows.append(("output", config.output or workspace.stage_dir("plot")))
    console.result_table("nexus plot would draw", ("what", "where"), rows)
