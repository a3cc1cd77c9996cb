"""Windows as nodes: convolutions over as few axes as their windows need, and taps added up each from its place.

Indices that a kernel is not moved along become part of the batch, or a last axis of which the kernel has one entry: a
kernel along one of three axes is one of two, the others merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size, product
from regauge.passes.deriving.expressions import Axes, Axis, Index, Window
from regauge.passes.deriving.layouts import Laid, has_whole, is_weight
from regauge.passes.deriving.sources import Convolved, Shifted, Source, Tensor, Unfolded, places_of, turned

Part = tuple[int, int, int]

if TYPE_CHECKING:
    from regauge.passes.deriving.lowering import Lowering


def is_image(left: Laid, right: Laid, summed: Axis) -> bool:
    """Whether channels that are summed with a weight lie before other axes, as a convolution wants them."""
    return is_weight(right.value) and 3 <= len(left.axes) <= 5 and bool(summed) and set(left.axes[1]) == set(summed)


def pointwise(lowering: Lowering, source: Source, left: Laid, right: Laid, columns: Axis) -> Laid:
    """A product with a weight along the axis of channels, by a convolution with one tap; indices to be summed first."""
    channels = left.axes[1]
    columns = tuple(sorted(columns, key=lambda index: index in lowering.order))
    ones: Axes = ((),) * (len(left.axes) - 2)
    weight = lowering.arranged(right, (columns, channels, *ones))
    value = lowering.build.conv(
        left.value, weight, *_given(lowering.bias(source, columns)), stride=(1,) * len(ones), padding=(0,) * len(ones),
        dilation=(1,) * len(ones), groups=1,
    )  # fmt: skip
    return Laid(value, (left.axes[0], columns, *left.axes[2:]))


def convolved(lowering: Lowering, source: Convolved, x: Laid, kernel: Laid) -> Laid:
    """A convolution, or a transposed one, of what is summed before where one of both has it alone."""
    read = {index for window in source.windows for index in window.indices}.union(source.kept)
    shared = set(x.flat) & set(kernel.flat)
    x, kernel = (lowering.summed(laid, read | shared) for laid in (x, kernel))
    windows = sorted(source.windows, key=lambda window: x.flat.index(_ends(window, source.spread)[0]))
    ends = [_ends(window, source.spread) for window in windows]
    own, made = tuple(end[0] for end in ends), tuple(end[1] for end in ends)
    taps: Axes = tuple((tap,) if tap is not None else () for _, _, tap in ends)
    groups = tuple(index for index in x.flat if index in shared and index in source.kept)
    channels = tuple(index for index in x.flat if index in shared and index not in source.kept)
    columns = tuple(index for index in kernel.flat if index not in shared and (index,) not in taps)
    batch, *beside = _beside(x, (*groups, *channels), own)
    before, behind = ((axis,) if axis else () for axis in beside)
    front = ((*groups, *channels), columns) if source.spread else ((*groups, *columns), channels)
    value = lowering.arranged(x, (batch, (*groups, *channels), *before, *((index,) for index in own), *behind))
    weight = lowering.arranged(kernel, (*front, *((),) * len(before), *taps, *((),) * len(behind)))
    places = [(window.stride, -window.start, window.dilation) for window in map(_window, windows)]
    one = [(1, 0, 1)]
    stride, padding, dilation = zip(*one * len(before), *places, *one * len(behind), strict=True)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": int(_size(groups))}
    if source.spread:
        options["output_padding"] = (*(0,) * len(before), *map(_over, map(_window, windows)), *(0,) * len(behind))
    bias = lowering.bias(source, (*groups, *columns))
    result = lowering.build("conv_transpose" if source.spread else "conv", value, weight, *_given(bias), **options)
    return Laid(result, (batch, (*groups, *columns), *before, *((index,) for index in made), *behind))


def shifted(lowering: Lowering, source: Shifted, laid: Laid) -> Laid:
    """Taps added up, each cut out from its place; of a transposed window with steps, phase by phase."""
    own, made, tap = _ends(source.window, source.spread)
    window = _window(source.window)
    assert tap is not None
    if source.spread and window.stride > 1:
        return _phases(lowering, laid, window, (own, made, tap))
    return _added(lowering, laid, (own, made, tap), window, spread=source.spread)


def unfolded(lowering: Lowering, source: Unfolded, laid: Laid) -> Laid:
    """What each tap reads, side by side along an axis of taps before that of the windows."""
    own, made, tap = _ends(source.window, False)
    window = _window(source.window)
    assert tap is not None
    laid = _apart(lowering, laid, (own,))
    dim = laid.axes.index((own,))
    parts = [_part(lowering, laid.value, dim, window, part, window.stride) for part in window.parts(spread=False)]
    value = lowering.build.stack(*parts, dim=dim)
    return Laid(value, (*laid.axes[:dim], (tap,), (made,), *laid.axes[dim + 1 :]))


def _phases(lowering: Lowering, laid: Laid, window: Window, ends: tuple[Index, Index, Index]) -> Laid:
    """Entries ``stride * q + r`` of the result get tap ``stride * m + r`` of entry ``q - m``, for all m."""
    (own, made, tap), steps = ends, window.stride
    laps = -(-window.taps // steps)
    laid = _apart(lowering, laid, (own, tap))
    dim = laid.axes.index((tap,))
    value = _padded(lowering, laid.value, dim, 0, laps * steps - window.taps)
    lap, phase, place = Index(laps), Index(steps), own
    split: Axis = (lap, phase) if laps > 1 else (phase,)
    laid = Laid(value, (*laid.axes[:dim], split, *laid.axes[dim + 1 :]))
    if laps > 1:
        place = Index(window.out + laps - 1)
        inner = Window(1, 1, 0, window.out + laps - 1, window.out, laps)
        laid = _added(lowering, laid, (own, place, lap), inner, spread=True)
    laid = _apart(lowering, laid, (place, phase))
    axes = tuple((place, phase) if axis == (place,) else axis for axis in laid.axes if axis != (phase,))
    value, dim = lowering.arranged(laid, axes), axes.index((place, phase))
    first, size = -window.start, (window.out + laps - 1) * steps
    value = _padded(lowering, value, dim, 0, max(0, first + window.wide - size))
    if first or first + window.wide < size:
        value = lowering.build.slice(value, dim=dim, start=first, end=first + window.wide, step=1)
    return Laid(value, tuple((made,) if axis == (place, phase) else axis for axis in axes))


def _added(lowering: Lowering, laid: Laid, ends: tuple[Index, Index, Index], window: Window, *, spread: bool) -> Laid:
    """The sum of all taps, each with zeros where it reads nothing."""
    build, (own, made, tap) = lowering.build, ends
    laid = _apart(lowering, laid, (own, tap))
    dim, at = laid.axes.index((own,)), laid.axes.index((tap,))
    total: Value | None = None
    for place, part in enumerate(window.parts(spread=spread)):
        if part[1] < part[2]:
            value = build.select(laid.value, dim=at, index=place)
            value = _part(lowering, value, dim - (at < dim), window, part, 1 if spread else window.stride, spread)
            total = value if total is None else build.add(total, value)
    assert total is not None
    return Laid(total, tuple((made,) if axis == (own,) else axis for axis in laid.axes if axis != (tap,)))


def _part(
    lowering: Lowering,
    value: Value,
    dim: int,
    window: Window,
    part: tuple[int, int, int],
    step: int,
    spread: bool = False,
) -> Value:
    """What one tap reads along an axis, and zeros around it where it reads nothing."""
    (first, low, high), count = part, window.wide if spread else window.out
    end = first + step * (high - low - 1) + 1
    if first or step > 1 or end < (window.out if spread else window.wide):
        value = lowering.build.slice(value, dim=dim, start=first, end=max(first, end), step=step)
    return _padded(lowering, value, dim, low, count - high)


def _padded(lowering: Lowering, value: Value, dim: int, before: int, after: int) -> Value:
    if not before and not after:
        return value
    pads = [(0, 0)] * value.rank
    pads[dim] = (before, after)
    result: Value = lowering.build.pad(value, pads=tuple(pads))
    return result


def _apart(lowering: Lowering, laid: Laid, indices: Axis) -> Laid:
    """The value with each of these indices an axis of its own."""
    if has_whole(laid.axes, indices) and all((index,) in laid.axes for index in indices):
        return laid
    axes: list[Axis] = []
    for axis in laid.axes:
        axes += [(index,) for index in axis] if set(axis) & set(indices) else [axis]
    return Laid(lowering.arranged(laid, tuple(axes)), tuple(axes))


def _beside(x: Laid, channels: Axis, own: Axis) -> tuple[Axis, Axis, Axis]:
    """Which indices that a kernel is not moved along are the batch, and which an axis before or behind its only one."""
    other = tuple(index for index in x.flat if index not in (*channels, *own))
    if len(own) > 1:
        return other, (), ()
    at, last = x.flat.index(own[0]), max((x.flat.index(index) for index in channels), default=-1)
    before, behind = x.flat[last + 1 : at], x.flat[at + 1 :]
    if behind and set(behind) <= set(other):
        return tuple(index for index in other if index not in behind), (), behind
    if before and channels and not behind:
        return tuple(index for index in other if index not in before), before, ()
    return other, (), ()


def _ends(window: Tensor, spread: bool) -> tuple[Index, Index, Index | None]:
    own, made, tap = turned(window, spread=spread)
    assert own is not None and made is not None
    return own, made, tap


def _window(tensor: Tensor) -> Window:
    places = places_of(tensor)
    assert isinstance(places, Window)
    return places


def _over(window: Window) -> int:
    """How many entries the result of a transposed convolution has behind what its padding leaves of the last window."""
    reached = (window.out - 1) * window.stride + window.dilation * (window.taps - 1) + 1
    return window.wide - (reached + 2 * window.start)


def _size(indices: Axis) -> Size:
    return product(index.size for index in indices)


def _given(bias: Value | None) -> tuple[Value, ...]:
    return () if bias is None else (bias,)
