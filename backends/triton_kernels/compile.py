"""Kernels compiled ahead of time for a named architecture, without a GPU, and what they take of it.

    compiled = compile_kernel(kernel.source(), {dim: size, ...}, "sm_90")
    compiled.registers, compiled.spilled, compiled.shared, compiled.binary

Sizes decide what Triton specializes: steps of 1, and numbers that 16 divides. The binary is the same each time, as no
path of a source is in it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from regauge.backends.triton_kernels.configs import Config
from regauge.backends.triton_kernels.kernel import Source, config_for, launch_of, numbers, shape_of
from regauge.backends.triton_kernels.launch import Launch
from regauge.backends.triton_kernels.loops import Tensor, start_of, strides_of
from regauge.ir.affine import index_of
from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.fusion.products import FLOAT8

ARCHITECTURES: Mapping[str, int] = {"sm_80": 80, "sm_90": 90}
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1"}
_POINTERS |= {torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}
_POINTERS[torch.int64] = "*i64"
_POINTERS |= dict.fromkeys(FLOAT8, "*u8")


@dataclass(frozen=True)
class Argument:
    """An argument of a compiled kernel: its name and type, as Triton writes it (``*bf16``, ``i32``).

    ``fixed`` is the number that the binary was compiled for, where it does not take the argument at all; ``divisible``
    says that the binary takes it for a multiple of 16 (a pointer: an address).
    """

    name: str
    type: str
    fixed: int | None = None
    divisible: bool = False


@dataclass(frozen=True)
class Build:
    """All that decides the binary of a kernel, which is called ``name`` in its source."""

    source: Source
    name: str
    architecture: str
    launch: Launch
    arguments: tuple[Argument, ...]

    @property
    def key(self) -> str:
        """A digest of the source, which is all that the generator decides, of Triton's version, and of what it is told.

        Whether products are fused with sums is among this, so that it does not follow Triton's default.
        """
        start = self.launch
        told = [self.name, self.architecture, dict(start.constants), start.options(self.source.rounding)]
        parts = [self.source.text, version("triton"), *map(repr, (told, self.arguments))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: the binary, and per thread registers and bytes of ``spilled`` ones, per program
    bytes of ``shared`` memory. The binary takes the arguments of its ``build`` that are not fixed, and behind them two
    pointers to scratch memory, which may be null."""

    binary: bytes
    registers: int
    spilled: int
    shared: int
    build: Build


def compile_kernel(
    source: Source,
    sizes: Mapping[Dim, int],
    architecture: str,
    config: Config | None = None,
    *,
    name: str | None = None,
) -> Compiled:
    """Compile a kernel, by default the first of the source, for tensors of these sizes without gaps in memory, and by
    default as the shipped table has it.

    Raises FusionError for an unknown architecture, or where Triton is not installed or refuses.
    """
    return compile_build(build_of(source, sizes, architecture, config, name=name))


def compile_build(build: Build) -> Compiled:
    """Compile what a build says; raises FusionError where Triton refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, architecture, start, arguments = build.source, build.architecture, build.launch, build.arguments
    signature = {one.name: one.type if one.fixed is None else "constexpr" for one in arguments}
    signature.update(dict.fromkeys(start.constants, "constexpr"))
    constants = {one.name: one.fixed for one in arguments if one.fixed is not None}
    hints = {(place,): [["tt.divisibility", 16]] for place, one in enumerate(arguments) if one.divisible}
    made = ASTSource(source.function(build.name), signature, {**start.constants, **constants}, hints)
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
    return Compiled(binary, registers, spilled, int(kernel.metadata.shared), build)


def build_of(
    source: Source,
    sizes: Mapping[Dim, int],
    architecture: str,
    config: Config | None = None,
    open_sizes: Collection[Dim] = (),
    name: str | None = None,
) -> Build:
    """What would be compiled; for ``open_sizes`` it is good whatever they are. Raises FusionError for an unknown
    architecture, or where Triton is not installed."""
    if architecture not in ARCHITECTURES:
        raise FusionError(f"there is no architecture {architecture!r}: give {' or '.join(ARCHITECTURES)}")
    names = source.function().arg_names
    start = launch_of(source, sizes, config or config_for(source, sizes, architecture), architecture)
    return Build(source, name or source.name, architecture, start, _arguments(source, names, sizes, open_sizes, start))


def _arguments(
    source: Source, names: Sequence[str], sizes: Mapping[Dim, int], open_sizes: Collection[Dim], start: Launch
) -> tuple[Argument, ...]:
    """The arguments as Triton specialises them at a launch, by what is 1 and what 16 divides, but for open sizes."""
    types = [_POINTERS[tensor.value.dtype] for tensor in source.tensors]  # type: ignore[index]
    types += [_POINTERS[torch.float32]] * (bool(start.partials) + len(source.scratch) + len(source.totals))
    found = [Argument(name, kind, divisible=True) for name, kind in zip(names, types, strict=False)]
    steps: dict[Tensor, Mapping[Dim, int]] = {}
    starts: list[int] = []
    for tensor in source.tensors:
        without_data = torch.empty(shape_of(tensor.layout, sizes), device="meta")
        steps[tensor] = strides_of(tensor, without_data, sizes)
        starts += [start_of(tensor, without_data, sizes)] if tensor.shifts else []
    values = numbers(source, sizes, starts, steps)
    for name, number, dims in zip(names[len(found) :], values, number_dims(source), strict=False):
        if any(dim in open_sizes for dim in (sizes if dims is None else dims)):
            found.append(Argument(name, "i64"))
        else:
            kind = "i32" if number < 2**31 else "i64"
            found.append(Argument(name, kind, 1 if number == 1 else None, number % 16 == 0))
    return tuple(found)


def number_dims(source: Source) -> list[tuple[Dim, ...] | None]:
    """The arguments behind the pointers, of tensors without gaps: each is the product of the sizes of these loops.

    None where it is none: where a tensor begins that is read at places of its own, and its steps.
    """
    loops = source.loops.all
    found: list[tuple[Dim, ...] | None] = [loop.dims for loop in source.loops.sized]
    found += [None for tensor in source.tensors if tensor.shifts]
    for tensor in source.tensors:
        flat = [dim for axis in tensor.layout for dim in axis]
        for last in (loop.dims[-1] for loop in tensor.loops(loops)):
            own = [place for place in tensor.places.values() if last in place.dims] == [index_of(last)]
            found.append(tuple(flat[flat.index(last) + 1 :]) if own and last in flat else None)
        found += [tuple(flat[flat.index(dim) + 1 :]) for dim in tensor.picked]
    return found


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
