"""The public names: all of them load, and the functions that share a module's name are functions."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

import regauge


@pytest.mark.parametrize("name", regauge.__all__)
def test_public_name_loads(name: str) -> None:
    assert getattr(regauge, name) is not None
    assert name in dir(regauge)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'regauge' has no attribute 'optimise'"):
        regauge.optimise  # noqa: B018


@pytest.mark.parametrize("first", ["import regauge.cli", "from regauge.optimize import optimize", "import regauge"])
def test_optimize_is_a_function_whatever_was_imported_before(first: str) -> None:
    code = f"{first}; import regauge; assert callable(regauge.optimize), regauge.optimize"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_elements_of_own_operators_are_written_with_scalars() -> None:
    assert inspect.ismodule(regauge.scalars) and regauge.scalars.sum_ is not None


def test_import_is_light() -> None:
    code = (
        "import sys, regauge, regauge.cli; assert 'torch' not in sys.modules, 'torch'; assert 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("method", "function"),
    [
        ("to_torch", "regauge.backends.to_torch.to_torch"),
        ("write", "regauge.backends.to_torch.write"),
        ("to_onnx", "regauge.backends.to_onnx.to_onnx"),
        ("apply_to", "regauge.backends.apply_to.apply_to"),
    ],
)
def test_methods_of_a_graph_have_the_parameters_of_what_they_call(method: str, function: str) -> None:
    module, _, name = function.rpartition(".")
    called = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters.values())[1:]
    shown = list(inspect.signature(getattr(regauge.Graph, method)).parameters.values())[1:]
    assert [(p.name, p.kind, p.default) for p in shown] == [(p.name, p.kind, p.default) for p in called]


def test_find_suggests_names_that_exist() -> None:
    graph = regauge.capture(torch.nn.Sequential(torch.nn.Linear(2, 3)), (torch.randn(1, 2),))
    with pytest.raises(regauge.RegaugeError, match=r"did you mean 0\.weight"):
        graph.find("0.wieght")
