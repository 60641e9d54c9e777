import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from nexus_cli import embedded
from nexus_cli.config.shared import TextData
from nexus_cli.core.data import build
from nexus_cli.core.data.order import mixture_order
from nexus_cli.errors import ArtifactError, ConfigError, ResourceError
from nexus_cli.pipeline.text import describe_sources, load_blocks, load_documents, load_tokenized

MODEL = embedded.MODEL_DIR
FIXTURES = Path(__file__).parents[1] / "fixtures/nemotron"
NVIDIA = FIXTURES / "nvidia"


def write_texts(path, count, word="word"):
    rows = ({"text": f"{word} {number} " * (5 + number % 20)} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mixture(tmp_path):
    """Two local sources, three to one."""
    small, large = (write_texts(tmp_path / f"{name}.jsonl", 60, name) for name in ("red", "blue"))
    return TextData(sources=f"{small}@all:3,{large}@all:1", seq_len=64)


def same_arrays(one, other):
    names = ("input_ids_NS", "position_ids_NS", "loss_mask_NS", "source_N")
    return all(
        np.array_equal(getattr(one.blocks, name), getattr(other.blocks, name)) for name in names
    )


@pytest.mark.parametrize(
    ("repository", "names"),
    [
        ("Nemotron-Post-Training-Dataset-v1", ["general", "code", "math", "tool-calling"]),
        ("Nemotron-Post-Training-Dataset-v2", ["general", "code", "math"]),
        ("Llama-Nemotron-Post-Training-Dataset", ["general", "code", "math"]),
        ("Nemotron-Agentic-v1", ["tool-calling"]),
        ("Nemotron-Math-v2", ["math"]),
    ],
)
def test_nemotron_in_every_layout_loads_under_its_names(monkeypatch, repository, names):
    monkeypatch.setenv("NEXUS_DATA_DIR", str(NVIDIA / repository))
    data = TextData(sources=",".join(f"nemotron-{name}@all" for name in names))
    text = load_tokenized(data, MODEL, default_split="train")
    assert {document.source_index for document in text.documents} == set(range(len(names)))
    for document in text.documents:
        assert document.is_chat
        assert document.loss_mask.any()
    for index, name in enumerate(names):
        of_tools = [d.value_mask.any() for d in text.documents if d.source_index == index]
        assert any(of_tools) == (name == "tool-calling")


def test_the_default_sources_are_the_four_of_nemotron(monkeypatch):
    monkeypatch.setenv("NEXUS_DATA_DIR", str(FIXTURES))
    data = TextData(held_out=0.3)
    plans = describe_sources(data, default_split="train")
    assert [plan.name.removeprefix("nemotron-") for plan in plans] == [
        "general",
        "code",
        "math",
        "tool-calling",
    ]
    assert {plan.split for plan in plans} == {"train"}


def test_the_config_beats_the_environment_in_where_the_data_is(monkeypatch, tmp_path):
    monkeypatch.setenv("NEXUS_DATA_DIR", str(tmp_path))
    data = TextData(sources="nemotron-math", data_dir=NVIDIA)
    assert str(NVIDIA) in describe_sources(data, default_split="train")[0].origin


def test_withheld_prompts_are_left_out_and_counted():
    data = TextData(
        sources="nemotron-general@all", data_dir=NVIDIA / "Nemotron-Post-Training-Dataset-v2"
    )
    report = load_documents(data, default_split="train").report.sources[0]
    assert report.dropped == {"empty or withheld prompt": 1}
    assert report.documents > 0
    assert "1 left out: empty or withheld prompt" in report.sentence()


def test_a_source_with_nothing_to_use_is_an_error_that_says_why():
    data = TextData(
        sources="nemotron-general@all",
        data_dir=NVIDIA / "Nemotron-SFT-Instruction-Following-Chat-v3",
    )
    with pytest.raises(ResourceError, match="withheld prompt"):
        load_documents(data, default_split="train")


def test_without_any_copy_the_error_says_how_to_give_text(monkeypatch):
    monkeypatch.delenv("NEXUS_DATA_DIR", raising=False)
    pytest.importorskip("datasets")
    with pytest.raises(ResourceError) as caught:
        load_documents(TextData(), default_split="train")
    assert "nvidia/Nemotron-Post-Training-Dataset-v1" in str(caught.value)
    assert "--data PATH" in caught.value.hint
    assert "--data-dir" in caught.value.hint


def test_without_the_package_for_streaming_the_error_names_the_extra(monkeypatch):
    monkeypatch.delenv("NEXUS_DATA_DIR", raising=False)
    monkeypatch.delitem(sys.modules, "nexus_cli.core.data.hub", raising=False)
    monkeypatch.delattr(sys.modules["nexus_cli.core.data"], "hub", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ResourceError) as caught:
        load_documents(TextData(sources="org/name"), default_split="train")
    assert "nexus-cli[hub]" in caught.value.hint
    assert "--data" in caught.value.hint


def test_a_hub_source_is_read_at_one_revision_and_no_further_than_wanted(monkeypatch):
    pytest.importorskip("datasets")
    from nexus_cli.core.data import hub

    asked, taken = [], []

    def load_dataset(repository, config, **options):
        asked.append((repository, config, options["split"], options["revision"]))
        rows = ({"text": f"Row {number} " * 30} for number in range(100_000))
        return (taken.append(1) or row for row in rows)

    monkeypatch.setattr(hub, "current_revision", lambda _: "0123abc")
    monkeypatch.setattr(hub.datasets, "load_dataset", load_dataset)
    data = TextData(sources="org/name:config:part", seq_len=64)
    text = load_blocks(data, MODEL, default_split="train", num_blocks=5)
    assert asked == [("org/name", "config", "part", "0123abc")]
    assert len(text.blocks) == 6
    assert len(taken) < 10_000


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("no-such-name", None, ConfigError, "no-such-name"),
        ("missing.jsonl", None, ConfigError, "missing.jsonl"),
        ("empty.jsonl", b"", ArtifactError, "empty"),
        ("latin.jsonl", b'{"text": "\xe9"}', ArtifactError, "line 1: not UTF-8"),
        ("keys.jsonl", b'{"body": "x"}', ArtifactError, "line 1: a row without text"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00", ArtifactError, "cannot be read"),
    ],
)
def test_what_is_wrong_with_text_is_one_error_that_names_the_file(
    tmp_path, name, content, error, words
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        load_documents(TextData(sources=str(path)), default_split="train")
    assert name in str(caught.value)


def test_a_split_without_documents_is_an_error_that_says_how_to_get_some(tmp_path):
    path = write_texts(tmp_path / "few.jsonl", 2)
    data = TextData(sources=str(path), held_out=1e-9)
    with pytest.raises(ResourceError) as caught:
        load_documents(data, default_split="held-out")
    assert "@all" in caught.value.hint


def test_a_limit_on_documents_is_shared_by_weight(mixture):
    text = load_documents(mixture, default_split="train", max_documents=20)
    assert [source.documents for source in text.report.sources] == [15, 5]
    assert load_documents(mixture, default_split="train", max_documents=20).digest == text.digest


def test_whole_documents_are_not_cut_to_the_sequence_length(mixture):
    text = load_tokenized(mixture, MODEL, default_split="train")
    assert max(map(len, text.documents)) > mixture.seq_len
    assert len(text.documents) == 120
    assert text.report.tokens == sum(map(len, text.documents))


def test_blocks_never_mix_sources_and_hold_every_target(mixture):
    text = load_blocks(mixture, MODEL, default_split="train")
    whole = load_tokenized(mixture, MODEL, default_split="train")
    blocks = text.blocks
    assert (np.diff(blocks.source_N) >= 0).all()
    decode = whole_decoder()
    for ids, source in zip(blocks.input_ids_NS, blocks.source_N, strict=True):
        assert ("blue", "red")[int(source)] not in decode(ids)
    targets = sum(int(document.loss_mask.sum()) for document in whole.documents)
    lost = sum(source.windows for source in text.report.sources)
    assert int(blocks.loss_mask_NS.sum()) == targets - lost
    assert min(source.fill for source in text.report.sources) > 0.9


def whole_decoder():
    from nexus_cli.core.data.render import Renderer

    return Renderer.from_folder(MODEL).tokenizer.decode


def test_no_more_is_read_than_the_caller_takes_and_no_block_is_seen_twice(mixture):
    text = load_blocks(mixture, MODEL, default_split="train", num_blocks=12)
    counts = text.blocks.blocks_per_source
    assert counts == [10, 4]
    order = mixture_order(0, counts, [source.weight for source in mixture.sources], 12)
    assert len(set(order.tolist())) == 12


def test_chats_that_do_not_fit_are_counted_and_their_count_is_reported(caplog):
    data = TextData(sources="bundled-tool-calling", seq_len=256, max_documents=60)
    with caplog.at_level(logging.INFO, logger="nexus_cli"):
        text = load_blocks(data, MODEL, default_split="held-out")
    (report,) = text.report.sources
    assert report.truncated > 0
    assert report.tokens_cut > 0
    assert "chats cut" in caplog.text
    assert report.documents + sum(report.dropped.values()) <= 60


def test_a_cached_set_is_the_same_set_without_reading_again(mixture, tmp_path, monkeypatch):
    plain = load_blocks(mixture, MODEL, default_split="train")
    first = load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(build, "tokenized_source", None)
    again = load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
    assert same_arrays(plain, first)
    assert same_arrays(first, again)
    assert plain.digest == first.digest == again.digest
    assert first.report == again.report == plain.report


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 65}, {"seed": 1}, {"max_documents": 50}, {"held_out": 0.5}],
)
def test_whatever_changes_the_text_changes_the_cache_entry(mixture, tmp_path, change):
    cache = tmp_path / "cache"
    for data in (mixture, mixture.model_copy(update=change)):
        load_blocks(data, MODEL, default_split="train", cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_another_content_of_the_same_file_is_another_entry(mixture, tmp_path):
    load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
    write_texts(tmp_path / "red.jsonl", 60, "ruby")
    text = load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
    assert "ruby" in whole_decoder()(text.blocks.input_ids_NS[0])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "entry", "entry fields"])
def test_a_damaged_cache_entry_is_made_again_with_a_warning(mixture, tmp_path, caplog, damage):
    whole = load_blocks(mixture, MODEL, default_split="train")
    load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    ids, entry = folder / "input_ids", folder / "entry.json"
    if damage == "flip":
        ids.write_bytes(b"\xff" + ids.read_bytes()[1:])
    elif damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "remove":
        ids.unlink()
    else:
        entry.write_text("{" if damage == "entry" else "{}")
    again = load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
    assert "damaged" in caplog.text
    assert same_arrays(whole, again)
    assert whole.digest == again.digest


def test_another_process_that_makes_the_same_entry_does_no_harm(mixture, tmp_path, monkeypatch):
    pack = build._pack_sources

    def pack_while_another_does(*args):
        monkeypatch.setattr(build, "_pack_sources", pack)
        monkeypatch.setattr(build.os, "getpid", lambda: 1)
        load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
        return pack(*args)

    monkeypatch.setattr(build, "_pack_sources", pack_while_another_does)
    text = load_blocks(mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache")
    assert same_arrays(text, load_blocks(mixture, MODEL, default_split="train"))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_failure_leaves_no_entry_behind(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 30)
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(ArtifactError, match="line 31"):
        load_blocks(
            TextData(sources=f"{path}@all"), MODEL, default_split="train", cache_dir=tmp_path / "c"
        )
    assert not list((tmp_path / "c").iterdir())


def test_the_tokenizer_is_part_of_what_the_cache_knows(mixture, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    load_blocks(mixture, model, default_split="train", cache_dir=tmp_path / "cache")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    load_blocks(mixture, model, default_split="train", cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


class FakeWorld:
    """A rank that runs ``meanwhile`` while it waits for the others."""

    def __init__(self, *, is_main, meanwhile):
        self.is_main = is_main
        self.barrier = meanwhile


def test_other_ranks_wait_and_map_what_rank_0_made(mixture, tmp_path):
    made = []

    def rank_0():
        world = FakeWorld(is_main=True, meanwhile=lambda: made.append("barrier"))
        made.append(load(world))

    def load(world):
        return load_blocks(
            mixture, MODEL, default_split="train", cache_dir=tmp_path / "cache", world=world
        )

    followed = load(FakeWorld(is_main=False, meanwhile=rank_0))
    assert made[0] == "barrier"
    assert same_arrays(made[1], followed)
    assert isinstance(followed.blocks.input_ids_NS.base, np.memmap)


def test_ranks_do_not_wait_for_one_that_failed(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}")
    data = TextData(sources=f"{tmp_path / 'bad.jsonl'}@all", seq_len=16)
    waited = []

    def load(world):
        with pytest.raises(ArtifactError, match=r"bad\.jsonl"):
            load_blocks(
                data, MODEL, default_split="train", cache_dir=tmp_path / "cache", world=world
            )

    load(FakeWorld(is_main=True, meanwhile=lambda: waited.append(0)))
    load(FakeWorld(is_main=False, meanwhile=lambda: waited.append(1)))
    assert waited == [0, 1]


def test_a_bad_tokenizer_folder_is_an_artifact_error(mixture, tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        load_tokenized(mixture, tmp_path, default_split="train")
