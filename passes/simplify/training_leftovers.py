"""What only training needed: dropout, activations that were trained into lines, norms that were trained into one.

    dropout(x), not in training              x
    leaky_relu(x, negative_slope=1)          x                     VanillaNet
    batch_norm(x) + eta * x                  batch_norm'(x)        SLAB's PRepBN once its LayerNorm has faded out

What was captured in training mode stays: ``training`` is an attribute of every such node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import rand, randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, refuse
from regauge.passes.simplify.affine import norm_vectors, weights
from regauge.passes.simplify.affine_steps import PAIRS, affine_of, batch_norm_affine
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, new_weight, number, successor
from regauge.passes.simplify.linear_map import axes_of

DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")


def drop_dropout(build: Builder, x: Value) -> Value:
    """Dropout passes everything on when nothing is trained."""
    return x


def drop_line(build: Builder, x: Value) -> Value:
    """A leaky ReLU with the slope one is the identity."""
    return x


def norm_with_shortcut(build: Builder, norm: Node, match: Match) -> Value:
    """A batch norm plus a scale of its input is a batch norm with another gain and another shift."""
    x, step = norm.inputs[0], match.bindings.get("step")
    assert isinstance(x, Value)
    axes = axes_of(norm).operands[0]
    batch_norm_affine(build, norm)  # refuses where it is no affine step
    eta, extra = number(1.0), number(0.0)
    if step is not None:
        slot = next(slot for slot, value in step.operands() if value is x)
        scale, shift = affine_of(build, step, slot, axes)
        eta = number(1.0) if scale is None else scale.along([axes[1]], "the channels")
        extra = number(0.0) if shift is None else shift.along([axes[1]], "the channels")
    gain, bias, mean, var = (norm.inputs[slot] if slot < len(norm.inputs) else None for slot in (1, 2, 3, 4))
    if not isinstance(mean, Parameter) or not isinstance(var, Parameter):
        return refuse("its statistics are views of weights")
    own_gain = number(1.0) if gain is None else fixed(build, gain)
    own_bias = number(0.0) if bias is None else fixed(build, bias)
    m, v = fixed(build, mean), fixed(build, var)
    assert own_gain and own_bias and m and v  # batch_norm_affine refuses otherwise
    eps = norm.attributes["eps"]
    new_gain = combined(lambda g, e, s: (g + e * torch.sqrt(s + eps)).expand(s.shape), own_gain, eta, v)
    new_bias = combined(lambda b, e, mu, t: (b + e * mu + t).expand(mu.shape), own_bias, eta, m, extra)
    vectors = [_in_place(build, old, value, mean) for old, value in ((gain, new_gain), (bias, new_bias))]
    with build.at(norm):
        result: Value = build.batch_norm(x, *vectors, mean, var, name=norm.name, **norm.attributes)
    return result


def _in_place(build: Builder, old: Any, value: Fixed, like: Parameter) -> Parameter:
    shape = like.weight.shape
    if isinstance(old, Parameter) and len(old.uses) == 1:
        return successor(build, old, value, shape)
    return new_weight(build, f"{like.name}_folded", like, value, shape)


# -- samples -----------------------------------------------------------------------------------------------------------


def _norm_samples() -> Iterable[dict[str, Any]]:
    yield weights({"x": randn(2, 6, 5), **norm_vectors(6)})
    yield weights({"x": randn(4, 6), "mean": randn(6), "var": rand(6) + 0.5})


def _step_samples() -> Iterable[dict[str, Any]]:
    for sample in _norm_samples():
        for op in PAIRS:
            yield {**sample, "f": 0.25, "step.op": op}
            yield {**sample, **weights({"f": rand(1) + 0.5}), "step.op": op}


# -- rules -------------------------------------------------------------------------------------------------------------


def _norm(op: Any, x: Any, gain: Any, shift: Any, mean: Any, var: Any) -> Any:
    return op.batch_norm(x, gain, shift, mean, var, momentum=..., eps=..., name="norm")


def _identity_beside(op: Any, x: Any, mean: Any, var: Any, gain: Any = None, shift: Any = None) -> Any:
    return op.add(_norm(op, x, gain, shift, mean, var), x)


def _step_beside(op: Any, x: Any, f: Any, mean: Any, var: Any, gain: Any = None, shift: Any = None) -> Any:
    return op.add(_norm(op, x, gain, shift, mean, var), op.any_of(PAIRS, x, f, name="step"))


RULES = RuleSet(
    [
        RewriteRule("dropout-in-evaluation", lambda op, x: op.any_of(DROPOUTS, x, p=..., training=False), drop_dropout,
                    samples=lambda: [{"x": randn(2, 3, 4, 4).double()}]),
        RewriteRule("leaky-relu-without-a-bend", lambda op, x: op.leaky_relu(x, negative_slope=1.0), drop_line,
                    samples=lambda: [{"x": randn(2, 3).double()}]),
        RewriteRule("identity-beside-batch-norm", _identity_beside, norm_with_shortcut, samples=_norm_samples),
        RewriteRule("step-beside-batch-norm", _step_beside, norm_with_shortcut, samples=_step_samples),
    ]
)  # fmt: skip
