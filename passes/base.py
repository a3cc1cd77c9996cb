"""What a pass is: a frozen dataclass whose fields are its options, and thereby its command line.

    @dataclass(frozen=True, kw_only=True)
    class DropDropout(Pass):
        \"\"\"Remove dropout.

        before  y = dropout(x)   ->   after  y = x
        \"\"\"

        name = "drop-dropout"
        contract = "exact"

        def call(self, graph: Graph, context: Context) -> Graph: ...

A pass never changes the graph it is given: it returns another one, or the same object when there is nothing to do. The
runner (:mod:`regauge.passes.pipeline`) checks that, and verifies the result.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from itertools import count
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch

from regauge.ir.errors import PassError
from regauge.ir.fusion.footprint import Footprints
from regauge.ir.graph import Graph
from regauge.ir.running.given_inputs import fitted
from regauge.ir.running.interpret import Interpreter, inputs_of
from regauge.ir.states import with_first_states
from regauge.ir.timing import Measure
from regauge.passes.options import check_options, describe, hints, unknown_option

Contract: TypeAlias = Literal["exact", "bounded", "approximate"]
"""``exact``: the same function up to rounding, which the runner checks; ``bounded``: within a bound that the pass
states; ``approximate``: another function."""

Need: TypeAlias = Literal["data", "gradients"]

GIVE_DATA = "give batches, optimize(graph, passes, data=...), or on the command line --data FILE"


class Cut(NamedTuple):
    """One Dim that a pass changed, and its sizes before and after; of a sparse weight, its entries.

    Where the Dim is one of several of an axis, ``axis`` is how the report shows that axis, once for all of them.
    ``lost`` says why what reads it does not make up for the cut, where a pass tries to; layers further on may.
    """

    dim: str
    before: int
    after: int
    axis: str = ""
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.axis or f"{self.dim}: {self.before} -> {self.after}"


@dataclass
class Context:
    """The context of one run of a pass: the data that it may use, and the report that it fills in."""

    data: Any = None  # batches to calibrate on, as given to optimize()
    cuts: list[Cut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)  # why things were left alone: reason -> how many
    measure: Measure | None = None  # times graphs in a runtime; None where nothing can
    footprints: Footprints | None = None  # says what kernels take of a GPU; None where nothing does
    original: Graph | None = None  # what the pipeline began with
    made_up: bool = False  # whether a pass made the data itself, so that its size says nothing of what runs will get

    def batches(self) -> Iterator[Any]:
        """The batches of ``data``, labels and all; raises PassError where there is none. See :meth:`inputs`."""
        given = self.data() if callable(self.data) else self.data
        if given is None:
            raise PassError(f"it needs data: {GIVE_DATA}")
        if isinstance(given, torch.Tensor | np.ndarray):
            raise PassError(f"data is one array of shape {tuple(given.shape)}: give a list of batches, data=[x]")
        if isinstance(given, Mapping | str):
            raise PassError(f"data is a {type(given).__name__}: give a list of batches, data=[batch]")
        found = False
        for batch in given if isinstance(given, Iterable) else ():
            found = True
            yield batch if isinstance(batch, Mapping | tuple | list) else (batch,)
        if not found:
            raise PassError(
                "data has no batch: give an iterable of batches, each a tensor, a tuple or a mapping of tensors"
            )

    def inputs(self, graph: Graph) -> Iterator[Any]:
        """The batches of ``data`` as ``graph.run`` takes them: what they hold behind the graph's inputs is left out.

        A batch without the states of a graph (caches, last frames) stands for a run that begins. Numbers of another
        width are brought to the types of the inputs, with a note. Raises GraphError where a batch is of another type
        or shape.
        """
        return (self.taken(graph, inputs_of(graph, batch)) for batch in self.batches())

    def taken(self, graph: Graph, inputs: Any) -> Any:
        """The inputs of one run, held to the graph's as :meth:`inputs` says."""
        found, changed = fitted(graph, with_first_states(graph, inputs))
        self.notes += [text for text in changed if text not in self.notes]
        return found

    def sizes(self, graph: Graph) -> Mapping[Any, int]:
        """The dynamic sizes that the first batch of ``data`` has, by symbol; none without data."""
        return {} if self.data is None else Interpreter(graph).bound(next(self.inputs(graph)))[1]

    def note(self, text: str) -> None:
        """Add a line to the report."""
        self.notes.append(text)


def reasons(left: Mapping[str, int]) -> list[str]:
    """Why things were left alone, each with how many they are."""
    return [f"{count} x {reason}" for reason, count in left.items() if count]


class Replayed:
    """The batches of an iterator, as often as they are asked for: those that were drawn are held.

    A generator gives its batches once, but every pass of a pipeline reads them, and so does the check of exact ones.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._drawn: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for place in count():
            if place == len(self._drawn):
                try:
                    self._drawn.append(next(self._source))
                except StopIteration:
                    return
            yield self._drawn[place]


class OptionInfo(NamedTuple):
    """One option as ``regauge passes NAME`` shows it."""

    name: str
    kind: str
    default: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """Base of every pass; see the module docstring. Options are checked when a pass is made (PassError)."""

    name: ClassVar[str] = ""
    contract: ClassVar[Contract] = "approximate"
    needs: ClassVar[frozenset[Need]] = frozenset()
    takes_fused: ClassVar[bool] = False
    """Whether the pass runs on graphs with fused regions; others want the nodes themselves."""

    solves: ClassVar[bool] = False
    """Whether the pass chooses or solves for weights; see :meth:`wants_floats`."""

    wants_layers: ClassVar[bool] = False
    """Whether products by transposed weights come to the pass as linear layers: ``x @ w.t()``, as some models and raw
    ONNX exports have them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    def __post_init__(self) -> None:
        _check_declaration(type(self))
        check_options(self)

    def requires(self, graph: Graph) -> None:  # noqa: B027
        """Raise PassError where the graph does not have what the pass needs."""

    def wants_floats(self, context: Context) -> bool:
        """True if the pass selects or solves for weights: quantized weights are dequantized before it runs."""
        return self.solves

    @abstractmethod
    def call(self, graph: Graph, context: Context) -> Graph:
        """The transformed graph, or ``graph`` itself when nothing changed; never writes into ``graph``."""

    def ensures(self, before: Graph, after: Graph) -> None:  # noqa: B027
        """Raise PassError where the result does not keep the promise of the pass."""

    @classmethod
    def option_table(cls) -> list[OptionInfo]:
        annotations = hints(cls)
        return [
            OptionInfo(
                entry.name,
                describe(annotations[entry.name]),
                "" if entry.default in (None, MISSING) else str(entry.default),
                entry.metadata.get("help", ""),
            )
            for entry in fields(cls)
        ]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """A pass from a mapping of options; raises PassError for an unknown one, naming those that exist."""
        valid = [entry.name for entry in fields(cls)]
        for name in options:
            if name.replace("-", "_") not in valid:
                raise unknown_option(cls.name, name, valid)
        required = [e.name for e in fields(cls) if e.default is MISSING and e.default_factory is MISSING]
        given = {name.replace("-", "_"): value for name, value in options.items()}
        missing = [name for name in required if name not in given]
        if missing:
            raise PassError(f"{cls.name} needs the option {missing[0]!r}: write {cls.name}{{{missing[0]}=...}}")
        return cls(**given)

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the docstring."""
        first = (cls.__doc__ or "").strip().partition("\n\n")[0]
        return re.split(r"(?<=(?<! al)\.) ", " ".join(first.split()))[0]

    @classmethod
    def details(cls) -> list[tuple[str, str]]:
        """The selectable parts of a pass, names with a line each, as ``regauge passes NAME`` lists them."""
        return []

    def given_options(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        return {e.name: getattr(self, e.name) for e in fields(self) if getattr(self, e.name) != e.default}

    def __str__(self) -> str:
        from regauge.passes.pipeline_text import format_stage

        return format_stage(self.name, self.given_options())


def _check_declaration(cls: type[Pass]) -> None:
    """An annotation that dataclass() never saw would be silently no option: say so to whoever wrote the pass."""
    declared = {entry.name for entry in fields(cls)}
    lost = [
        name
        for name, annotation in inspect.get_annotations(cls).items()
        if name not in declared and "ClassVar" not in str(annotation)
    ]
    if lost:
        raise PassError(f"pass {cls.__name__} is not a dataclass: write @dataclass(frozen=True, kw_only=True) above it")
