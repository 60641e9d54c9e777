"""Compile a Triton kernel for a GPU that is not there, and read what the assembler says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread; more than 0 means spills or indexed arrays.
        shared_bytes: of a block.
        sass: disassembly.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    sass: str


@pytest.fixture(scope="session")
def compile_kernel() -> Callable[..., Compiled]:
    """:func:`compile_offline`, as tests cannot import one another."""
    return compile_offline


def compile_offline(
    function: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile a bare ``@triton.jit`` function.

    Args:
        function: the kernel.
        signature: Triton type of every run-time argument, such as ``*bf16`` or ``i32``.
            Pointers and integers named here are taken to be multiples of 16.
        constexprs: value of every compile-time argument.
        capability: 80 (A100), 90 (H100) or 100 (B200).
        num_warps: of a program.
        num_stages: of software pipelining.
    """
    names = list(function.arg_names)
    types = {n: signature.get(n, "constexpr") for n in names}
    whole = [n for n in signature if signature[n].startswith(("*", "i"))]
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in whole}
    values = {(names.index(n),): v for n, v in constexprs.items()}
    source = ASTSource(function, types, values, divisible)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared_bytes=built.metadata.shared,
        sass=sass,
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
