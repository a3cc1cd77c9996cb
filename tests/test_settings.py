"""Settings: from the environment, for a block of code, and never misspelt in silence."""

import os
import subprocess
import sys

import pytest

from regauge.ir.errors import RegaugeError
from regauge.settings import current, using


def test_using_changes_and_restores() -> None:
    before = current()
    with using(verify="off", print_after="yes") as inside:
        assert (inside.verify, inside.print_after) == ("off", True)
    assert current() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verfy": "off"}, r"there is no setting 'verfy': did you mean 'verify'\?"),
        ({"zzz": 1}, "settings are verify, print_after, trace"),
        ({"verify": "some"}, "setting verify must be one of off, structure, numeric, not 'some'"),
        ({"trace": "maybe"}, "setting trace is a switch"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RegaugeError, match=message), using(**changes):
        pass


def test_environment() -> None:
    code = "from regauge.settings import current; print(current().trace, current().verify)"
    environment = {**os.environ, "REGAUGE_TRACE": "1", "REGAUGE_VERIFY": "off"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "off"], done.stderr
