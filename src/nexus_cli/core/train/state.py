"""Everything that a resumed run needs, as safetensors and JSON: no pickle is written or read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus_cli.core.distributed import World
from nexus_cli.core.train.adamw_8bit import REMAINDER, AdamW8bit
from nexus_cli.core.train.optim import read_master, write_master
from nexus_cli.errors import ArtifactError
from nexus_cli.io.hashing import sha256_file
from nexus_cli.io.model_dir import read_json

FORMAT = "nexus.training_state/1"
COUNTERS = "state.json"
PARTS = ("masters", "moments", "anchor", "rng")


@dataclass(frozen=True)
class TrainingState:
    """A run between two optimizer steps.

    Attributes:
        step: optimizer steps taken. The data position follows from it: what a step reads is a
            pure function of its number.
        tokens: counted tokens learned from so far.
        identity: settings and input digests that a run must share to go on from here.
        masters: the fp32 weights that train, by name, exact whatever the optimizer.
        moments: the rest of the optimizer's state, as ``<name>/<exp_avg|exp_avg_sq|step>`` or
            ``<name>/<step|first_N|...>`` (:class:`AdamW8bit`).
        anchor: what the weight averaging (SFA) pulls to; empty without it.
        rng: states of torch's random generators, as ``cpu.<rank>`` and ``cuda.<rank>``.
    """

    step: int
    tokens: int
    identity: dict[str, Any]
    masters: dict[str, Tensor]
    moments: dict[str, Tensor]
    anchor: dict[str, Tensor] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)


def write_state(directory: Path, state: TrainingState) -> None:
    """Write ``state`` into a new folder, the JSON with everything's hash last."""
    directory.mkdir(parents=True)
    files = {}
    for part in PARTS:
        tensors: dict[str, Tensor] = getattr(state, part)
        if tensors:
            path = directory / f"{part}.safetensors"
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
            files[path.name] = sha256_file(path)
    counters = {
        "format": FORMAT,
        "step": state.step,
        "tokens": state.tokens,
        "identity": state.identity,
        "files": files,
    }
    (directory / COUNTERS).write_text(json.dumps(counters, indent=2), encoding="utf-8")


def read_counters(directory: Path) -> dict[str, Any]:
    """The JSON part alone: step, identity, and the hashes of the other files.

    Raises:
        ArtifactError: it is missing, damaged, or of another format.
    """
    counters = read_json(directory / COUNTERS)
    if counters.get("format") != FORMAT:
        raise ArtifactError(
            f"{directory / COUNTERS}: not a {FORMAT} file", hint="resume from another checkpoint"
        )
    return counters


def read_state(directory: Path) -> TrainingState:
    """Read what :func:`write_state` wrote.

    Raises:
        ArtifactError: a file is missing, damaged, or of another format.
    """
    counters = read_counters(directory)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, digest in counters["files"].items():
        path = directory / Path(name).name
        damaged = ArtifactError(f"{path} is damaged", hint="resume from an older checkpoint")
        if not path.is_file() or sha256_file(path) != digest:
            raise damaged
        try:
            parts[path.stem] = load_file(path)
        except SafetensorError as error:
            raise damaged from error
    return TrainingState(counters["step"], counters["tokens"], counters["identity"], **parts)


def exact_masters(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The fp32 masters by name: the parameters themselves, or, where split, on the CPU.

    There, since for large models a second set does not fit beside the first.
    """
    masters = {}
    for name, parameter in named.items():
        master = read_master(optimizer, parameter)
        masters[name] = master if parameter.dtype == torch.float32 else master.cpu()
    return masters


def optimizer_moments(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state beside the masters, by parameter name; its own tensors, no copies."""
    return {
        f"{name}/{key}": value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key != REMAINDER
    }


@torch.no_grad()
def restore(
    state: TrainingState,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put weights and moments back, exactly, on the devices of the parameters.

    Raises:
        ArtifactError: the state is of other parameters or of another optimizer.
    """
    keys = {name: _moment_keys(optimizer, parameter) for name, parameter in named.items()}
    if named.keys() != state.masters.keys():
        raise ArtifactError("the checkpoint's training state is of another set of parameters")
    if {f"{name}/{key}" for name in named for key in keys[name]} != state.moments.keys():
        raise ArtifactError("the checkpoint's training state is of another optimizer")
    for name, parameter in named.items():
        saved = state.masters[name]
        if saved.shape != parameter.shape:
            raise ArtifactError(f"the checkpoint's {name} has the shape {list(saved.shape)}")
        write_master(optimizer, parameter, saved)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in named.items()}
    packed = optimizer.state_dict()
    packed["state"] = {
        index: packed["state"].get(index, {}) | _moments_of(state, names[id(parameter)])
        for index, parameter in enumerate(order)
    }
    optimizer.load_state_dict(packed)


def _moments_of(state: TrainingState, name: str) -> dict[str, Tensor]:
    parts = (key.rpartition("/") for key in state.moments)
    return {key: state.moments[f"{name}/{key}"] for owner, _, key in parts if owner == name}


def _moment_keys(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[str]:
    """What the optimizer keeps of a parameter beside its master."""
    if isinstance(optimizer, AdamW8bit):
        return [key for key in optimizer.state[parameter] if key != REMAINDER]
    return ["step", "exp_avg", "exp_avg_sq"]  # made in the first step


def gather_rng(world: World) -> dict[str, Tensor]:
    """Every rank's generator states. Training draws no numbers today; a kernel might."""
    mine = {f"cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        mine[f"cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return {key: value for states in world.gather_objects(mine) for key, value in states.items()}


def restore_rng(rng: Mapping[str, Tensor], world: World) -> None:
    """Put this rank's generator states back, where the run had this rank."""
    if (state := rng.get(f"cpu.{world.rank}")) is not None:
        torch.set_rng_state(state)
    if (state := rng.get(f"cuda.{world.rank}")) is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(state, world.device)
