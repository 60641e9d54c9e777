"""Generation marks in the harmony template, for a loss on assistant tokens only."""

from __future__ import annotations

BEGIN, END = "{%- generation -%}", "{%- endgeneration -%}"
HEADER = '{{- "<|start|>assistant" }}'


def mark_generation(template: str) -> str:
    """Mark what an assistant writes, which is all that follows ``<|start|>assistant``.

    The rendered text stays the same. The channel and recipient are inside the marks, since the
    generation prompt ends at ``<|start|>assistant`` and the model writes them itself.

    Args:
        template: the official GPT-OSS chat template.

    Raises:
        ValueError: the template does not hold the lines that this marks.
    """
    for channel in ("analysis", "final"):
        whole = f'{{{{- "<|start|>assistant<|channel|>{channel}<|message|>" + '
        rest = f'{{{{- "<|channel|>{channel}<|message|>" + '
        for line in _lines_with(template, whole):
            marked = HEADER + BEGIN + line.replace(whole, rest) + END
            template = template.replace(line, marked)
    return _mark_tool_call(template)


def _lines_with(template: str, start: str) -> list[str]:
    lines = {line.strip() for line in template.splitlines() if line.strip().startswith(start)}
    if not lines:
        raise ValueError(f"the template holds no line with {start!r}")
    return sorted(lines)


def _mark_tool_call(template: str) -> str:
    start, recipient, end = (
        '{{- "<|start|>assistant to=" }}',
        '{{- "functions." + tool_call.name',
        '{{- "<|call|>" }}',
    )
    for part in (start, recipient, end):
        if template.count(part) != 1:
            raise ValueError(f"the template must hold {part!r} once")
    template = template.replace(start, HEADER + BEGIN + '{{- " to=" }}')
    return template.replace(end, end + END)
