"""Every rule of ``simplify`` is proved on its own samples, on integers to the last bit where it can be."""

import pytest

from regauge.ir.equivalence import prove_rule
from regauge.ir.rewrite import RewriteRule
from regauge.passes.simplify.catalog import ALL_RULE_SETS

RULES = [pytest.param(rule, id=rule.name) for rules in ALL_RULE_SETS.values() for rule in rules]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_the_function(rule: RewriteRule) -> None:
    assert prove_rule(rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_it_does(rule: RewriteRule) -> None:
    assert rule.replacement.__doc__
