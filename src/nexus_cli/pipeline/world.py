"""Open the devices and ranks of a stage, in the user's words."""

from __future__ import annotations

from nexus_cli.core import distributed
from nexus_cli.core.distributed import World
from nexus_cli.errors import ResourceError


def open_world(device: str) -> World:
    """Join the run on ``device``.

    Raises:
        ResourceError: the device is not on this machine.
    """
    try:
        return distributed.open_world(device)
    except distributed.DeviceError as error:
        raise ResourceError(str(error), hint="name another with --device, or use auto") from error
