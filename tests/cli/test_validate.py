"""``nexus validate`` and ``nexus plot`` as processes: exit codes, pipes, what goes where."""

from __future__ import annotations

import json
from pathlib import Path

COMMON = ("--device", "cpu", "--set", "dtype=float32", "--set", "max_documents=2")


def test_checks_then_chat_through_a_pipe(nexus, tiny_converted_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"Some words, {n}."}) for n in range(4)))
    done = nexus(
        "validate",
        "--model",
        tiny_converted_dir,
        "--baseline",
        "self",
        "--compute-perplexity",
        "--chat",
        "--json",
        "--data",
        f"{text}@all",
        "--general-data",
        f"{text}@all",
        *COMMON,
        cwd=tmp_path,
        stdin="/max 2\nhi\n/quit\n",
    )
    assert done.returncode == 0, done.stderr
    report, end = json.JSONDecoder().raw_decode(done.stdout)
    assert report["format"] == "nexus.report/1"
    assert "at most 2 tokens" in done.stdout[end:]
    assert (tmp_path / "runs/default/validate/report.json").is_file()
    drawn = nexus("plot", "--output", "plots", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "plots/result.png").is_file()


def test_a_failed_check_exits_with_6_and_leaves_its_report(
    nexus, tiny_converted_dir: Path, make_tiny_model, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=5)
    metadata = tiny_converted_dir / "conversion_metadata.json"
    assert json.loads(metadata.read_text())["base"]["path"] != str(other)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_converted_dir.iterdir():
        if file.name != metadata.name and file.is_file():
            (copy / file.name).symlink_to(file)
    done = nexus(
        "validate",
        "--model",
        copy,
        "--baseline",
        other,
        "--set",
        "compute_perplexity=false",
        "--output",
        tmp_path / "report.json",
        *COMMON,
    )
    assert done.returncode == 6, done.stderr
    assert "error: validation failed: frozen tensors that differ" in done.stderr
    assert "Traceback" not in done.stderr
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert not checks[0]["passed"]


def test_plot_without_metrics_exits_with_4_and_a_hint(nexus, tmp_path: Path) -> None:
    done = nexus("plot", "--log-file", "outputs/training.log", cwd=tmp_path)
    assert done.returncode == 4
    assert "no training metrics at outputs/training.log" in done.stderr
    assert "hint: " in done.stderr
