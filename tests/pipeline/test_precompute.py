import copy
import errno
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter, namedtuple
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.config.train import TrainConfig
from nexus_cli.core.data.batch import Batch
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError, WorkspaceError
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.location import locate
from nexus_cli.io.model_dir import read_shape
from nexus_cli.io.teacher_store import writer as store_writer
from nexus_cli.io.teacher_store.reader import open_store
from nexus_cli.io.teacher_store.writer import StoreWriter
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import precompute
from nexus_cli.pipeline.precompute_dry_run import _store_bytes
from nexus_cli.pipeline.teacher_rows import Question, ask
from nexus_cli.pipeline.training.request import offline_request

# Shape letters: B sequences, S positions, V vocabulary, K kept entries, T temperatures,
# L layers, E experts, M positions whose next token is a target.

SEQ_LEN = 32
# The tiny model is unsure of everything: this mass takes from 2 to over 9 tokens.
TOP_P, MIN_K, TOP_K = 0.015, 4, 9
TEXT = ("input_ids_BS", "position_ids_BS", "loss_mask_BS", "source_B")


def write_text(path, num_documents, seed):
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(num_documents):
            words = [f"{'abcdefgh'[i % 8]}{i}" for i in rng.integers(500, size=40)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return {
        "large": write_text(folder / "large.jsonl", 40, 0),
        "small": write_text(folder / "small.jsonl", 6, 1),
    }


@pytest.fixture(scope="module")
def settings(tiny_model_dir, text):
    """Settings of a store of 12 sequences in 6 shards, of the numbers as they are."""

    def make(**changes):
        data = {"sources": f"{text['large']}@all,{text['small']}@all", "seq_len": SEQ_LEN}
        values = {
            "model": str(tiny_model_dir),
            "data": data | changes.pop("data", {}),
            "num_steps": 6,
            "batch_size": 2,
            "top_k": TOP_K,
            "top_p": TOP_P,
            "min_k": MIN_K,
            "values": "float32",
            "runtime": {"device": "cpu"},
        }
        return PrecomputeConfig(**values | changes)

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A workspace with a finished store: never write to it."""
    workspace = Workspace(tmp_path_factory.mktemp("finished"))
    precompute.run(settings(), workspace)
    return workspace


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def stock(tiny_model_dir):
    """What transformers' own GPT-OSS says of a document: logits, and those of every router."""
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    theirs = theirs.float()

    @torch.no_grad()
    def say(ids):
        routed = []

        def note(router, inputs):
            x_TH = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            routed.append(x_TH @ router.weight.double().T + router.bias.double())

        routers = [layer.mlp.router for layer in theirs.model.layers]
        hooks = [router.register_forward_pre_hook(note) for router in routers]
        logits_SV = theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        return logits_SV.double().numpy(), torch.stack(routed, 1).numpy()

    return say


@pytest.fixture(scope="module")
def oracle(stock):
    """Log-probabilities and router logits at the held positions, document by document."""

    def say(rows):
        logps, routers = [], []
        for b in range(len(rows)):
            starts = [*np.flatnonzero(rows.position_ids_BS[b] == 0), SEQ_LEN]
            said = [
                stock(rows.input_ids_BS[b, start:stop].tolist()) for start, stop in pairwise(starts)
            ]
            logits_SV, router_SLE = (np.concatenate(parts) for parts in zip(*said, strict=True))
            held_S = rows.held_BS[b]
            top_S1 = logits_SV.max(-1, keepdims=True)
            norm_S1 = top_S1 + np.log(np.exp(logits_SV - top_S1).sum(-1, keepdims=True))
            logps.append((logits_SV - norm_S1)[held_S])
            routers.append(router_SLE[held_S])
        return np.concatenate(logps), np.concatenate(routers)

    return say


def open_at(folder):
    return open_store(locate(folder))


def rows_of(folder):
    store = open_at(folder)
    return store.rows(range(len(store)))


def shards_of(folder):
    return [(shard.file, shard.sha256) for shard in open_at(folder).manifest.shards]


def listen(caplog):
    """The package's log does not reach the root logger, where caplog listens."""
    caplog.set_level("INFO", logger="nexus_cli")
    logging.getLogger("nexus_cli").addHandler(caplog.handler)


@pytest.fixture
def said(caplog):
    listen(caplog)
    yield caplog
    logging.getLogger("nexus_cli").removeHandler(caplog.handler)


def nucleus(logp_V, top_p, min_k, top_k):
    """Sizes that may be kept: one, unless the mass comes within rounding of the limit."""
    mass = np.cumsum(np.exp(np.sort(logp_V)[::-1][:top_k]))
    sizes = set()
    for limit in (top_p - 1e-7, top_p + 1e-7):
        reached = next((i + 1 for i in range(top_k) if mass[i] >= limit), top_k)
        sizes.add(min(max(reached, min_k), top_k))
    return sizes


def test_the_store_holds_the_nucleus_of_what_transformers_says(finished, oracle):
    rows = rows_of(finished.stage_dir("precompute"))
    logp_MV, _ = oracle(rows)
    labels_M = np.roll(rows.input_ids_BS, -1, axis=1)[rows.held_BS]
    kept, counts = rows.kept, Counter()
    for m, logp_V in enumerate(logp_MV):
        count = int(np.isfinite(kept.logprobs_MK[m]).sum())
        counts[count] += 1
        assert count in nucleus(logp_V, TOP_P, MIN_K, TOP_K)
        order_V = np.argsort(-logp_V)
        assert kept.ids_MK[m, :count].tolist() == order_V[:count].tolist()
        np.testing.assert_allclose(
            kept.logprobs_MK[m, :count], logp_V[order_V[:count]], rtol=0, atol=1e-4
        )
        rest_V = logp_V[order_V[count:]]
        tails_T = [np.log(np.exp(rest_V / t).sum()) for t in (1, 2, 4)]
        np.testing.assert_allclose(kept.tails_MT[m], tails_T, rtol=0, atol=1e-4)
        assert kept.nll_M[m] == pytest.approx(-logp_V[labels_M[m]], abs=1e-4)
    assert {MIN_K, TOP_K} < set(counts), "both bounds are met, and what lies between"
    manifest = open_at(finished.stage_dir("precompute")).manifest
    assert manifest.num_targets == len(logp_MV) > 300
    assert manifest.mean_k == pytest.approx(sum(k * n for k, n in counts.items()) / len(logp_MV))
    nll = -logp_MV[np.arange(len(logp_MV)), labels_M].mean()
    assert manifest.teacher_nll == pytest.approx(nll, abs=1e-4)
    assert manifest.ended_early is None


def test_a_fixed_number_in_codes_with_samples_and_experts(settings, oracle, tmp_path):
    extras = {"tail_samples": 40, "experts": True, "compression": "gzip"}
    config = settings(num_steps=2, values="codes", top_p=1.0, top_k=5, **extras)
    precompute.run(config, Workspace(tmp_path))
    rows = rows_of(tmp_path / "precompute")
    logp_MV, router_MLE = oracle(rows)
    kept = rows.kept
    best_MK = np.argsort(-logp_MV, axis=-1)[:, :5]
    assert np.array_equal(kept.ids_MK, best_MK)
    assert (np.abs(kept.logprobs_MK - np.take_along_axis(logp_MV, best_MK, 1)) <= 1 / 16).all()
    chosen_MLA = np.sort(np.argsort(-router_MLE, axis=-1)[..., :2], axis=-1)
    assert np.array_equal(kept.experts_MLA, chosen_MLA)
    assert np.ptp(chosen_MLA.reshape(len(kept), -1), axis=0).all(), "experts differ by position"
    samples_MD = kept.tail_samples_MD
    assert samples_MD.shape == (len(kept), 40)
    assert samples_MD.min() >= 0
    for m in range(len(kept)):
        assert not set(samples_MD[m]) & set(best_MK[m])
    # The samples' mean log-probability is that of the tail, within its own error.
    tail_MV = logp_MV.copy()
    np.put_along_axis(tail_MV, best_MK, -np.inf, axis=1)
    p_MV = np.exp(tail_MV) / np.exp(tail_MV).sum(-1, keepdims=True)
    mean_M = (p_MV * logp_MV).sum(-1)
    spread_M = np.sqrt((p_MV * (logp_MV - mean_M[:, None]) ** 2).sum(-1))
    drawn_M = np.take_along_axis(logp_MV, samples_MD.astype(np.int64), 1).mean(1)
    z = ((drawn_M - mean_M) / (spread_M / np.sqrt(40))).sum() / np.sqrt(len(kept))
    assert abs(z) < 5


def test_a_batch_without_a_target_is_asked_for_nothing(model):
    ids_BS = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
    zeros_B = torch.zeros(2, dtype=torch.int64)
    batch = Batch(
        input_ids_BS=ids_BS,
        position_ids_BS=ids_BS % SEQ_LEN,
        loss_mask_BS=torch.zeros_like(ids_BS, dtype=torch.bool),
        source_B=zeros_B,
        index_B=zeros_B,
    )
    rows = ask(model, batch, Question(top_k=4, top_p=0.9, tail_samples=2, experts=True)).rows()
    assert len(rows.kept) == 0
    assert rows.kept.ids_MK.shape == (0, 4)
    assert rows.kept.experts_MLA.shape == (0, 2, 2)


def test_the_plan_names_teacher_tokenizer_and_chat_template(finished, tiny_model_dir):
    plan = open_at(finished.stage_dir("precompute")).plan
    assert plan.tokenizer == sha256_file(tiny_model_dir / "tokenizer.json")
    assert plan.chat_template == sha256_file(tiny_model_dir / "chat_template.jinja")
    assert plan.teacher_name == str(tiny_model_dir)
    assert (plan.vocab_size, plan.top_p, plan.min_k, plan.top_k) == (8256, TOP_P, MIN_K, TOP_K)
    assert (plan.dtype, plan.rows_per_shard, plan.num_shards) == ("float32", 2, 6)


def test_the_commonest_tokens_of_the_text_have_the_lowest_ranks(finished):
    store = open_at(finished.stage_dir("precompute"))
    counts = Counter(store.rows(range(12)).input_ids_BS.reshape(-1).tolist())
    expected = sorted(range(8256), key=lambda token: (-counts[token], token))
    assert store.ranks.id_V.tolist() == expected


def test_sources_take_turns_by_their_weights_and_none_is_repeated(finished, text):
    store = open_at(finished.stage_dir("precompute"))
    rows = store.rows(range(12))
    assert sorted(np.bincount(rows.source_B)) == [6, 6]
    assert len({row.tobytes() for row in rows.input_ids_BS}) == 12
    names = [name.partition("@")[0] for name in store.plan.sources]
    assert names == [str(text["large"]), str(text["small"])]


def test_a_finished_store_is_not_made_again_and_other_settings_are_refused(
    settings, finished, monkeypatch
):
    def no_model(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(precompute, "load_model", no_model)
    precompute.run(settings(), finished)
    with pytest.raises(WorkspaceError, match="top_p"):
        precompute.run(settings(top_p=0.5), finished)


def test_text_that_runs_out_is_an_error_and_leaves_a_usable_store(settings, text, tmp_path):
    folder = tmp_path / "store"
    sources = f"{text['large']}@all,{text['small']}@all"
    config = settings(num_steps=1000, output=folder, data={"sources": sources})
    for _ in range(2):
        with pytest.raises(ResourceError, match=r"ran out after \d+ of 2,000 sequences"):
            precompute.run(config, Workspace(tmp_path / "w"))
    store = open_at(folder)
    assert store.manifest.ended_early == "text"
    rows = store.rows(range(len(store)))
    assert store.manifest.actual_steps == len(store) // 2
    assert len({row.tobytes() for row in rows.input_ids_BS}) == len(store)
    large, small = np.bincount(rows.source_B)
    assert abs(large - small) <= 1, "the mixture keeps its proportions to the end"


def test_a_sequence_count_that_is_no_multiple_of_anything_is_kept_whole(settings, text, tmp_path):
    config = settings(num_steps=1000, batch_size=5, data={"sources": f"{text['small']}@all"})
    with pytest.raises(ResourceError, match="ran out"):
        precompute.run(config, Workspace(tmp_path))
    store = open_at(tmp_path / "precompute")
    assert len(store) % 5
    assert len(store.rows(range(len(store)))) == len(store)


IN_A_SHARD = """
    close, closed = StoreWriter.close, []

    def dying(self, shard):
        if len(closed) == 2:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        closed.append(shard)
        return close(self, shard)

    StoreWriter.close = dying
"""
AT_ANY_MOMENT = """
    ask, asked = precompute.ask, []

    def dying(*args, **kwargs):
        asked.append(1)
        if len(asked) == 2:
            threading.Timer({delay}, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        if len(asked) > 2:
            time.sleep(0.05)
        return ask(*args, **kwargs)

    precompute.ask = dying
"""
KILLED = """
    import os, signal, threading, time
    from pathlib import Path
    from nexus_cli.config.precompute import PrecomputeConfig
    from nexus_cli.io.teacher_store.writer import StoreWriter
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import precompute
    {how}
    precompute.run(PrecomputeConfig.model_validate_json({config!r}), Workspace(Path({root!r})))
"""


@pytest.mark.parametrize("moment", ["while a shard is written", "at a random moment"])
def test_a_killed_run_continues_and_ends_with_the_shards_of_an_unbroken_one(
    settings, finished, tmp_path, monkeypatch, moment
):
    config = settings()
    in_a_shard = moment == "while a shard is written"
    how = IN_A_SHARD if in_a_shard else AT_ANY_MOMENT.format(delay=random.uniform(0, 0.1))
    code = textwrap.dedent(KILLED).format(
        config=config.model_dump_json(), root=str(tmp_path), how=textwrap.dedent(how)
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = tmp_path / "precompute"
    whole = len(list((folder / "shards").glob("0*.parquet")))
    assert whole == 2 if in_a_shard else whole < 6
    with pytest.raises(ArtifactError, match="unfinished"):
        open_at(folder)

    asked = count_questions(monkeypatch)
    precompute.run(config, Workspace(tmp_path))
    assert len(asked) == 6 - whole, "what was there already is not asked again"
    assert shards_of(folder) == shards_of(finished.stage_dir("precompute"))


def count_questions(monkeypatch):
    asked, real = [], precompute.ask

    def counted(*args, **kwargs):
        asked.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(precompute, "ask", counted)
    return asked


RANKS = """
    import hashlib, json, sys
    from pathlib import Path
    import numpy as np
    from nexus_cli.config.precompute import PrecomputeConfig
    from nexus_cli.core.distributed import open_world
    from nexus_cli.core.train.feed import StepBatches
    from nexus_cli.io.location import locate
    from nexus_cli.io.teacher_store.reader import open_store
    from nexus_cli.io.teacher_store.writer import StoreWriter
    from nexus_cli.io.workspace import Workspace
    from nexus_cli.pipeline import precompute
    from nexus_cli.pipeline.training.text import StoredSequences, passes

    world, notes = open_world("cpu"), Path({notes!r})
    assert world.size == {size}, world
    close = StoreWriter.close

    def noting(self, shard):
        (notes / f"{{shard}}-{{world.rank}}").touch()
        return close(self, shard)

    StoreWriter.close = noting
    precompute.run(PrecomputeConfig.model_validate_json({config!r}), Workspace(Path({root!r})))
    world.barrier()
    store = open_store(locate({store!r}))
    sequences = StoredSequences(store, len(store))
    steps = StepBatches(sequences, passes(12, 12, 0), 2, 1, world.rank, world.size)
    read = [
        hashlib.sha256(store.rows([row]).input_ids_BS.tobytes()).hexdigest()
        for step in range(steps.num_steps)
        for batch in steps.micro_batches(step)
        for row in batch.index_B.tolist()
    ]
    (notes / f"read-{{world.rank}}.json").write_text(json.dumps(read))
"""


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_writes_and_reads_the_rows_of_one(settings, finished, tmp_path, size):
    script, notes = tmp_path / "ranks.py", tmp_path / "notes"
    notes.mkdir()
    one, many = finished.stage_dir("precompute"), tmp_path / "precompute"
    script.write_text(
        textwrap.dedent(RANKS).format(
            config=settings().model_dump_json(),
            root=str(tmp_path),
            notes=str(notes),
            size=size,
            store=str(many),
        )
    )
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    process = subprocess.run(
        [sys.executable, "-m", *launcher, script],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    written = {name.name for name in notes.iterdir() if name.suffix != ".json"}
    assert written == {f"{shard}-{shard % size}" for shard in range(6)}
    assert open_at(many).plan == open_at(one).plan
    ours, theirs = rows_of(many), rows_of(one)
    for name in TEXT:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    assert np.array_equal(ours.kept.ids_MK, theirs.kept.ids_MK)
    for name in ("logprobs_MK", "tails_MT", "nll_M"):  # other threads sum in another order
        mine, one_rank = getattr(ours.kept, name), getattr(theirs.kept, name)
        np.testing.assert_allclose(mine, one_rank, rtol=1e-5, atol=1e-5, err_msg=name)
    read = Counter()
    for rank in range(size):
        read.update(json.loads((notes / f"read-{rank}.json").read_text()))
    assert read == Counter(hashlib.sha256(row.tobytes()).hexdigest() for row in theirs.input_ids_BS)


def test_a_lost_shard_alone_is_made_again(settings, tmp_path, monkeypatch):
    config, folder = settings(num_steps=3), tmp_path / "precompute"
    precompute.run(config, Workspace(tmp_path))
    before = shards_of(folder)
    (folder / "shards" / "00001.parquet").unlink()
    asked = count_questions(monkeypatch)
    precompute.run(config, Workspace(tmp_path))
    assert len(asked) == 1
    assert shards_of(folder) == before


@pytest.fixture
def disk_full_at(monkeypatch):
    """Let there be no room for a file of this name."""

    def arrange(name):
        real = store_writer.write_atomic

        def write(path, data):
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path, data)

        monkeypatch.setattr(store_writer, "write_atomic", write)

    return arrange


def test_a_disk_that_fills_up_leaves_a_store_to_train_on_and_the_same_line_completes_it(
    settings, finished, tiny_converted_dir, tmp_path, monkeypatch, disk_full_at
):
    config, folder = settings(), tmp_path / "precompute"
    disk_full_at("00002.parquet")
    with pytest.raises(ResourceError, match=r"no space left for .*00002\.parquet") as caught:
        precompute.run(config, Workspace(tmp_path))
    monkeypatch.undo()
    assert "4 of 12 sequences (2 of 6 steps)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "same command again" in caught.value.hint
    store = open_at(folder)
    assert (len(store), store.manifest.ended_early) == (4, "disk")
    theirs = rows_of(finished.stage_dir("precompute"))
    assert np.array_equal(rows_of(folder).input_ids_BS, theirs.input_ids_BS[:4])
    offline = TrainConfig(
        student=str(tiny_converted_dir), max_steps=None, runtime={"device": "cpu"}
    )
    assert offline_request(offline, Workspace(tmp_path), 1).max_steps == 2

    asked = count_questions(monkeypatch)
    precompute.run(config, Workspace(tmp_path))
    assert len(asked) == 4
    assert open_at(folder).manifest == open_at(finished.stage_dir("precompute")).manifest


def test_a_disk_without_room_for_any_shard_is_one_line_too(settings, tmp_path, disk_full_at):
    disk_full_at("00000.parquet")
    with pytest.raises(ResourceError, match="no space left") as caught:
        precompute.run(settings(), Workspace(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="unfinished"):
        open_at(tmp_path / "precompute")


def test_a_rank_stops_asking_when_the_disk_of_another_is_full(settings, tmp_path, monkeypatch):
    asked, real = [], precompute.ask

    def counted(*args, **kwargs):
        asked.append(1)
        if len(asked) == 3:  # what a rank that finds the disk full does
            (tmp_path / "precompute" / ".writing").unlink()
        return real(*args, **kwargs)

    monkeypatch.setattr(precompute, "ask", counted)
    with pytest.raises(ResourceError, match=r"^the disk is full; 4 of 12 sequences"):
        precompute.run(settings(), Workspace(tmp_path))
    assert len(asked) == 3
    assert open_at(tmp_path / "precompute").manifest.ended_early == "disk"


def test_the_share_of_time_that_the_teacher_waits_for_the_disk_is_told(
    settings, tmp_path, monkeypatch, said
):
    close = StoreWriter.close

    def slow(self, shard):
        time.sleep(0.4)
        return close(self, shard)

    monkeypatch.setattr(StoreWriter, "close", slow)
    precompute.run(settings(), Workspace(tmp_path))
    line = next(r.getMessage() for r in said.records if "waited for the disk" in r.getMessage())
    share = float(line.partition("disk ")[2].partition("%")[0])
    assert 20 < share <= 100


def test_force_replaces_a_store_made_with_other_settings(settings, tmp_path):
    precompute.run(settings(num_steps=2), Workspace(tmp_path))
    precompute.run(settings(num_steps=1, top_k=5), Workspace(tmp_path), force=True)
    store = open_at(tmp_path / "precompute")
    assert (len(store), store.plan.top_k) == (2, 5)
    assert len(list((tmp_path / "precompute" / "shards").iterdir())) == 1


def test_the_shared_expert_of_a_converted_teacher_takes_part(
    settings, tiny_converted_dir, tmp_path, said
):
    config = settings(num_steps=1, model=str(tiny_converted_dir))
    precompute.run(config, Workspace(tmp_path))
    assert "takes part" in said.text


def test_a_dry_run_says_what_and_writes_nothing(settings, tmp_path, capsys):
    precompute.run(settings(top_p=0.98), Workspace(tmp_path), dry_run=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "12 x 32 tokens" in said
    assert "the likeliest to 98% of the mass, 4 to 9 of 8,256 tokens a position" in said
    precompute.run(settings(top_p=1.0), Workspace(tmp_path), dry_run=True)
    assert "9 of 8,256 tokens a position, and the mass of the rest" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", ["codes", "float32"])
def test_a_dry_run_names_more_bytes_than_are_written(settings, tiny_model_dir, tmp_path, values):
    everything = {"tail_samples": 3, "experts": True, "top_k": 4, "top_p": 1.0, "num_steps": 2}
    config = settings(values=values, compression="none", **everything)
    planned = _store_bytes(config, read_shape(tiny_model_dir))
    precompute.run(config, Workspace(tmp_path))
    shards = (tmp_path / "precompute" / "shards").iterdir()
    columns = [column for shard in shards for column in pq.read_table(shard).columns]
    written = sum(len(value) for c in columns if c.type == pa.binary() for value in c.to_pylist())
    assert 0.5 * planned < written <= planned


def test_a_store_that_does_not_fit_is_refused_before_it_starts(settings, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 0, 100))
    with pytest.raises(ResourceError, match="no room"):
        precompute.run(settings(), Workspace(tmp_path), dry_run=True)


def test_more_entries_than_the_vocabulary_has_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="has 8256 tokens"):
        precompute.run(settings(top_k=9000), Workspace(tmp_path))


def test_a_teacher_that_gives_no_numbers_is_refused(settings, model, tmp_path, monkeypatch):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(torch.nan)
    monkeypatch.setattr(precompute, "load_model", lambda *_, **__: broken)
    with pytest.raises(ArtifactError, match="not numbers"):
        precompute.run(settings(num_steps=1), Workspace(tmp_path))


@pytest.mark.parametrize("place", ["load_model", "ask"])
def test_a_full_device_is_said_with_its_numbers(settings, tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(precompute, place, full)
    with pytest.raises(ResourceError, match=r"on cpu: 3\.00 GiB were asked for; ") as caught:
        precompute.run(settings(), Workspace(tmp_path))
    assert "--batch-size" in caught.value.hint


def test_a_store_is_written_to_this_machine(settings):
    for output in ("s3://bucket/store", "gs:/bucket/store"):
        with pytest.raises(ValueError, match="no folder of this machine"):
            settings(output=output)
