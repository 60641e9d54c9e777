"""Write docs/configuration.md from the config models: every key, its default, its meaning.

python scripts/configuration_docs.py          writes the page
python scripts/configuration_docs.py --check  fails if the page is not current
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nexus_cli.config.base import ConfigModel
from nexus_cli.config.collect import CollectConfig
from nexus_cli.config.convert import ConvertConfig
from nexus_cli.config.pca import PcaConfig
from nexus_cli.config.plot import PlotConfig
from nexus_cli.config.precompute import PrecomputeConfig
from nexus_cli.config.shared import DataSource, LossWeights
from nexus_cli.config.train import TrainConfig
from nexus_cli.config.validate import ValidateConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BLOCKS: dict[str, type[ConfigModel]] = {
    "collect": CollectConfig,
    "pca": PcaConfig,
    "convert": ConvertConfig,
    "train": TrainConfig,
    "precompute": PrecomputeConfig,
    "validate": ValidateConfig,
    "plot": PlotConfig,
}
HEAD = """\
# Configuration

Made by `python scripts/configuration_docs.py`; a test keeps it current.

`--config FILE.yaml` holds a block for each stage. The blocks `model`, `data`, `dtype` and `runtime`
at the top level fill the key of the same name in every stage that has it. What wins, lowest first:
defaults, top-level blocks, the stage's block, `--set key=value` (dotted keys, YAML values), flags.
`train-offline` reads the block `train`. An unknown key is an error. `configs/` has examples.

`data.sources` is a string, `NAME[@SPLIT][:WEIGHT],...`, or a list whose items are such strings or
blocks (see [a data source](#a-data-source)).
"""


def rows(model: type[ConfigModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and description of every leaf, depth first."""
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, ConfigModel):
            yield from rows(kind, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        yield f"{prefix}{name}", shown(default), field.description or ""


def shown(default: Any) -> str:
    """A default as it could be written in YAML."""
    if isinstance(default, tuple) and all(isinstance(item, DataSource) for item in default):
        return "`" + ",".join(item.name for item in default) + "`" if default else ""
    if isinstance(default, ConfigModel):
        return "`" + json.dumps(default.model_dump(mode="json")) + "`"
    if isinstance(default, (str, int, float, bool, type(None))):
        return f"`{json.dumps(default)}`"
    return f"`{json.dumps(list(default))}`" if isinstance(default, tuple) else ""


def table(model: type[ConfigModel]) -> str:
    """The rows of one block as Markdown."""
    lines = ["| key | default | |", "| --- | --- | --- |"]
    for key, default, text in rows(model):
        cells = (f"`{key}`", default, text.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += [f"## {name}\n\n{table(model)}" for name, model in BLOCKS.items()]
    parts.append(f"## A data source\n\n{table(DataSource)}")
    parts.append(f"`loss`, if given:\n\n{table(LossWeights)}")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or check it."""
    if "--check" in sys.argv[1:]:
        sys.exit(page() != PAGE.read_text(encoding="utf-8") and f"{PAGE.name} is not current")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
