"""Evaluation on a CUDA device: bf16 and fp32, against the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.evaluate.perplexity import log_probabilities
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_half_precision_logits_are_not_rounded() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(33, 256, device="cuda").bfloat16()
    head = torch.randn(500, 256, device="cuda").bfloat16()
    exact = torch.log_softmax(hidden.double() @ head.double().T, dim=-1)
    found = log_probabilities(hidden, head).double()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_figures_are_those_of_the_cpu(
    tiny_converted_dir: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": f"Words and {n} more. " * n}) for n in range(1, 9))
    )
    found = {}
    for device in ("cpu", "cuda"):
        config = ValidateConfig.model_validate(
            {
                "checkpoint": str(tiny_converted_dir),
                "domain": f"{text}@all",
                "general": None,
                "window": 64,
                "stride": 32,
                "dtype": dtype if device == "cuda" else "float32",
                "runtime": {"device": device},
                "output": tmp_path / f"{device}.json",
            }
        )
        validate.run(config, Workspace(tmp_path / device))
        report = json.loads((tmp_path / f"{device}.json").read_text())
        assert all(check["passed"] for check in report["checks"])
        found[device] = report["sets"]["domain"]["perplexity"]["model"]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=tolerance)
