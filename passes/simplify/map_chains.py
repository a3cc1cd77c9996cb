"""Linear maps in a row become one, where that does not cost more.

    linear(w1, b1) -> linear(w2, b2)    linear(w2 w1, w2 b1 + b2)
    conv 1x1 -> conv kxk                conv kxk, unless the bias of the first one would be missing in a border
    conv kxk -> conv 1x1                conv kxk

A product of two narrow maps may be far wider than they are, so parameters and MACs are compared before each merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet
from regauge.passes.simplify.affine import weights
from regauge.passes.simplify.kernels import composed, placed
from regauge.passes.simplify.linear_map import X, must_pay, own_weight

CHAINED = ("linear", "matmul", "conv")


def _chain_samples() -> Iterable[dict[str, Any]]:
    x, image = randn(3, 5, 4), randn(2, 4, 7, 7)
    for first, second in (("linear", "linear"), ("matmul", "linear"), ("linear", "matmul"), ("matmul", "matmul")):
        left = randn(9, 4) if first == "linear" else randn(4, 9)
        right = randn(3, 9) if second == "linear" else randn(9, 3)
        biases = {"b": randn(9)} if first == "linear" else {}
        biases |= {"c": randn(3)} if second == "linear" else {}
        yield weights({"x": x, "w": left, "v": right, "first.op": first, "second.op": second, **biases})
    convs = {"x": image, "first.op": "conv", "second.op": "conv"}
    kernel = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
    yield weights({**convs, "w": randn(32, 4, 1, 1), "v": randn(6, 16, 3, 3), "second.attributes": kernel})
    yield weights({**convs, "w": randn(32, 2, 1, 1), "v": randn(6, 32, 2, 2), "b": randn(32), "c": randn(6),
                   "first.attributes": {"groups": 2}})  # fmt: skip
    yield weights({**convs, "w": randn(32, 2, 3, 3), "v": randn(4, 16, 1, 1), "b": randn(32),
                   "first.attributes": kernel, "second.attributes": {"groups": 2, "stride": (2, 2)}})  # fmt: skip


def _chain(op: Any, x: Any, w: Any, v: Any, b: Any = None, c: Any = None) -> Any:
    first = op.any_of(CHAINED, x, w, b, name="first", attributes=...)
    return op.any_of(CHAINED, first, v, c, name="second", attributes=...)


def chain_rule(name: str, check: Callable[[Builder, Sequence[Node]], None]) -> RewriteRule:
    """Two linear maps in a row are one; ``check(build, before)`` refuses where what was built does not pay."""

    def replacement(build: Builder, first: Node, second: Node) -> Value:
        """Two linear maps in a row are one, if it costs no more than both."""
        own_weight(build, first)
        own_weight(build, second)
        x = first.inputs[X]
        assert isinstance(x, Value)
        result = placed(build, second, x, composed(build, first, second))
        check(build, [first, second])
        return result

    return RewriteRule(name, _chain, replacement, samples=_chain_samples)


RULES = RuleSet([chain_rule("maps-in-a-row", must_pay)])
