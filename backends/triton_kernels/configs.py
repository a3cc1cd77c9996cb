"""Tables of kernel configurations, which say how kernels are cut into programs: by form, type, sizes and architecture.

    shipped()                     the table of the package, ``configs.json``, screened offline
    Table.read("tuned.json")      one that ``regauge autotune`` wrote, asked before the shipped one

An entry holds the sizes that it was found for. Of the shipped table the entry with the nearest sizes counts, of a tuned
one only an entry whose sizes have the same powers of two above them: what was measured says nothing of other sizes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from regauge.ir.errors import FusionError

SHIPPED = Path(__file__).parent / "configs.json"
_TILE: Mapping[str, tuple[str, ...]] = {
    "pointwise": ("ENTRIES",),
    "rows": ("ENTRIES",),
    "looped": ("ENTRIES",),
    "contraction": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP"),
}
"""What the tile of a form is made of; ``ENTRIES`` are those of a tile of rows and columns together."""


@dataclass(frozen=True)
class Config:
    """One way to cut a kernel: the numbers of its tile, warps of a program, steps of a loop that are in flight."""

    tile: Mapping[str, int]
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = " ".join(f"{name}={number}" for name, number in self.tile.items())
        return f"{tile} warps={self.warps} stages={self.stages}"


@dataclass(frozen=True)
class Case:
    """What a configuration is looked up by.

    ``sizes``: how many rows and columns a kernel has, and how many indices are contracted (1 where none are);
    ``numbers``: ``single`` where it reads single precision, else ``half``.
    """

    form: str
    numbers: str
    sizes: tuple[int, int, int]

    def buckets(self) -> tuple[int, ...]:
        return tuple(power_above(size) for size in self.sizes)


@dataclass(frozen=True)
class Entry:
    """A configuration, and what it is for."""

    architecture: str
    case: Case
    config: Config


class Table:
    """Entries, found by architecture and case."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Table:
        """The table in a file; raises FusionError, naming the entry, for what is none."""
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))["entries"]
        except FileNotFoundError as error:
            raise FusionError(f"there is no file {path}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FusionError(f"{path} is no table of kernel configurations: regauge autotune writes one") from error
        return Table([_entry(row, f"{path}, entry {number}") for number, row in enumerate(rows)])

    def write(self, path: str | os.PathLike[str], note: str) -> None:
        """Write the table, an entry a line; ``note`` says where it comes from."""
        lines = ",\n  ".join(json.dumps(_row(entry)) for entry in self.entries)
        text = f'{{\n "note": {json.dumps(note)},\n "entries": [\n  {lines}\n ]\n}}\n'
        Path(path).write_text(text, encoding="utf-8")

    def nearest(self, architecture: str, case: Case) -> Config | None:
        """The entry of the form and type whose sizes differ least, the columns first; of the newest architecture that
        is not newer."""
        known = {entry.architecture for entry in self.entries}
        name = newest_not_above(known, architecture) or min(known, key=_version, default="")
        found = [e for e in self.entries if (e.architecture, e.case.form) == (name, case.form)]
        found = [e for e in found if e.case.numbers == case.numbers] or found
        return min(found, key=lambda entry: _distance(entry.case, case)).config if found else None

    def exact(self, architecture: str, case: Case) -> Config | None:
        """The entry for sizes of the same powers of two, on this architecture."""
        for entry in self.entries:
            if (entry.architecture, entry.case.form, entry.case.numbers) == (architecture, case.form, case.numbers):
                if entry.case.buckets() == case.buckets():
                    return entry.config
        return None


@cache
def shipped() -> Table:
    return Table.read(SHIPPED)


@lru_cache(maxsize=4096)  # asked at every launch
def config_of(case: Case, architecture: str, tuned: Table | None = None) -> Config:
    """The configuration for a case: a tuned one where there is one, else the shipped one with the nearest sizes."""
    found = tuned.exact(architecture, case) if tuned is not None else None
    found = found or shipped().nearest(architecture, case)
    if found is None:
        raise FusionError(f"there is no configuration for kernels of the form {case.form}")
    return found


@cache
def architecture_of(device: torch.device) -> str:
    """``sm_90`` for a GPU of that kind; the oldest that the shipped table knows where there is none (interpreter)."""
    if device.type != "cuda":
        return min((entry.architecture for entry in shipped().entries), key=_version)
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def newest_not_above(names: Iterable[str], architecture: str) -> str | None:
    """Of architectures the newest one that is not newer than one that is given; None where all are."""
    return max((n for n in names if _version(n) <= _version(architecture)), key=_version, default=None)


def power_above(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def _version(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def _distance(entry: Case, case: Case) -> tuple[float, float]:
    """Doublings between sizes: of columns, on which registers depend where rows are reduced, and of all."""
    if case.form == "pointwise":  # how its entries are laid out in rows is nothing to it
        return 0.0, abs(math.log2(max(math.prod(entry.sizes), 1)) - math.log2(math.prod(case.buckets())))
    away = [abs(math.log2(max(a, 1)) - math.log2(b)) for a, b in zip(entry.sizes, case.buckets(), strict=True)]
    return (away[1] if case.form in ("rows", "looped") else 0.0, sum(away))


def _row(entry: Entry) -> dict[str, Any]:
    rows, columns, contracted = entry.case.sizes
    head = {"architecture": entry.architecture, "form": entry.case.form, "numbers": entry.case.numbers}
    sizes = {"rows": rows, "columns": columns, "contracted": contracted}
    return {**head, **sizes, **asdict(entry.config)}


def _entry(row: Any, where: str) -> Entry:
    try:
        sizes = (int(row["rows"]), int(row["columns"]), int(row["contracted"]))
        case = Case(row["form"], row["numbers"], sizes)
        tile = {str(name): int(number) for name, number in row["tile"].items()}
        config = Config(tile, int(row["warps"]), int(row["stages"]))
        _version(row["architecture"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FusionError(f"{where}: {error!r} is missing or wrong") from error
    wanted = _TILE.get(case.form)
    if wanted is not None and set(tile) != set(wanted):
        raise FusionError(f"{where}: a tile of the form {case.form} has {', '.join(wanted)}, not {', '.join(tile)}")
    for number in (*tile.values(), config.warps):
        if number < 1 or number != power_above(number):
            raise FusionError(f"{where}: {number} is no power of two")
    if config.stages < 1:
        raise FusionError(f"{where}: there must be one stage at least")
    return Entry(row["architecture"], case, config)
