"""How fast a checkpoint goes from the page cache to a GPU, packed, and at what host memory.

python benchmarks/gpu/load.py [--model 20b] [--layers 24] [--dtype bfloat16] [--device cuda]
                              [--folder DIR] [--keep] [--json]

Writes random bytes under the real names in three shards (having been written, they are in the
page cache), loads them with nexus and with transformers' from_pretrained, packed both, each in a
process of its own, and compares all weights by a checksum. Host memory is anonymous memory
(RssAnon), sampled; mapped files, which the system can drop, are in VmHWM alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from children import Result, run_child
from machine import print_machine
from shapes import MODELS
from timing import GIB, emit, finish, peak_gib
from torch import Tensor
from transformers import GptOssConfig

from nexus_cli.core.model.gpt_oss.loading import load_config, load_model
from nexus_cli.core.model.gpt_oss.modeling_nexus_gpt_oss import (
    NexusGptOssConfig,
    NexusGptOssForCausalLM,
)

SHARDS = 3
BLOCK = 2**26
SAMPLE_SECONDS = 0.005
CHECK_WORDS = 2**24
STORED = {torch.uint8: "U8", torch.bfloat16: "BF16"}
CHILD_SECONDS = 120.0


def write_checkpoint(folder: Path, model: str, layers: int) -> int:
    """Write the model; returns the bytes of its tensors."""
    values = MODELS[model].config(layers)
    with torch.device("meta"):
        network = NexusGptOssForCausalLM(NexusGptOssConfig(**values, num_shared_experts=0))
    tensors = dict(network.bfloat16().named_parameters())
    total = sum(tensor.nbytes for tensor in tensors.values())
    split: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        split[written * SHARDS // total][name] = tensor
        written += tensor.nbytes
    names = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(SHARDS)]
    block = memoryview(os.urandom(BLOCK))
    with ThreadPoolExecutor(SHARDS) as pool:
        jobs = zip(names, split, strict=True)
        futures = [pool.submit(write_shard, folder / name, part, block) for name, part in jobs]
    for future in futures:
        future.result()
    weight_map = {key: name for name, part in zip(names, split, strict=True) for key in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = GptOssConfig(**values, quantization_config={"quant_method": "mxfp4"})
    config.save_pretrained(folder)
    return total


def write_shard(path: Path, tensors: dict[str, Tensor], block: memoryview) -> None:
    """One file: its header, then the same random block again and again."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": STORED[tensor.dtype], "shape": shape, "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(block[: min(end, BLOCK)])


class HostMemory:
    """Peaks of this process while the block runs, from the system's own account."""

    def __enter__(self) -> HostMemory:
        self.before = status_bytes()
        self.peaks = dict(self.before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for name, count in status_bytes().items():
                self.peaks[name] = max(count, self.peaks[name])

    def report(self) -> Result:
        """GiB; some systems do not tell all of them."""
        found = {f"host_{name}_peak_gib": count / GIB for name, count in self.peaks.items()}
        if "RssAnon" in self.before:
            found["host_RssAnon_before_gib"] = self.before["RssAnon"] / GIB
        return found


def status_bytes() -> dict[str, int]:
    """Anonymous, resident, and most ever resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    wanted = {"RssAnon", "VmRSS", "VmHWM"}
    return {key: int(value.split()[0]) * 1024 for key, value in pairs if key in wanted}


def measure_child(args: argparse.Namespace) -> Result:
    """Load once, in a process that has done nothing else."""
    device = torch.device(args.device)
    load = loader(args.child, args.folder, device, getattr(torch, args.dtype))
    torch.zeros(1, device=device)  # the device's own start is not loading
    with HostMemory() as memory:
        start = time.perf_counter()
        model = load()
        finish(device)
        seconds = time.perf_counter() - start
    result = {"seconds": seconds, **memory.report(), **peak_gib(device)}
    return result | {"checksum": sum(map(checksum, model.parameters()))}


def loader(how: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """The call to time."""
    if how == "nexus":
        return lambda: load_model(folder, device=device, dtype=dtype)
    return lambda: NexusGptOssForCausalLM.from_pretrained(
        folder,
        config=load_config(folder),
        dtype=dtype,
        device_map={"": device},
        attn_implementation="eager",
        local_files_only=True,
    )


def checksum(tensor: Tensor) -> int:
    """Of every byte and its place."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    words = raw.view(torch.int64) if len(raw) % 8 == 0 else raw.long()
    total = 0
    for number, part in enumerate(words.split(CHECK_WORDS)):
        place = torch.arange(len(part), device=part.device) * 2 + 1
        total += (number + 1) * int((part * place).sum())
    return total


def measure(folder: Path, args: argparse.Namespace) -> Result:
    """Write, load both ways, compare."""
    start = time.perf_counter()
    size = write_checkpoint(folder, args.model, args.layers)
    result: Result = {
        "model": args.model,
        "layers": args.layers,
        "dtype": args.dtype,
        "checkpoint_gb": size / 1e9,
        "write_s": time.perf_counter() - start,
    }
    common = ("--device", args.device, "--dtype", args.dtype, "--folder", folder)
    sums = []
    for how in ("nexus", "transformers"):
        found = run_child("load.py", "--child", how, *common, timeout=CHILD_SECONDS)
        if "error" in found:
            raise SystemExit(f"{how}: {found['error']}")
        sums.append(found.pop("checksum"))
        result[how] = found | {"gb_a_second": size / 1e9 / found["seconds"]}
    result["equal"] = sums[0] == sums[1]
    result["times_as_fast"] = result["transformers"]["seconds"] / result["nexus"]["seconds"]
    return result


def main() -> None:
    """Measure, print, and clean up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="20b")
    parser.add_argument("--layers", type=int, help="all of the model's by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for a while")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--child", choices=("nexus", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure_child(args)))
        return
    args.layers = args.layers or MODELS[args.model].layers
    machine = print_machine()
    folder = Path(tempfile.mkdtemp(prefix="nexus-load-", dir=args.folder))
    try:
        result = measure(folder, args)
    finally:
        if args.keep:
            print(f"the checkpoint is in {folder}")
        else:
            shutil.rmtree(folder)
    if args.json:
        emit({"machine": machine, **result})
    else:
        for name, value in result.items():
            print(f"{name:16} {value}")
    if not result["equal"]:
        sys.exit("the two loaders gave different weights")


if __name__ == "__main__":
    main()
