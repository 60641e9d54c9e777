import json

import pytest
from typer.testing import CliRunner

from nexus_cli.cli.app import app


@pytest.fixture(scope="module")
def model(make_tiny_model, tmp_path_factory):
    """The tiny model with as many experts as the 20B, so that 24 of them can be chosen."""
    shape = {"num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4}
    return make_tiny_model(tmp_path_factory.mktemp("models") / "m", **shape)


def test_the_lines_of_the_spec_work_one_after_the_other(nexus, model, tmp_path, monkeypatch):
    line = "collect --target-tokens 3000 --max-candidates 300 --output data/router_probs.npz"
    result = nexus(*line.split(), "--model", model, "--data", "bundled-general", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stdout
    report = json.loads((tmp_path / "data" / "collection_report.json").read_text())
    assert report["coverage"]["candidates"]["documents"] == 300
    line = "pca --input data/router_probs.npz --output data/pca_stats.json --top-k 24 --no-plots"
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, line.split(), catch_exceptions=False).exit_code == 0
    stats = json.loads((tmp_path / "data" / "pca_stats.json").read_text())
    assert stats["model_fingerprint"] == report["model_fingerprint"]
    assert stats["num_experts"] == 32


def test_batch_select_is_a_flag(nexus, model, tmp_path):
    line = "collect --target-tokens 1000 --max-candidates 40 --batch-select 50 --output o.npz"
    result = nexus(*line.split(), "--model", model, "--data", "bundled-general", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "collection_report.json").read_text())
    assert report["batch_select"] == 50
    # one round: no gain was computed a second time
    assert report["coverage"]["selected"]["gains_computed"] == 40
    described = nexus(
        *line.replace("o.npz", "p.npz").split(), "--model", model, "--data", "bundled-general",
        "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert "1,000 tokens, 50 texts a round" in described.stdout


def test_a_round_of_no_text_is_refused(nexus, tmp_path):
    result = nexus("collect", "--batch-select", "0", cwd=tmp_path)
    assert result.returncode == 2
    assert "collect.batch_select" in result.stderr


def test_a_mistake_is_one_line_and_a_code(nexus, tmp_path):
    result = nexus("collect", "--target-tokens", "0", cwd=tmp_path)
    assert result.returncode == 2
    assert "collect.target_tokens" in result.stderr
    assert "Traceback" not in result.stderr
