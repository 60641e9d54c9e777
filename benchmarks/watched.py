"""Run a command and watch what it takes: memory while it runs, bytes read and written at its end.

Linux alone: it reads ``/proc``, and of the command itself, not of processes that it starts.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS_BETWEEN_SAMPLES = 0.02


@dataclass(frozen=True)
class Watched:
    """What one run of a command took.

    Attributes:
        seconds: of wall time.
        cpu_seconds: user and system time over all threads.
        peak_resident: most bytes resident at a time, mapped pages of files among them.
        peak_anonymous: most bytes of those that belong to no file.
        read_from_disk: bytes that the storage delivered for it; less than ``read`` if the page
            cache held some.
        read: bytes that its calls of read returned; pages of mapped files are not counted.
        written: bytes that it had the storage write.
    """

    seconds: float
    cpu_seconds: float
    peak_resident: int
    peak_anonymous: int
    read_from_disk: int
    read: int
    written: int


def run_watched(command: Sequence[str], environment: dict[str, str] | None = None) -> Watched:
    """Run ``command`` to its end, its output on stderr.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | (environment or {}), stdout=sys.stderr.fileno()
    )
    folder = Path("/proc") / str(process.pid)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    # Not reaped yet when it has ended: its counters are read first.
    waiting = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, waiting) is None:
        found = _numbers(folder / "status")
        peaks = {name: max(peak, 1024 * found.get(name, 0)) for name, peak in peaks.items()}
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    seconds = time.perf_counter() - start
    counted = _numbers(folder / "io")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status := process.wait():
        raise subprocess.CalledProcessError(status, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Watched(
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak_resident=peaks["VmHWM"],
        peak_anonymous=peaks["RssAnon"],
        read_from_disk=counted["read_bytes"],
        read=counted["rchar"],
        written=counted["write_bytes"],
    )


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget a folder's files, so that the next read comes from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _numbers(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[1:] and line[1].isdigit()}
