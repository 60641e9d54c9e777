import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from nexus_cli.config.collect import CollectConfig
from nexus_cli.core.router.moments import Reservoir, RouterMoments, TokenSums
from nexus_cli.errors import ArtifactError, ResourceError
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import capacity, collect, collect_dry_run, collect_run
from nexus_cli.pipeline.collect_partial import PartialStatistics, Progress
from nexus_cli.pipeline.collect_plan import cut_up, make_plan
from nexus_cli.pipeline.inputs import model_input
from nexus_cli.pipeline.router_statistics import load_moments

SUMS = ("probability_LE", "outer_LEE", "top1_LE", "topk_LE", "weight_LE")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Eighty short texts of words in two styles, every fifth of them twice."""
    rng = np.random.default_rng(0)
    words = ["router", "expert", "token", "layer", "gate", "shared", "42", "if", "(", ")", "é"]
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    rows = []
    for number in range(80):
        text = " ".join(rng.choice(words, size=rng.integers(15, 90))) + f" {number}"
        rows += [json.dumps({"text": text})] * (2 if number % 5 == 0 else 1)
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def settings(tiny_model_dir, texts):
    """A small run on the tiny model."""
    return {
        "model": str(tiny_model_dir),
        "data": {"sources": str(texts)},
        "target_tokens": 1500,
        "reservoir": 50,
        "runtime": {"batch_size": 4, "device": "cpu"},
    }


def run(settings, folder, **changes):
    output = folder / "router_probs.npz"
    collect.run(CollectConfig(**settings | changes, output=output), Workspace(folder / "ws"))
    return output


def report_of(output):
    return json.loads(output.with_name("collection_report.json").read_text())


def assert_same(left, right, rtol):
    for population in ("body", "first"):
        a, b = getattr(left, population), getattr(right, population)
        assert a.tokens == b.tokens
        for name in SUMS:
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-12)
    np.testing.assert_array_equal(left.reservoir.keys_R, right.reservoir.keys_R)
    if left.units_LEI is not None and right.units_LEI is not None:
        np.testing.assert_allclose(left.units_LEI, right.units_LEI, rtol=rtol)


def chosen_sequences(settings):
    config = CollectConfig(**settings)
    model = model_input(config.model)
    return make_plan(config, model, collect.model_dir.read_shape(model.path)).sequences


def test_the_statistics_are_those_of_stock_transformers_on_each_text_alone(settings, tmp_path):
    # Padding, batching, first tokens and the router's own logits: one oracle for all of them.
    from transformers import GptOssForCausalLM, Mxfp4Config

    found, _ = load_moments(run(settings, tmp_path))
    stock = GptOssForCausalLM.from_pretrained(
        settings["model"],
        dtype=torch.float32,
        quantization_config=Mxfp4Config(dequantize=True),
    )
    body, first = ([[], []] for _ in range(2))
    for ids in chosen_sequences(settings):
        with torch.no_grad():
            output = stock.model(
                torch.tensor(ids[None], dtype=torch.int64), output_router_logits=True
            )
        for layer, logits in enumerate(output.router_logits):
            first[layer].append(logits[:1].double())
            body[layer].append(logits[1:].double())
    for layer in range(2):
        for sums, parts in ((found.body, body), (found.first, first)):
            p = torch.cat(parts[layer]).softmax(-1).numpy()
            chosen = p >= np.sort(p, axis=1)[:, [-2]]  # two experts a token
            applied = np.where(chosen, p, 0) / np.where(chosen, p, 0).sum(1, keepdims=True)
            first_choice = np.bincount(p.argmax(1), minlength=8)
            assert sums.tokens == len(p)
            np.testing.assert_allclose(sums.probability_LE[layer], p.sum(0), rtol=1e-4)
            np.testing.assert_allclose(sums.outer_LEE[layer], p.T @ p, rtol=1e-4)
            np.testing.assert_array_equal(sums.top1_LE[layer], first_choice)
            np.testing.assert_array_equal(sums.topk_LE[layer], chosen.sum(0))
            np.testing.assert_allclose(sums.weight_LE[layer], applied.sum(0), rtol=1e-4)


def stock_contributions(settings):
    """By the definition, in float64, from the weights that stock transformers decodes."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    stock = GptOssForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    inputs = [[] for _ in stock.model.layers]
    for layer, seen in zip(stock.model.layers, inputs, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, 1:]))
    with torch.no_grad():
        for ids in chosen_sequences(settings):
            stock.model(torch.tensor(ids[None], dtype=torch.int64))
    found = []
    for layer, seen in zip(stock.double().model.layers, inputs, strict=True):
        x, experts = torch.cat(seen).double(), layer.mlp.experts
        logits = x @ layer.mlp.router.weight.T + layer.mlp.router.bias
        best, chosen = logits.topk(2)
        weight = torch.zeros_like(logits).scatter(1, chosen, best.softmax(-1))
        both = torch.einsum("th,ehi->eti", x, experts.gate_up_proj)
        both += experts.gate_up_proj_bias[:, None]
        gate, up = both[..., 0::2].clamp(max=7), both[..., 1::2].clamp(-7, 7)
        magnitude = ((up + 1) * gate * torch.sigmoid(1.702 * gate)).abs()
        length = experts.down_proj.norm(dim=-1)
        found.append((torch.einsum("te,eti->ei", weight, magnitude) * length).detach().numpy())
    return np.stack(found)


@pytest.mark.parametrize("engine", [False, True])
def test_contributions_of_units_are_those_of_the_definition(
    settings, tmp_path, monkeypatch, engine
):
    if engine:  # its PyTorch twin, which runs anywhere
        from nexus_cli.core.model.gpt_oss.engine.attach import attach_engine

        def load(*arguments, **options):
            network = load_model(*arguments, **options | {"experts_backend": "auto"})
            attach_engine(network, experts_backend="torch")
            return network

        load_model = collect_run.load_model
        monkeypatch.setattr(collect_run, "load_model", load)
    found, _ = load_moments(run(settings, tmp_path))
    np.testing.assert_allclose(found.units_LEI, stock_contributions(settings), rtol=1e-4)


def test_statistics_without_units_are_smaller_and_as_good(settings, tmp_path):
    with_units, _ = load_moments(run(settings, tmp_path / "a"))
    without, _ = load_moments(run(settings, tmp_path / "b", units=False))
    assert without.units_LEI is None
    assert_same(with_units, without, rtol=0)


def test_the_report_says_what_was_chosen(settings, tmp_path):
    output = run(settings, tmp_path)
    report, (moments, metadata) = report_of(output), load_moments(output)
    selected = report["coverage"]["selected"]
    assert report["target_reached"]
    assert 1500 <= selected["tokens"] < 1500 + 512
    assert report["tokens_counted"] + report["first_tokens_counted"] == selected["tokens"]
    assert report["first_tokens_counted"] == selected["documents"] == moments.first.tokens
    assert report["tokens_per_second"] > 0
    assert metadata["model_fingerprint"] == model_input(settings["model"]).digest
    assert len(moments.reservoir.keys_R) == 50


def test_a_text_that_occurs_twice_runs_once(settings, tmp_path):
    settings["target_tokens"] = 10**6
    output = run(settings, tmp_path)
    sequences = [tuple(ids) for ids in chosen_sequences(settings)]
    assert len(set(sequences)) == len(sequences)
    assert report_of(output)["coverage"]["selected"]["documents"] == len(sequences)


def test_equal_runs_give_equal_files_and_workers_change_nothing(settings, tmp_path):
    first = run(settings, tmp_path / "a").read_bytes()
    workers = {"runtime": settings["runtime"] | {"num_processes": 2}}
    assert run(settings, tmp_path / "b", **workers).read_bytes() == first


def test_another_batch_size_changes_rounding_only(settings, tmp_path):
    left, _ = load_moments(run(settings, tmp_path / "a"))
    alone = {"runtime": settings["runtime"] | {"batch_size": 1}}
    right, _ = load_moments(run(settings, tmp_path / "b", **alone))
    assert_same(left, right, rtol=1e-5)


def stop_after(monkeypatch, batches):
    """Make the run fail when so many batches were counted."""
    original, counted = collect_run._run_batch, []

    def stop(*arguments):
        if len(counted) == batches:
            raise KeyboardInterrupt
        counted.append(1)
        return original(*arguments)

    monkeypatch.setattr(collect_run, "_run_batch", stop)
    return counted


@pytest.mark.parametrize("batches", [1, 4])
def test_an_interrupted_run_continues_and_equals_an_unbroken_one(
    settings, tmp_path, monkeypatch, batches
):
    settings["runtime"] |= {"checkpoint_seconds": 0}
    whole = run(settings, tmp_path / "whole").read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "broken")
    assert not (tmp_path / "broken" / "router_probs.npz").exists()
    with monkeypatch.context() as patch:
        counted = stop_after(patch, 10**6)
        resumed = run(settings, tmp_path / "broken")
    assert resumed.read_bytes() == whole
    assert len(counted) == report_of(resumed)["batches"] - batches  # none ran twice
    assert not list((tmp_path / "broken").glob(".*.partial"))


def test_partial_statistics_of_other_settings_are_not_used(settings, tmp_path, monkeypatch):
    settings["runtime"] |= {"checkpoint_seconds": 0}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "a")
    changed = run(settings, tmp_path / "a", target_tokens=1000)
    assert changed.read_bytes() == run(settings, tmp_path / "b", target_tokens=1000).read_bytes()


def test_a_killed_process_continues(settings, tmp_path):
    settings["runtime"] = {"batch_size": 1, "device": "cpu", "checkpoint_seconds": 0}
    whole = run(settings, tmp_path / "whole").read_bytes()
    output = tmp_path / "killed" / "router_probs.npz"
    line = f"collect --model {settings['model']} --data {settings['data']['sources']} --device cpu "
    line += f"--target-tokens 1500 --output {output} --set reservoir=50 "
    line += "--set runtime.batch_size=1 --set runtime.checkpoint_seconds=0"
    process = subprocess.Popen(
        [sys.executable, "-m", "nexus_cli", *line.split()], stderr=subprocess.DEVNULL
    )
    partial = tmp_path / "killed" / ".router_probs.npz.partial" / "rank-0-of-1.npz"
    deadline = time.monotonic() + 120
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.exists()
    assert not output.exists()
    assert run(settings, tmp_path / "killed").read_bytes() == whole


def test_two_ranks_give_the_statistics_of_one(settings, tmp_path):
    alone, _ = load_moments(run(settings, tmp_path / "one"))
    output = tmp_path / "two" / "router_probs.npz"
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 -m nexus_cli"
    line = f"collect --model {settings['model']} --data {settings['data']['sources']} --device cpu "
    line += f"--target-tokens 1500 --output {output} --set reservoir=50 --set runtime.batch_size=4"
    result = subprocess.run(
        [sys.executable, *launcher.split(), *line.split()],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert report_of(output)["ranks"] == 2
    together, _ = load_moments(output)
    # The sums are in float64, but what is summed comes from float32 products, whose order of
    # summation follows threads and memory addresses: other processes, other last bits.
    assert_same(together, alone, rtol=1e-5)
    np.testing.assert_allclose(
        together.reservoir.probability_RLE, alone.reservoir.probability_RLE, rtol=2**-9, atol=1e-7
    )
    assert result.stdout.count("tokens/s") == 1  # one rank speaks


def test_a_converted_model_runs_with_its_shared_expert(
    settings, tiny_converted_dir, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("nexus_cli.io.console.configure", lambda *_: None)
    caplog.set_level("INFO", "nexus_cli")
    base, _ = load_moments(run(settings, tmp_path / "base"))
    output = run(settings | {"model": str(tiny_converted_dir)}, tmp_path / "converted")
    found, metadata = load_moments(output)
    assert "shared expert included" in caplog.text
    assert metadata["num_shared_experts"] == report_of(output)["shared_experts"] == 1
    assert_same(found, base, rtol=1e-12)  # its gate is closed


def test_a_router_that_produces_nan_is_an_error_that_names_the_layer(
    settings, make_tiny_model, tmp_path
):
    from safetensors.torch import load_file, save_file

    model = make_tiny_model(tmp_path / "model")
    shard = model / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.router.bias"][3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="router of layer 1 produced NaN"):
        run(settings | {"model": str(model)}, tmp_path)
    assert not (tmp_path / "router_probs.npz").exists()


def test_too_little_text_is_said_and_all_of_it_used(settings, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("nexus_cli.io.console.configure", lambda *_: None)
    output = run(settings, tmp_path, target_tokens=10**6)
    report = report_of(output)
    assert not report["target_reached"]
    assert report["coverage"]["selected"]["distribution_covered"] == 1.0
    assert "of the 1,000,000 tokens asked for" in caplog.text
    assert "--max-candidates" in caplog.text


def test_text_that_is_all_too_short_is_an_error(settings, tmp_path):
    with pytest.raises(ResourceError, match="no text of 400 tokens") as caught:
        run(settings, tmp_path, min_seq_length=400)
    assert "--data" in caught.value.hint


def test_a_full_disk_and_a_full_device_are_said(settings, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nexus_cli.io.router_probs.write", full)
        with pytest.raises(ResourceError, match=r"no space left for .*router_probs"):
            run(settings, tmp_path)
    settings["runtime"] |= {"checkpoint_seconds": 0}
    with monkeypatch.context() as patch:
        patch.setattr("nexus_cli.io.router_probs.write", full)
        with pytest.raises(ResourceError, match=r"no space left for .*partial"):
            run(settings, tmp_path)

    class Full:
        def add(self, *_):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(collect_run, "MomentAccumulator", lambda *_: Full())
    with pytest.raises(ResourceError, match="out of memory on cpu") as caught:
        run(settings, tmp_path)
    assert "runtime.batch_size" in caught.value.hint
    assert not (tmp_path / "router_probs.npz").exists()


def test_long_texts_are_cut_into_windows_and_chats_to_their_head():
    class Text:
        def __init__(self, length, source, chat=False):
            self.input_ids = np.arange(length, dtype=np.int32)
            self.source_index, self.is_chat = source, chat

        def __len__(self):
            return len(self.input_ids)

    config = CollectConfig(max_seq_length=100, min_seq_length=20, max_candidates=4)
    documents = [Text(250, 0), Text(250, 1, chat=True), Text(119, 2), Text(15, 3), Text(30, 4)]
    found = cut_up(documents, config)
    # First windows first; 15 and 19 tokens are too few; four candidates at most.
    assert [(len(ids), source) for ids, source in found] == [(100, 0), (100, 1), (100, 2), (30, 4)]
    more = cut_up(documents, config.model_copy(update={"max_candidates": 9}))
    assert [(int(ids[0]), len(ids), source) for ids, source in more[4:]] == [
        (100, 100, 0),
        (200, 50, 0),
    ]


def test_a_dry_run_says_the_work_and_refuses_what_does_not_fit(
    settings, tmp_path, capsys, monkeypatch
):
    config, workspace = CollectConfig(**settings), Workspace(tmp_path / "ws")
    collect.run(config, workspace, dry_run=True)
    said = capsys.readouterr().out
    assert "1,500 tokens" in said
    assert "texts.jsonl" in said
    for name, match in (("free_memory", "no memory for"), ("free_disk", "no room for")):
        with monkeypatch.context() as patch:
            patch.setattr(collect_dry_run, name, lambda _: 1)
            with pytest.raises(ResourceError, match=match):
                collect.run(config, workspace, dry_run=True)
    assert not (tmp_path / "ws").exists()


def test_packed_weights_are_measured_as_they_are_and_the_rest_in_its_dtype(tiny_model_dir):
    from nexus_cli.core.model.gpt_oss.loading import load_model

    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(tiny_model_dir, device="cpu", dtype=dtype)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        assert capacity.weight_bytes(tiny_model_dir, dtype) == held


class Rank:
    """One of several ranks, without processes: the main rank's value is handed on."""

    def __init__(self, rank, size, said=None):
        self.rank, self.size, self.said = rank, size, said

    @property
    def is_main(self):
        return self.rank == 0

    def broadcast_object(self, value):
        self.said = value if self.is_main else self.said
        return self.said

    def barrier(self):
        pass


def progress(*batches):
    """Statistics in which batch ``b`` counts ``2**b`` tokens, all alike."""
    total = RouterMoments.zeros(1, 2, 1, 4)
    for batch in batches:
        n = 2**batch
        half = np.full((1, 2), n / 2)
        sums = TokenSums(
            n, half, np.full((1, 2, 2), n / 4), np.array([[n, 0]]), np.array([[n, 0]]), half
        )
        total = total + RouterMoments(1, sums, TokenSums.zeros(1, 2), Reservoir.empty(4, 1, 2))
    return Progress(total, frozenset(batches))


def resume(folder, size):
    """What every rank takes over, and the batches that count as done."""
    empty = progress().moments
    said, shares = None, []
    for rank in range(size):
        world = Rank(rank, size, said)
        share, done = PartialStatistics(folder, "plan", world).load(empty)
        said = world.said
        shares.append(share)
    return shares, done


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_run_of_three_ranks_continues_on_any_number(tmp_path, size):
    for rank, batches in enumerate([(0, 3), (1, 4), (2,)]):
        PartialStatistics(tmp_path, "plan", Rank(rank, 3)).save(progress(*batches))
    shares, done = resume(tmp_path, size)
    assert done == {0, 1, 2, 3, 4}
    assert sum(share.moments.body.tokens for share in shares) == 0b11111
    if size == 3:  # every rank goes on with its own
        assert [sorted(share.batches) for share in shares] == [[0, 3], [1, 4], [2]]


def test_what_was_taken_over_is_not_counted_twice(tmp_path):
    for rank, batches in enumerate([(0,), (1,), (2,)]):
        PartialStatistics(tmp_path, "plan", Rank(rank, 3)).save(progress(*batches))
    # One rank took all of it over, went on, saved, and was killed before the old files went.
    PartialStatistics(tmp_path, "plan", Rank(0, 1)).save(progress(0, 1, 2, 3))
    for size in (1, 3):
        shares, done = resume(tmp_path, size)
        assert done == {0, 1, 2, 3}
        assert sum(share.moments.body.tokens for share in shares) == 0b1111


def test_damaged_partial_statistics_are_said_and_run_again(tmp_path, caplog):
    PartialStatistics(tmp_path, "plan", Rank(0, 2)).save(progress(0))
    PartialStatistics(tmp_path, "plan", Rank(1, 2)).save(progress(1))
    PartialStatistics(tmp_path, "other", Rank(2, 3)).save(progress(2))
    path = tmp_path / "rank-1-of-2.npz"
    path.write_bytes(path.read_bytes()[:-100])
    _, done = resume(tmp_path, 1)
    assert done == {0}
    assert "will run again" in caplog.text
