"""The ``README.md`` of an adapter on the hub: what it is of, and how to put it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from nexus_cli.io.adapter_dir import TENSORS, AdapterConfig
from nexus_cli.io.model_dir import EMBEDDED

APACHE = "Apache License"
LICENCE = "LICENSE*"


def model_card(repository: str, folder: Path, config: AdapterConfig) -> str:
    """The card's text, for the hub to read (YAML) and for people.

    Args:
        repository: ``owner/name``, where it will be.
        folder: of the adapter; its licence is named.
        config: what the adapter says about itself.
    """
    return "\n".join([*_front(folder, config), "", *_body(repository, folder, config), ""])


def _front(folder: Path, config: AdapterConfig) -> Iterator[str]:
    """What the hub indexes; the base only where it is a repository of the hub."""
    yield "---"
    yield "library_name: nexus"
    yield "pipeline_tag: text-generation"
    if config.base.repository is not None:
        yield f"base_model: {config.base.repository}"
        yield "base_model_relation: adapter"
    if _is_apache(folder):
        yield "license: apache-2.0"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("nexus", "gpt_oss", "mixture-of-experts", "adapter"))
    yield "---"


def _body(repository: str, folder: Path, config: AdapterConfig) -> Iterator[str]:
    base, shape = config.base, config.shape
    yield f"# {repository.partition('/')[2]}"
    yield ""
    yield f"A Nexus adapter for {_linked(config)}."
    yield f"In each of the {shape.num_layers} layers it adds a shared expert of"
    yield f"{shape.shared_intermediate_size} units, which every token passes, beside the base's"
    yield f"own {shape.num_experts} experts. It is of use with that base alone."
    yield ""
    yield "```sh"
    yield 'pip install "nexus-cli[hub]"'
    if base.repository is not None:
        revision = f" --revision {base.revision}" if base.revision else ""
        yield f"hf download {base.repository}{revision}"
        yield f"nexus convert --input hf://{repository} --output MODEL"
    elif base.name == EMBEDDED:
        yield f"nexus convert --input hf://{repository} --output MODEL"
    else:
        yield f"nexus convert --input hf://{repository} --base BASE --output MODEL"
    yield "```"
    yield ""
    yield "`MODEL` is then a whole model folder, for `transformers` with `trust_remote_code=True`"
    yield "and for every `nexus` command; the commands that train and validate take"
    yield f"`hf://{repository}` itself. Nexus verifies both parts, and refuses any other base."
    yield ""
    yield from _table(
        {
            "base": base.name,
            "revision of the base": base.revision,
            "fingerprint of the base": base.fingerprint,
            f"SHA-256 of `{TENSORS}`": config.tensors.sha256,
            "made with Nexus": config.environment.get("nexus-cli"),
        }
    )
    yield ""
    yield "## Licence"
    yield ""
    yield _licence(folder)


def _linked(config: AdapterConfig) -> str:
    if (repository := config.base.repository) is not None:
        return f"[{repository}](https://huggingface.co/{repository})"
    if config.base.name == EMBEDDED:
        return "the small model that comes with Nexus"
    return f"the model `{config.base.name}`"


def _table(rows: Mapping[str, str | None]) -> Iterator[str]:
    yield "| | |"
    yield "| --- | --- |"
    yield from (f"| {name} | `{value}` |" for name, value in rows.items() if value is not None)


def _licence(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob(LICENCE))
    if not files:
        return "The adapter came without a licence file; the base's licence applies to the base."
    return f"{', '.join(f'`{name}`' for name in files)}, as it came with the base."


def _is_apache(folder: Path) -> bool:
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob(LICENCE)]
    return any(APACHE in text and "Version 2.0" in text for text in texts)
