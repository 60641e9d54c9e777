"""``report.html``: every picture and number in one file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nexus_cli.pipeline.plotting.result import ROWS, change, complete, number
from nexus_cli.pipeline.plotting.series import Run, event_steps, extract

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #f6f6f4; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .6rem; }
.panels { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; padding: .4rem;
  background: #fff; border: 1px solid #e2e2e2; border-radius: 6px; }
img { width: 100%; height: auto; display: block; }
.wide { max-width: 720px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; font-size: .92rem; }
th, td { border: 1px solid #e2e2e2; padding: .3rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { background: #efefec; }
.bad { color: #b00020; font-weight: 600; }
.note { color: #555; font-size: .9rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
.legend span { display: inline-block; margin-right: 1rem; }
.legend i { display: inline-block; width: 1.6em; height: .25em; margin: 0 .4em .2em 0; }
"""


@dataclass(frozen=True)
class Section:
    """A heading and its pictures: files with their alternative texts."""

    title: str
    pictures: Sequence[tuple[Path, str]]


def write_page(
    runs: Sequence[Run],
    colours: Sequence[str],
    sections: Sequence[Section],
    notes: Sequence[str],
    report: Mapping[str, Any] | None,
    result: Path | None,
) -> str:
    """The page as text."""
    parts = [f"<h1>{_title(runs)}</h1>"]
    if report is not None:
        parts.append(_report(report, result))
    if runs:
        parts += ["<h2>Runs</h2>", _runs(runs)]
    if len(runs) > 1:
        entries = (
            f'<span><i style="background:{colours[n % len(colours)]}"></i>{escape(r.label)}</span>'
            for n, r in enumerate(runs)
        )
        parts.append(f'<p class="legend">{"".join(entries)}</p>')
    for section in sections:
        figures = "".join(_figure(path, text) for path, text in section.pictures)
        parts.append(f'<h2>{escape(section.title)}</h2><div class="panels">{figures}</div>')
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f'<h2>Notes</h2><ul class="note">{items}</ul>')
    parts += [_settings(run) for run in runs if run.settings]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_title(runs)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def _title(runs: Sequence[Run]) -> str:
    names = ", ".join(run.label for run in runs)
    return escape(f"Nexus: {names}" if names else "Nexus: result")


def _figure(path: Path, text: str, kind: str = "") -> str:
    mime = "svg+xml" if path.suffix == ".svg" else "png"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{escape(text, quote=True)}" src="data:image/{mime};base64,{data}">'
    return f'<figure class="{kind}">{image}</figure>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _report(report: Mapping[str, Any], result: Path | None) -> str:
    """Before and after, the checks, and how it was measured."""
    summary = report["summary"]
    rows = [
        (escape(title), number(pair[0]), number(pair[1]), change(*pair))
        for key, title in ROWS
        if (pair := complete(summary.get(key)))
    ]
    parts = ["<h2>Before and after</h2>"]
    if result is not None:
        parts.append(_figure(result, "Perplexity of base and model", "wide"))
    if rows:
        parts.append(_table(("perplexity", "base", "model", "change"), rows))
    parts.append(_table(("check", "value", "threshold", "passed"), map(_check, report["checks"])))
    listed = "".join(_pair(key, value) for key, value in flatten(report["settings"]).items())
    parts.append(f"<details><summary>How it was measured</summary>{_two_columns(listed)}</details>")
    return "\n".join(parts)


def _check(check: Mapping[str, Any]) -> tuple[str, str, str, str]:
    passed = "yes" if check["passed"] else '<span class="bad">no</span>'
    return (
        escape(str(check["check"])),
        escape(_short(check["value"])),
        escape(_short(check["threshold"])),
        passed,
    )


def _runs(runs: Sequence[Run]) -> str:
    head = ("run", "steps", "tokens", "last loss", "median tokens/s", "peak memory, GiB", "resumed")
    rows = []
    for run in runs:
        steps = [record["step"] for record in run.records]
        loss = extract(run.records, "loss").values_P
        speed = extract(run.records, "tokens_per_second").values_P
        memory = extract(run.records, "memory_gib").values_P
        tokens = extract(run.records, "tokens").values_P
        cells = (
            escape(run.label),
            f"{max(steps):,}" if steps else "0",
            f"{tokens[-1]:,.0f}" if len(tokens) else "-",
            f"{loss[-1]:.4g}" if len(loss) else "-",
            f"{np.nanmedian(speed):,.0f}" if np.isfinite(speed).any() else "-",
            f"{np.nanmax(memory):.2f}" if np.isfinite(memory).any() else "-",
            str(len(event_steps(run.records, "resume"))),
        )
        rows.append(cells)
    return _table(head, rows)


def _settings(run: Run) -> str:
    listed = "".join(_pair(key, value) for key, value in run.settings.items())
    title = f"Settings of {escape(run.label)}"
    return f"<details><summary>{title}</summary>{_two_columns(listed)}</details>"


def _two_columns(rows: str) -> str:
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _pair(key: str, value: Any) -> str:
    return f"<tr><td>{escape(key)}</td><td>{escape(_short(value))}</td></tr>"


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
