"""One application of a rule in notation: names are bound to extents, composites solved, results built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regauge.ir.axis_rules.notation import Axis, Composite, One, Pattern, Rule, Run, Term
from regauge.ir.dims import extents as ext
from regauge.ir.dims.extents import ONE, Extent, fresh, size_of
from regauge.ir.dims.unify import unify
from regauge.ir.errors import AxisError
from regauge.ir.sizes.expressions import Size, divide, product, same, total

if TYPE_CHECKING:
    from regauge.ir.axis_rules.rules import Axes, Call


class Application:
    """One application of a parsed rule: binds names to extents, solves composites, builds the results."""

    def __init__(self, call: Call, rule: Rule, sizes: dict[str, Size]) -> None:
        self.call = call
        self.rule = rule
        self.names: dict[str, Extent] = {}
        self.runs: dict[str, Axes] = {}
        self.sizes: dict[str, Size] = dict(sizes)
        self.batch: list[Axes] = []
        for attribute, name in rule.derived:
            given = call.node.attributes.get(attribute)
            if name not in self.sizes and given is not None and not isinstance(given, tuple):
                self.sizes[name] = given

    def run(self) -> list[Axes]:
        composites: list[tuple[Composite, Extent]] = []
        given = self.call.axes
        for index, pattern in enumerate(self.rule.operands):
            axes = given[index] if index < len(given) else None
            if axes is not None:
                self._match(pattern, axes, index, composites)
            elif not pattern.optional:
                raise AxisError(f"{self.call.where}: operand {index} is missing; the rule is {self.rule}")
        if len(given) > len(self.rule.operands):
            raise AxisError(f"{self.call.where}: more operands than the rule has: {self.rule}")
        if composites:
            self._solve(composites)
        batch = self.call.broadcast(self.batch)
        results = [self._result(pattern, batch, index) for index, pattern in enumerate(self.rule.results)]
        self._state_roles()
        for attribute, name in self.rule.derived:
            self.call.derived[attribute] = tuple(self.runs[name]) if name in self.runs else self.names.get(name, ONE)
        return results

    def _match(self, pattern: Pattern, axes: Axes, index: int, composites: list[tuple[Composite, Extent]]) -> None:
        if not pattern.runs and len(axes) == pattern.fixed:
            for term, extent in zip(pattern.terms, axes, strict=True):
                self._bind_term(term, extent, composites)
            return
        lengths = self._run_lengths(pattern, axes, index)
        position = 0
        for term in pattern.terms:
            if isinstance(term, Run):
                self._bind_run(term.name, axes[position : position + lengths[term.name]])
                position += lengths[term.name]
                continue
            self._bind_term(term, axes[position], composites)
            position += 1

    def _run_lengths(self, pattern: Pattern, axes: Axes, index: int) -> dict[str, int]:
        """How many axes each run of the pattern stands for; at most one may be unknown, and takes what is left."""
        runs = pattern.runs
        if len(runs) == 1 and len(axes) >= pattern.fixed:
            return {runs[0]: len(axes) - pattern.fixed}
        known = {name: length for name in runs if (length := self._known_length(name)) is not None} if runs[1:] else {}
        unknown = [name for name in runs if name not in known]
        left = len(axes) - pattern.fixed - sum(known.values())
        if left < 0 or len(unknown) > 1 or (left and not unknown):
            raise AxisError(
                f"{self.call.where}: operand {index} has {len(axes)} axes, but the rule {self.rule} wants '{pattern}'"
            )
        return {**known, **dict.fromkeys(unknown, left)}

    def _known_length(self, name: str) -> int | None:
        if name in self.runs:
            return len(self.runs[name])
        for attribute, derived in self.rule.derived:
            given = self.call.node.attributes.get(attribute)
            if derived == name and isinstance(given, tuple):
                return len(given)
        return None

    def _bind_run(self, name: str, run: Axes) -> None:
        if not name:
            self.batch.append(run)
        elif name not in self.runs:
            self.runs[name] = run
        elif len(self.runs[name]) != len(run):
            raise AxisError(f"{self.call.where}: '{name}...' stands for {len(self.runs[name])} and for {len(run)} axes")
        else:
            for a, b in zip(self.runs[name], run, strict=True):
                unify(a, b)

    def _bind_term(self, term: Term, extent: Extent, composites: list[tuple[Composite, Extent]]) -> None:
        if isinstance(term, Axis):
            self._bind_name(term.name, extent)
        elif isinstance(term, Composite):
            composites.append((term, extent))
        elif isinstance(term, One) and not same(size_of(extent), 1):
            raise AxisError(f"{self.call.where}: an axis of size 1 is expected, got {extent}; the rule is {self.rule}")

    def _bind_name(self, name: str, extent: Extent) -> None:
        if name in self.names:
            unify(self.names[name], extent)
        else:
            self.names[name] = extent

    def _known_size(self, part: Axis | Composite) -> Size | None:
        if isinstance(part, Composite):
            known = [size for p in part.parts if (size := self._known_size(p)) is not None]
            if len(known) < len(part.parts):
                return None
            return product(known) if part.kind == " " else total(known)
        if part.name in self.names:
            return size_of(self.names[part.name])
        return self.sizes.get(part.name)

    def _solve(self, composites: list[tuple[Composite, Extent]]) -> None:
        """Refine axes that the rule calls composite; repeated, because one may give the size another needs."""
        pending = list(composites)
        while pending:
            postponed = []
            for term, extent in pending:
                if not self._solve_one(term, extent):
                    postponed.append((term, extent))
            if len(postponed) == len(pending):
                unknown = ", ".join(str(term) for term, _ in postponed)
                raise AxisError(f"{self.call.where}: the sizes inside {unknown} are not determined by {self.rule}")
            pending = postponed

    def _solve_one(self, term: Composite, extent: Extent) -> bool:
        sizes = [self._known_size(part) for part in term.parts]
        missing = [i for i, size in enumerate(sizes) if size is None]
        if len(missing) > 1:
            return False
        known = [size for size in sizes if size is not None]
        if missing:
            if term.kind == " ":
                size = divide(size_of(extent), product(known))
            else:
                size = size_of(extent) - sum(known)
            if size is None:
                raise AxisError(f"{self.call.where}: {extent} is not divisible as {term}; the rule is {self.rule}")
            sizes[missing[0]] = size
        full = [size for size in sizes if size is not None]
        if not same(product(full) if term.kind == " " else sum(full), size_of(extent)):
            raise AxisError(f"{self.call.where}: {extent} is not laid out as {term} with sizes {full}")
        parts = self.call.reshape([extent], full) if term.kind == " " else self.call.split(extent, full)
        for part, piece in zip(term.parts, parts, strict=True):
            if isinstance(part, Composite):
                self._solve_one(part, piece)
            else:
                self._bind_name(part.name, piece)
        return True

    def _result(self, pattern: Pattern, batch: Axes, index: int) -> Axes:
        axes: Axes = []
        for term in pattern.terms:
            if isinstance(term, Run):
                if not term.name:
                    axes.extend(batch)
                    continue
                if term.name not in self.runs:  # a run born here, such as the spatial axes after a window
                    shape = self.call.node.outputs[index].shape
                    start = len(axes)
                    self.runs[term.name] = [fresh(size) for size in shape[start : start + len(shape) - pattern.fixed]]
                axes.extend(self.runs[term.name])
            else:
                axes.append(self._build(term, index, len(axes)))
        return axes

    def _build(self, term: Term, index: int, position: int) -> Extent:
        if isinstance(term, One):
            return ONE
        if isinstance(term, Composite):
            parts = [self._build(part, index, -1) for part in term.parts]
            return ext.resolve(ext.Product(parts) if term.kind == " " else ext.Concat(parts))
        assert isinstance(term, Axis)
        if term.name not in self.names:
            size = self.sizes.get(term.name)
            if size is None and position >= 0:
                size = self.call.node.outputs[index].shape[position]
            if size is None:
                raise AxisError(f"{self.call.where}: the size of {term.name!r} is not determined by {self.rule}")
            self.names[term.name] = fresh(size)
        return self.names[term.name]

    def _state_roles(self) -> None:
        given = self.call.axes
        present = tuple(i < len(given) and given[i] is not None for i in range(len(self.rule.operands)))
        roles = self.rule.roles_with(present)
        self.call.state_roles([roles[name] for name in self.names], list(self.names.values()))
        for name, run in self.runs.items():
            self.call.state_roles([roles[name]] * len(run), run)
