"""Norms put together again from means, differences and roots.

    (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps)     layer_norm(x)
    x * rsqrt(mean(x ** 2) + eps)                            rms_norm(x)
    reshape(instance_norm(reshape(x)))                       group_norm(x), layer_norm(x)
    batch_norm(x, 1, 0, mean(x), var(x))                     instance_norm(x), of an only example
    sum(x) / n                                               mean(x), where so many entries are summed
    layer_norm(x) * gain + shift                             layer_norm(x, gain, shift)

Gains and shifts are taken in by rules of their own, so that each norm is written down once, with or without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.matcher import Match, is_number, number_of
from regauge.ir.rewriting.pattern_instances import Constant, Weight
from regauge.ir.rewriting.rewrite import RuleSet, differs, refuse, rule
from regauge.ir.sizes.expressions import Size, divide, product, same

TRAILING_NORMS = ("layer_norm", "rms_norm")  # over the last axes; gains run along all of them
CHANNEL_NORMS = ("group_norm", "instance_norm")  # gains run along axis 1


def number(operand: Operand, what: str) -> float:
    found = number_of(operand)
    return refuse(f"its {what} is computed") if found is None else float(found)


def last_axes(x: Value, dims: tuple[int, ...] | None) -> tuple[Size, ...]:
    """The sizes of the axes ``dims``, which must be the last ones of ``x``."""
    axes = sorted(range(x.rank) if dims is None else {dim % x.rank for dim in dims})
    if not axes or axes != list(range(axes[0], x.rank)):
        return refuse(f"it averages over the axes {axes} of {x.rank}: only the last ones make a whole operator")
    return x.shape[axes[0] :]


def everywhere(operand: Operand, wanted: float) -> bool:
    """Whether an operand is absent, a constant full of a number, or an initializer of a file full of it, expanded."""
    while isinstance(operand, Value) and operand.producer is not None and operand.producer.op == "expand":
        operand = operand.producer.inputs[0]
    if isinstance(operand, Parameter) and operand.origin is not None:
        return bool((operand.tensor == wanted).all())
    return operand is None or is_number(operand, wanted)


# -- layer norm and RMS norm -------------------------------------------------------------------------------------------


def _squared(op: Any, make: Any) -> Any:
    """The square of what ``make`` writes."""
    return op.either(op.mul(make(), make()), op.pow(make(), 2))


def _over_root(op: Any, x: Any, square: Any) -> Any:
    """``x / sqrt(square)``, with the inverse of the root in any spelling."""
    root = op.sqrt(square)
    inverse = op.either(op.rsqrt(square), op.reciprocal(root), op.div(1, root), op.pow(square, -0.5))
    return op.either(op.div(x, op.either(root, op.pow(square, 0.5))), op.mul(x, inverse))


def _layer_norm(op: Any, x: Any, dims: Any, eps: Any) -> Any:
    def centred() -> Any:
        return op.sub(x, op.mean(x, dims=dims, keepdim=True))

    squares = op.mean(_squared(op, centred), dims=dims, keepdim=True)
    variance = op.either(squares, op.var(x, dims=dims, correction=0, keepdim=True))
    return _over_root(op, centred(), op.add(variance, eps))


@rule(
    _layer_norm,
    samples=lambda: [
        {"x": randn(2, 3, 6).double(), "dims": (2,), "eps": 1e-5},
        {"x": randn(2, 3, 6).double(), "dims": (-1, 1), "eps": 1e-3},
        {"x": randn(2, 3, 4, 6).double(), "dims": (2, 3), "eps": Constant(torch.tensor([1e-3]))},
    ],
)
def layer_norm_from_means(build: Builder, x: Value, dims: tuple[int, ...] | None, eps: Operand) -> Value:
    """A difference from the mean over the root of its mean square is a layer norm, over all of an image instance norm.

    The two are the same function there; the gains of an instance norm run along the channels.
    """
    shape = last_axes(x, dims)
    pixels = product(shape)
    if x.rank > 3 and len(shape) == x.rank - 2 and isinstance(pixels, int) and pixels > 1:
        return build.instance_norm(x, eps=number(eps, "eps"))  # type: ignore[no-any-return]
    return build.layer_norm(x, normalized_shape=shape, eps=number(eps, "eps"))  # type: ignore[no-any-return]


def _rms_norm(op: Any, x: Any, dims: Any, eps: Any) -> Any:
    return _over_root(op, x, op.add(op.mean(_squared(op, lambda: x), dims=dims, keepdim=True), eps))


@rule(
    _rms_norm,
    samples=lambda: [
        {"x": randn(2, 3, 6).double(), "dims": (2,), "eps": 1e-6},
        {"x": randn(2, 3, 6).double(), "dims": (1, 2), "eps": 1e-3},
    ],
)
def rms_norm_from_means(build: Builder, x: Value, dims: tuple[int, ...] | None, eps: Operand) -> Value:
    """A value over the root of its mean square is an RMS norm."""
    shape = last_axes(x, dims)
    return build.rms_norm(x, normalized_shape=shape, eps=number(eps, "eps"))  # type: ignore[no-any-return]


FROM_MEANS = (layer_norm_from_means, rms_norm_from_means)


def _share_of_sum(op: Any, x: Any, by: Any, dims: Any, keep: Any) -> Any:
    total = op.sum(x, dims=dims, keepdim=keep)
    return op.either(op.div(total, by), op.mul(total, by), name="way")


@rule(
    _share_of_sum,
    samples=lambda: [
        {"x": randn(2, 4, 6).double(), "dims": (2,), "keep": False, "by": 6, "way": 0},
        {"x": randn(2, 4, 6).double(), "dims": (-1, 1), "keep": True, "way": 1}
        | {"by": Constant(torch.tensor(1 / 24, dtype=torch.float64))},
    ],
)
def mean_from_sum(
    build: Builder, x: Value, by: Operand, dims: tuple[int, ...] | None, keep: bool, match: Match
) -> Value:
    """A sum over its number of entries is a mean, which a cut leaves one: the number would stay as it was."""
    count = product([x.shape[dim] for dim in (range(x.rank) if dims is None else dims)])
    if not isinstance(count, int) or count < 2 or not isinstance(x.dtype, torch.dtype):
        return refuse("how many entries are summed is not known")
    if not x.dtype.is_floating_point or not is_number(by, count if match.root.op == "div" else 1 / count):
        return differs(f"it does not divide by the {count} entries that are summed")
    return build.mean(x, dims=dims, keepdim=keep)  # type: ignore[no-any-return]


def _by_own_statistics(op: Any, x: Any, dims: Any, dropped: Any, eps: Any, ones: Any = None, zeros: Any = None) -> Any:
    def flat(make: Any) -> Any:
        return op.either(make(False), op.squeeze(make(True), dims=dropped))

    def mean(keep: bool) -> Any:
        return op.mean(x, dims=dims, keepdim=keep)

    def variance(keep: bool) -> Any:
        squares = op.mean(_squared(op, lambda: op.sub(x, mean(True))), dims=dims, keepdim=keep)
        return op.either(squares, op.var(x, dims=dims, correction=0, keepdim=keep))

    return op.batch_norm(x, ones, zeros, flat(mean), flat(variance), momentum=..., eps=eps)


@rule(
    _by_own_statistics,
    samples=lambda: [
        {"x": randn(1, 3, 6, 2).double(), "dims": (0, 2, 3), "dropped": (0, 2, 3), "eps": 1e-3},
        {"x": randn(1, 3, 6).double(), "dims": (0, 2), "dropped": (2, 0), "eps": 1e-5}
        | {"ones": Constant(torch.ones(3).double()), "zeros": Constant(torch.zeros(3).double())},
    ],
)
def instance_norm_from_statistics(
    build: Builder, x: Value, dims: tuple[int, ...], eps: float, ones: Operand, zeros: Operand
) -> Value:
    """A batch norm by what is computed of an only example is an instance norm."""
    if {dim % x.rank for dim in dims} != {0, *range(2, x.rank)} or x.rank < 3 or not same(x.shape[0], 1):
        return refuse("its statistics are not those of each channel of each example")
    if not everywhere(ones, 1) or not everywhere(zeros, 0):
        return refuse("its channels have gains or shifts of their own")
    return build.instance_norm(x, eps=eps)  # type: ignore[no-any-return]


# -- group norm --------------------------------------------------------------------------------------------------------


def _group_samples() -> Iterable[dict[str, Any]]:
    x = {"x": randn(2, 6, 4, 5).double(), "back": (2, 6, 4, 5)}
    ones, zeros = Constant(torch.ones(3).double()), Constant(torch.zeros(3).double())
    rows = {"grouped": (2, 3, 40), "norm.op": "instance_norm", "norm.attributes": {"eps": 1e-3}}
    yield {**x, **rows, "ones": ones, "zeros": zeros}
    yield {**x, **rows}
    layer = {"norm.op": "layer_norm", "norm.attributes": {"eps": 1e-5, "normalized_shape": (2, 20)}}
    yield {**x, **layer, "grouped": (2, 3, 2, 20)}


@rule(
    lambda op, x, grouped, back, ones=None, zeros=None: op.reshape(
        op.any_of(
            ("instance_norm", "layer_norm"),
            op.reshape(x, shape=grouped), ones, zeros, name="norm", attributes=...,
        ),
        shape=back,
    ),
    samples=_group_samples,
)  # fmt: skip
def group_norm_from_reshapes(
    build: Builder, x: Value, norm: Node, grouped: tuple[Size, ...], ones: Operand, zeros: Operand, match: Match
) -> Value:
    """A norm of each of the rows that the channels of an image were gathered in is a group norm."""
    if not everywhere(ones, 1) or not everywhere(zeros, 0):
        return refuse("its rows have gains or shifts of their own")
    groups = grouped[1] if len(grouped) > 2 and x.rank > 2 else None
    whole = isinstance(groups, int) and same(grouped[0], x.shape[0]) and divide(x.shape[1], groups) is not None
    after = match.root.output.shape
    if not whole or len(after) != x.rank or not all(map(same, after, x.shape)):
        return refuse("its reshapes do not gather neighbouring channels in groups")
    if norm.op == "layer_norm" and len(norm.attributes["normalized_shape"]) != len(grouped) - 2:
        return refuse("it averages over a part of each group")
    return build.group_norm(x, num_groups=groups, eps=norm.attributes["eps"])  # type: ignore[no-any-return]


@rule(
    lambda op, x, grouped, back, eps: op.reshape(op.instance_norm(op.reshape(x, shape=grouped), eps=eps), shape=back),
    samples=lambda: [
        {"x": randn(2, 6).double(), "grouped": (1, 2, 6, 1), "back": (2, 6), "eps": 1e-3},
        {"x": randn(2, 3, 4, 5).double(), "grouped": (1, 6, 20), "back": (2, 3, 4, 5), "eps": 1e-5},
    ],
)
def layer_norm_from_rows(build: Builder, x: Value, grouped: tuple[Size, ...], eps: float, match: Match) -> Value:
    """An instance norm of rows that are last axes is a layer norm."""
    after, length = match.root.output.shape, product(grouped[2:])
    first = next((axis for axis in range(1, x.rank) if same(product(x.shape[axis:]), length)), None)
    if first is None or len(after) != x.rank or not all(map(same, after, x.shape)):
        return refuse("its reshapes do not make rows of the last axes")
    return build.layer_norm(x, normalized_shape=x.shape[first:], eps=eps)  # type: ignore[no-any-return]


# -- gains and shifts --------------------------------------------------------------------------------------------------


def along(build: Builder, norm: Node, vector: Operand) -> Value:
    """A gain or shift that is broadcast against the result of a norm, as the norm itself takes it."""
    shape, rank = norm.output.shape, norm.output.rank
    if not isinstance(vector, Value) or vector.rank > rank or vector.dtype != norm.output.dtype:
        return refuse(f"{vector} is no gain or shift of its type")
    kept = range(rank - len(norm.attributes["normalized_shape"]), rank) if norm.op in TRAILING_NORMS else (1,)
    wanted = tuple(shape[axis] for axis in kept)
    aligned = (1,) * (rank - vector.rank) + vector.shape
    if not all(same(size, shape[axis] if axis in kept else 1) for axis, size in enumerate(aligned)):
        return refuse(f"{vector} does not run along what is normalised, or the channels, alone")
    source = _without_ones(vector, wanted)
    if source.rank == len(wanted):
        return source
    if not isinstance(vector, Parameter):
        return build.reshape(vector, shape=wanted)  # type: ignore[no-any-return]
    if len(vector.uses) > 1:
        return refuse(f"{vector.name} has another shape, and other readers")
    sizes = tuple(size for size in wanted if isinstance(size, int))
    return build.folded(vector, lambda tensor: tensor.reshape(sizes), shape=sizes)


def _without_ones(vector: Value, wanted: tuple[Size, ...]) -> Value:
    """What a vector was before it was given axes of size one, where that has the wanted shape; else the vector."""
    source: Operand = vector
    while isinstance(source, Value) and source.dtype == vector.dtype:
        if source.rank == len(wanted) and all(map(same, source.shape, wanted)):
            return source
        if source.producer is None or source.producer.op not in ("reshape", "unsqueeze", "cast"):
            break
        source = source.producer.inputs[0]
    return vector


def _norms(gains: bool) -> list[dict[str, Any]]:
    """Samples of all norms that a vector may stand behind; with gains of their own where asked."""
    image, tokens = randn(2, 6, 4, 5).double(), randn(2, 3, 6).double()
    cases: list[tuple[str, torch.Tensor, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
        ("layer_norm", tokens, {"normalized_shape": (6,)}, (6,), (6,)),
        ("layer_norm", tokens, {"normalized_shape": (6,)}, (1, 1, 6), (6,)),
        ("layer_norm", tokens, {"normalized_shape": (3, 6)}, (3, 6), (3, 6)),
        ("rms_norm", tokens, {"normalized_shape": (6,), "eps": 1e-6}, (6,), (6,)),
        ("group_norm", image, {"num_groups": 3}, (6, 1, 1), (6,)),
        ("instance_norm", image, {}, (1, 6, 1, 1), (6,)),
    ]
    return [
        {"x": x, "vector": Weight(randn(shape).double()), "norm.op": op, "norm.attributes": attributes}
        | ({"gain": Weight(randn(own).double())} if gains else {})
        for op, x, attributes, shape, own in cases
        if not gains or op != "rms_norm"
    ]


@rule(
    lambda op, x, vector: op.mul(op.any_of((*TRAILING_NORMS, *CHANNEL_NORMS), x, name="norm", attributes=...), vector),
    samples=lambda: _norms(gains=False),
)
def gain_into_norm(build: Builder, x: Value, norm: Node, vector: Operand) -> Value:
    """A factor behind a norm without gains is its gain."""
    return build(norm.op, x, along(build, norm, vector), **norm.attributes)  # type: ignore[no-any-return]


@rule(
    lambda op, x, vector, gain=None: op.add(
        op.any_of(("layer_norm", *CHANNEL_NORMS), x, gain, name="norm", attributes=...), vector
    ),
    samples=lambda: [*_norms(gains=True), *(s for s in _norms(gains=False) if s["norm.op"] != "rms_norm")],
)
def shift_into_norm(build: Builder, x: Value, gain: Value | None, norm: Node, vector: Operand) -> Value:
    """A summand behind a norm without shifts is its shift."""
    return build(norm.op, x, gain, along(build, norm, vector), **norm.attributes)  # type: ignore[no-any-return]


@rule(
    lambda op, x, w, offset, shape, eps: op.rms_norm(x, op.add(w, offset), normalized_shape=shape, eps=eps),
    samples=lambda: [
        {"x": randn(2, 6).double(), "w": Weight(randn(6).double()), "offset": 1.0, "shape": (6,), "eps": 1e-6}
    ],
)
def offset_into_gain(
    build: Builder, x: Value, w: Operand, offset: Operand, shape: tuple[Size, ...], eps: float | None
) -> Value:
    """Gains stored as their distance from one are stored as they are; both round once."""
    by = number(offset, "offset")
    if not isinstance(w, Parameter) or len(w.uses) > 1 or w.shape != shape:
        return refuse("its gain is no weight of its own")
    return build.rms_norm(  # type: ignore[no-any-return]
        x, build.folded(w, lambda tensor: tensor + by), normalized_shape=shape, eps=eps
    )


RULES = RuleSet(
    [
        layer_norm_from_means,
        rms_norm_from_means,
        mean_from_sum,
        instance_norm_from_statistics,
        group_norm_from_reshapes,
        layer_norm_from_rows,
        gain_into_norm,
        shift_into_norm,
        offset_into_gain,
    ]
)
