"""The claims of docs/compatibility.md, on the suite's own transformers and without the network."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nexus_cli.config.convert import ConvertConfig
from nexus_cli.core.evaluate.generate import Sampling, generate
from nexus_cli.core.evaluate.perplexity import Subject
from nexus_cli.core.model.gpt_oss.loading import load_model, load_tokenizer
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import convert

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compatibility_check.py"
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 2
# None in its place makes every import of a module an ImportError.
WITHOUT_NEXUS = (
    "import runpy, sys; sys.modules['nexus_cli'] = None; sys.argv = sys.argv[1:];"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
UNASKED = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def _checks() -> list[str]:
    spec = importlib.util.spec_from_file_location("compatibility_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return list(module.CHECKS)


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose shared experts are heard."""
    root = tmp_path_factory.mktemp("compatibility")
    settings = {"init_strategy": "random", "start": "scaled", "output_scale": 2.0}
    config = ConvertConfig(model=str(tiny_model_dir), output=root / "model", **settings)
    convert.run(config, Workspace(root / "workspace"))
    return root / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Run Python code on a folder, with caches of its own and no terminal to ask at."""
    environment = os.environ | {
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_HUB_OFFLINE": "1",
    }

    def run(code: str, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def found(folder: Path, run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What stock transformers makes of the folder where Nexus cannot be imported."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    stop = model.generation_config.eos_token_id
    sampling = Sampling(temperature=0, max_tokens=16)
    greedy = list(generate(Subject(model), ids[0], stop, sampling, torch.Generator()))
    reference = tmp_path_factory.mktemp("reference") / "reference.pt"
    torch.save({"text": TEXT, "logits": logits, "greedy": greedy}, reference)
    done = run(WITHOUT_NEXUS, SCRIPT, folder, reference)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", _checks())
def test_stock_transformers_alone(found: dict[str, dict], check: str) -> None:
    assert found[check]["holds"], found[check]["saw"]


def test_a_user_who_says_nothing_about_trust_gets_an_error_too(folder: Path, run) -> None:
    done = run(UNASKED, folder)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]


def test_another_auto_class_than_that_of_language_models_is_refused(folder: Path, run) -> None:
    code = UNASKED.replace("AutoModelForCausalLM", "AutoModel").replace(
        "argv[1]", "argv[1], trust_remote_code=True"
    )
    done = run(code, folder)
    assert done.returncode != 0
    assert "Unrecognized configuration class" in done.stderr
