"""Configurations of kernels chosen without a GPU: compiled, dropped where they spill or take too much, and ranked.

    for screened in screen([(source, sizes)], "sm_90"):      the best first
        screened.config, screened.compiled.registers, screened.seconds

The rank is a model, not a measurement. A kernel waits for arithmetic, for memory, or for what is on its way: the bytes
in flight on a multiprocessor, over the latency of memory, bound what it reads (Little's law; Williams, Waterman and
Patterson 2009 for the roofline). How many programs a multiprocessor holds follows from the registers and the shared
memory that the compiler says. Of equal ones the first of the candidates counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

from regauge.backends.triton_kernels.compile import Compiled, compile_kernel
from regauge.backends.triton_kernels.configs import Case, Config, power_above
from regauge.backends.triton_kernels.kernel import Source, case_of, launch_of
from regauge.backends.triton_kernels.launch import REGISTERS, Launch
from regauge.backends.triton_kernels.loops import count
from regauge.ir.cost import item_size
from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError

COMPILED = 8
"""Configurations of a kernel that are kept: those that the model likes best while registers are only estimated."""


@dataclass(frozen=True)
class Gpu:
    """What the model knows of an architecture: about what an A100 and an H100 reach, as published; nothing is measured.

    ``tensor`` and ``plain``: FLOP/s of half precision with tensor cores and of single precision without; ``small``: the
    part of ``tensor`` that tiles of less than 64 rows reach. ``memory`` and ``cache`` (the second level): bytes/s.
    ``shared``: bytes of a multiprocessor, and ``registers`` of its register file, of which a thread has 255 at most.
    """

    processors: int
    tensor: float
    plain: float
    small: float
    memory: float
    cache: float
    shared: int
    registers: int = REGISTERS


GPUS: Mapping[str, Gpu] = {
    "sm_80": Gpu(108, 2.6e14, 1.8e13, 1.0, 1.4e12, 4e12, 164 * 1024),
    "sm_90": Gpu(132, 7.9e14, 5.5e13, 0.6, 3.0e12, 5.5e12, 228 * 1024),  # its wgmma takes 64 rows
}
LATENCY = 8e-7
"""Seconds that what is read from memory is on its way."""
PORT = 1.1e11
"""Bytes/s that one multiprocessor reads at most, of the cache or of memory: 64 in each cycle."""
START = 2e-6
"""Seconds that programs take before their first and behind their last step."""
THREADS, PROGRAMS, RESERVED = 2048, 32, 1024
"""What a multiprocessor has for programs, and bytes of shared memory that each takes beside its own."""

Sized: TypeAlias = tuple[Source, Mapping[Dim, int]]


@dataclass(frozen=True)
class Screened:
    """A configuration that fits: compiled, with the seconds that the model gives it."""

    config: Config
    compiled: Compiled
    seconds: float


def candidates(case: Case) -> list[Config]:
    """What may be tried for a case, before anything is known of registers."""
    if case.form == "contraction":
        return list(_tiles(case))
    if case.form not in ("pointwise", "rows", "looped"):
        raise FusionError(f"there are no candidates for kernels of the form {case.form}")
    whole = max(512, power_above(case.sizes[1]))
    entries = (whole,) if case.form == "rows" else (1024, 2048, 4096, 512, 8192)
    made = [Config({"ENTRIES": n}, warps, 2) for n, warps in product(entries, (4, 8, 16, 32))]

    def of_thread(config: Config) -> float:
        return config.tile["ENTRIES"] / (32 * config.warps)

    found = [config for config in made if 1 <= of_thread(config) <= 64]
    wanted = 8 if case.form == "pointwise" else 16  # one load of 16 bytes of halves; two, where warps wait for another
    return sorted(found, key=lambda config: abs(math.log2(of_thread(config) / wanted)))


def _tiles(case: Case) -> Iterator[Config]:
    rows, columns, _ = case.sizes
    single = case.numbers == "single"
    sides = (128, 64, 32, 16) if single else (128, 64, 32, 16, 256)
    depths = (32, 16) if single else (64, 32, 128)
    for high, wide, deep, warps, stages in product(sides, sides, depths, (4, 8), (3, 2, 4, 5)):
        sums = high * wide / (32 * warps)  # registers that sums take
        if high <= max(16, power_above(rows)) and wide <= max(16, power_above(columns)) and 2 <= sums <= 64:
            yield Config({"BLOCK_M": high, "BLOCK_N": wide, "BLOCK_K": deep, "GROUP": 8}, warps, stages)


def screen(kernels: Sequence[Sized], architecture: str, most: int = COMPILED) -> list[Screened]:
    """At most so many configurations that fit each of the kernels, the best for the first one first.

    Raises FusionError where none fits, for another architecture, and where Triton is not installed.
    """
    if architecture not in GPUS:
        raise FusionError(f"kernels are screened for {' or '.join(GPUS)}, not for {architecture}")
    model = Model(*kernels[0], GPUS[architecture])
    tried = candidates(model.case)
    found: list[Screened] = []
    for config in sorted(tried, key=lambda config: model.guess(launch_of(*kernels[0], config))):
        if len(found) == most or model.guess(launch_of(*kernels[0], config)) == math.inf:
            break
        compiled = [compile_kernel(source, sizes, architecture, config) for source, sizes in kernels]
        if all(one.spilled == 0 and one.shared + RESERVED <= model.gpu.shared for one in compiled):
            first = compiled[0]
            found.append(Screened(config, first, model.seconds(first.build.launch, first.registers, first.shared)))
    if not found:
        raise FusionError(f"{kernels[0][0].name}: no configuration fits {architecture} without spilling registers")
    return sorted(found, key=lambda one: (about(one.seconds), tried.index(one.config)))


def about(seconds: float) -> float:
    """Seconds in steps of 2 %: the model is no better, and what is equal stays in the order of the candidates."""
    return seconds if seconds == math.inf else math.exp(0.02 * round(math.log(seconds) / 0.02))


class Model:
    """The predicted seconds of one kernel for given sizes."""

    def __init__(self, source: Source, sizes: Mapping[Dim, int], gpu: Gpu) -> None:
        self.gpu, self.case = gpu, case_of(source, sizes)
        self.size = 4 if self.case.numbers == "single" else 2
        self.batch = count(source.loops.batch, sizes)
        self.moved = sum(
            item_size(tensor.value.dtype) * count(tensor.loops(source.loops.all), sizes) for tensor in source.tensors
        )

    def guess(self, start: Launch) -> float:
        """About the seconds, before a compiler has said what a program takes; infinite where that is too much."""
        shared = self._stages(start)
        fits = shared + RESERVED <= self.gpu.shared
        return about(self.seconds(start, self._registers(start), shared)) if fits else math.inf

    def _registers(self, start: Launch) -> int:
        high, wide = start.constants.get("BLOCK_M"), start.constants.get("BLOCK_N", 0)
        if high is None:
            tile = start.constants.get("ROWS", 1) * start.constants["BLOCK"]
            return min(255, 24 + 2 * tile // (32 * start.warps))
        return min(255, 64 + high * wide // (32 * start.warps))

    def _stages(self, start: Launch) -> int:
        """Bytes that a program shares: the tiles of both factors in each stage."""
        if self.case.form != "contraction":
            return 0
        return start.stages * self._step(start)

    def _step(self, start: Launch) -> int:
        sides = start.constants["BLOCK_M"] + start.constants["BLOCK_N"]
        return sides * start.constants["BLOCK_K"] * self.size

    def seconds(self, start: Launch, registers: int, shared: int) -> float:
        most = -(-start.programs // self.gpu.processors)  # programs of the busiest multiprocessor
        together = min(most, resident(start, registers, shared, self.gpu)) or 1
        memory = self.moved / self.gpu.memory
        waves = most / together
        if self.case.form == "contraction":
            return START * math.ceil(waves) + max(memory, self._product(start, most, together))
        steps = 2 * -(-self.case.sizes[1] // start.constants["BLOCK"]) if self.case.form == "looped" else 1
        uneven = most * self.gpu.processors / max(1, start.programs)
        return START + max(memory * uneven, steps * waves * LATENCY)

    def _product(self, start: Launch, most: int, together: int) -> float:
        """Of a contraction without what reaches memory: arithmetic, tiles from the cache, and what is on its way."""
        numbers, gpu = start.constants, self.gpu
        steps = -(-self.case.sizes[2] // numbers["BLOCK_K"])
        if self.case.numbers == "single":
            side = math.sqrt(numbers["BLOCK_M"] * numbers["BLOCK_N"] / (32 * start.warps))
            speed = gpu.plain * side / (side + 2)  # a thread reads both sides of its part of the tile at each step
        else:
            speed = gpu.tensor * (gpu.small if numbers["BLOCK_M"] < 64 else 1)
        speed *= min(1.0, together * start.warps / 8) / gpu.processors
        arithmetic = most * steps * 2 * numbers["BLOCK_M"] * numbers["BLOCK_N"] * numbers["BLOCK_K"] / speed
        cache = start.programs * steps * self._step(start) / gpu.cache
        port = most * steps * self._step(start) / PORT
        return max(arithmetic, cache, port, most / together * steps * LATENCY / max(1, start.stages - 1))


def resident(start: Launch, registers: int, shared: int, gpu: Gpu) -> int:
    """How many programs a multiprocessor holds at a time."""
    of_program = -(-registers // 8) * 8 * 32 * start.warps
    by_threads, by_registers = THREADS // (32 * start.warps), gpu.registers // of_program
    return max(1, min(PROGRAMS, by_threads, by_registers, gpu.shared // (shared + RESERVED)))
