"""A chat template made fit for training: the date held fixed, what an assistant writes marked."""

from __future__ import annotations

import json
import re
from datetime import date

from nexus_cli.core.data.errors import BadFileError

# Prompts of GPT-OSS hold the date. Were it today's, no text would be the same tomorrow.
FIXED_DATE = date(2026, 11, 1)
NOW = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

BEGIN, END = "{%- generation -%}", "{%- endgeneration -%}"
HEADER = '{{- "<|start|>assistant" }}'
WHOLE = re.compile(r'\{\{-\s*"<\|start\|>assistant(?P<rest><\|channel\|>.*?\}\})')
CALL = re.compile(
    r'\{\{-\s*"<\|start\|>assistant to="\s*\}\}(?P<rest>.*?\{\{-\s*"<\|call\|>"\s*\}\})', re.DOTALL
)


def with_fixed_date(template: str) -> str:
    """Replace every ``strftime_now("...")`` by ``FIXED_DATE`` in that format.

    Raises:
        BadFileError: the template asks for the time in another way.
    """

    def spell(found: re.Match[str]) -> str:
        return json.dumps(FIXED_DATE.strftime(found["format"]))

    fixed = NOW.sub(spell, template)
    if "strftime_now" in fixed:
        raise BadFileError("the chat template computes a date in a way that cannot be held fixed")
    return fixed


def has_marks(template: str) -> bool:
    """Whether the template says which of its output an assistant writes."""
    return MARK.search(template) is not None


def with_marks(template: str) -> str:
    """Mark in GPT-OSS's template what an assistant writes; the rendered text stays the same.

    That is all after ``<|start|>assistant``, where a generation prompt ends: the channel, the
    recipient, the content, and the token that ends the message.

    Raises:
        BadFileError: the template is another one, without marks of its own.
    """
    if has_marks(template):
        return template
    marked, turns = WHOLE.subn(
        lambda found: f'{HEADER}{BEGIN}{{{{- "{found["rest"]}{END}', template
    )
    marked, calls = CALL.subn(
        lambda found: f'{HEADER}{BEGIN}{{{{- " to=" }}}}{found["rest"]}{END}', marked
    )
    if not turns or not calls:
        raise BadFileError(
            "the chat template does not say what an assistant writes, and is not GPT-OSS's",
            "Put a copy with {% generation %} marks beside it as chat_template_training.jinja.",
        )
    return marked
