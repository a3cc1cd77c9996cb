"""Sizes: arithmetic that stays in ints where it can, and a parser that never evaluates code."""

import pytest

from regauge.ir.errors import RegaugeError
from regauge.ir.sizes.expressions import (
    divide,
    evaluate,
    floor_divide,
    format_size,
    parse_size,
    prime_hints,
    same,
    simplify,
    symbol,
    unclamped,
)

BATCH, SEQUENCE = symbol("batch"), symbol("seq")


def test_division_is_exact_or_nothing() -> None:
    assert divide(12, 4) == 3 and divide(12, 5) is None
    assert divide(BATCH * SEQUENCE, SEQUENCE) == BATCH
    assert divide(6 * BATCH, 4) is None and divide(BATCH + 1, BATCH) is None
    assert divide(64 * BATCH, 64 * BATCH) == 1 and isinstance(divide(64 * BATCH, 64 * BATCH), int)


def test_sizes_are_the_same_only_when_that_is_certain() -> None:
    assert same(2 * (BATCH + 1), 2 * BATCH + 2)
    assert not same(BATCH, SEQUENCE) and not same(BATCH, 8)


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("seq*batch", {BATCH: 3, SEQUENCE: 5}, 15),
        ("(((seq - 1)//2)) + 1", {SEQUENCE: 7}, 4),
        ("Min(64, seq)", {SEQUENCE: 80}, 64),
        ("Max(seq, 8) % 5", {SEQUENCE: 2}, 3),
        ("-seq + 2**3", {SEQUENCE: 5}, 3),
        ("17", {}, 17),
    ],
)
def test_expressions_parse_and_evaluate(text: str, values: dict[object, int], expected: int) -> None:
    size = parse_size(text)
    assert evaluate(size, values) == expected  # type: ignore[arg-type]
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["__import__('os')", "seq.real", "a if b else c", "f(x)", "1.5", "", "a b", "2**100"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RegaugeError, match="is not a size"):
        parse_size(text)


def test_an_unbound_size_names_what_is_missing() -> None:
    with pytest.raises(RegaugeError, match="bind batch"):
        evaluate((4, BATCH), {})


def test_hints_are_distinct_primes_and_floor_division_keeps_exactness() -> None:
    hints = prime_hints([BATCH, SEQUENCE])
    assert len(set(hints.values())) == 2 and min(hints.values()) > 64
    assert floor_divide(7, 2) == 3 and floor_divide(4 * BATCH, 2) == 2 * BATCH


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("seq - Min(3, seq)", "Max(0, seq - 3)"),
        ("Min(1, seq - 1) + 1", "Min(2, seq)"),
        ("seq - Max(0, seq - 3) - 1", "Min(2, seq - 1)"),
        ("Min(batch, seq) + Max(batch, seq)", "batch + seq"),
        ("Min(2, seq) - 1 - Min(1, seq - 1) + seq", "seq"),
        ("2*Min(3, seq) + Max(batch, seq)", "2*Min(3, seq) + Max(batch, seq)"),
        ("Min(3, seq)//2", "Min(3, seq)//2"),
    ],
)
def test_limits_of_sizes_have_one_form(text: str, plain: str) -> None:
    assert str(parse_size(text)) == str(parse_size(plain)) and simplify(parse_size(text)) == parse_size(text)
    for batch in range(1, 8):
        for seq in range(1, 8):
            given = {"batch": batch, "seq": seq, "Min": min, "Max": max}
            assert evaluate(parse_size(text), {BATCH: batch, SEQUENCE: seq}) == eval(text, given)  # noqa: S307


def test_a_size_fits_what_it_limits() -> None:
    limited = parse_size("Min(16, seq)")
    assert unclamped(SEQUENCE, limited) == unclamped(limited, SEQUENCE) == SEQUENCE
    assert unclamped(SEQUENCE, BATCH) is None and unclamped(limited, 16) is None
    assert unclamped(parse_size("Min(16, batch + seq) - Min(16, batch)"), SEQUENCE) == SEQUENCE
