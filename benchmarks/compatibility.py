"""Who else can use a model folder: stock transformers, lm-evaluation-harness, other versions.

python benchmarks/compatibility.py [--transformers 5.17.0 5.24.0] [--lm-eval 0.4.13]
                                   [--environments DIR] [--json]

Nexus converts the embedded model with shared experts that matter, trains it for two steps, its
routers too, and turns the checkpoint into an adapter and back. For each version of transformers,
in virtual environments made with pip: stock transformers, where Nexus is not installed, loads all
three folders (the checks are compatibility_check.py's); lm-evaluation-harness scores held-out text,
which `nexus validate` scores in the same windows; and Nexus itself does all of it again. Everything
is float32 on the CPU. Making six environments takes minutes and 9 GB; --environments keeps them.
The exit code is 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compatibility_harness import WINDOW, as_the_harness_counts, harness
from environments import environment, pinned, run
from nexus_cli import embedded
from nexus_cli.core.evaluate.generate import Sampling, generate
from nexus_cli.core.evaluate.perplexity import Subject
from nexus_cli.core.model.gpt_oss.loading import load_model, load_tokenizer
from nexus_cli.io import manifest
from runs import ROOT, versions

RELATIVE = 1e-4  # what passes for equal between two perplexities in float32
CHECK = Path(__file__).with_name("compatibility_check.py")
NEW_TOKENS = 16  # as CHECK
SHORT_TEXTS, JOINED_TEXTS = 8, 12
PROMPT = 700  # characters; the sliding window of the embedded model is 128 tokens
CONVERT = ("--init-strategy", "random", "--start", "scaled", "--output-scale", "1")
TRAIN = (
    *("--data", "bundled-general", "--max-steps", "2", "--batch-size", "2", "--train-router"),
    *("--learning-rate", "2e-3", "--set", "optimizer.router_learning_rate=2e-3"),
    *("--set", "data.seq_len=128", "--set", "evaluation.every=null", "--device", "cpu"),
)
AS_LM_EVAL = (
    *("--baseline", "self", "--set", "general=null", "--set", "dtype=float32", "--device", "cpu"),
    *("--set", f"window={WINDOW}", "--set", f"stride={WINDOW}", "--set", "score_end=false"),
    *("--set", "runtime.batch_size=1"),
)


def write_texts(path: Path) -> list[str]:
    """Held-out plain text of the corpus: some texts alone, and one of many windows."""
    with gzip.open(embedded.DATA_DIR / "general.held-out.jsonl.gz", "rt") as lines:
        texts = [row["text"] for row in map(json.loads, lines) if "text" in row]
    joined = texts[SHORT_TEXTS : SHORT_TEXTS + JOINED_TEXTS]
    texts = [*texts[:SHORT_TEXTS], "\n\n".join(joined) + "\n"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def pipeline(python: Path, folder: Path, texts: Path) -> dict[str, dict[str, Any]]:
    """Convert, train, adapter and back, validate; what `nexus validate` says of two models."""
    folder.mkdir()

    def nexus(*words: object) -> None:
        run([python, "-m", "nexus_cli", *words], folder)

    nexus("convert", "-w", folder, *CONVERT)
    nexus("train", "-w", folder, *TRAIN)
    checkpoint = folder / "train" / "checkpoint-2"
    nexus("convert", "--input", checkpoint, "--adapter", "--output", folder / "adapter")
    nexus("convert", "--input", folder / "adapter", "--output", folder / "from-adapter")
    found = {}
    for name, model in {"converted": folder / "convert/model", "trained": checkpoint}.items():
        report = folder / f"{name}.json"
        words = ["--model", model, "--data", f"{texts}@all", "--output", report, *AS_LM_EVAL]
        nexus("validate", "-w", folder, *words)
        found[name] = json.loads(report.read_text())["sets"]["domain"]
    return found


def write_reference(path: Path, folder: Path, text: str) -> torch.Tensor:
    """What Nexus computes from a folder, for the checks; returns the logits ``[1, S, V]``."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    sampling = Sampling(temperature=0, max_tokens=NEW_TOKENS)
    stop, chance = model.generation_config.eos_token_id, torch.Generator()
    greedy = list(generate(Subject(model), ids[0], stop, sampling, chance))
    torch.save({"text": text, "logits": logits, "greedy": greedy}, path)
    return logits


def stock(python: Path, work: Path, model: Path, reference: Path) -> dict[str, dict[str, Any]]:
    """The checks of one folder in an environment without Nexus."""
    done = run([python, CHECK, model, reference], work, HF_HOME=str(work / "hf"))
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def refused_by_the_harness(python: Path, model: Path, texts: Path, work: Path) -> bool:
    """Whether lm-eval fails without trust_remote_code, and says what to pass."""
    try:
        harness(python, model, texts, work, trust=False)
    except subprocess.CalledProcessError as error:
        return "trust_remote_code=True" in str(error.stderr)
    return False


def apart(one: float, other: float) -> float:
    """How far apart two figures are, relative to the second."""
    return abs(one / other - 1)


class Record:
    """What holds, and the figures behind it."""

    def __init__(self) -> None:
        self.musts: dict[str, bool] = {}
        self.figures: dict[str, Any] = {}

    def add(self, name: str, holds: bool, figure: Any, shown: str | None = None) -> None:
        """Keep one result, and print it."""
        self.musts[name], self.figures[name] = holds, figure
        words = str(figure) if shown is None else shown
        print(f"{'holds' if holds else 'MISSED':8}{name:80} {words[:72]}", flush=True)

    def near(self, name: str, found: float, expected: float) -> None:
        """Two figures within the tolerance."""
        distance = apart(found, expected)
        figure = {"found": found, "expected": expected, "apart": distance}
        shown = f"{found:.6f} for {expected:.6f}: {distance:.1e} apart"
        self.add(name, distance <= RELATIVE, figure, shown)


def one_version(
    record: Record, version: str, args: argparse.Namespace, work: Path, ours: dict[str, Any]
) -> None:
    """All that one version of transformers has to do."""
    base = [pinned("torch"), f"transformers=={version}"]
    label, root, texts = f"transformers {version}", args.environments, work / "texts.jsonl"
    place = work / version
    place.mkdir()
    python = environment(root / f"stock-{version}", base)
    for name, model in ours["models"].items():
        for check, found in stock(python, place, model, work / f"{name}.pt").items():
            record.add(f"{label}, {name}: {check}", found["holds"], found["saw"])
    python = environment(root / f"harness-{version}", [*base, f"lm_eval[hf]=={args.lm_eval}"])
    for name in ours["validate"]:
        expected = as_the_harness_counts(ours["validate"][name], texts)
        model = ours["models"][name]
        for metric, value in harness(python, model, texts, place, trust=True).items():
            record.near(f"{label}, {name}: lm-eval's {metric}", value, expected[metric])
    refused = refused_by_the_harness(python, ours["models"]["converted"], texts, place)
    record.add(f"{label}: lm-eval refuses without trust", refused, refused)
    python = environment(root / f"nexus-{version}", [*base, f"-e {ROOT}"])
    for name, figures in pipeline(python, place / "nexus", texts).items():
        expected = ours["validate"][name]["perplexity"]["model"]
        found = figures["perplexity"]["model"]
        record.near(f"{label}, {name}: perplexity by Nexus", found, expected)


def benchmark(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Make the models, then ask every version."""
    texts = write_texts(work / "texts.jsonl")
    here = work / "here"
    validated = pipeline(Path(sys.executable), here, work / "texts.jsonl")
    models = {
        "converted": here / "convert" / "model",
        "trained": here / "train" / "checkpoint-2",
        "from an adapter": here / "from-adapter",
    }
    prompt = texts[0][:PROMPT]
    logits = {n: write_reference(work / f"{n}.pt", m, prompt) for n, m in models.items()}
    record = Record()
    same = torch.equal(logits["trained"], logits["from an adapter"])
    record.add("an adapter turned back is the checkpoint, bit for bit", same, same)
    moved = float((logits["trained"] - logits["converted"]).abs().max())
    record.add("training moved the logits", moved > 100 * RELATIVE, moved)
    base = write_reference(work / "base.pt", embedded.MODEL_DIR, prompt)
    moved = float((logits["converted"] - base).abs().max())
    record.add("the shared experts move the logits", moved > 100 * RELATIVE, moved)
    ours = {"models": models, "validate": validated}
    for version in args.transformers:
        one_version(record, version, args, work, ours)
    return {"musts": record.musts, "figures": record.figures, "validate": validated}


def main() -> None:
    """Print what holds; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", nargs="+", default=["5.17.0", "5.24.0"])
    parser.add_argument("--lm-eval", default="0.4.13")
    parser.add_argument("--environments", type=Path, help="where to keep them; by default nowhere")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nexus-compatibility-") as name:
        args.environments = (args.environments or Path(name) / "environments").absolute()
        found = benchmark(args, Path(name).resolve())
    missed = [must for must, holds in found["musts"].items() if not holds]
    print(f"{len(found['musts']) - len(missed)} of {len(found['musts'])} hold")
    if args.json:
        asked = {"transformers": args.transformers, "lm_eval": args.lm_eval}
        print(json.dumps({**versions(), "nexus": manifest.environment(), **asked, **found}))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
