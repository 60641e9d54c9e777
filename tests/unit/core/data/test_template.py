import pytest

from nexus_cli import embedded
from nexus_cli.core.data.errors import BadFileError
from nexus_cli.core.data.template import has_marks, with_fixed_date, with_marks

OFFICIAL = (embedded.MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")


def test_the_date_is_held_fixed_in_any_format():
    assert with_fixed_date('{{ strftime_now("%Y-%m-%d") }}') == '{{ "2026-11-01" }}'
    assert with_fixed_date("{{ strftime_now( '%d %b %Y' ) }}") == '{{ "01 Nov 2026" }}'
    assert "strftime_now" not in with_fixed_date(OFFICIAL)


def test_a_date_that_cannot_be_held_fixed_is_refused():
    with pytest.raises(BadFileError, match="date"):
        with_fixed_date("{{ strftime_now(format) }}")


def test_a_template_with_marks_is_left_alone():
    marked = with_marks(OFFICIAL)
    assert has_marks(marked)
    assert not has_marks(OFFICIAL)
    assert with_marks(marked) == marked


def test_another_template_without_marks_is_refused():
    with pytest.raises(BadFileError) as caught:
        with_marks("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "chat_template_training.jinja" in caught.value.hint
