"""Pipelines as text: parsed, printed, and refused with the position of what is wrong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regauge.ir.errors import PassError
from regauge.passes.pipeline_text import Stage, format_pipeline, parse_pipeline

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT.filter(bool), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("prune", [Stage("prune", {})]),
        ("prune{}", [Stage("prune", {})]),
        ("prune{ratio=0.5}, other", [Stage("prune", {"ratio": 0.5}), Stage("other", {})]),
        ("p{a=1,b=-2.5e3,c=true,d=none,e=l2}", [Stage("p", {"a": 1, "b": -2500.0, "c": True, "d": None, "e": "l2"})]),
        (
            "p{size=5MB, exclude=[head.*, conv1.weight:0]}",
            [Stage("p", {"size": "5MB", "exclude": ["head.*", "conv1.weight:0"]})],
        ),
        (
            'p{name="a, b", keep={conv1=8, "x y"=[1,2]}}',
            [Stage("p", {"name": "a, b", "keep": {"conv1": 8, "x y": [1, 2]}})],
        ),
        (" p { a = [ ] , } ", [Stage("p", {"a": []})]),
    ],
)
def test_parse(text: str, stages: list[Stage]) -> None:
    assert parse_pipeline(text) == stages


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3))
def test_printed_text_parses_back(given_stages: list[tuple[str, dict[str, Any]]]) -> None:
    stages = [Stage(*stage) for stage in given_stages]
    assert parse_pipeline(format_pipeline(stages)) == stages


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 1, "expected the name of a pass, but the text ends"),
        ("prune{ratio=0.5", 16, "expected ',' or '}', but the text ends"),
        ("prune{ratio 0.5}", 13, "expected '=', but '0.5' stands there"),
        ("prune{ratio=}", 13, "expected a value, but '}' stands there"),
        ("prune{a=1,a=2}", 11, "a is given twice"),
        ("prune other", 7, "expected ',' and another pass, or the end, but 'other' stands there"),
        ("prune,", 7, "expected the name of a pass, but the text ends"),
        ("{a=1}", 1, "expected the name of a pass"),
        ('p{a="x}', 5, "this quotation mark is never closed"),
        (r'p{a="\q"}', 5, "quoted text knows"),
        ("p{a=" + "[" * 30 + "]" * 30 + "}", 26, "values are nested too deeply"),
    ],
)
def test_error_has_a_caret(text: str, column: int, reason: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_pipeline(text)
    first, shown, caret = str(caught.value).split("\n")
    assert first.startswith(f"pass pipeline, column {column}: {reason}")
    assert shown.strip() == text.strip() and caret.index("^") == 4 + column - 1


@given(st.text(max_size=30))
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        parse_pipeline(text)
    except PassError:
        pass
