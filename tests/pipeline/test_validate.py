"""``nexus validate`` on a tiny model: true figures, honest checks, clear failures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.model.gpt_oss.export import nexus_tensors, write_model_directory
from nexus_cli.core.model.gpt_oss.loading import load_model, load_tokenizer
from nexus_cli.errors import ArtifactError, CheckFailed, ConfigError, ResourceError, WorkspaceError
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import validate, validate_plan
from nexus_cli.pipeline.stage import stage
from nexus_cli.pipeline.text import load_tokenized
from nexus_cli.pipeline.validate import Mode

SUMMARY = {
    "domain_perplexity",
    "general_perplexity",
    "kl_to_base",
    "trained_parameters",
    "total_parameters",
    "argument_value_perplexity",
}
CALL = {"name": "look_up", "arguments": {"place": "Ulm", "days": 3}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few chats with a tool call, and a few plain texts, one longer than a window."""
    folder = tmp_path_factory.mktemp("texts")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"How warm is it at {n}?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": CALL}],
                },
            ]
        }
        for n in range(3)
    ]
    plain = [{"text": f"The {n} brown foxes jump. " * (4 + 8 * n)} for n in range(4)]
    for name, rows in (("domain", chats), ("general", plain)):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return {name: f"{folder / name}.jsonl@all" for name in ("domain", "general")}


@pytest.fixture(scope="module")
def trained_dir(tiny_converted_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model with its gates open, as training leaves it."""
    tensors = {
        name: torch.full_like(value, 4.0) if name.endswith("output_gate") else value
        for name, value in nexus_tensors(tiny_converted_dir).items()
    }
    target = tmp_path_factory.mktemp("trained") / "model"
    write_model_directory(target, tiny_converted_dir, tensors)
    return target


def config(texts: dict[str, str], **more: object) -> ValidateConfig:
    values = {"domain": texts["domain"], "general": texts["general"], "window": 64, "stride": 24}
    return ValidateConfig.model_validate(
        {**values, "dtype": "float32", "runtime": {"device": "cpu", "batch_size": 4}, **more}
    )


def report_of(workspace: Workspace) -> dict:
    return json.loads((workspace.stage_dir("validate") / "report.json").read_text())


def failed(report: dict) -> list[str]:
    return [check["check"] for check in report["checks"] if not check["passed"]]


def test_a_converted_model_is_its_base_to_the_last_bit(
    tiny_converted_dir: Path, tiny_model_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    validate.run(config(texts, checkpoint=str(tiny_converted_dir)), workspace)
    report = report_of(workspace)
    assert report["format"] == "nexus.report/1"
    assert failed(report) == []
    assert {"gate off equals base: largest difference of hidden states"} <= {
        check["check"] for check in report["checks"]
    }
    assert set(report["summary"]) == SUMMARY
    assert report["baseline"]["kind"] == "base"
    assert Path(report["baseline"]["path"]) == tiny_model_dir
    for name in ("domain", "general"):
        found = report["sets"][name]
        assert found["perplexity"]["base"] == found["perplexity"]["model"]
        assert found["kl"] == 0.0
        assert found["delta_nll"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert found["top1_agreement"] == 1.0
        assert found["router_agreement"] == pytest.approx(1.0, rel=1e-12)
    added = sum(tensor.numel() for tensor in nexus_tensors(tiny_converted_dir).values())
    assert report["summary"]["trained_parameters"] == added
    assert (workspace.stage_dir("validate") / "manifest.json").is_file()


def test_base_perplexity_is_that_of_stock_transformers(
    trained_dir: Path, tiny_model_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    """Stock code, dequantised, whole documents, transformers' own loss without the aux term."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    stock = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    settings = config(texts, checkpoint=str(trained_dir), window=4096, stride=4096)
    validate.run(settings, Workspace(tmp_path))
    found = report_of(Workspace(tmp_path))["sets"]
    for name, data in (("domain", settings.domain), ("general", settings.general)):
        nll, tokens = 0.0, 0
        for document in load_tokenized(data, tiny_model_dir, default_split="held-out").documents:
            ids = torch.from_numpy(document.input_ids.astype("int64"))[None]
            labels = ids.masked_fill(~torch.from_numpy(document.loss_mask)[None], -100)
            with torch.no_grad():
                loss = stock(input_ids=ids, labels=labels, output_router_logits=False).loss
            nll += float(loss) * int(document.loss_mask.sum())
            tokens += int(document.loss_mask.sum())
        assert found[name]["tokens"] == tokens
        assert found[name]["perplexity"]["base"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)


def test_windows_argument_values_and_kl_equal_a_naive_computation(
    trained_dir: Path, tiny_model_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    settings = config(texts, checkpoint=str(trained_dir), baseline=str(tiny_model_dir))
    validate.run(settings, Workspace(tmp_path))
    report = report_of(Workspace(tmp_path))
    assert report["baseline"]["kind"] == "named"
    model = load_model(trained_dir, device="cpu", dtype=torch.float32)
    nll = base_nll = kl = tokens = 0.0
    known: dict[tuple, torch.Tensor] = {}

    def logprobs(model, ids: torch.Tensor, shared_experts: bool) -> torch.Tensor:
        """Float64 ``[S, V]`` of a window."""
        key = (*ids.tolist(), shared_experts)
        if key not in known:
            with torch.no_grad():
                out = model(input_ids=ids[None], shared_experts=shared_experts)
            known[key] = functional.log_softmax(out.logits[0].double(), dim=-1)
        return known[key]

    loaded = load_tokenized(settings.general, trained_dir, default_split="held-out")
    for document in loaded.documents:
        ids = torch.from_numpy(document.input_ids.astype("int64"))
        for target in range(1, len(ids)):
            # The window that scores it: the first, or the first later one that reaches it.
            past = max(0, target - 64)
            end = min(64 + 24 * -(-past // 24), len(ids) - 1)
            begin = max(0, end - 64)
            rows = [logprobs(model, ids[begin:end], on)[target - 1 - begin] for on in (True, False)]
            nll -= float(rows[0][ids[target]])
            base_nll -= float(rows[1][ids[target]])
            kl += float((rows[1].exp() * (rows[1] - rows[0])).sum())
            tokens += 1
    found = report["sets"]["general"]
    assert found["tokens"] == tokens
    assert found["perplexity"]["model"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found["perplexity"]["base"] == pytest.approx(math.exp(base_nll / tokens), rel=1e-4)
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert found["kl"] > 1e-5
    values = report["sets"]["domain"]
    assert 0 < values["value_tokens"] < values["tokens"]
    assert report["summary"]["argument_value_perplexity"] == values["value_perplexity"]


def test_without_a_known_base_the_gates_speak_for_the_identity(
    trained_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    orphan = tmp_path / "orphan"
    shutil.copytree(trained_dir, orphan)
    (orphan / "conversion_metadata.json").unlink()
    validate.run(config(texts, checkpoint=str(orphan), general=None), Workspace(tmp_path / "w"))
    report = report_of(Workspace(tmp_path / "w"))
    assert report["baseline"]["kind"] == "self"
    assert failed(report) == []
    assert any("gate at zero equals gate off" in check["check"] for check in report["checks"])
    assert report["summary"]["general_perplexity"] is None
    assert report["summary"]["kl_to_base"] is None


def test_against_itself_the_model_is_loaded_once_and_its_files_are_still_compared(
    trained_dir: Path,
    texts: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[Path] = []

    def counting(path: Path, **how: object) -> object:
        loaded.append(path)
        return load_model(path, **how)

    monkeypatch.setattr(validate, "load_model", counting)
    settings = config(texts, checkpoint=str(trained_dir), baseline="self", general=None)
    validate.run(settings, Workspace(tmp_path / "w"))
    assert loaded == [trained_dir]
    report = report_of(Workspace(tmp_path / "w"))
    assert failed(report) == []
    assert any("frozen tensors" in check["check"] for check in report["checks"])
    capsys.readouterr()
    validate.run(settings, Workspace(tmp_path / "v"), dry_run=True)
    rows = [line for line in capsys.readouterr().out.splitlines() if "models in memory" in line]
    assert "1" in rows[0]


def test_a_trained_router_is_told_from_a_damaged_expert(
    trained_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    router = "model.layers.0.mlp.router.weight"
    before = load_model(trained_dir, device="cpu", dtype=torch.float32)
    changed = dict(before.named_parameters())[router].flip(0).bfloat16()
    target = tmp_path / "router"
    write_model_directory(target, trained_dir, {**nexus_tensors(trained_dir), router: changed})
    validate.run(config(texts, checkpoint=str(target)), Workspace(tmp_path / "w"))
    report = report_of(Workspace(tmp_path / "w"))
    assert failed(report) == []
    assert report["sets"]["general"]["router_agreement"] < 1
    assert report["summary"]["trained_parameters"] > changed.numel()


def test_a_changed_frozen_tensor_fails_both_checks_after_the_report_is_written(
    trained_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    norm = torch.full((64,), 1.5, dtype=torch.bfloat16)
    target = tmp_path / "damaged"
    tensors = {**nexus_tensors(trained_dir), "model.norm.weight": norm}
    write_model_directory(target, trained_dir, tensors)
    settings = config(texts, checkpoint=str(target), compute_perplexity=False)
    for _ in range(2):  # the second time it is up to date, and still fails
        with pytest.raises(CheckFailed, match="frozen tensors that differ"):
            validate.run(settings, Workspace(tmp_path / "w"))
    names = failed(report_of(Workspace(tmp_path / "w")))
    assert names[0] == "frozen tensors that differ from the base"
    assert any(name.startswith("gate off equals base") for name in names)


def test_the_gate_on_general_perplexity(
    trained_dir: Path, tiny_model_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    signs = []
    for model, baseline in ((trained_dir, tiny_model_dir), (tiny_model_dir, trained_dir)):
        workspace = Workspace(tmp_path / model.name)
        settings = config(texts, checkpoint=str(model), baseline=str(baseline))
        validate.run(settings, workspace)
        found = report_of(workspace)["sets"]["general"]["perplexity"]
        change = 100 * (found["model"] / found["base"] - 1)
        signs.append(change > 0)
        if change > 0:
            limited = settings.model_copy(update={"max_degradation": change * 0.9})
            with pytest.raises(CheckFailed, match="general perplexity") as caught:
                validate.run(limited, workspace, force=True)
            assert caught.value.exit_code == 6
            assert failed(report_of(workspace)) == ["general perplexity, change in percent"]
            limited = settings.model_copy(update={"max_degradation": change * 1.1})
            validate.run(limited, workspace, force=True)
            assert failed(report_of(workspace)) == []
    assert sorted(signs) == [False, True]


def test_ranks_add_up_to_one_process(trained_dir: Path, texts: dict[str, str]) -> None:
    """Two ranks score disjoint windows; their sums are those of one."""
    from nexus_cli.core.evaluate.perplexity import Subject, score
    from nexus_cli.core.evaluate.windows import batches, collated, plan

    model = load_model(trained_dir, device="cpu", dtype=torch.float32)
    loaded = load_tokenized(config(texts).general, trained_dir, default_split="held-out")
    groups = batches(plan(loaded.documents, window=64, stride=24), max_tokens=128)
    assert len(groups) > 2

    def sums(part: list) -> torch.Tensor:
        return score(
            Subject(model),
            Subject(model, shared_experts=False),
            collated(part, loaded.documents),
            num_documents=len(loaded.documents),
            top_k=2,
            device="cpu",
        )

    torch.testing.assert_close(sums(groups[0::2]) + sums(groups[1::2]), sums(groups))


def test_the_newest_model_of_the_workspace_is_taken(
    tiny_converted_dir: Path, trained_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    settings = config(texts, compute_perplexity=False)
    with pytest.raises(WorkspaceError, match="no trained and no converted model"):
        validate.run(settings, workspace)
    for name, source in (("convert", tiny_converted_dir), ("train", trained_dir)):
        main = "model" if name == "convert" else "checkpoint-7"
        with stage(name, settings, workspace, main=main, inputs={}) as out:
            assert out is not None
            shutil.copytree(source, out.main)
            out.add(out.main, format="nexus.model/1")
        validate.run(settings, workspace, force=True)
        assert Path(report_of(workspace)["model"]["path"]).name == main


def test_models_that_cannot_be_compared_are_refused(
    trained_dir: Path, make_tiny_model, texts: dict[str, str], tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", num_local_experts=4)
    with pytest.raises(ArtifactError, match="num_experts is 8 and 4"):
        validate.run(
            config(texts, checkpoint=str(trained_dir), baseline=str(other)), Workspace(tmp_path)
        )


def test_a_missing_model_is_one_clear_line(texts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        validate.run(config(texts, checkpoint=str(tmp_path / "nowhere")), Workspace(tmp_path))


def test_json_is_the_only_thing_on_stdout(
    trained_dir: Path, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(texts, checkpoint=str(trained_dir), output=tmp_path / "out" / "r.json")
    validate.run(settings, Workspace(tmp_path / "w"), mode=Mode(json=True))
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((tmp_path / "out" / "r.json").read_text())
    assert not (tmp_path / "w").exists()


def test_a_dry_run_says_what_and_whether_it_fits(
    trained_dir: Path,
    texts: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(texts, checkpoint=str(trained_dir))
    validate.run(settings, Workspace(tmp_path), dry_run=True)
    printed = capsys.readouterr().out
    assert "models in memory" in printed
    assert "domain.jsonl" in printed.replace("\n", "")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(validate_plan, "free_memory", lambda _device: 1)
    with pytest.raises(ResourceError, match="GiB are free"):
        validate.run(settings, Workspace(tmp_path), dry_run=True)


def rolling_nll(model, ids: list[int], bos: int, length: int) -> float:
    """lm-evaluation-harness' ``loglikelihood_rolling``: disjoint windows, the last one full."""
    total = 0.0
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        inputs = [bos, *ids][max(0, end - length) : end]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([inputs])).logits[0, begin - end :]
        rows = functional.log_softmax(logits.double(), dim=-1)
        total -= float(rows.gather(1, torch.tensor(ids[begin:end])[:, None]).sum())
    return total


def test_disjoint_windows_without_the_end_token_are_lm_evals(
    trained_dir: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    found = {}
    for score_end in (True, False):
        settings = config(texts, checkpoint=str(trained_dir), score_end=score_end, stride=64)
        workspace = Workspace(tmp_path / str(score_end))
        validate.run(settings, workspace)
        found[score_end] = report_of(workspace)["sets"]
    assert found[True]["general"]["tokens"] == found[False]["general"]["tokens"] + 4
    assert found[True]["domain"]["tokens"] == found[False]["domain"]["tokens"]
    tokenizer = load_tokenizer(trained_dir)
    model = load_model(trained_dir, device="cpu", dtype=torch.float32)
    rows = [
        tokenizer(f"The {n} brown foxes jump. " * (4 + 8 * n), add_special_tokens=False).input_ids
        for n in range(4)
    ]
    nll = sum(rolling_nll(model, ids, tokenizer.bos_token_id, 64) for ids in rows)
    tokens = sum(map(len, rows))
    assert found[False]["general"]["tokens"] == tokens
    measured = found[False]["general"]["perplexity"]["model"]
    assert measured == pytest.approx(math.exp(nll / tokens), rel=1e-5)


@pytest.mark.parametrize("mode", [Mode(), Mode(check=False, chat=True)])
def test_a_full_device_is_said_with_its_numbers(
    texts, tiny_model_dir, tmp_path, monkeypatch, mode
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(validate, "load_model", full)
    monkeypatch.setattr(validate.chat, "load_model", full)
    settings = config(texts, checkpoint=str(tiny_model_dir))
    with pytest.raises(ResourceError, match=r"on cpu: 3\.00 GiB were asked for; ") as caught:
        validate.run(settings, Workspace(tmp_path), mode=mode)
    assert caught.value.hint
    assert not (tmp_path / "validate" / "report.json").exists()
