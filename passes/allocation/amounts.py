"""Amounts as people write them: ``0.5``, ``300M``, ``5MB``, ``5ms``."""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple, TypeAlias

from regauge.ir.errors import PassError
from regauge.ir.printing.tables import short

Unit: TypeAlias = Literal["count", "bytes", "time"]

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-zµμ]*)", re.IGNORECASE)
_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_COUNTS = {prefix + b: factor for prefix, factor in _PREFIXES.items() for b in ("", "b") if prefix or b}
_TIMES = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ns": 1e-6}  # in milliseconds
_EXAMPLES = {"count": "1.2M or 5MB", "bytes": "1.2M or 5MB", "time": "5ms or 800us"}


class Amount(NamedTuple):
    """A budget: a share of what the graph has, or a number; times are in milliseconds."""

    value: float
    relative: bool

    def of(self, original: float) -> float:
        return self.value * original if self.relative else self.value


def parse_amount(given: float | int | str, option: str, unit: Unit = "count") -> Amount:
    """``0.5`` is a share, ``1200000``, ``1.2M``, ``5MB`` and of times ``5ms`` are numbers; else raises PassError."""
    if isinstance(given, str):
        match = _NUMBER.fullmatch(given.strip())
        units = _TIMES if unit == "time" else _COUNTS
        if match is None or (match.group(2) and match.group(2).lower() not in units):
            raise PassError(
                f"{option}={given} is not an amount: write a share such as 0.5, or a number such as {_EXAMPLES[unit]}"
            )
        number = float(match.group(1))
        if not match.group(2):
            return parse_amount(number, option, unit)
        return Amount(_positive(number * units[match.group(2).lower()], given, option, unit), relative=False)
    _positive(given, f"{given:g}", option, unit)
    if given > 1 and unit == "time":
        raise PassError(
            f"{option}={given:g} is neither a share, which is at most 1, nor a time: write {option}={given:g}ms"
        )
    if given > 1 and given != int(given):
        raise PassError(
            f"{option}={given:g} is neither a share, which is at most 1, nor a whole number: "
            f"write {option}=0.5 to keep half, or a number such as 1.2M"
        )
    return Amount(float(given), relative=given <= 1)


def _positive(number: float, given: str, option: str, unit: Unit) -> float:
    if not number > 0 or math.isinf(number):
        example = _EXAMPLES[unit].partition(" ")[0]
        raise PassError(
            f"{option}={given} is out of range: write a share above 0 and up to 1, or a number such as {example}"
        )
    return number


def shown(number: float, unit: Unit) -> str:
    """A figure of a budget as reports and messages show it."""
    if unit == "time":
        return f"{number:.3g} ms"
    return f"{short(number)}B" if unit == "bytes" else short(number)
