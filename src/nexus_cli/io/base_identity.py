"""Which model something was made from: by name, for people, and by fingerprint, for certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from nexus_cli import embedded
from nexus_cli.errors import ArtifactError
from nexus_cli.io import hub_cache, model_dir
from nexus_cli.io.shard_identity import shard_digest
from nexus_cli.io.uri import REPOSITORY, REVISION


class BaseIdentity(BaseModel):
    """The model that was converted, in words that hold on any machine.

    Attributes:
        name: ``owner/name`` if it lay in a cache of the hub, ``embedded``, or its folder's name.
        revision: of ``owner/name``, the commit.
        fingerprint: see :func:`~nexus_cli.io.model_dir.fingerprint`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # All three may come from anyone, and are shown, the revision to be typed.
    name: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    revision: str | None = Field(None, pattern=rf"^{REVISION.pattern}$")
    fingerprint: str = Field(pattern=r"^[0-9a-f]+$")

    @property
    def repository(self) -> str | None:
        """The name, if it is one of the hub."""
        return self.name if REPOSITORY.fullmatch(self.name) else None


def identity(path: Path, fingerprint: str) -> BaseIdentity:
    """The identity of the model in the folder ``path``, which need not be there any more."""
    if path in (embedded.MODEL_DIR, embedded.MODEL_DIR.resolve()):
        return BaseIdentity(name=model_dir.EMBEDDED, fingerprint=fingerprint)
    own = "".join(character for character in path.name if character.isprintable())
    found = hub_cache.repository_of(path)
    if found is None or not found[0].isprintable() or not REVISION.fullmatch(found[1]):
        return BaseIdentity(name=own or "unnamed", fingerprint=fingerprint)
    return BaseIdentity(name=found[0], revision=found[1], fingerprint=fingerprint)


def base_record(path: Path, fingerprint: str) -> dict[str, Any]:
    """What ``conversion_metadata.json`` says of the base in the folder ``path``.

    Beside its identity: the path, and the digest of each shard, by which a folder of links knows
    that what they lead to has changed.
    """
    record = identity(path, fingerprint).model_dump()
    return record | {"path": str(path), "shards": model_dir.shard_digests(path)}


def replaced_base(path: Path) -> Path | None:
    """Where another model lies by now in the place of what the folder ``path`` was converted from.

    The folder itself is whole if it holds hard links or copies: those keep the original's bytes.
    ``None`` if the base is as it was, or is not there, or the folder does not say.
    """
    if not (path / model_dir.CONVERSION).is_file():
        return None
    base = model_dir.read_json(path / model_dir.CONVERSION).get("base")
    shards = base.get("shards") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(shards, dict):
        return None
    place = Path(str(base.get("path", "")))
    if not model_dir.is_model(place):
        return None
    changed = (_is_other(place / name, path / name, digest) for name, digest in shards.items())
    return place if any(changed) else None


def _is_other(shard: Path, linked: Path, digest: str) -> bool:
    if not shard.is_file():
        return True
    if linked.is_file() and shard.samefile(linked):
        return False  # checked where it is linked
    try:
        return shard_digest(shard) != digest
    except ArtifactError:
        return True
