"""Push an adapter to the hub: its own files alone, and none that names a place of this machine."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from nexus_cli import __version__
from nexus_cli.core.model.gpt_oss.adapter import Adapter
from nexus_cli.core.model.gpt_oss.export import LICENCES
from nexus_cli.io import adapter_dir, console, hub
from nexus_cli.pipeline.model_card import model_card

log = logging.getLogger(__name__)


def push(adapter: Adapter, repository: str, *, public: bool) -> None:
    """Upload ``adapter``, which is verified, in one commit.

    What goes up: its tensors, its config in the present format, licences, and a ``README.md``:
    the adapter's own if it has one, or one that is made here, unless the repository has one.

    Raises:
        ConfigError: the repository is public, and ``public`` is not said.
        ArtifactError: there is no such owner.
        ResourceError: the hub does not answer or refuses, or its client is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="nexus-push-") as temporary:
        stage_files(adapter, Path(temporary), repository)
        message = f"Upload an adapter with Nexus {__version__}"
        url, private = hub.push(Path(temporary), repository, public=public, message=message)
    if private and public:
        log.warning("%s was private before, and stays so; its settings on the hub say", repository)
    seen = "private" if private else "public"
    console.result(f"{url} ({seen}): to be read as hf://{repository}")


def stage_files(adapter: Adapter, folder: Path, repository: str) -> None:
    """Put what is to be uploaded into the empty ``folder``; the tensors are linked."""
    tensors = (adapter.path / adapter_dir.TENSORS).resolve()
    (folder / adapter_dir.TENSORS).symlink_to(tensors)
    adapter_dir.write_config(folder, adapter.config)
    for file in sorted(adapter.path.iterdir()):
        if file.name in (*hub.LEGAL, hub.CARD) and file.is_file():
            shutil.copyfile(file, folder / file.name)
        elif file.name.startswith(LICENCES) and file.is_file():
            log.warning("%s is not pushed: a licence is one of %s", file, ", ".join(hub.LEGAL))
    if not (folder / hub.CARD).exists():
        text = model_card(repository, folder, adapter.config)
        (folder / hub.CARD).write_text(text, encoding="utf-8")
