"""Sizes computed with plain numbers, and what they settle before sympy is asked."""

import random
from typing import Any

import pytest
import sympy

from regauge.ir.sizes.expressions import at_least, divide, floor_divide, may_be_same, same, simplify, symbol
from regauge.ir.sizes.numbers import fingerprint, number_at, takes_both_signs, takes_zero_and_more

BATCH, SEQUENCE = symbol("batch"), symbol("seq")


def _made_up(chance: random.Random, depth: int) -> Any:
    kind = chance.randrange(8) if depth else 0
    if kind < 2:
        return chance.choice([BATCH, SEQUENCE, BATCH * SEQUENCE, chance.randrange(1, 9)])
    part = _made_up(chance, depth - 1)
    if kind == 2:
        return part + chance.randrange(-300, 300)
    if kind == 3:
        return part * chance.choice([2, 3, 64])
    if kind == 4:
        return part - _made_up(chance, depth - 1)
    if kind == 5:
        return sympy.floor(sympy.sympify(part) / chance.choice([2, 3, 64]))
    return sympy.Max(chance.randrange(5), part) if kind == 6 else sympy.Min(chance.randrange(1, 500), part)


@pytest.mark.parametrize("seed", range(40))
def test_numbers_and_shortcuts_agree_with_sympy(seed: int) -> None:
    chance = random.Random(seed)
    one, other = (simplify(_made_up(chance, 3)) for _ in range(2))
    values = {BATCH: chance.randrange(1, 300), SEQUENCE: chance.randrange(1, 300)}
    assert number_at(one, values) == sympy.sympify(one).subs(values)
    step = chance.choice([2, 3, 64])
    found = sympy.sympify(floor_divide(one, step))
    assert found.subs(values) == sympy.floor(sympy.sympify(one).subs(values) / step)
    assert same(one, one + other - other) and same(simplify(one + 0 * other), one)
    difference = sympy.sympify(one).subs(values) - sympy.sympify(other).subs(values)
    assert difference == 0 or not same(one, other)
    assert difference != 0 or may_be_same(one, other)
    assert sympy.sympify(one).subs(values) >= 1 or not at_least(one, 1)


def test_what_is_divisible_is_taken_out_of_a_floor() -> None:
    assert floor_divide(8 * BATCH + 167, 2) == 4 * BATCH + 83
    assert str(floor_divide(SEQUENCE - 192, 128)) == "floor(seq/128 - 3/2)"
    assert divide(sympy.floor(SEQUENCE / 2), 1) == sympy.floor(SEQUENCE / 2)
    assert floor_divide(sympy.Min(126, 6 * BATCH), 2) == sympy.Min(126, 6 * BATCH) / 2


def test_signs_and_zeros_are_seen_by_numbers() -> None:
    windows = sympy.floor(SEQUENCE / 128 - sympy.Rational(3, 2)) + 1
    assert takes_both_signs(windows) and takes_zero_and_more(windows)
    assert not takes_both_signs(SEQUENCE) and not takes_zero_and_more(SEQUENCE)
    assert fingerprint(sympy.sqrt(SEQUENCE)) is None and number_at(1 / SEQUENCE, {SEQUENCE: 0}) is None
