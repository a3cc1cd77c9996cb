"""Every error Regauge raises on purpose: one line that names the place, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RegaugeError(Exception):
    """Base of every error that Regauge raises on purpose; the command line prints it as one line and exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class AxisError(RegaugeError):
    """Two axes that must have the same indices cannot (different sizes), or an axis rule does not fit its operands."""


class RuleSyntaxError(RegaugeError):
    """An axis rule is not written in the rule notation."""


class GraphError(RegaugeError):
    """A graph is structurally wrong: a dangling value, a cycle, a duplicate name, a wrong shape."""


class OperatorError(RegaugeError):
    """An operator is unknown, registered twice, or called with arguments it does not take."""


class PatternError(RegaugeError):
    """A rewrite rule is not well formed: its pattern names an attribute that does not exist, returns no call ..."""


class LawError(RegaugeError):
    """An operator does not do what its record says: its rule, its symmetry or its cost is wrong."""


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Turn what a function of an operator's record raises into an OperatorError that names it: ``what``."""
    try:
        yield
    except RegaugeError:
        raise
    except Exception as error:  # anything, since the function is its author's
        raise OperatorError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


class CaptureError(RegaugeError):
    """A model could not be captured, or the captured graph does not compute what the model computes."""


class LoadError(RegaugeError):
    """A file could not be read: truncated, missing external data, a path that leaves its folder."""


class EmitError(RegaugeError):
    """A graph could not be written as a torch module or as an ONNX model."""


class PassError(RegaugeError):
    """A pass was given a wrong option, cannot meet its budget, or broke its contract."""


class PipelineError(PassError):
    """The text of a pipeline cannot be read. Unlike others it takes three lines, the text with a caret being two."""


class ExplainError(RegaugeError):
    """Something that was asked about (a Dim, a value, a parameter) does not exist in the graph."""


class FusionError(RegaugeError):
    """Nodes cannot be one kernel; the message is the reason."""


class EquivalenceError(RegaugeError):
    """Two graphs that must compute the same function do not."""


class RegaugeWarning(UserWarning):
    """Something works, but not as well as it could: an operator is kept opaque, a size that should vary is fixed."""
