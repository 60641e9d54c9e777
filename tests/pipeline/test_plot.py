"""``nexus plot``: figures, notes and one page from whatever a run left behind."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nexus_cli.config.plot import PlotConfig
from nexus_cli.errors import ArtifactError, WorkspaceError
from nexus_cli.io.metrics import MetricsWriter
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import plot

REPORT = {
    "format": "nexus.report/1",
    "checks": [
        {"check": "gate off equals base", "value": 0.0, "threshold": 0.0, "passed": True},
        {"check": "general <perplexity>", "value": 4.0, "threshold": 1.0, "passed": False},
    ],
    "settings": {"window": 2048, "bos": "as tokenised"},
    "sets": {},
    "summary": {
        "domain_perplexity": {"base": 12.0, "model": 9.0},
        "general_perplexity": {"base": 20.0, "model": None},
        "kl_to_base": 0.01,
        "trained_parameters": 10,
        "total_parameters": 1000,
    },
}


def make_run(folder: Path, steps: int = 30, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.write({"step": 0, "event": "start", "config": {"lr": 0.5, "name": "<b>"}})
        for step in range(1, steps + 1):
            loss = float("nan") if step == 4 else 3.0 / step
            record = {"step": step, "loss": loss, "ce": loss, "kd": 0.1, "temperature": 1.0}
            writer.write(record | {"grad_norm": 1.0 / step, "clipped": step < 5} | more)
        writer.write({"step": steps, "eval": {"domain": {"loss": 1.0, "perplexity": 2.7}}})
        writer.write({"step": steps, "event": "checkpoint"})
    return folder


def make_short_run(folder: Path, steps: int) -> Path:
    """One measure alone: quick to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for step in range(1, steps + 1):
            writer.write({"step": step, "loss": 3.0 / step})
    return folder


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.sources += [v for k, v in values.items() if k in ("src", "href") and v]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_page(folder: Path) -> str:
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[^\"]*", "", text))
    return text


def test_a_finished_run_becomes_figures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(tmp_path / "ws")
    make_run(workspace.stage_dir("train"))
    (workspace.stage_dir("validate")).mkdir()
    (workspace.stage_dir("validate") / "report.json").write_text(json.dumps(REPORT))
    plot.run(PlotConfig(), workspace)
    said = capsys.readouterr()
    folder = workspace.stage_dir("plot")
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {"losses", "evaluation", "optimiser", "result"}
    assert {path.stem for path in folder.glob("*.svg")} == pictures
    page = read_page(folder)
    assert "-25.0%" in page  # 12 to 9
    assert "general &lt;perplexity&gt;" in page
    assert "config.lr" in page
    assert "&lt;b&gt;" in page
    assert "temperature" not in page.lower().split("<h2>notes")[0]
    assert "Temperature of kd: 1 throughout" in page
    assert "not a finite number at 1 steps, first at step 4" in " ".join(said.err.split())
    assert "report.html" in said.out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"train", "validate"}
    assert "losses.png" in manifest["outputs"]


def test_several_runs_share_the_figures(tmp_path: Path) -> None:
    runs = [
        make_short_run(tmp_path / name / "trained", steps) for name, steps in (("a", 9), ("b", 1))
    ]
    config = PlotConfig(log_file=tuple(map(str, runs)), output=tmp_path / "plots")
    plot.run(config, Workspace(tmp_path / "ws"))
    page = read_page(tmp_path / "plots")
    assert "a/trained" in page
    assert "b/trained" in page
    assert not (tmp_path / "ws").exists()


def test_the_specs_line_finds_the_run_below_its_log(tmp_path: Path) -> None:
    make_short_run(tmp_path / "outputs" / "trained", 3)
    config = PlotConfig(
        log_file=str(tmp_path / "outputs/training.log"), output=tmp_path / "plots", smooth_window=50
    )
    plot.run(config, Workspace(tmp_path / "ws"))
    assert (tmp_path / "plots" / "losses.png").is_file()


def test_drawing_again_follows_a_run_that_goes_on(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    make_short_run(workspace.stage_dir("train"), 5)
    plot.run(PlotConfig(), workspace)
    first = (workspace.stage_dir("plot") / "losses.png").read_bytes()
    plot.run(PlotConfig(), workspace)
    assert (workspace.stage_dir("plot") / "losses.png").read_bytes() == first
    make_short_run(workspace.stage_dir("train"), 9)
    plot.run(PlotConfig(), workspace)
    assert (workspace.stage_dir("plot") / "losses.png").read_bytes() != first


def test_a_run_of_thousands_of_steps_stays_a_small_page(tmp_path: Path) -> None:
    make_short_run(tmp_path / "long", 5000)
    plot.run(
        PlotConfig(log_file=str(tmp_path / "long"), output=tmp_path / "p"), Workspace(tmp_path)
    )
    assert (tmp_path / "p" / "report.html").stat().st_size < 300_000


def test_a_run_without_a_step_yet_is_said_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        writer.write({"step": 0, "event": "start"})
    plot.run(PlotConfig(log_file=str(folder), output=tmp_path / "p"), Workspace(tmp_path))
    said = " ".join(capsys.readouterr().err.split())
    assert "no training step was recorded yet" in said
    assert not list((tmp_path / "p").glob("*.png"))


def test_records_on_stdin_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"step": 1, "loss": 2.0}\n'))
    plot.run(PlotConfig(log_file="-", output=tmp_path / "p"), Workspace(tmp_path))
    assert (tmp_path / "p" / "losses.png").is_file()


def test_nothing_to_draw_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no training and no validation"):
        plot.run(PlotConfig(), Workspace(tmp_path))


def test_a_report_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"format": "other/1"}')
    with pytest.raises(ArtifactError, match=r"nexus\.report/1"):
        plot.run(PlotConfig(report=tmp_path / "report.json"), Workspace(tmp_path))


def test_a_dry_run_lists_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(tmp_path)
    make_short_run(workspace.stage_dir("train"), 1)
    plot.run(PlotConfig(), workspace, dry_run=True)
    assert "metrics.jsonl" in capsys.readouterr().out.replace("\n", "")
    assert not workspace.stage_dir("plot").exists()


def test_a_file_in_the_current_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_short_run(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    plot.run(PlotConfig(log_file="metrics.jsonl", output=Path("p")), Workspace(tmp_path))
    assert (tmp_path / "p" / "losses.png").is_file()


def test_records_of_nothing_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ArtifactError, match="no records"):
        plot.run(
            PlotConfig(log_file=str(tmp_path / "empty.txt"), output=tmp_path / "p"),
            Workspace(tmp_path),
        )
    assert not (tmp_path / "p").exists()
