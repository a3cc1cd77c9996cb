"""Every operator obeys its laws (ir/laws/operators.py) on every sample: one test per operator, of all of them."""

import pytest
import torch

from regauge.ir.axis_rules.notation import PINNING_ROLES
from regauge.ir.dims.extents import leaves
from regauge.ir.errors import RegaugeError, blamed_on
from regauge.ir.laws.cases import draw_case, sample_count
from regauge.ir.laws.operators import check_law, laws_of
from regauge.ir.operator import all_operators, get_operator
from regauge.ir.shapes import infer_in_full, infer_shortly

# Operators that need regions, an outside runtime or a library's operator: each has direct tests of its own.
WITHOUT_SAMPLES = {"cond", "while_loop", "loop", "scan", "fused", "torch_call", "onnx_call"}

WITH_SAMPLES = sorted(name for name in all_operators() if sample_count(name))


def broken_laws(name: str, index: int) -> list[str]:
    """What each broken law says; without the shape law every other would only repeat what that one says."""
    broken = []
    for law in laws_of(get_operator(name)):
        torch.manual_seed(0)  # a law draws the same maps whatever was checked before it
        try:
            with blamed_on(f"operator {name}, sample {index}, {law}: a function of its record fails"):
                check_law(name, index, law)
        except RegaugeError as error:
            broken.append(str(error))
            if law == "shape":
                break
    return broken


@pytest.mark.parametrize("name", WITH_SAMPLES)
def test_operator_obeys(name: str) -> None:
    broken = [line for index in range(sample_count(name)) for line in broken_laws(name, index)]
    assert not broken, "\n".join(broken)


def test_every_operator_has_samples() -> None:
    bare = {name for name, record in all_operators().items() if record.samples is None} - WITHOUT_SAMPLES
    assert not bare, f"without samples no law is tested: {', '.join(sorted(bare))}"


# What is drawn at random is pinned whatever its role.
SAMPLED = [name for name in WITH_SAMPLES if not get_operator(name).random]


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


@pytest.mark.parametrize("name", WITH_SAMPLES)
def test_the_short_way_to_a_shape_says_what_torch_says(name: str) -> None:
    """Also that it is taken: an operator that says its shape says it for most of its samples."""
    nodes = [draw_case(name, index).node for index in range(sample_count(name))]
    taken = 0
    for index, node in enumerate(nodes):
        short = infer_shortly(node.operator, node.inputs, node.attributes)
        if short is not None:
            taken += 1
            assert short == infer_in_full(node.operator, node.inputs, node.attributes), f"sample {index}"
    if get_operator(name).shape is not None:
        assert 2 * taken >= len(nodes)
