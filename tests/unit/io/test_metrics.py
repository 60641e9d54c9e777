"""The metrics file survives kills, resumes and numbers that JSON cannot hold."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from nexus_cli.errors import ArtifactError
from nexus_cli.io.metrics import MetricsWriter, read_metrics


def write(path: Path, *records: dict) -> Path:
    with MetricsWriter(path) as writer:
        for record in records:
            writer.write(record)
    return path


def test_each_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"loss": 2.0, "step": 1})
        assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert path.read_text().startswith('{"step": 1')


def test_a_number_that_is_not_finite_becomes_null_and_the_file_stays_json(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        {"step": 1, "loss": math.nan, "eval": {"domain": {"loss": math.inf}}, "loads": [-math.inf]},
    )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "eval": {"domain": {"loss": None}}, "loads": [None]}


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"step": 3, "event": "checkpoint"},
        {"step": 4, "loss": 4.0},
    )
    with path.open("a") as stream:
        stream.write('{"step": 5, "lo')
    with MetricsWriter(path, resume_step=3) as writer:
        writer.write({"step": 4, "loss": 40.0})
    losses = [record.get("loss") for record in read_metrics(path)]
    assert losses == [1.0, 2.0, 3.0, None, 40.0]


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl", resume_step=7) as writer:
        writer.write({"step": 8})
    assert read_metrics(tmp_path) == [{"step": 8}]


def test_a_new_run_does_not_append_to_an_old_one(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", {"step": 1})
    path = write(tmp_path / "metrics.jsonl", {"step": 2})
    assert read_metrics(path) == [{"step": 2}]


@pytest.mark.parametrize("step", [None, 1.5, "1", True])
def test_a_record_without_a_whole_step_is_refused(tmp_path: Path, step: object) -> None:
    with (
        MetricsWriter(tmp_path / "metrics.jsonl") as writer,
        pytest.raises(ValueError, match="step"),
    ):
        writer.write({"step": step})


def test_a_torn_last_line_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1})
    with path.open("a") as stream:
        stream.write('{"step": 2, "loss": 0.')
    assert read_metrics(path) == [{"step": 1}]
    assert "unfinished last line (2)" in caplog.text


@pytest.mark.parametrize("damage", ['{"step": 2, "loss": 0.', "[1]", '{"loss": 1}', "step 3"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)


def test_nan_written_by_another_tool_is_read_as_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "kd": -Infinity}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "kd": None}]


def test_a_run_folder_and_its_log_mean_the_metrics_beside_them(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1})
    (tmp_path / "training.log").write_text("words, not records\n")
    for source in (path, tmp_path, tmp_path / "training.log", str(tmp_path)):
        assert read_metrics(source) == [{"step": 1}]


def test_a_log_named_one_folder_up_finds_the_only_run_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trained").mkdir()
    write(tmp_path / "trained" / "metrics.jsonl", {"step": 1})
    assert read_metrics(tmp_path / "training.log") == [{"step": 1}]
    assert "trained" in caplog.text


def test_several_runs_below_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "metrics.jsonl", {"step": 1})
    with pytest.raises(ArtifactError, match="several runs") as caught:
        read_metrics(tmp_path)
    assert caught.value.hint is not None
    assert "--log-file" in caught.value.hint


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/training.log", "."])
def test_no_metrics_is_one_clear_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="no training metrics"):
        read_metrics(tmp_path / name)


def test_a_binary_file_is_not_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="not a metrics file"):
        read_metrics(tmp_path)


def test_records_come_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"step": 1}\n\n{"step": 2}'))
    assert read_metrics("-") == [{"step": 1}, {"step": 2}]
