"""From the name of a source to its text: a known data set, a path, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nexus_cli import embedded
from nexus_cli.core.data.errors import MissingTextError, UnknownSourceError
from nexus_cli.core.data.files import find_files
from nexus_cli.core.data.nemotron import HUB_SPLITS, LAYOUTS, OWNER, V1, local_copy

BUNDLED = {"bundled-general": "general", "bundled-tool-calling": "tool-calling"}
BUNDLED_SPLITS = {
    "train": ("train",),
    "held-out": ("held-out",),
    "all": ("train", "held-out"),
}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?", re.ASCII)
NAMES = (*LAYOUTS, *BUNDLED)


@dataclass(frozen=True)
class LocalText:
    """Files on this machine.

    Attributes:
        files: in a fixed order.
        origin: where they are, for the report.
        is_split: the files already are the wanted split, made by the publisher.
    """

    files: tuple[Path, ...]
    origin: str
    is_split: bool = False


@dataclass(frozen=True)
class HubText:
    """A data set to stream from the hub: ``org/name[:CONFIG[:SPLIT]]``."""

    repository: str
    config: str | None
    split: str

    @property
    def origin(self) -> str:
        """For the report."""
        return f"hub: {self.repository} {self.config or 'default'} {self.split}"


def resolve_source(name: str, split: str, data_dir: Path | None) -> LocalText | HubText:
    """Find the text of a source. There is no fallback to another.

    Args:
        name: a known name, a path, or ``org/name[:CONFIG[:SPLIT]]``.
        split: ``train``, ``held-out`` or ``all``.
        data_dir: folder with local copies of the named data sets.

    Raises:
        UnknownSourceError: the name is none of these.
        MissingTextError: the data folder is not there.
        BadFileError: a path holds no files of text.
    """
    if name in BUNDLED:
        return _bundled(BUNDLED[name], split)
    if name in LAYOUTS:
        return _nemotron(name, data_dir)
    path = Path(name).expanduser()
    if path.exists():
        return LocalText(files=tuple(find_files(path)), origin=str(path))
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or path.suffix in (".jsonl", ".json", ".parquet", ".txt", ".gz", ".zst"):
        known = ", ".join(NAMES)
        raise UnknownSourceError(
            f"no data source {name!r}: there is no such file or folder",
            f"Give a path, a hub id org/name, or one of: {known}.",
        )
    return HubText(repository=hub_id[1], config=hub_id[2], split=hub_id[3] or "train")


def _bundled(stem: str, split: str) -> LocalText:
    files = tuple(embedded.DATA_DIR / f"{stem}.{part}.jsonl.gz" for part in BUNDLED_SPLITS[split])
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise MissingTextError(
            f"the bundled text is missing from the installation: {', '.join(missing)}",
            "Install the package again, or give text with --data PATH.",
        )
    return LocalText(files=files, origin=f"bundled {stem}", is_split=True)


def _nemotron(name: str, data_dir: Path | None) -> LocalText | HubText:
    if data_dir is None:
        return HubText(repository=f"{OWNER}/{V1}", config=None, split=HUB_SPLITS[name])
    if not data_dir.is_dir():
        raise MissingTextError(
            f"the data folder {data_dir} is not there",
            "Name it with --data-dir or NEXUS_DATA_DIR, or give text with --data PATH.",
        )
    found = local_copy(name, data_dir)
    if found is None:
        raise MissingTextError(
            f"no copy of {name} under {data_dir}",
            f"Put a clone of {OWNER}/{V1} there (--data-dir), or give text with --data PATH.",
        )
    origin, files = found
    return LocalText(files=tuple(files), origin=origin)
