"""The public names: all of them load, and the functions that share a module's name are functions."""

import subprocess
import sys

import pytest

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


def test_import_is_light() -> None:
    code = (
        "import sys, regauge, regauge.cli; assert 'torch' not in sys.modules, 'torch'; assert 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
