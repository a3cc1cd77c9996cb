"""Values of the original graph as the new one has them: data and a scale, the value as it was, or both."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.scaling.factors import ONE, Factor, FactorBuilder, exponent_below
from regauge.passes.scaling.magnitudes import Magnitudes, magnitudes_of

WIDE = (torch.float32, torch.float64)  # types of values that are held in a narrower one


@dataclass(frozen=True)
class Plan:
    """What values are held in, and where their scales are set.

    ``narrow``     the type of data; None: their own
    ``float8``     the type to which operands of layers are rounded; None: they are not
    ``norm``       what is brought to 1 at the ``points``: max, l1 or l2
    ``measured``   what values are like on data; those that are not in it are measured in each run
    ``margin``     powers of two between the greatest entry and the end of float8
    ``bias``       one exponent for all that is rounded to float8; None: by the greatest entry (AMAX)
    ``gradients``  the type of gradients of layers, where the module is to be trained
    """

    narrow: torch.dtype | None
    float8: torch.dtype | None
    norm: str
    points: Set[Value]
    measured: Mapping[Value, Magnitudes]
    margin: int
    bias: int | None
    gradients: torch.dtype | None


@dataclass
class Held:
    """``data`` times ``scale`` is the value; ``true`` is the value in its own type. Each is made when first asked for.

    ``any_scale``: it is zero or infinite everywhere, so that its data is the same at all scales. Of a weight,
    ``natural`` is the exponent of its norm, ``sole`` whether it has one reader, so that it may be stored at the scale
    that suits that, and ``read`` whether it is read as it is, so that it stays.
    """

    true: Value | None = None
    data: Value | None = None
    scale: Factor = ONE
    any_scale: bool = False
    natural: int | None = None
    sole: bool = False
    read: bool = False


class Holder:
    """Makes data of values, and values of data, in one graph."""

    def __init__(self, graph: Graph, build: Builder, plan: Plan) -> None:
        self.build, self.plan = build, plan
        double = any(value.dtype == torch.float64 for value in graph.values())
        self.factors = FactorBuilder(build, torch.float64 if double else torch.float32)
        self._held: dict[Value, Held] = {}
        self._rounded: dict[Value, tuple[Value, Factor]] = {}
        self._kept = {value for state in graph.states for value in (state.before, state.after)}
        self._kept |= {output for part in graph.nested() for output in part.outputs if isinstance(output, Value)}

    def of(self, value: Value) -> Held:
        if value not in self._held:
            held = self._held[value] = Held(true=value)
            if isinstance(value, Parameter):
                held.natural = magnitudes_of(value.tensor).exponent("l2")
                held.any_scale = held.natural is None
                held.read = value in self._kept or self._trained(value)
                held.sole = len(value.uses) == 1 and value not in self._kept
        return self._held[value]

    def put(self, value: Value, held: Held) -> None:
        self._held[value] = held

    def true(self, value: Value) -> Value:
        """The value as it was, in its own type."""
        held = self.of(value)
        held.read = True
        if held.true is None:
            assert held.data is not None and isinstance(value.dtype, torch.dtype)
            held.true = self.factors.multiplied(self._cast(held.data, value.dtype), held.scale)
        return held.true

    def data(self, value: Value) -> Held:
        """The value as data and scale."""
        held = self.of(value)
        if held.data is None:
            if isinstance(value, Parameter):
                self._split(value, held, held.natural or 0)
            else:
                assert held.true is not None
                scale = self._entry_scale(value, held.true)
                held.data = self._narrowed(self.factors.multiplied(held.true, self.factors.inverse(scale)))
                held.scale = scale
        return held

    def natural(self, value: Value) -> Factor:
        """The scale that a value has by itself: of a weight that brings its mean square to 1."""
        held = self.of(value)
        if held.data is None and isinstance(value, Parameter):
            return Factor(held.natural or 0)
        return self.data(value).scale

    def at(self, value: Value, scale: Factor) -> Value:
        """The data of a value at a given scale."""
        held = self.of(value)
        if held.data is None and held.sole and scale.value is None and isinstance(value, Parameter):
            self._split(value, held, 0 if held.any_scale else scale.exponent)
            assert held.data is not None
            return held.data
        found = self.data(value)
        assert found.data is not None
        if held.any_scale:
            return found.data
        return self.factors.multiplied(found.data, self.factors.times(found.scale, self.factors.inverse(scale)))

    def number(self, number: Any, scale: Factor) -> Any:
        """A Python number at a given scale."""
        if scale.value is None:
            return number if abs(number) == float("inf") else number * 2.0**-scale.exponent
        wide = self.build.mul(self.factors.whole(self.factors.inverse(scale)), float(number))
        return self._narrowed(wide)

    def norm_of(self, value: Value, data: Value) -> Factor:
        """The power of two below the norm of data that stands for a value, taken in each run."""
        return Factor(0, self.factors.rounded_down(self.factors.norm(data, self.plan.norm)))

    def rounded(self, value: Value) -> tuple[Value, Factor]:
        """The value in float8 and back, and its scale."""
        if value not in self._rounded:
            self._rounded[value] = self._round(value)
        return self._rounded[value]

    # -- types -------------------------------------------------------------------------------------------------------

    def narrowed_type(self, dtype: Any) -> Any:
        return self.plan.narrow if self.plan.narrow is not None and dtype in WIDE else dtype

    def _narrowed(self, value: Value) -> Value:
        return self._cast(value, self.narrowed_type(value.dtype))

    def _cast(self, value: Value, dtype: torch.dtype) -> Value:
        return value if value.dtype == dtype else self.build.cast(value, dtype=dtype)

    # -- weights and entries -----------------------------------------------------------------------------------------

    def _split(self, weight: Parameter, held: Held, exponent: int) -> None:
        """Let a weight be stored as data at a scale; one that is read as it is too is divided in each run."""
        held.scale = Factor(exponent)
        if held.read:
            assert held.true is not None
            held.data = self._narrowed(self.factors.multiplied(held.true, Factor(-exponent)))
            return
        stored, held.data, held.true = self.narrowed_type(weight.dtype), weight, None
        if exponent or stored != weight.dtype:
            held.data = self.build.folded(weight, lambda t: t * 2.0**-exponent, dtype=stored)

    def _trained(self, weight: Parameter) -> bool:
        """Whether a weight stays as it is: optimizers take steps that narrow types do not tell, and have rates for its
        own scale."""
        return self.plan.gradients is not None and weight.trainable

    def _entry_scale(self, value: Value, true: Value) -> Factor:
        if value not in self.plan.points:
            return ONE
        if value in self.plan.measured:
            return Factor(self.plan.measured[value].exponent(self.plan.norm) or 0)
        return self.norm_of(value, true)

    # -- float8 ------------------------------------------------------------------------------------------------------

    def _round(self, value: Value) -> tuple[Value, Factor]:
        dtype = self.plan.float8
        assert dtype is not None
        held, limit = self.of(value), torch.finfo(dtype).max
        sizes = self.plan.measured.get(value)
        if isinstance(value, Parameter) and not self._trained(value):
            sizes = magnitudes_of(value.tensor)
        if self.plan.bias is None and sizes is None:
            return self._round_by_run(value, limit)
        exponent = self.plan.bias
        if exponent is None:
            assert sizes is not None
            exponent = exponent_below(limit / (sizes.norm("max") or 1.0)) - self.plan.margin
        scale = Factor(-exponent)
        if isinstance(value, Parameter) and held.sole and held.data is None and not held.read:
            stored = self.build.folded(value, lambda t: (t * 2.0**exponent).clamp(-limit, limit), dtype=dtype)
            data = held.data = self.build.cast(stored, dtype=value.dtype)
            held.scale, held.true = scale, None
            return data, scale
        return self._through_float8(self.at(value, scale), limit), scale

    def _round_by_run(self, value: Value, limit: float) -> tuple[Value, Factor]:
        """With the exponent that the greatest entry has in this run."""
        found, factors, build = self.data(value), self.factors, self.build
        assert found.data is not None
        greatest = build.clamp(factors.norm(found.data, "max"), 1e-30)
        up = factors.rounded_down(build.mul(build.reciprocal(greatest), limit * 2.0**-self.plan.margin))
        scale = factors.times(found.scale, factors.inverse(Factor(0, up)))
        return self._through_float8(factors.multiplied(found.data, Factor(0, up)), limit), scale

    def _through_float8(self, x: Value, limit: float) -> Value:
        dtype = self.plan.float8
        if self.plan.gradients is not None:
            return self.build.fake_cast(x, dtype=dtype)  # type: ignore[no-any-return]
        return self._cast(self.build.cast(self.build.clamp(x, -limit, limit), dtype=dtype), x.dtype)  # type: ignore[arg-type]
