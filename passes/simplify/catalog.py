"""The rule sets of ``simplify``, by name, in the order in which they are preferred."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from regauge.ir.errors import PassError
from regauge.ir.rewrite import RuleSet
from regauge.passes.simplify import (
    affine,
    assemble_activations,
    assemble_attention,
    assemble_linear,
    assemble_norms,
)

ASSEMBLING: Mapping[str, RuleSet] = {
    "assemble-norms": assemble_norms.RULES,
    "assemble-activations": assemble_activations.RULES,
    "assemble-linear": assemble_linear.RULES,
    "assemble-attention": assemble_attention.RULES,
}
"""Whole operators from the primitive ones that exporters write: worth it for passes, and for what runs them whole."""

RULE_SETS: Mapping[str, RuleSet] = {
    **ASSEMBLING,
    "affine": affine.RULES,
}


def choose(
    only: tuple[str, ...], skip: tuple[str, ...], steps: tuple[str, ...], *, assemble: bool = True
) -> tuple[RuleSet, list[str]]:
    """The rules and steps that are named (all where none is), less those to skip; raises PassError for others.

    Without ``assemble``, rules that put operators together are left out.
    """
    known = [*steps, *RULE_SETS, *(rule.name for rules in RULE_SETS.values() for rule in rules)]
    for name in (*only, *skip):
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f": did you mean {close[0]!r}?" if close else f": sets are {', '.join([*steps, *RULE_SETS])}"
            raise PassError(f"simplify has no rule, set or step called {name!r}{hint}")

    def wanted(*names: str) -> bool:
        return (not only or any(name in only for name in names)) and not any(name in skip for name in names)

    chosen = [
        rule
        for name, rules in RULE_SETS.items()
        for rule in rules
        if wanted(rule.name, name) and (assemble or name not in ASSEMBLING)
    ]
    return RuleSet(chosen), [step for step in steps if wanted(step)]
