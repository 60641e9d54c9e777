"""The teacher store: bytes a target, error of the gradient, speed, on real and synthetic logits.

python benchmarks/teacher_store.py [--positions 4096] [--no-loader] [--json]

On logits of the embedded model over its held-out general text, and on synthetic ones over the
full vocabulary (synthetic_logits.py has the recipe, some of which was tuned to a measured model:
the embedded model is the measurement, the synthetic positions have the real size). The student
near the teacher is the teacher with noise on its logits. Errors are of the gradient of the KL with
respect to the student's logits at the first 1,024 positions, as stored and read back, against the
full vocabulary's. Positions are all targets, so a byte a token is a byte a target; the text's own
ids are counted in ours and not in the older layouts. Speeds are of one core, the best of several
runs: coding with compression, and reading with decompression and decoding, in the stored order of
rows (a run's first pass) and in a random one, in which every row pays for its row group. The
loader reads a store of the demo's text, in a random order too, and is compared with a training
step.
"""

# ruff: noqa: N803, N806, N815 - the names of arrays end with their shapes

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

import store_layouts as layouts
from nexus_cli import embedded
from nexus_cli.config.shared import TextData
from nexus_cli.core.data.blocks import collate
from nexus_cli.core.distill.store_teacher import StoreTeacher, stored_batch
from nexus_cli.core.distill.topk import TopK, nucleus
from nexus_cli.core.kernels.head_top_k import top_k_of_logits
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.io.location import locate
from nexus_cli.io.teacher_store.columns import Codec, Layout
from nexus_cli.io.teacher_store.id_planes import VocabularyRanks
from nexus_cli.io.teacher_store.reader import open_store
from nexus_cli.io.teacher_store.rows import Kept, StoreRows
from nexus_cli.io.teacher_store.shard import ShardReader, write_shard
from nexus_cli.pipeline.text import load_blocks
from runs import DEMO, metrics, nexus, steps_of, versions
from synthetic_logits import (
    NEAR_NOISE,
    VOCAB_SIZE,
    Census,
    student_logits,
    synthetic_logits,
)

# Shape letters in this file: C positions of a chunk, V vocabulary, K kept entries, M positions,
# B rows, S positions of a row.

ROW = 1024  # targets of a row
REPEATS = 7
GRADIENT_POSITIONS = 1024
TIMED_ROWS = 64
DEFAULT = "default"


@dataclass(frozen=True)
class Profile:
    """What is kept."""

    top_k: int
    top_p: float = 0.98
    min_k: int = 4


PROFILES = {
    "k16": Profile(16, 1.0),
    DEFAULT: Profile(32),
    "k32": Profile(32, 1.0),
    "high": Profile(64),
    "k64": Profile(64, 1.0),
}


@dataclass(frozen=True)
class Part:
    """Consecutive positions: teacher, next tokens, and a student near the teacher."""

    logits_CV: Tensor
    labels_C: Tensor
    student_CV: Tensor


Parts = Callable[[], Iterator[Part]]


def synthetic_parts(positions: int) -> Iterator[Part]:
    """Of the recipe, over the full vocabulary."""
    for chunk in synthetic_logits(positions):
        yield Part(chunk.logits_CV, chunk.labels_C, student_logits(chunk))


def embedded_parts(positions: int) -> Parts:
    """The embedded model over held-out general text, in float32."""
    data = TextData.model_validate({"sources": "bundled-general@held-out", "seq_len": 512})
    blocks = load_blocks(data, embedded.MODEL_DIR, default_split="held-out").blocks
    model = load_model(embedded.MODEL_DIR, device="cpu", dtype=torch.float32)
    found: list[tuple[Tensor, Tensor]] = []
    for index in range(len(blocks)):
        batch = collate(blocks, np.array([index]))
        held_S = batch.loss_mask_BS[0, 1:]
        with torch.inference_mode():
            logits_SV = model(
                input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
            ).logits[0, :-1]
        found.append((logits_SV[held_S].float().clone(), batch.input_ids_BS[0, 1:][held_S]))
        if sum(len(labels_C) for _, labels_C in found) >= positions:
            break

    def parts() -> Iterator[Part]:
        generator = torch.Generator().manual_seed(0)
        for logits_CV, labels_C in found:
            noise_CV = torch.randn(logits_CV.shape, generator=generator)
            yield Part(logits_CV, labels_C, logits_CV + NEAR_NOISE * noise_CV)

    return parts


def keep(part: Part, profile: Profile) -> TopK:
    """What the store is given."""
    kept = TopK(*top_k_of_logits(part.logits_CV, part.labels_C, profile.top_k))
    return nucleus(kept, profile.top_p, profile.min_k)


class Stored:
    """Positions of one profile as a shard in memory, and as they are read back."""

    def __init__(self, profile: Profile, kept: list[TopK], labels_M: Tensor, vocab: int) -> None:
        """Code whole rows of ``ROW`` targets; what is left over is dropped."""
        self.exact = [torch.cat([getattr(k, n) for k in kept]) for n in _NAMES]
        num_rows = len(labels_M) // ROW
        text_BS = np.zeros((num_rows, ROW + 1), np.int32)
        text_BS[:, 1:] = labels_M[: num_rows * ROW].view(num_rows, ROW).numpy()
        ranks = VocabularyRanks.by_count(np.bincount(text_BS.reshape(-1), minlength=vocab))
        variable = profile.top_p < 1
        self._codec = Codec(Layout(ROW + 1, profile.top_k, variable, "codes"), ranks)
        self._rows = self._of(text_BS)
        self.data = self._write(self._rows)
        self.bytes_per_token = self.data.size / (num_rows * ROW)
        self.kept = self._codec.decode(self._codec.encode(self._rows, np.arange(num_rows))).kept
        assert np.array_equal(
            np.where(np.isfinite(self.kept.logprobs_MK), self.kept.ids_MK, 0),
            np.where(np.isfinite(self._rows.kept.logprobs_MK), self._rows.kept.ids_MK, 0),
        ), "ids are not exact"

    def _of(self, text_BS: NDArray[np.int32]) -> StoreRows:
        mask_BS = np.ones(text_BS.shape, np.bool_)
        mask_BS[:, 0] = False
        count = len(text_BS) * ROW
        ids, logprobs, tails, nll = (tensor[:count].numpy() for tensor in self.exact)
        return StoreRows(
            text_BS,
            np.tile(np.arange(ROW + 1, dtype=np.int32), (len(text_BS), 1)),
            mask_BS,
            np.zeros(len(text_BS), np.int16),
            Kept(ids.astype(np.int32), logprobs, tails, nll),
        )

    def _write(self, rows: StoreRows) -> pa.Buffer:
        sink = pa.BufferOutputStream()
        table = self._codec.encode(rows, np.arange(len(rows)))
        write_shard(sink, [table], seq_len=ROW + 1, compression="zstd", metadata={})
        return sink.getvalue()

    def quantisation(self) -> dict[str, float]:
        """KL that the codes add, mean over positions, and the largest error of a sum."""
        exact, read = self._rows.kept, self.kept
        columns = []
        for kept in (exact, read):
            logs_MX = np.concatenate([kept.logprobs_MK, kept.tails_MT[:, :1]], 1).astype(float)
            columns.append(logs_MX)
        used_MX = np.isfinite(columns[0]) & np.isfinite(columns[1])
        differences_MX = np.where(used_MX, columns[0], 0) - np.where(used_MX, columns[1], 0)
        p_MX = np.exp(columns[0])
        sums_M = np.exp(columns[1]).sum(1)
        return {
            "quantisation_kl": float((p_MX * differences_MX).sum(1).mean()),
            "sum_error": float(np.abs(sums_M - 1).max()),
            "mean_k": float(np.isfinite(read.logprobs_MK).sum(1).mean()),
            "nll_difference": float(read.nll_M.mean() - exact.nll_M.mean()),
        }

    def speeds(self) -> dict[str, float]:
        """Tokens a second of one core, coded and decoded."""
        times = -(-TIMED_ROWS // len(self._rows))
        many = replace(
            self._rows,
            **{
                name: np.concatenate([getattr(self._rows, name)] * times)
                for name in ("input_ids_BS", "position_ids_BS", "loss_mask_BS", "source_B")
            },
            kept=Kept(
                *(np.concatenate([getattr(self._rows.kept, n)] * times) for n in _KEPT_NAMES)
            ),
        )
        tokens = len(many) * ROW
        encode = best(lambda: self._write(many))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "shard.parquet"
            path.write_bytes(self._write(many).to_pybytes())
            stored = np.arange(len(many))
            shuffled = np.random.default_rng(0).permutation(stored)

            def read(order: NDArray[np.int64]) -> None:
                shard = ShardReader(locate(path), seq_len=ROW + 1)
                for start in range(0, len(order), 16):
                    rows = [shard.row(int(i)) for i in order[start : start + 16]]
                    self._codec.decode(pa.concat_tables(rows))

            decode, scattered = best(lambda: read(stored)), best(lambda: read(shuffled))
        return {
            "encode_tokens_per_s": tokens / encode,
            "decode_tokens_per_s": tokens / decode,
            "decode_shuffled_tokens_per_s": tokens / scattered,
        }

    def target(self, start: int, count: int) -> layouts.Target:
        """What is read back of some positions."""
        part = slice(start, start + count)
        logprobs_CK = torch.from_numpy(self.kept.logprobs_MK[part])
        tail_C = torch.from_numpy(self.kept.tails_MT[part, 0]).exp()
        return layouts.Target(
            torch.from_numpy(self.kept.ids_MK[part]).long(), logprobs_CK.exp(), tail_C
        )


_NAMES = ("ids_NK", "logprobs_NK", "tails_NT", "nll_N")
_KEPT_NAMES = ("ids_MK", "logprobs_MK", "tails_MT", "nll_M")


def best(act: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(parts: Parts, vocab: int, census: Census) -> dict[str, Any]:
    """All profiles and both older layouts on the same positions, in two passes over them."""
    kept: dict[str, list[TopK]] = {name: [] for name in PROFILES}
    labels, top = [], []
    for part in parts():
        census.add(part.logits_CV, part.labels_C, part.student_CV)
        labels.append(part.labels_C)
        for name, profile in PROFILES.items():
            kept[name].append(keep(part, profile))
        logits_CK, ids_CK = part.logits_CV.topk(layouts.POLYNOMIAL_K)
        log_sum_C1 = part.logits_CV.logsumexp(-1, keepdim=True)
        top.append((ids_CK, logits_CK, logits_CK - log_sum_C1))
    labels_M = torch.cat(labels)
    stored = {name: Stored(PROFILES[name], kept.pop(name), labels_M, vocab) for name in PROFILES}
    top_ids, top_logits, top_logprobs = (torch.cat(each) for each in zip(*top, strict=True))
    records = layouts.polynomial_encode(top_ids, top_logprobs)
    errors = gradient_errors(parts, stored, records)
    table: dict[str, Any] = {}
    for name, store in stored.items():
        table[name] = {
            "bytes_per_token": store.bytes_per_token,
            "gradient_error": errors[name].value,
            "gradient_cosine": errors[name].cosine,
            **store.quantisation(),
            **store.speeds(),
        }
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        sizes = {
            "original": layouts.original_bytes(top_ids, top_logits, Path(first)),
            "polynomial": layouts.polynomial_bytes(records, Path(second)),
        }
    for name, size in sizes.items():
        table[name] = {
            "bytes_per_token": size,
            "gradient_error": errors[name].value,
            "gradient_cosine": errors[name].cosine,
        }
    table["original"]["router_bytes_per_token_120b"] = layouts.ROUTER_BYTES
    return {**census.means(), "positions": len(labels_M), "profiles": table}


def gradient_errors(
    parts: Parts, stored: dict[str, Stored], records: NDArray[np.uint8]
) -> dict[str, layouts.GradientError]:
    """Of every layout, over the same positions."""
    errors = {name: layouts.GradientError() for name in (*stored, "original", "polynomial")}
    start, limit = 0, min(GRADIENT_POSITIONS, *(len(store.kept) for store in stored.values()))
    for part in parts():
        count = min(len(part.labels_C), limit - start)
        if count <= 0:
            break
        logits_CV, place = part.logits_CV[:count], slice(start, start + count)
        p_CV = torch.softmax(logits_CV, -1)
        q_CV = torch.softmax(part.student_CV[:count], -1)
        for name, store in stored.items():
            target = store.target(start, count)
            errors[name].add(q_CV, p_CV, layouts.bucket_gradient(q_CV, target))
        logits_CK, ids_CK = logits_CV.topk(layouts.ORIGINAL_K)
        older = {
            "original": layouts.original_target(ids_CK, logits_CK),
            "polynomial": layouts.polynomial_target(records[place]),
        }
        for name, target in older.items():
            errors[name].add(q_CV, p_CV, layouts.sparse_gradient(q_CV, target))
        start += count
    return errors


def loader(batch_size: int = 4, seq_len: int = 512) -> dict[str, float]:
    """Tokens a second of reading a store of the demo's text, and of a training step."""
    common = ["-c", DEMO, "--batch-size", batch_size, "--set", f"data.seq_len={seq_len}"]
    with tempfile.TemporaryDirectory() as name:
        folder, store_dir = Path(name), Path(name) / "store"
        nexus("convert", "-w", folder, "--init-strategy", "random")
        nexus(
            *("precompute", "-w", folder, *common, "--teacher-model", "embedded"),
            *("--num-steps", 12, "--output-dir", store_dir),
        )
        nexus(
            *("train-offline", "-w", folder, *common, "--precomputed-teacher", store_dir),
            *("--max-steps", 12, "--set", "evaluation.every=null", "--output-dir", folder / "run"),
            *("--set", "runtime.save_every=null", "--set", "runtime.watch_every=1"),
        )
        steps = steps_of(metrics(folder / "run"))[1:]
        step = float(np.median([sum(record["seconds"].values()) for record in steps]))
        order = np.random.default_rng(0).permutation(len(open_store(locate(store_dir))))

        def read() -> None:
            store = open_store(locate(store_dir))  # afresh: it remembers what it has decoded
            teacher = StoreTeacher(store)
            for start in range(0, len(order), batch_size):
                teacher.signal(stored_batch(store, order[start : start + batch_size]))

        seconds = best(read)
    tokens = batch_size * seq_len
    reading, training = len(order) * seq_len / seconds, tokens / step
    return {
        "loader_tokens_per_s": reading,
        "training_tokens_per_s": training,
        "loader_times_training": reading / training,
    }


def show(title: str, found: dict[str, Any]) -> None:
    """One table."""
    print(
        f"{title}: {found['positions']:,} positions, entropy {found['entropy_nats']:.2f} nats, "
        f"mean K {found['k']:.1f}, student at KL {found['kl_nats']:.3f}"
    )
    print(f"{'':12}bytes/token     K  gradient error  cosine  code kl   enc M/s  dec M/s  random")
    for name, row in found["profiles"].items():
        print(
            f"{name:12}{row['bytes_per_token']:11.1f}{row.get('mean_k', float('nan')):6.1f}"
            f"{row['gradient_error']:16.4f}{row['gradient_cosine']:8.4f}"
            f"{row.get('quantisation_kl', float('nan')):9.1e}"
            f"{row.get('encode_tokens_per_s', float('nan')) / 1e6:10.2f}"
            f"{row.get('decode_tokens_per_s', float('nan')) / 1e6:9.2f}"
            f"{row.get('decode_shuffled_tokens_per_s', float('nan')) / 1e6:8.2f}"
        )


def musts(found: dict[str, Any]) -> dict[str, bool]:
    """What the default profile has to hold on both kinds of logits, and the loader if it ran."""
    held = {}
    for name in ("synthetic", "embedded"):
        table = found[name]["profiles"]
        row, original = table[DEFAULT], table["original"]
        held |= {
            f"{name}: at most 50 bytes a token": row["bytes_per_token"] <= 50,
            f"{name}: a quarter of top-100's error": row["gradient_error"]
            < original["gradient_error"] / 4,
            f"{name}: sums to one within 1e-6": row["sum_error"] < 1e-6,
            f"{name}: codes add under 1e-4 nats": row["quantisation_kl"] < 1e-4,
            f"{name}: coded and read above 1 M tokens a second": min(
                row["encode_tokens_per_s"], row["decode_tokens_per_s"]
            )
            > 1e6,
        }
    if "loader_times_training" in found:
        held["loader at 20 times the training"] = found["loader_times_training"] >= 20
    return held


def main() -> None:
    """Measure; with --json, the last line is one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--no-loader", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    census = Census()
    synthetic = measure(lambda: synthetic_parts(args.positions), VOCAB_SIZE, census)
    census.check()
    show("synthetic", synthetic)
    model = measure(embedded_parts(args.positions), 8256, Census())
    show("embedded model", model)
    feeding = {} if args.no_loader else loader()
    for name, value in feeding.items():
        print(f"{name:24}{value:14,.1f}")
    found = {"synthetic": synthetic, "embedded": model, **feeding}
    held = musts(found)
    for name, holds in held.items():
        print(f"{'holds' if holds else 'MISSED':8}{name}")
    if args.json:
        default = synthetic["profiles"][DEFAULT]
        head = {
            name: default[name]
            for name in (
                "bytes_per_token",
                "gradient_error",
                "encode_tokens_per_s",
                "decode_tokens_per_s",
            )
        }
        head["gradient_error_top100"] = synthetic["profiles"]["original"]["gradient_error"]
        head["profiles"] = synthetic["profiles"]
        print(json.dumps({**versions(), **head, "musts": held, **found}))


if __name__ == "__main__":
    main()
