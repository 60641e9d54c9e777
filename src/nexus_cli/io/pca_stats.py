"""Read the ``nexus.pca_stats/1`` file: which experts each layer's shared expert starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nexus_cli.errors import ArtifactError
from nexus_cli.io import model_dir

FORMAT = "nexus.pca_stats/1"
AGAIN = "run nexus pca again, with --force"


@dataclass(frozen=True)
class PcaStats:
    """The chosen experts of each layer, best first, and how much each expert is used.

    ``method`` and ``tokens`` are for the record; statistics that another tool wrote may not say.
    """

    model_fingerprint: str
    num_layers: int
    num_experts: int
    top_k: int
    experts: tuple[tuple[int, ...], ...]
    usage: tuple[tuple[float, ...], ...]
    method: str | None
    tokens: int | None


def load_pca_stats(path: Path) -> PcaStats:
    """Read and check the file.

    Raises:
        ArtifactError: not such a file, or its numbers do not fit each other.
    """
    document = model_dir.read_json(path)
    if document.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a {FORMAT} file", hint="nexus pca writes it")
    try:
        layers = [document["layers"][f"layer_{i}"] for i in range(document["num_layers"])]
        stats = PcaStats(
            model_fingerprint=document["model_fingerprint"],
            num_layers=document["num_layers"],
            num_experts=document["num_experts"],
            top_k=document["top_k"],
            experts=tuple(tuple(layer["top_expert_indices"]) for layer in layers),
            usage=tuple(tuple(layer["usage"]) for layer in layers),
            method=document.get("method"),
            tokens=document.get("tokens"),
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: it lacks {error}", hint=AGAIN) from error
    known = range(stats.num_experts)
    if any(len(chosen) != stats.top_k or not set(chosen) <= set(known) for chosen in stats.experts):
        raise ArtifactError(
            f"{path} is damaged: a layer names experts that do not exist", hint=AGAIN
        )
    if any(len(usage) != stats.num_experts for usage in stats.usage):
        raise ArtifactError(
            f"{path} is damaged: a layer lacks the usage of its experts", hint=AGAIN
        )
    return stats
