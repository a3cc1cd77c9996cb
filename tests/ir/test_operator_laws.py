"""Every operator obeys its laws (ir/laws/operators.py) on every sample: one test per operator, sample and law."""

from functools import cache

import pytest

from regauge.ir.axis_rules.notation import PINNING_ROLES
from regauge.ir.dims.extents import leaves
from regauge.ir.errors import LawError
from regauge.ir.laws.cases import draw_case, sample_count
from regauge.ir.laws.operators import check_law, laws_of
from regauge.ir.operator import all_operators
from regauge.ir.shapes import infer_in_full, infer_shortly

# Operators that need regions, an outside runtime or a library's operator: each has direct tests of its own.
WITHOUT_SAMPLES = {"cond", "while_loop", "loop", "scan", "fused", "torch_call", "onnx_call"}

CASES = [
    pytest.param(name, index, law, id=f"{name}-{index}-{law}")
    for name, record in sorted(all_operators().items())
    for index in range(sample_count(name))
    for law in laws_of(record)
]


@cache
def fits(name: str, index: int) -> bool:
    """Whether the shape law holds; without it every other law would only repeat what that one says."""
    try:
        check_law(name, index, "shape")
    except LawError:
        return False
    return True


@pytest.mark.parametrize(("name", "index", "law"), CASES)
def test_operator_obeys(name: str, index: int, law: str) -> None:
    if law != "shape" and not fits(name, index):
        pytest.skip("the shape law fails already")
    check_law(name, index, law)


def test_every_operator_has_samples() -> None:
    bare = {name for name, record in all_operators().items() if record.samples is None} - WITHOUT_SAMPLES
    assert not bare, f"without samples no law is tested: {', '.join(sorted(bare))}"


# What is drawn at random is pinned whatever its role.
SAMPLED = sorted(name for name, record in all_operators().items() if sample_count(name) and not record.random)


@pytest.mark.parametrize("name", SAMPLED)
def test_every_role_that_may_be_free_is_tested(name: str) -> None:
    """A role that no sample shows on a free Dim is a claim that no law looks at."""
    stated: set[str] = set()
    tested: set[str] = set()
    for index in range(sample_count(name)):
        case = draw_case(name, index)
        free = {dim for dim, _ in case.free_dims()}
        for role, extent in case.analysis.calls[case.node].roles:
            if role not in PINNING_ROLES and leaves(extent):
                stated.add(role)
                tested.update({role} if free.intersection(leaves(extent)) else ())
    missing = stated - tested
    assert not missing, f"no sample of {name} has a free axis whose role is {' or '.join(sorted(missing))}"


@pytest.mark.parametrize(("name", "index"), [case.values[:2] for case in CASES if case.values[2] == "shape"])
def test_the_short_way_to_a_shape_says_what_torch_says(name: str, index: int) -> None:
    """Also that it is taken: an operator that says its shape says it for most of its samples."""
    node = draw_case(name, index).node
    short = infer_shortly(node.operator, node.inputs, node.attributes)
    if short is not None:
        assert short == infer_in_full(node.operator, node.inputs, node.attributes)
    elif node.operator.shape is not None:
        nodes = [draw_case(name, other).node for other in range(sample_count(name))]
        taken = [infer_shortly(one.operator, one.inputs, one.attributes) is not None for one in nodes]
        assert 2 * sum(taken) >= len(taken)
