"""Where the four Nemotron names are found: in local copies of NVIDIA's data sets, or on the hub.

For streaming, the version that is open to all and holds all four is used throughout; the newer
one asks for a licence form. Locally that version comes first too, then the others in order.
"""

from __future__ import annotations

from pathlib import Path

from nexus_cli.core.data.files import SAVED, SAVED_SPLITS, find_files, kind_of

OWNER = "nvidia"
V1 = "Nemotron-Post-Training-Dataset-v1"
V2 = "Nemotron-Post-Training-Dataset-v2"
LLAMA = "Llama-Nemotron-Post-Training-Dataset"
STAGE_1, STAGE_2 = "Nemotron-Cascade-SFT-Stage-1", "Nemotron-Cascade-SFT-Stage-2"
CASCADE_2 = "Nemotron-Cascade-2-SFT-Data"
CHAT = "Nemotron-SFT-Instruction-Following-Chat"

# For each name: repositories in the order of preference, with the globs of its part of each.
LAYOUTS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "nemotron-general": (
        (V1, ("data/chat-*",)),
        (V2, ("data/chat-*",)),
        (LLAMA, ("SFT/chat/*",)),
        ("Nemotron-Instruction-Following-Chat-v1", ("data/chat_if.jsonl*",)),
        (f"{CHAT}-v2", ("data/reasoning_*.jsonl*",)),
        (f"{CHAT}-v3", ("data/*",)),
        (STAGE_1, ("general.jsonl*", "general/*")),
        (STAGE_2, ("general.jsonl*", "general/*", "instruction-following.jsonl*")),
        (CASCADE_2, ("chat/*", "instruction_following/*")),
    ),
    "nemotron-code": (
        (V1, ("data/code-*",)),
        (V2, ("data/code-*",)),
        (LLAMA, ("SFT/code/*",)),
        ("Nemotron-Competitive-Programming-v1", ("data/*",)),
        (STAGE_1, ("code/*",)),
        (STAGE_2, ("code/*", "swe_*.jsonl*")),
    ),
    "nemotron-math": (
        (V1, ("data/math-*",)),
        (V2, ("data/math-*",)),
        (LLAMA, ("SFT/math/*",)),
        ("Nemotron-Math-v2", ("data/*",)),
        (STAGE_1, ("math/*",)),
        (STAGE_2, ("math/*",)),
        (CASCADE_2, ("math/*",)),
    ),
    "nemotron-tool-calling": (
        (V1, ("data/tool-*",)),
        ("Nemotron-Agentic-v1", ("data/tool_calling.jsonl*", "data/interactive_agent.jsonl*")),
        (STAGE_2, ("tool_calling.jsonl*",)),
        (CASCADE_2, ("conversational_agent/*",)),
    ),
}
# Folders of save_to_disk, or of any files, under these names count as well.
FOLDERS = {
    "nemotron-general": ("nemotron-general", "general", "chat"),
    "nemotron-code": ("nemotron-code", "code"),
    "nemotron-math": ("nemotron-math", "math"),
    "nemotron-tool-calling": ("nemotron-tool-calling", "tool_calling", "tool-calling", "tool"),
}
HUB_SPLITS = {
    "nemotron-general": "chat",
    "nemotron-code": "code",
    "nemotron-math": "math",
    "nemotron-tool-calling": "tool_calling",
}


def local_copy(name: str, data_dir: Path) -> tuple[str, list[Path]] | None:
    """The files of a Nemotron name under a folder of local copies, and which copy they are of.

    Args:
        name: one of ``LAYOUTS``.
        data_dir: folder that holds clones (``nvidia/NAME``, ``NAME``, or as the hub's cache
            lays them out), folders of ``save_to_disk`` under a short name, or is a clone itself.

    Returns:
        The copy's folder and its files, or None if there is none. One copy, never a mixture.
    """
    for repository, globs in LAYOUTS[name]:
        for base in _places(repository, data_dir):
            files = sorted({path for glob in globs for path in base.glob(glob)})
            files = [path for path in files if path.is_file() and kind_of(path)]
            if files:
                return str(base), files
    for folder in (data_dir / short for short in FOLDERS[name]):
        if folder.is_dir() and (_is_saved(folder) or any(map(kind_of, folder.rglob("*")))):
            return str(folder), find_files(folder)
    return None


def _places(repository: str, data_dir: Path) -> list[Path]:
    places = [data_dir / OWNER / repository, data_dir / repository]
    if data_dir.name == repository:
        places.append(data_dir)
    snapshots = data_dir / f"datasets--{OWNER}--{repository}" / "snapshots"
    return places + sorted(snapshots.glob("*"))


def _is_saved(folder: Path) -> bool:
    return (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file()
