"""No kernel of any form spills a register: with whatever version of Triton is installed."""

import importlib.util
from itertools import chain

import pytest
from benchmarks.kernel_resources import ARCHITECTURES, GRADIENTS, cases, gradient_cases

from kernel_forms import FORMS

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_spills_nothing_on_any_architecture(name: str) -> None:
    spilled = {
        (case.kernel, case.source.form, case.rows, architecture): compiled.spilled
        for case in chain(cases([name]), gradient_cases([name] if name in GRADIENTS else []))
        for architecture in ARCHITECTURES
        if (compiled := case.compiled(architecture)).spilled
    }
    assert spilled == {}
