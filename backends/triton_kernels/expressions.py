"""Scalar expressions as Triton source: the primitives of :mod:`regauge.ir.scalars`, and functions that Triton lacks.

All is computed in single precision; truth values stay truth values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from regauge.ir.dtypes import Dtype
from regauge.ir.fusion.region import Term
from regauge.ir.scalars import PRIMITIVES, ROUNDED_8

TEXT: Mapping[str, str] = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})",
    "abs": "tl.abs({})", "maximum": "maximum({}, {})", "minimum": "minimum({}, {})",
    "exp": "tl.exp({})", "exp2": "tl.exp2({})", "expm1": "expm1({})",
    "log": "tl.log({})", "log2": "tl.log2({})", "log1p": "log1p({})",
    "sqrt": "tl.sqrt_rn({})", "rsqrt": "tl.rsqrt({})", "sigmoid": "tl.sigmoid({})", "tanh": "tanh({})",
    "erf": "tl.erf({})", "sin": "tl.sin({})", "cos": "tl.cos({})", "floor": "tl.floor({})", "ceil": "tl.ceil({})",
    "eq": "({} == {})", "ne": "({} != {})", "lt": "({} < {})", "le": "({} <= {})", "gt": "({} > {})",
    "ge": "({} >= {})", "where": "tl.where({}, {}, {})",
    "logical_and": "(({} != 0) & ({} != 0))", "logical_or": "(({} != 0) | ({} != 0))", "logical_not": "({} == 0)",
    "real": "{}", "code": "{}", "round": "round({})",
    **{name: f"{name}({{}})" for name in ROUNDED_8.values()}, "power_of_two": "power_of_two({})",
}  # fmt: skip
"""How each primitive is written; names without ``tl.`` are in FUNCTIONS."""


_ONE_ZERO = "tl.where(near == 0, 0, bits ^ size)"


def _rounded_8(
    name: str,
    fraction: int,
    *,
    fixed: str,
    least: int,
    apart: int,
    beyond: str,
    greatest: int,
    at_most: int,
    sign: str = "bits ^ size",
) -> str:
    """A function that rounds to a float of 8 bits with so many bits of ``fraction``.

    In bits of single precision ``least`` is the least normal one and ``greatest`` the greatest, beyond which it gives
    ``at_most``. Subnormal ones are 2^``apart`` from each other: added to ``fixed``, single precision has such steps.
    ``sign`` is that of the result, which zero may not have.
    """
    cut = 23 - fraction
    half, kept = (1 << (cut - 1)) - 1, 0x7FFFFFFF & ~((1 << cut) - 1)
    return f'''@triton.jit
def {name}(x):
    """The nearest float of 8 bits with {fraction} of fraction, halves to even, in single precision; {beyond}
    what is greater than all. Below the least normal one they are 2^{apart} apart."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    near = (size + 0x{half:X} + ((size >> {cut}) & 1)) & 0x{kept:X}
    fixed = ((tl.abs(x) + {fixed}) - {fixed}).to(tl.uint32, bitcast=True)
    near = tl.where(size < 0x{least:X}, fixed, near)
    near = tl.where(near > 0x{greatest:X}, 0x{at_most:X}, near)
    near = tl.where(size > 0x7F800000, 0x7FC00000, near)
    return (({sign}) | near).to(tl.float32, bitcast=True)
'''


FUNCTIONS: Mapping[str, str] = {
    "maximum": '''@triton.jit
def maximum(x, y):
    """The greater one; not a number where one is none."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
''',
    "minimum": '''@triton.jit
def minimum(x, y):
    """The smaller one; not a number where one is none."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
''',
    "tanh": '''@triton.jit
def tanh(x):
    """The hyperbolic tangent; a Taylor polynomial near zero, where the quotient would cancel."""
    s = x * x
    near = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925))))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0.0, -far, far))
''',
    "expm1": '''@triton.jit
def expm1(x):
    """exp(x) - 1; a Taylor polynomial near zero, where the difference would cancel."""
    terms = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    near = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * terms)))))
    return tl.where(tl.abs(x) < 0.35, near, tl.exp(x) - 1.0)
''',
    "log1p": '''@triton.jit
def log1p(x):
    """log(1 + x); what rounding loses in 1 + x is made good by a factor (Kahan)."""
    u = 1.0 + x
    good = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, good))
''',
    "round": '''@triton.jit
def round(x):
    """The nearest integer, halves to even: numbers of this size have no places behind the point."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
''',
    "e4m3": _rounded_8(
        "e4m3",
        3,
        fixed="24576.0",
        least=0x3C800000,
        apart=-9,
        beyond="the greatest for",
        greatest=0x43E00000,
        at_most=0x43E00000,
    ),
    "e5m2": _rounded_8(
        "e5m2",
        2,
        fixed="192.0",
        least=0x38800000,
        apart=-16,
        beyond="infinite for",
        greatest=0x47600000,
        at_most=0x7F800000,
    ),
    "e4m3fnuz": _rounded_8(
        "e4m3fnuz",
        3,
        fixed="12288.0",
        least=0x3C000000,
        apart=-10,
        beyond="no number for",
        greatest=0x43700000,
        at_most=0x7FC00000,
        sign=_ONE_ZERO,
    ),
    "e5m2fnuz": _rounded_8(
        "e5m2fnuz",
        2,
        fixed="96.0",
        least=0x38000000,
        apart=-17,
        beyond="no number for",
        greatest=0x47600000,
        at_most=0x7FC00000,
        sign=_ONE_ZERO,
    ),
    "power_of_two": '''@triton.jit
def power_of_two(x):
    """The least power of two that is not below a normal number greater than 0: what has a fraction goes up."""
    bits = x.to(tl.uint32, bitcast=True) + 0x7FFFFF
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)
''',
    "bits_of_e4m3": '''@triton.jit
def bits_of_e4m3(x):
    """The 8 bits of a number that is such a float: those of it in half precision, whose exponents are 8 greater."""
    size = (tl.abs(x) * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True) >> 7
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (sign | tl.where(x != x, 0x7F, size)).to(tl.uint8)
''',
    "bits_of_e5m2": '''@triton.jit
def bits_of_e5m2(x):
    """The 8 bits of a number that is such a float: the upper ones of it in half precision."""
    size = tl.abs(x).to(tl.float16).to(tl.uint16, bitcast=True) >> 8
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (sign | tl.where(x != x, 0x7F, size)).to(tl.uint8)
''',
    "bits_of_e4m3fnuz": '''@triton.jit
def bits_of_e4m3fnuz(x):
    """The 8 bits of a number that is such a float: those of it in half precision, whose exponents are 7 greater; those
    of a negative zero are no number."""
    size = (tl.abs(x) * 0.0078125).to(tl.float16).to(tl.uint16, bitcast=True) >> 7
    sign = tl.where(size == 0, 0, (x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    return tl.where(x != x, 0x80, sign | size).to(tl.uint8)
''',
    "bits_of_e5m2fnuz": '''@triton.jit
def bits_of_e5m2fnuz(x):
    """The 8 bits of a number that is such a float: the upper ones of it in half precision, whose exponents are 1 less,
    or of its double where that is subnormal; those of a negative zero are no number."""
    own = tl.abs(x).to(tl.float16).to(tl.uint16, bitcast=True) >> 8
    double = (tl.abs(x) * 2.0).to(tl.float16).to(tl.uint16, bitcast=True) >> 8
    size = tl.where(own >= 4, own + 4, double)
    sign = tl.where(size == 0, 0, (x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    return tl.where(x != x, 0x80, sign | size).to(tl.uint8)
''',
    "bits_below": '''@triton.jit
def bits_below(mask, place):
    """How many of the lowest 7 bits of a mask are set below a place."""
    below = mask & ((1 << place) - 1)
    count = below & 1
    for bit in tl.static_range(1, 7):
        count += (below >> bit) & 1
    return count
''',
    "set_below": '''@triton.jit
def set_below(mask, place):
    """How many of the lowest 31 bits of a mask are set below a place."""
    below = (mask & ((1 << place) - 1)).to(tl.int32)
    pairs = below - ((below >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
''',
    "from_e4m3": '''@triton.jit
def from_e4m3(bits):
    """The number in half precision that 8 bits are: 1 for the sign, 4 of exponent, which half precision has 8 more of,
    and 3 of fraction; all ones are no number."""
    wide = bits.to(tl.uint16)
    number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), number).to(tl.float16)
''',
    "from_e5m2": '''@triton.jit
def from_e5m2(bits):
    """The number in half precision whose upper 8 bits are these."""
    return (bits.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
''',
    "from_e4m3fnuz": '''@triton.jit
def from_e4m3fnuz(bits):
    """The number in half precision that 8 bits are: 1 for the sign, 4 of exponent, which half precision has 7 more of,
    and 3 of fraction; the bits of a negative zero are no number."""
    wide = bits.to(tl.uint16)
    number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 128.0
    return tl.where(wide == 0x80, float("nan"), number).to(tl.float16)
''',
    "from_e5m2fnuz": '''@triton.jit
def from_e5m2fnuz(bits):
    """The number in half precision that 8 bits are: half of the one whose upper bits they are, which has an exponent 1
    less, but for the least exponents; the bits of a negative zero are no number."""
    wide = bits.to(tl.uint16)
    size, sign = wide & 0x7F, (wide & 0x80) << 8
    large = (sign | ((size - 4) << 8)).to(tl.float16, bitcast=True)
    small = (sign | (size << 8)).to(tl.float16, bitcast=True) * 0.5
    return tl.where(wide == 0x80, float("nan"), tl.where(size >= 8, large, small)).to(tl.float16)
''',
}

ROUNDED = {"div": "tl.div_rn({}, {})"}
"""What is written otherwise where each operator is rounded as in torch: a quotient that is off by two places is not."""

FLOAT8: Mapping[Dtype, str] = {dtype: f"from_{name}" for dtype, name in ROUNDED_8.items()}
"""What makes numbers of floats of 8 bits, which kernels read as bytes: not all architectures have them."""

BITS8: Mapping[Dtype, str] = {dtype: f"bits_of_{name}" for dtype, name in ROUNDED_8.items()}
"""What makes the bytes that kernels write of them."""

NATIVE8: Mapping[Dtype, str] = {torch.float8_e4m3fn: "tl.float8e4nv", torch.float8_e5m2: "tl.float8e5"}
"""Floats of 8 bits that GPUs multiply as such, as Triton calls them."""

TRITON_TYPES = {
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.bool: "tl.int1",
}

_TRUTHS = {"inside", "bit", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"}


def is_truth(term: Term) -> bool:
    """Whether a term is a truth value."""
    if term.op in ("load", "result"):
        value = term.value.value if term.op == "load" else term.value
        return bool(value.dtype == torch.bool)
    return term.op in _TRUTHS or term.op == "where" and all(map(is_truth, term.args[1:]))


def constant(term: Term) -> float | None:
    """The number that a term is whatever is read; None where it depends on that."""
    if term.op == "number":
        return float(term.value)
    if term.op == "result":
        return constant(term.args[0])
    if term.op not in PRIMITIVES:
        return None
    args = list[float]()
    for arg in term.args:
        number = constant(arg)
        if number is None:  # at once: there may be many paths to what lies below
            return None
        args.append(number)
    return float(PRIMITIVES[term.op](*(torch.tensor(arg, dtype=torch.float64) for arg in args)))


def literal(number: float) -> str:
    """The number as Triton reads it."""
    text = repr(number)
    return text if text[-1].isdigit() else f'float("{text}")'


def outermost(text: str) -> str:
    """The text without a pair of parentheses around all of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[1:-1] if place == len(text) - 1 else text
    return text
