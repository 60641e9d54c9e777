"""``nexus validate --dry-run``: what would run, on what, and whether it fits."""

from __future__ import annotations

from nexus_cli.config.validate import ValidateConfig
from nexus_cli.core.distributed import DeviceError, resolve_device
from nexus_cli.core.evaluate.perplexity import LOGITS_IN_A_CHUNK
from nexus_cli.core.train.precision import frozen_dtype
from nexus_cli.errors import ResourceError
from nexus_cli.io import console, model_dir
from nexus_cli.io.report import FILENAME
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.capacity import free_memory, gib
from nexus_cli.pipeline.model_memory import Placement
from nexus_cli.pipeline.text import describe_sources
from nexus_cli.pipeline.validate_models import Choice

LOGIT_BUFFERS = 8  # of the model and of the baseline, and what their comparison makes of them


def describe(
    config: ValidateConfig, workspace: Workspace, choice: Choice, reads_text: bool
) -> None:
    """Print the plan.

    Raises:
        ResourceError: it does not fit into memory, or a device or text is not there.
    """
    try:
        device = resolve_device(config.runtime.device)
    except DeviceError as error:
        raise ResourceError(str(error), hint="name another with --device, or use auto") from error
    dtype = frozen_dtype(config.dtype, device)
    # The base is loaded for the identity check even where the comparison needs one copy.
    others = {a.path: a for a in (choice.loaded_base, choice.baseline) if a}
    copies = [choice.model, *others.values()]
    place = Placement(device, dtype, config.runtime.experts_backend)
    needed = _activations(config, choice, place)
    needed += sum(place.weight_bytes(artifact.path) for artifact in copies[:2])
    tokens = config.runtime.batch_size * config.window
    needed += sum(place.buffer_bytes(artifact.path, tokens) for artifact in copies[1:2])
    free = free_memory(device)
    rows: list[tuple[str, object]] = [
        ("model", choice.model.path),
        ("baseline", choice.reason),
        ("device", f"{device}, {str(dtype).removeprefix('torch.')}"),
    ]
    if reads_text and config.compute_perplexity:
        for name, text in (("domain", config.domain), ("general", config.general)):
            for plan in describe_sources(text, default_split="held-out") if text else ():
                rows.append((f"{name} text", f"{plan.name} ({plan.split}) from {plan.origin}"))
        rows.append(("windows", f"{config.window} tokens, stride {config.stride}"))
    rows += [
        ("models in memory", min(len(copies), 2)),
        ("memory", f"about {gib(needed)} of {gib(free)} free"),
        ("report", config.output or workspace.stage_dir("validate") / FILENAME),
        ("fits", "yes" if needed < free else "no"),
    ]
    console.result_table("nexus validate would run", ("what", "value"), rows)
    if needed >= free:
        raise ResourceError(
            f"validation needs about {gib(needed)} and {gib(free)} are free",
            hint="lower runtime.batch_size or window, or use --baseline self: one copy in memory",
        )


def _activations(config: ValidateConfig, choice: Choice, place: Placement) -> int:
    """Logits of a chunk, and the forward pass of a batch."""
    shape = model_dir.read_shape(choice.model.path)
    logits = LOGIT_BUFFERS * 4 * max(LOGITS_IN_A_CHUNK, shape.vocab_size)
    return logits + place.forward_bytes(choice.model.path, config.runtime.batch_size, config.window)
