"""Kernels compiled ahead of time for a named architecture, without a GPU, and what they take of it.

    compiled = compile_kernel(kernel.source(), {dim: size, ...}, "sm_90")
    compiled.registers, compiled.spilled, compiled.shared, compiled.binary

Sizes decide what Triton specializes: steps of 1, and numbers that 16 divides. The binary is the same each time, as no
path of a source is in it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regauge.backends.triton_kernel import Launch, Source, launch_of, numbers, shape_of
from regauge.backends.triton_loops import Tensor, strides_of
from regauge.ir.errors import FusionError
from regauge.ir.extents import Dim

ARCHITECTURES: Mapping[str, int] = {"sm_80": 80, "sm_90": 90}
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1", torch.int8: "*i8",
    torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: the binary, and per thread registers and bytes of ``spilled`` ones, per program
    bytes of ``shared`` memory."""

    binary: bytes
    registers: int
    spilled: int
    shared: int
    launch: Launch


def compile_kernel(source: Source, sizes: Mapping[Dim, int], architecture: str) -> Compiled:
    """Compile a kernel for tensors of these sizes that lie in memory without gaps.

    Raises FusionError for an unknown architecture, or where Triton is not installed or refuses.
    """
    if architecture not in ARCHITECTURES:
        raise FusionError(f"there is no architecture {architecture!r}: give {' or '.join(ARCHITECTURES)}")
    function = source.function()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = launch_of(source, sizes)
    signature, constants, hints = _specialised(source, sizes, start)
    made = ASTSource(function, signature, constants, hints)
    options = start.options(source.rounding)
    before = os.environ.get("TRITON_DISABLE_LINE_INFO")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    try:
        kernel = triton.compile(made, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32), options=options)
    except Exception as error:
        raise FusionError(f"{source.name}: Triton cannot compile it for {architecture}: {error}") from error
    finally:
        if before is None:
            del os.environ["TRITON_DISABLE_LINE_INFO"]
        else:
            os.environ["TRITON_DISABLE_LINE_INFO"] = before
    binary: bytes = kernel.asm["cubin"]
    registers, spilled = _resources(binary)
    return Compiled(binary, registers, spilled, int(kernel.metadata.shared), start)


def _specialised(
    source: Source, sizes: Mapping[Dim, int], start: Launch
) -> tuple[dict[str, str], dict[str, int], dict[tuple[int], Any]]:
    """Types of the arguments, those that are constants, and those that 16 divides, as Triton finds them at a launch."""
    steps: dict[Tensor, Mapping[Dim, int]] = {}
    for tensor in source.tensors:
        without_data = torch.empty(shape_of(tensor.layout, sizes), device="meta")
        steps[tensor] = strides_of(tensor, without_data, sizes)
    names = source.function().arg_names
    signature: dict[str, str] = {}
    constants: dict[str, int] = dict(start.constants)
    hints: dict[tuple[int], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for tensor, name in zip(source.tensors, names, strict=False):
        signature[name] = _POINTERS[tensor.value.dtype]  # type: ignore[index]
        hints[len(signature) - 1,] = divisible
    for name in source.scratch:
        signature[name] = "*fp32"
        hints[len(signature) - 1,] = divisible
    for name, number in zip(names[len(signature) :], numbers(source, sizes, steps), strict=False):
        if number == 1:
            constants[name] = 1
        elif number % 16 == 0:
            hints[len(signature),] = divisible
        signature[name] = "constexpr" if number == 1 else "i32" if number < 2**31 else "i64"
    signature.update(dict.fromkeys(start.constants, "constexpr"))
    return signature, constants, hints


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack that spilled ones take, as Triton's own cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise FusionError(f"cuobjdump says nothing of registers: {done.stderr.strip() or done.stdout.strip()}")
    return int(found[1]), int(found[2])
