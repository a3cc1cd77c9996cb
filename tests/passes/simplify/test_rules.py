"""Every rule of ``simplify`` is proved on its own samples, on integers to the last bit where it can be."""

import pytest

from regauge.ir.errors import PassError
from regauge.ir.rewriting.equivalence import prove_rule
from regauge.ir.rewriting.rewrite import RewriteRule
from regauge.passes.simplify.catalog import ALL_RULE_SETS, choose

RULES = [pytest.param(rule, id=rule.name) for rules in ALL_RULE_SETS.values() for rule in rules]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_the_function(rule: RewriteRule) -> None:
    assert prove_rule(rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_it_does(rule: RewriteRule) -> None:
    assert rule.replacement.__doc__


def test_a_rule_goes_by_its_name_or_by_that_of_its_set_and_its_own() -> None:
    full, _ = choose(("identities/nothing-done",), (), ())
    short, _ = choose(("nothing-done",), (), ())
    assert full == short and len(full.rules) == 1
    with pytest.raises(PassError, match="did you mean 'identities/nothing-done'"):
        choose(("identities/nothing-don",), (), ())
