"""What integers an ONNX file of QuantizeLinear and DequantizeLinear has to give, computed by NumPy in integers.

    acc = sum (q_x - z_x) q_w + q_b       exact, 64 bits; it has to fit into 32
    q_y = clamp(round(acc s_x s_w / s_y) + z_y)      the nearest integer, halves to even

A runtime computes the second line in single precision. Its integer may differ from this one only where the exact number
lies so near to a half that rounding errors of so many operations reach it: FUSED where kernels multiply integers (acc
to float, two products of scales, one of acc: each half a unit in the last place of the result, so it differs by 1 at
most), and one for each term of the sum more, in units of the sum of magnitudes, where the runtime computes the float
graph as it is written. With its optimisations on, onnxruntime also turns a bias in float into an integer if it stands
behind a product of integers (WeightBiasQuantization): that moves the sum by half a step s_x s_w at most. Everywhere
else it is equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

UNIT = 2.0**-24
FUSED = 6
MOVES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Identity"}


@dataclass
class Coded:
    """Dequantized integers: (q - zero) * scale, with ``scale`` and ``zero`` in a shape that broadcasts."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    @property
    def number(self) -> Number:
        centred = (self.q - self.zero) * self.scale
        return Number(centred, (np.abs(self.q) + np.abs(self.zero)) * self.scale, 3)


@dataclass
class Number:
    """Exact results, the sum of the magnitudes of what was added up, and how often that was rounded at most; ``slack``
    is what else it may be off by. Of a product, ``step`` is what one more in its accumulator makes."""

    value: np.ndarray
    reach: np.ndarray
    steps: int
    slack: Any = 0.0
    step: Any = None

    def off_by(self) -> np.ndarray:
        found: np.ndarray = self.reach * (self.steps + FUSED) * UNIT + self.slack
        return found


@dataclass
class Findings:
    """How many integers were compared, how many were near a half, and how many of those a runtime rounds otherwise."""

    compared: int = 0
    near: int = 0
    other: int = 0
    floats: int = 0
    untraced: list[str] = field(default_factory=list)


def exposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all integers that it computes as further outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    known = {output.name for output in result.graph.output}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] not in known:
            result.graph.output.append(helper.make_tensor_value_info(node.output[0], kinds[node.input[2]], None))
    return result


class IntegerReference:
    """Holds the integers that a runtime found to those that they have to be; each layer on the runtime's own input."""

    def __init__(self, model: onnx.ModelProto, *, fused: bool, optimised: bool) -> None:
        self.model, self.fused, self.optimised = model, fused, optimised
        self.findings = Findings()

    def check(self, found: dict[str, np.ndarray]) -> Findings:
        """``found``: inputs, and outputs of the exposed model, by name. Raises AssertionError where one is wrong."""
        self.values: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer} | found
        for node in self.model.graph.node:
            if node.op_type == "Constant":
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
                continue
            compute = getattr(self, f"_{node.op_type.lower()}", None)
            operands = [self.values.get(name) if name else None for name in node.input]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            result = None
            if node.op_type in MOVES:
                result = self._moved(node, operands)
            elif compute is not None and operands[0] is not None:
                result = compute(node, attributes, *operands)
            if node.op_type == "QuantizeLinear":
                self._compare(node, result)
            elif result is not None:
                self._compare_floats(node.output[0], result)
                self.values.setdefault(node.output[0], result)
        return self.findings

    # -- comparisons -------------------------------------------------------------------------------------------------

    def _compare(self, node: onnx.NodeProto, wanted: Number | None) -> None:
        found = self.values[node.output[0]]
        if wanted is None:
            self.findings.untraced.append(node.output[0])
            return
        zero = float(self.values[node.input[2]])
        limits = np.iinfo(found.dtype)
        error = wanted.off_by()
        exact = np.clip(np.rint(wanted.value) + zero, limits.min, limits.max)
        ends = [np.clip(np.rint(wanted.value + side * error) + zero, limits.min, limits.max) for side in (-1, 1)]
        near = ends[0] != ends[1]
        wrong = (found != exact) & ~near | (found < ends[0]) | (found > ends[1])
        assert not wrong.any(), (
            f"{node.output[0]}: {int(wrong.sum())} of {wrong.size} integers are wrong, such as {found[wrong][:4]} "
            f"in place of {exact[wrong][:4]} ({wanted.value[wrong][:4] + zero})"
        )
        self.findings.compared += found.size
        self.findings.near += int(near.sum())
        self.findings.other += int((found != exact).sum())

    def _compare_floats(self, name: str, wanted: Any) -> None:
        """Of outputs of the model that are not integers."""
        found = self.values.get(name)
        if isinstance(found, np.ndarray) and isinstance(wanted, Number | Coded):
            number = wanted if isinstance(wanted, Number) else wanted.number
            assert (np.abs(found - number.value) <= number.off_by()).all(), f"{name} is off by more than rounding"
            self.findings.floats += found.size

    # -- operators ---------------------------------------------------------------------------------------------------

    def _quantizelinear(self, node: Any, attributes: Any, x: Any, scale: Any, zero: Any = None) -> Number:
        assert np.ndim(scale) == 0, "activations have one scale"
        number = self._number(x)
        by = 1 / np.float64(scale)
        return Number(number.value * by, number.reach * by, number.steps + 1, number.slack * by)

    def _dequantizelinear(self, node: Any, attributes: Any, q: Any, scale: Any, zero: Any = None) -> Coded | None:
        if attributes.get("block_size"):
            return None
        shape = [1] * np.ndim(q)
        if np.ndim(scale):
            shape[attributes.get("axis", 1)] = -1
        parts = [np.asarray(part).astype(kind).reshape(shape if np.ndim(scale) else ()) for part, kind in
                 ((scale, np.float64), (np.zeros_like(scale) if zero is None else zero, np.int64))]  # fmt: skip
        return Coded(np.asarray(q).astype(np.int64), *parts)

    def _conv(self, node: Any, attributes: Any, x: Any, w: Any, b: Any = None) -> Number | None:
        if not isinstance(x, Coded) or not isinstance(w, Coded):
            return None
        acc, terms = convolved(x.q - x.zero, w.q, attributes)
        by_channel = (1, -1) + (1,) * (acc.ndim - 2)
        reach = convolved(np.abs(x.q) + np.abs(x.zero), np.abs(w.q), attributes)[0]
        return self._product(acc, reach, terms, x.scale * w.scale.reshape(by_channel), b, by_channel)

    def _gemm(self, node: Any, attributes: Any, x: Any, w: Any, b: Any = None) -> Number | None:
        if not isinstance(x, Coded) or not isinstance(w, Coded):
            return None
        turned = attributes.get("transB", 0)
        q = w.q.T if turned else w.q
        scale = w.scale.reshape(-1)
        reach = (np.abs(x.q) + np.abs(x.zero)) @ np.abs(q)
        return self._product((x.q - x.zero) @ q, reach, q.shape[0], x.scale * scale, b, (-1,))

    def _matmul(self, node: Any, attributes: Any, x: Any, w: Any) -> Number | None:
        return self._gemm(node, {}, x, w)

    def _product(self, acc: Any, reach: Any, terms: int, scale: Any, b: Any, shape: Any) -> Number:
        if isinstance(b, Coded):
            first = np.broadcast_to(scale, (1,) * (acc.ndim - len(np.shape(scale))) + np.shape(scale)).reshape(-1)
            assert np.allclose(first, b.scale.reshape(-1), rtol=2 * UNIT, atol=0), "a bias in other steps"
            acc = acc + b.q.reshape(shape)
            reach = reach + np.abs(b.q.reshape(shape))
        assert (reach < 2**31).all(), "sums do not fit into 32 bits"
        number = Number(acc * scale, np.abs(acc) * scale, 1, step=scale)
        if not self.fused:
            number = Number(acc * scale, reach * scale, terms + 3, step=scale)
        return self._sum(number, np.float64(b).reshape(shape)) if isinstance(b, np.ndarray) else number

    def _sum(self, first: Number, second: Any) -> Number:
        """A constant behind a product is its bias."""
        behind = self.optimised and first.step is not None and isinstance(second, np.ndarray)
        other = self._number(second)
        slack = first.slack + other.slack + (first.step / 2 if behind else 0)
        return Number(first.value + other.value, first.reach + other.reach, max(first.steps, other.steps) + 1, slack)

    def _relu(self, node: Any, attributes: Any, x: Any) -> Number:
        number = self._number(x)
        return Number(np.maximum(number.value, 0), number.reach, number.steps, number.slack)

    def _clip(self, node: Any, attributes: Any, x: Any, low: Any = None, high: Any = None) -> Number:
        number = self._number(x)
        value = number.value if low is None else np.maximum(number.value, np.float64(low))
        value = value if high is None else np.minimum(value, np.float64(high))
        return Number(value, number.reach, number.steps, number.slack)

    def _add(self, node: Any, attributes: Any, a: Any, b: Any) -> Number | None:
        if a is None or b is None:
            return None
        return self._sum(self._number(b), a) if isinstance(a, np.ndarray) else self._sum(self._number(a), b)

    def _mul(self, node: Any, attributes: Any, a: Any, b: Any) -> Number | None:
        if a is None or b is None:
            return None
        first, second = self._number(a), self._number(b)
        slack = first.slack * np.abs(second.value) + second.slack * np.abs(first.value)
        return Number(first.value * second.value, first.reach * second.reach, first.steps + second.steps + 1, slack)

    def _concat(self, node: Any, attributes: Any, *parts: Any) -> Number | None:
        if any(part is None for part in parts):
            return None
        found = [self._number(part) for part in parts]
        join = [np.concatenate([getattr(n, kind) for n in found], attributes["axis"]) for kind in ("value", "reach")]
        slack = max(np.max(number.slack) for number in found)
        return Number(*join, max(number.steps for number in found), slack)

    def _moved(self, node: Any, operands: Any) -> Any:
        """Entries that stay what they are, of integers or of numbers."""
        x = operands[0]
        if isinstance(x, Coded) and x.scale.ndim == 0:
            return Coded(self._run(node, x.q.astype(np.float64), operands[1:]).astype(np.int64), x.scale, x.zero)
        if isinstance(x, Number):  # the error of a maximum is at most the greatest one
            parts = [self._run(node, part, operands[1:]) for part in (x.value, x.reach)]
            return Number(*parts, x.steps, np.max(x.slack))
        return self._run(node, x, operands[1:]) if isinstance(x, np.ndarray) else None

    def _run(self, node: Any, x: Any, rest: Any) -> Any:
        from onnx.reference import ReferenceEvaluator

        feeds = dict(zip(node.input, [x, *rest], strict=True))
        return ReferenceEvaluator(
            helper.make_graph(
                [node],
                "one",
                [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                 for n, v in feeds.items()],
                [helper.make_tensor_value_info(node.output[0], 0, None)],
            ),
            opsets={"": self.model.opset_import[0].version},
        ).run(None, feeds)[0]  # fmt: skip

    def _number(self, x: Any) -> Number:
        if isinstance(x, Coded):
            return x.number
        return x if isinstance(x, Number) else Number(np.asarray(x, np.float64), np.abs(np.asarray(x, np.float64)), 0)


def convolved(x: np.ndarray, w: np.ndarray, attributes: dict[str, Any]) -> tuple[np.ndarray, int]:
    """A convolution of integers with zeros around them, and the terms of each sum."""
    axes = x.ndim - 2
    strides, dilations = (attributes.get(name, [1] * axes) for name in ("strides", "dilations"))
    pads, groups = attributes.get("pads", [0] * 2 * axes), attributes.get("group", 1)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    spans = [(size - 1) * by + 1 for size, by in zip(w.shape[2:], dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, x.ndim)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in strides),
                       *(slice(None, None, d) for d in dilations))]  # fmt: skip
    parts = [
        np.tensordot(own, kernel, ([1, *range(2 + axes, 2 + 2 * axes)], range(1, 2 + axes)))
        for own, kernel in zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True)
    ]
    return np.moveaxis(np.concatenate(parts, -1), -1, 1), int(np.prod(w.shape[1:]))
