"""What register_operator refuses: records that no call could fit, or that no backend could emit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from own_operators import registered
from regauge.ir.errors import OperatorError, RegaugeError
from regauge.ir.operator import Operator, all_operators, find_aten, find_onnx, register_operator
from regauge.ir.record_checks import check_aten_name


def one(x: torch.Tensor) -> torch.Tensor:
    return x


def two(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y


def biased(x: torch.Tensor, bias: torch.Tensor | None = None, *, groups: int = 1) -> torch.Tensor:
    return x if bias is None else x + bias


def many(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return sum(others, x)


def refused(function: Callable[..., Any], rule: Any, **fields: Any) -> str:
    """The message with which a record is refused; nothing of it is left behind."""
    before = set(all_operators())
    with pytest.raises(RegaugeError) as caught, registered(function, rule, **fields):
        pass
    assert set(all_operators()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "rule", "message"),
    [
        (one, "a, a -> a", "the rule of one has 2 operands, its function takes 1 (x): write one pattern for each"),
        (two, "a b -> a b", "the rule of two has 1 operands, its function takes 2 (x, y)"),
        (biased, "... c, c -> ... c", "operand 'bias' of biased has a default, but no '?': end its pattern"),
        (two, "... c, c? -> ... c", "operand 'y' of two may be absent by the rule, but has no default"),
        (many, "a -> b", "the axis 'b' in a result of many is in no operand"),
        (two, "n i, o i -> n p", "the axis 'p' in a result of two is in no operand: is it misspelt?"),
        (one, "a b -> (a c) b", "the axis 'c' in a result of one is in no operand"),
        (biased, "... c, c? -> ... c ; group = c", "says group = ..., but its function has no such attribute (groups)"),
        (one, "a -> a ; wholly a", "unknown annotation 'wholly'"),
        (one, "a a", "the rule of one: expected '->'"),
        (one, 3, "the rule of one is a string in rule notation or a function of a Call"),
    ],
)
def test_rules_that_fit_no_call_are_refused(function: Callable[..., Any], rule: Any, message: str) -> None:
    assert message in refused(function, rule)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (one, "a -> a k ; whole k"),
        (one, "a -> a k ; window k"),
        (biased, "... c, c? -> ... c g ; groups = g"),
        (many, "... c, ... c, ... c -> ... c"),
        (many, "... c -> ... c"),
    ],
)
def test_what_can_fit_is_taken(function: Callable[..., Any], rule: str) -> None:
    with registered(function, rule) as name:
        assert name in all_operators()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.gate", "a custom operator is written 'mine::gate'"),
        ("mine.gate.default", "a custom operator is written 'mine::gate'"),
        ("mine::gate.default", "one cannot stand for 'mine::gate.default': write 'mine::gate'"),
        ("aten::add.Tensor", "one cannot stand for 'aten::add.Tensor': write 'add.Tensor'"),
        ("gaet", "which is no ATen operator that torch has: is it misspelt?"),
        ("add.Tensro", "which is no ATen operator that torch has: add has no such overload"),
        ("special_i0.default", "write 'special_i0'"),
    ],
)
def test_names_that_no_call_has_are_refused(name: str, message: str) -> None:
    assert message in refused(one, "a -> a", aten={name: None})


@pytest.mark.parametrize("name", ["mine::gate", "special_i0", "special_i1.out"])
def test_names_that_a_call_may_have_are_taken(name: str) -> None:
    with registered(one, "a -> a", aten={name: None}):
        assert find_aten(name) is not None


@pytest.mark.parametrize(
    ("name", "advice"), [("Geluu", "did you mean 'Gelu'"), ("Swish_v2_mine", "is written 'domain::Name'")]
)
def test_names_that_no_onnx_operator_has_are_refused(name: str, advice: str) -> None:
    assert advice in refused(one, "a -> a", onnx={name: None})
    with registered(one, "a -> a", onnx={f"mine::{name}": None}):
        assert find_onnx("mine", name) is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aten": ["relu"]}, "aten of one is a list: write aten={NAME: None}, or an adapter"),
        ({"onnx": "Relu"}, "onnx of one is a str: write onnx={NAME: None}, or an adapter"),
        ({"macs": 3}, "macs of one is a int: write macs=lambda call: ..."),
        ({"element": "x"}, "element of one is a str: write element=lambda x: ..."),
    ],
)
def test_fields_of_another_form_are_refused(fields: dict[str, Any], message: str) -> None:
    assert message in refused(one, "a -> a", **fields)


def test_a_name_that_the_text_form_cannot_hold_is_refused() -> None:
    with pytest.raises(OperatorError, match="cannot be called 'my gate': use letters, digits and underscores"):
        register_operator(Operator(name="my gate", evaluate=one, rule="a -> a"))


def test_a_taken_name_leaves_nothing_behind() -> None:
    assert "relu is mapped to operator 'relu' already, not to 'one'" in refused(
        one, "a -> a", aten={"special_i0": None, "relu": None}
    )
    assert find_aten("special_i0") is None


@pytest.mark.parametrize(
    ("function", "kind"), [(lambda x: x, "a lambda"), (torch.special.i1, "a builtin_function_or_method")]
)
def test_functions_without_a_source_are_refused(function: Callable[..., Any], kind: str) -> None:
    assert f"is {kind}, whose source cannot be emitted: define a function with def" in refused(function, "a -> a")


def test_every_name_of_a_built_in_record_is_known_to_torch() -> None:
    wrong = []
    for record in all_operators().values():
        for name in record.aten:
            try:
                check_aten_name(record.name, name)
            except OperatorError as error:
                wrong.append(str(error))
    assert not wrong
