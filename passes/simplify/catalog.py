"""The rule sets of ``simplify``, by name, in the order in which they are preferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from regauge.ir.errors import PassError
from regauge.ir.rewriting.rewrite import RuleSet
from regauge.passes.simplify import (
    affine,
    affine_before,
    assemble_activations,
    assemble_attention,
    assemble_linear,
    assemble_norms,
    attention_biases,
    branches,
    identities,
    layout,
    map_chains,
    merges,
    orders,
    pieces,
    reductions,
    separable,
    side_by_side,
    step_chains,
    training_leftovers,
    transposes,
)

ASSEMBLING: Mapping[str, RuleSet] = {
    "assemble-norms": assemble_norms.RULES,
    "assemble-activations": assemble_activations.RULES,
    "assemble-linear": assemble_linear.RULES,
    "assemble-attention": assemble_attention.RULES,
}
"""Whole operators from the primitive ones that exporters write: worth it for passes, and for what runs them whole."""

RULE_SETS: Mapping[str, RuleSet] = {
    "training-leftovers": training_leftovers.RULES,
    "identities": identities.RULES,
    **ASSEMBLING,
    "layout": layout.RULES,
    "pieces": pieces.RULES,
    "transposes": transposes.RULES,
    "orders": orders.RULES,
    "reductions": reductions.RULES,
    "affine": affine.RULES + affine_before.RULES,
    "chains": map_chains.RULES + step_chains.RULES,
    "branches": branches.RULES,
    "side-by-side": side_by_side.RULES,
    "attention-biases": attention_biases.RULES,
}


BEFORE_OTHERS = ("training-leftovers", "identities", *ASSEMBLING)
"""Applied to the whole graph before the others, which take parts of a whole operator: the scales of its formula."""

OFF_BY_DEFAULT: Mapping[str, RuleSet] = {
    "merges": merges.RULES,
    "separable": separable.RULES,
}
"""Applied only where ``also`` or ``only`` names them: whether they pay depends on the hardware, or on values."""

ALL_RULE_SETS: Mapping[str, RuleSet] = {**RULE_SETS, **OFF_BY_DEFAULT}


def choose(
    only: tuple[str, ...],
    skip: tuple[str, ...],
    steps: tuple[str, ...],
    also: tuple[str, ...] = (),
    *,
    assemble: bool = True,
) -> tuple[RuleSet, list[str]]:
    """The rules and steps that are named (all where none is), less those to skip; raises PassError for others.

    A rule goes by its name, ``relu-twice``, or with that of its set before it, as ``regauge passes simplify`` lists it.
    ``also`` names rules and sets that are off by default. Without ``assemble``, rules that put operators together are
    left out.
    """
    full = {f"{name}/{rule.name}": rule.name for name, rules in ALL_RULE_SETS.items() for rule in rules}
    known = [*steps, *ALL_RULE_SETS, *full.values(), *full]
    only, skip, also = (tuple(full.get(name, name) for name in names) for names in (only, skip, also))
    for name in (*only, *skip, *also):
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f": did you mean {close[0]!r}?" if close else f": sets are {', '.join([*steps, *ALL_RULE_SETS])}"
            raise PassError(f"simplify has no rule, set or step called {name!r}{hint}")

    def wanted(*names: str, off: bool = False) -> bool:
        named = any(name in (*only, *also) for name in names)
        return (named or not (only or off)) and not any(name in skip for name in names)

    chosen = [
        rule
        for name, rules in ALL_RULE_SETS.items()
        for rule in rules
        if wanted(rule.name, name, off=name in OFF_BY_DEFAULT) and (assemble or name not in ASSEMBLING)
    ]
    return RuleSet(chosen), [step for step in steps if wanted(step)]


def before_others(rules: RuleSet) -> RuleSet:
    """Of the chosen rules those that put whole operators together, with what clears their way; none without them."""
    if not any(rule in ASSEMBLING[name].rules for name in ASSEMBLING for rule in rules):
        return RuleSet()
    return RuleSet(rule for name in BEFORE_OTHERS for rule in RULE_SETS[name] if rule in rules.rules)


def by_default(rules: RuleSet) -> RuleSet:
    """Of the chosen rules those that are on by default."""
    off = {rule for name in OFF_BY_DEFAULT for rule in OFF_BY_DEFAULT[name]}
    return RuleSet(rule for rule in rules if rule not in off)


def described() -> list[tuple[str, str]]:
    """Every rule, by the name of its set and its own, with the first line of its docstring."""
    return [
        (f"{name}/{rule.name}", summary(rule.replacement)) for name, rules in ALL_RULE_SETS.items() for rule in rules
    ]


def summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]
