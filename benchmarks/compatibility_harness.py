"""Perplexity by lm-evaluation-harness, from a task over local text, for compatibility.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from environments import run

TASK = "nexus_held_out"
METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
WINDOW = 2048


def write_task(folder: Path, texts: Path) -> None:
    """A task that scores every ``text`` of a JSON-lines file, each from its beginning."""
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(texts)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in METRICS],
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{TASK}.yaml").write_text(json.dumps(task, indent=2))  # JSON is YAML


def harness(python: Path, model: Path, texts: Path, folder: Path, trust: bool) -> dict[str, float]:
    """What ``lm_eval --model hf`` finds on the texts.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    write_task(folder / "tasks", texts)
    found = folder / "found.json"
    arguments = f"pretrained={model},dtype=float32,max_length={WINDOW}"
    arguments += ",trust_remote_code=True" * trust
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", arguments]
    command += ["--tasks", TASK, "--include_path", folder / "tasks", "--device", "cpu"]
    command += ["--batch_size", "2", "--output_path", found]
    run(command, folder, loud=trust, HF_HOME=str(folder / "hf"))
    (written,) = folder.glob("found_*.json")  # it adds the time to the name
    results = json.loads(written.read_text())["results"][TASK]
    written.unlink()
    return {name: results[f"{name},none"] for name in METRICS}


def as_the_harness_counts(figures: dict[str, Any], texts: Path) -> dict[str, float]:
    """The same three figures from a set of ``nexus validate``'s report.

    Words are what lies between white space, and bytes those of the text in UTF-8, as lm-eval's
    ``PerplexityTask`` counts them.
    """
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    words = sum(len(re.split(r"\s+", text)) for text in documents)
    num_bytes = sum(len(text.encode()) for text in documents)
    nats = math.log(figures["perplexity"]["model"]) * figures["tokens"]
    return {
        "word_perplexity": math.exp(nats / words),
        "byte_perplexity": math.exp(nats / num_bytes),
        "bits_per_byte": figures["bits_per_byte"]["model"],
    }
