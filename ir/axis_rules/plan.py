"""Rules worked out once per rank: what :class:`regauge.ir.axis_rules.application.Application` does, without the search.

Which axes carry the same name depends only on the rule and the ranks of the operands. Where nothing else decides (no
composite axes, no names that only results have) that is a plan: rows of places to unify, and a recipe of the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from regauge.ir.axis_rules.notation import PINNING_ROLES, Axis, One, Pattern, Rule, Run
from regauge.ir.dims.extents import ONE, Extent
from regauge.ir.dims.unify import unify

if TYPE_CHECKING:
    from regauge.ir.axis_rules.rules import Axes, Call

Ranks: TypeAlias = tuple[int | None, ...]
Place: TypeAlias = tuple[int, int]  # operand, axis of it
_BATCH, _ONE = -1, -2  # in the recipe of a result: all leading axes, an axis of size one


@dataclass(frozen=True)
class Plan:
    """Places by name: ``first`` binds name number i, the places of ``others`` are unified with it."""

    first: tuple[Place, ...]
    others: tuple[tuple[int, Place], ...]
    batches: tuple[tuple[int, int], ...]  # operand, end of its leading axes
    results: tuple[tuple[int, ...], ...]
    roles: tuple[str | None, ...]  # of each name
    pinning: tuple[tuple[str, int], ...]  # those roles that pin
    derived: tuple[tuple[str, int | tuple[int, ...]], ...]

    def run(self, call: Call) -> list[Axes]:
        axes: Sequence[Axes] = call.axes  # type: ignore[assignment]
        names = [axes[operand][axis] for operand, axis in self.first]
        for name, (operand, axis) in self.others:
            if names[name] is not axes[operand][axis]:
                unify(names[name], axes[operand][axis])
        leading = [axes[operand][:end] for operand, end in self.batches]
        batch = leading[0] if len(leading) == 1 else call.broadcast(leading)
        call.stated = (*call.stated, (self.roles, names))
        for role, name in self.pinning:
            call.pin(names[name], PINNING_ROLES[role].format(operator=call.node.op))
        for attribute, found in self.derived:
            call.derived[attribute] = tuple([names[n] for n in found]) if isinstance(found, tuple) else names[found]
        return [_result(recipe, names, batch) for recipe in self.results]


def _result(recipe: tuple[int, ...], names: list[Extent], batch: Axes) -> Axes:
    axes: Axes = []
    for name in recipe:
        if name == _BATCH:
            axes.extend(batch)
        else:
            axes.append(ONE if name == _ONE else names[name])
    return axes


def plan_of(rule: Rule, ranks: Ranks) -> Plan | None:
    """The plan of a rule for operands of these ranks (None: absent); None where the rule has to be searched."""
    if ranks not in rule.plans:
        rule.plans[ranks] = _plan(rule, ranks)
    plan: Plan | None = rule.plans[ranks]
    return plan


def _plan(rule: Rule, ranks: Ranks) -> Plan | None:
    if len(ranks) > len(rule.operands):
        return None
    ranks = ranks + (None,) * (len(rule.operands) - len(ranks))
    lengths = _run_lengths(rule, ranks)
    places: dict[str, list[Place]] = {}
    runs: dict[str, list[str]] = {}
    batches: list[tuple[int, int]] = []
    for operand, (pattern, rank) in enumerate(zip(rule.operands, ranks, strict=True)):
        if rank is None and pattern.optional:
            continue
        if rank is None or not _place(pattern, operand, rank, lengths, places, runs, batches):
            return None
    numbers = {name: number for number, name in enumerate(places)}
    members = {name: tuple(numbers[member] for member in run) for name, run in runs.items()}
    known: dict[str, int | tuple[int, ...]] = {**numbers, **members}
    results = [_recipe(pattern, known) for pattern in rule.results]
    if None in results or any(name not in known for _, name in rule.derived):
        return None
    roles = rule.roles_with(tuple(rank is not None for rank in ranks))
    stated: list[str | None] = [roles.get(name) for name in numbers]
    for name, run in members.items():
        for member in run:
            stated[member] = roles[name]
    return Plan(
        first=tuple(found[0] for found in places.values()),
        others=tuple((numbers[name], place) for name, found in places.items() for place in found[1:]),
        batches=tuple(batches),
        results=tuple(recipe for recipe in results if recipe is not None),
        roles=tuple(stated),
        pinning=tuple((role, name) for name, role in enumerate(stated) if role in PINNING_ROLES),
        derived=tuple((attribute, known[name]) for attribute, name in rule.derived),
    )


def _run_lengths(rule: Rule, ranks: Ranks) -> dict[str, int]:
    """The lengths of named runs, as far as an operand with one run only tells them."""
    return {
        pattern.runs[0]: rank - pattern.fixed
        for pattern, rank in zip(rule.operands, ranks, strict=True)
        if rank is not None and len(pattern.runs) == 1 and pattern.runs[0]
    }


def _place(
    pattern: Pattern,
    operand: int,
    rank: int,
    lengths: dict[str, int],
    places: dict[str, list[Place]],
    runs: dict[str, list[str]],
    batches: list[tuple[int, int]],
) -> bool:
    """Note where each name of a pattern stands in an operand of this rank; False where that is not fixed by rank."""
    unknown = [name for name in pattern.runs if name not in lengths]
    left = rank - pattern.fixed - sum(lengths.get(name, 0) for name in pattern.runs)
    if len(unknown) > 1 or left < 0 or (left and not unknown):
        return False
    axis = 0
    for term in pattern.terms:
        if isinstance(term, Axis):
            names = [term.name]
        elif isinstance(term, Run) and term.name:
            names = [f"{term.name}.{i}" for i in range(lengths.get(term.name, left))]
            if runs.setdefault(term.name, names) != names:
                return False
        elif isinstance(term, Run) and axis == 0:
            batches.append((operand, left))
            axis = left
            continue
        else:
            return False
        for name in names:
            places.setdefault(name, []).append((operand, axis))
            axis += 1
    return True


def _recipe(pattern: Pattern, known: dict[str, int | tuple[int, ...]]) -> tuple[int, ...] | None:
    recipe: list[int] = []
    for term in pattern.terms:
        if isinstance(term, One):
            recipe.append(_ONE)
        elif isinstance(term, Run) and not term.name:
            recipe.append(_BATCH)
        elif isinstance(term, Axis | Run) and term.name in known:
            found = known[term.name]
            recipe.extend(found if isinstance(found, tuple) else (found,))
        else:
            return None
    return tuple(recipe)
