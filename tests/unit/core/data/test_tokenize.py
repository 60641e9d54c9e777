import pytest

from nexus_cli import embedded
from nexus_cli.core.data import tokenize
from nexus_cli.core.data.document import Document, LeftOut
from nexus_cli.core.data.render import Renderer
from nexus_cli.core.data.tokenize import tokenize_documents

DOCUMENTS = [
    *(Document(text=f"Document {i}: " + "word " * (i * 37 % 50)) for i in range(40)),
    LeftOut("for a reason"),
    Document(
        messages=({"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "x"})
    ),
    Document(text="the last"),
]


@pytest.fixture(scope="module")
def renderer():
    return Renderer.from_folder(embedded.MODEL_DIR)


def test_two_workers_give_what_one_process_gives_in_the_same_order(renderer, monkeypatch):
    monkeypatch.setattr(tokenize, "WORTH_WORKERS", 8)
    monkeypatch.setattr(tokenize, "CHUNK", 5)
    one, two = (
        list(tokenize_documents(iter(DOCUMENTS), embedded.MODEL_DIR, renderer, workers))
        for workers in (1, 2)
    )
    assert len(one) == len(two) == len(DOCUMENTS)
    for first, second in zip(one, two, strict=True):
        if isinstance(first, LeftOut):
            assert first == second
        else:
            assert first.id == second.id
            assert first.input_ids.tolist() == second.input_ids.tolist()
            assert first.loss_mask.tolist() == second.loss_mask.tolist()


def test_for_few_documents_no_worker_is_started(renderer, monkeypatch):
    monkeypatch.setattr(tokenize, "ProcessPoolExecutor", None)
    made = list(tokenize_documents(iter(DOCUMENTS), embedded.MODEL_DIR, renderer, 4))
    assert [isinstance(item, LeftOut) for item in made] == [False] * 40 + [True, True, False]


def test_documents_are_read_as_they_are_needed(renderer):
    taken = []
    source = (taken.append(document) or document for document in DOCUMENTS)
    next(tokenize_documents(source, embedded.MODEL_DIR, renderer, 1))
    assert len(taken) == 1


def test_no_worker_at_all_is_refused(renderer):
    with pytest.raises(ValueError, match="at least 1"):
        tokenize_documents(iter(DOCUMENTS), embedded.MODEL_DIR, renderer, 0)
