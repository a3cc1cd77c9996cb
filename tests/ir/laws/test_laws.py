"""What ``check_operator`` finds: each wrong record fails the law it breaks, and says which Dim and what to do."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import regauge
from own_operators import registered
from regauge.ir import derivatives, scalars
from regauge.ir.errors import LawError, OperatorError
from regauge.ir.graph import Node
from regauge.ir.laws.operators import check_law
from regauge.ir.operator import Symmetry

Register = Callable[..., str]


@pytest.fixture
def register() -> Iterator[Register]:
    with ExitStack() as stack:
        yield lambda *record, **fields: stack.enter_context(registered(*record, **fields))


def rows() -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def flipped(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


def squashed(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) + 1


def mixed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(w @ x)


def projected(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) @ w


def scored(x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x @ w) * gate


def summed(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)


@pytest.mark.parametrize("role", ["normalise c", "reduce c"])
def test_an_axis_that_is_read_by_position_is_not_normalised(register: Register, role: str) -> None:
    name = register(flipped, f"... c -> ... c ; {role}", regauge.sample(rows()))
    with pytest.raises(LawError, match=r"operator flipped, sample 0, permute x:1=4: .* state its role"):
        regauge.check_operator(name)


def test_an_axis_that_is_read_by_position_is_not_mapped_over(register: Register) -> None:
    name = register(flipped, "... c -> ... c", regauge.sample(rows()))
    with pytest.raises(LawError, match="permute x:1=4"):
        regauge.check_operator(name)


def test_a_rotation_alone_does_not_show_every_permutation(register: Register) -> None:
    def neighbours(x: torch.Tensor) -> torch.Tensor:
        return x + x.roll(1, -1)

    name = register(neighbours, "... c -> ... c", regauge.sample(rows()))
    with pytest.raises(LawError, match="permute x:1=4"):
        regauge.check_operator(name)


def test_a_wrong_shape_is_told_by_the_shape_law(register: Register) -> None:
    name = register(summed, "... c -> ... c", regauge.sample(rows()))
    with pytest.raises(LawError, match=r"operator summed, sample 0, shape: .* correct the rule"):
        regauge.check_operator(name)


@pytest.mark.parametrize("symmetry", [Symmetry.LINEAR, Symmetry.ODD, Symmetry.HOMOGENEOUS, Symmetry.LAYOUT])
def test_a_shifted_tanh_has_no_symmetry(register: Register, symmetry: Symmetry) -> None:
    name = register(squashed, "... c -> ... c", regauge.sample(rows()), symmetry=symmetry)
    with pytest.raises(LawError, match="map of x:0=2: result 0 differs by .* claim a weaker symmetry"):
        regauge.check_operator(name)


def test_it_passes_with_none(register: Register) -> None:
    regauge.check_operator(register(squashed, "... c -> ... c", regauge.sample(rows())))


def test_a_tanh_behind_a_contraction_is_not_linear(register: Register) -> None:
    sample = regauge.sample(torch.randn(5, 3), torch.randn(5, 5))
    name = register(mixed, "s c, t s -> t c ; whole s t", sample, symmetry=Symmetry.PRODUCT)
    with pytest.raises(LawError, match="general linear map of x:1=3"):
        regauge.check_operator(name)


def test_a_tanh_before_a_contraction_is_not_linear(register: Register) -> None:
    sample = regauge.sample(torch.randn(5, 3), torch.randn(3, 4))
    name = register(projected, "n i, i o -> n o", sample, symmetry=Symmetry.PRODUCT)
    with pytest.raises(LawError, match="map of x:[01]="):
        regauge.check_operator(name)


def test_two_factors_that_have_an_axis_do_not_take_general_maps(register: Register) -> None:
    sample = regauge.sample(torch.randn(5, 3), torch.randn(3, 4), torch.randn(4))
    regauge.check_operator(register(scored, "n i, i o, o -> n o", sample, symmetry=Symmetry.PRODUCT))


def test_an_element_that_computes_something_else_is_told(register: Register) -> None:
    name = register(squashed, "... c -> ... c", regauge.sample(rows()), element=lambda x: scalars.tanh(x) + 1.1)
    with pytest.raises(LawError, match="operator squashed, sample 0, element: result 0 differs by 0.1: correct its"):
        regauge.check_operator(name)


def test_an_element_with_an_axis_too_many_is_told(register: Register) -> None:
    name = register(summed, "... c -> ...", regauge.sample(rows()), element=lambda x: x)
    with pytest.raises(LawError, match="element: it has an axis that the result has not"):
        regauge.check_operator(name)


ELEMENTS = {
    "if": (lambda x: x if x > 0 else -x, "neither true nor false: choose by regauge.scalars.where"),
    "==": (lambda x: scalars.where(x == 0, 1.0, x), r"write eq\(x, y\)"),
    "power": (lambda x: x**2.5, r"write exp\(2.5 \* log\(x\)\)"),
}


@pytest.mark.parametrize("way", ELEMENTS)
def test_an_element_that_asks_python_is_told(register: Register, way: str) -> None:
    element, reason = ELEMENTS[way]
    with pytest.raises(OperatorError, match=f"operator squashed, its element: TypeError: .*{reason}"):
        regauge.check_operator(register(squashed, "... c -> ... c", regauge.sample(rows()), element=element))


def test_an_element_may_be_written_with_powers(register: Register) -> None:
    def measured(x: torch.Tensor) -> torch.Tensor:
        return x.abs() + x**2

    name = register(measured, "... c -> ... c", regauge.sample(rows()), element=lambda x: abs(x) + x**2)
    regauge.check_operator(name)


def test_an_element_may_be_a_reduction(register: Register) -> None:
    regauge.check_operator(register(summed, "... c -> ...", regauge.sample(rows()), element=scalars.sum_))


def test_a_cost_that_reads_no_sizes_is_told(register: Register) -> None:
    def counted(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    name = register(counted, "... c -> ... c", regauge.sample(rows()), macs=lambda call: id(call.node))
    with pytest.raises(LawError, match="operator counted, sample 0, cost: macs are"):
        regauge.check_operator(name)


def test_a_record_without_samples_cannot_be_checked(register: Register) -> None:
    with pytest.raises(LawError, match="operator 'squashed' has no samples"):
        regauge.check_operator(register(squashed, "... c -> ... c"))


def test_an_unknown_operator_is_told() -> None:
    with pytest.raises(OperatorError, match="did you mean 'relu'"):
        regauge.check_operator("rellu")


def test_a_built_in_record_passes_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    regauge.check_operator("linear")
    assert torch.equal(before, torch.random.get_rng_state())


def log_volume(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.det(x)


def test_an_aten_operator_that_computes_something_else_is_told(register: Register) -> None:
    matrices = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aten = {"linalg_det": None, "logdet": None}
    name = register(log_volume, "b n m -> b ; whole n m", regauge.sample(matrices), aten=aten)
    with pytest.raises(LawError, match=r"sample 0, aten aten\.logdet.*: give the name an adapter"):
        regauge.check_operator(name)


def test_a_wrong_derivative_of_a_primitive_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "GRADIENTS", {**derivatives.GRADIENTS, "tanh": lambda g, r, x: (g * (1.0 - r),)})
    with pytest.raises(LawError, match="operator tanh, sample 0, gradient: result 0"):
        check_law("tanh", 0, "gradient")


def test_a_custom_operator_that_is_not_registered_is_told(register: Register) -> None:
    with torch.library._scoped_library("test_laws", "DEF") as library:
        library.define("cube(Tensor x) -> Tensor")
        name = register(squashed, "... c -> ... c", regauge.sample(rows()), aten={"test_lwas::cube": None})
        with pytest.raises(
            OperatorError, match=r"torch has no such operator registered: did you mean 'test_laws::cube'"
        ):
            regauge.check_operator(name)
    with pytest.raises(OperatorError, match="'test_lwas::cube', but torch has no such operator registered"):
        regauge.check_operator(name)


def test_a_sample_with_equal_sizes_is_told(register: Register) -> None:
    name = register(squashed, "... c -> ... c", regauge.sample(torch.randn(3, 3)))
    with pytest.raises(
        LawError, match="sample 0, sizes: x:0=3 and x:1=3 have the same size: give the sample different"
    ):
        regauge.check_operator(name)


def test_equal_sizes_that_cannot_differ_are_taken(register: Register) -> None:
    sample = regauge.sample(torch.eye(3) + torch.randn(2, 3, 3) / 9)
    regauge.check_operator(register(inverted, "b n m -> b m n ; whole n m", sample))


def inverted(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"macs": lambda call: call.size(3, 0)}, "operator squashed, its macs: IndexError: "),
        ({"macs": lambda call: call.outs()}, "operator squashed, its macs: AttributeError: "),
        ({"element": lambda x: scalars.tanhh(x)}, "operator squashed, its element: AttributeError: "),
        ({"element": lambda x: 3}, "operator squashed, its element: it gives a int: write it with regauge.scalars"),
        (
            {"symmetry": lambda node: node.nothing},
            "operator squashed, sample 0, .*: a function of its record fails: Attr",
        ),
        ({"spell": lambda onnx, node: onnx.nothing}, "operator squashed, sample 0, onnx at opset 13, its spell: Attr"),
    ],
)
def test_functions_of_a_record_that_fail_are_told(register: Register, fields: dict[str, Any], message: str) -> None:
    name = register(squashed, "... c -> ... c", regauge.sample(rows()), **fields)
    with pytest.raises(OperatorError, match=message):
        regauge.check_operator(name)


def test_samples_that_are_none_are_told(register: Register) -> None:
    name = register(squashed, "... c -> ... c", rows())
    with pytest.raises(OperatorError, match=r"operator squashed, its samples: one is a Tensor: write sample"):
        regauge.check_operator(name)


def test_a_spelling_is_run(register: Register) -> None:
    """It is held to what the operator computes, in onnxruntime at several opsets; operators of its own it has not."""

    def right(onnx: Any, node: Node) -> Any:
        return onnx.Add(onnx.Tanh(onnx.operand(0)), 1.0)

    regauge.check_operator(register(squashed, "... c -> ... c", regauge.sample(rows()), spell=right))


@pytest.mark.parametrize(
    ("spell", "message"),
    [
        (lambda onnx, node: onnx.Tanh(onnx.operand(0)), "onnxruntime gives something else: .* correct its spell"),
        (lambda onnx, node: onnx.Squeeze(onnx.operand(0)), "onnxruntime gives something else|is no model"),
        (lambda onnx, node: onnx.Tahn(onnx.operand(0)), "no sample of it can be written at opsets .* has no Tahn"),
    ],
)
def test_a_wrong_spelling_is_told(register: Register, spell: Any, message: str) -> None:
    name = register(squashed, "... c -> ... c", regauge.sample(rows()), spell=spell)
    with pytest.raises(LawError, match=message):
        regauge.check_operator(name)
