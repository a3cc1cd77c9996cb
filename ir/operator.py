"""One record per operator, and the registry of records.

A record states once everything Regauge knows about an operator: its signature and semantics (a plain Python function
over torch tensors), its axis rule, which ATen overloads and ONNX operators it stands for, its cost, how values pass
through it (symmetry), and sample inputs from which its law tests are generated. Shape inference, dependency groups,
roles, gauge classes, cost, emitted torch source and the tests are all derived from the record.

    @operator(
        rule="... i, o i, o? -> ... o",
        aten={"linear": None},
        macs=lambda call: call.count(0) * call.size(1, 0),
        samples=lambda: [sample(randn(2, 3, 6), randn(4, 6), randn(4))],
    )
    def linear(x, weight, bias=None):
        return F.linear(x, weight, bias)

Positional parameters of the function are the operand slots (``None`` for an absent optional operand; Python numbers
and sizes may stand where a tensor may); keyword-only parameters are the attributes. A body of one expression is inlined
into emitted source, a longer one is copied there as a function. Of modules it may use ``torch``, ``F``
(torch.nn.functional) and ``math``. Other functions that it calls are copied along, and numbers, strings and tuples that
it reads by name are written out.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from regauge.ir.errors import OperatorError
from regauge.ir.record_checks import check_record
from regauge.ir.scalars import Element
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import Size

if TYPE_CHECKING:
    from regauge.ir.axis_rules.rules import Call
    from regauge.ir.graph import Node

    RuleFunction = Callable[[Call], Any]

Adapter = Callable[..., Any]
"""``adapter(build, ...)``: emits the nodes that an operator of another framework stands for, and returns their values.

An ATen adapter gets the call's arguments as its schema names them, tensors as Values. An ONNX adapter gets one
:class:`regauge.frontends.onnx_model.call.OnnxCall`.
"""

Speller = Callable[..., Any]
"""``spell(onnx, node)``: writes a new node of the record as ONNX operators, and returns the value or values they give.

``onnx`` is a :class:`regauge.backends.onnx_model.speller.OnnxSpeller`: ``onnx.Relu(x)`` adds an ONNX node,
``onnx.operand(0)`` is an operand of ``node``, ``onnx.opset`` the version to write for. Where it cannot be written:
``raise onnx.refusal(reason)``.
"""


class Symmetry(enum.Enum):
    """The equivariance of an operator in the values on an axis that it does not end; regauge.ir.gauge.classes reads it,
    and a law checks it.
    """

    LINEAR = "linear"  # f(A x + B y) = A f(x) + B f(y): adds, scalings by constants
    LAYOUT = "layout"  # entries are moved, nothing is added to them: reshape, concat, slice
    HOMOGENEOUS = "homogeneous"  # f(s x) = s f(x) for s > 0: relu, abs, max
    ODD = "odd"  # f(-x) = -f(x): tanh
    PRODUCT = "product"  # linear in each operand alone: mul, and contractions such as linear and matmul
    INDEXWISE = "indexwise"  # linear in all operands together, with every index for itself: gather, scatter
    AFFINE = "affine"  # a gain and a shift per index: batch norm
    POINTWISE = "pointwise"  # any other function of one index: only permutation commutes


def symmetry_of(node: Node) -> Symmetry:
    """The symmetry of an operator, at a node where its operands decide."""
    symmetry = node.operator.symmetry
    return symmetry if isinstance(symmetry, Symmetry) else symmetry(node)


@dataclass(frozen=True)
class Sample:
    """One call of an operator for its law tests: operands (tensors, numbers or None) and attributes."""

    operands: tuple[Any, ...]
    attributes: Mapping[str, Any]


def sample(*operands: Any, **attributes: Any) -> Sample:
    return Sample(operands, attributes)


class Sized(Protocol):
    """A call as far as its cost goes: a node, or a stand-in for one whose axes have other sizes than its values say.

    Operands are values, numbers or None; what has a shape is a tensor. No other type may be relied on.
    """

    @property
    def inputs(self) -> Sequence[Any]: ...

    @property
    def outputs(self) -> Sequence[Any]: ...

    @property
    def attributes(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Cost:
    """What a cost function may ask about a call: sizes of operands and results, and attributes."""

    node: Sized

    @property
    def operands(self) -> range:
        """The numbers of the operand slots that are given."""
        return range(len(self.node.inputs))

    def size(self, operand: int, axis: int) -> Size:
        size: Size = getattr(self.node.inputs[operand], "shape", ())[axis]
        return size

    def count(self, operand: int) -> Size:
        """Number of elements of an operand."""
        from regauge.ir.sizes.expressions import count

        return count(getattr(self.node.inputs[operand], "shape", ()))

    def out(self, axis: int | None = None, result: int = 0) -> Size:
        """Number of elements of a result, or the size of one of its axes."""
        from regauge.ir.sizes.expressions import count

        shape = self.node.outputs[result].shape
        size: Size = count(shape) if axis is None else shape[axis]
        return size

    def rank(self, operand: int) -> int:
        """Number of axes of an operand; 0 for a number and for what is absent."""
        return len(getattr(self.node.inputs[operand], "shape", ()))

    def __getitem__(self, attribute: str) -> Any:
        return self.node.attributes[attribute]


@dataclass(frozen=True, kw_only=True)
class OnnxForm:
    """The mapping of an ONNX operator to a record.

    ``read(build, call)`` emits the IR; ``write(nodes, patch)`` puts changed size-valued attributes of the IR nodes that
    stand for one carried ONNX node back into it (only operators with such attributes need it). Where the ONNX node
    ``stores_shape``, the sizes even of axes that the record only maps over (Resize) or of a weight (Conv), it is also
    called for a new shape of a result or a weight.
    A ``direct`` operator computes what the record does on the same operands, and its attributes have the same names: a
    new node of the record is written as one of it. One that is read as it stands (without ``read``) is direct.
    """

    read: Adapter | None = None
    write: Callable[..., None] | None = None
    stores_shape: bool = False
    direct: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """Everything known about one operator.

    ``name``       in text form, and for :class:`regauge.Builder`
    ``evaluate``   the semantics, a function over torch tensors; see the module docstring
    ``rule``       the axis rule, a string in rule notation or a function of a :class:`regauge.ir.axis_rules.rules.Call`
    ``element``    what the only result is at one index, as an expression over scalars (:mod:`regauge.ir.scalars`): a
                   function of operands and attributes. None where there is no such expression, and from it where there
                   is none for these operands and attributes: then no kernel is made of it
    ``aten``       ATen overloads it stands for (``add.Tensor``, ``add`` for all of them, ``namespace::name`` for a
                   custom operator), with adapters; None maps arguments to slots and attributes by name
    ``onnx``       ONNX operators it stands for (``Add``, ``domain::Name``), likewise
    ``spell``      how a new node of it is written in ONNX, where no entry of ``onnx`` is direct
    ``spelled_for_torch`` whether graphs from torch are written with ``spell``, too: torch's exporter has no form of it,
                   or none of the nodes of which a function says so
    ``macs``       multiply-accumulates of a call; None costs nothing ``samples``    calls on which its laws are checked
    (:mod:`regauge.ir.laws.operators`) ``symmetry``   how values pass through it, or a function of the node where its
    operands decide ``scaling``    what it does with scales where its symmetry does not tell
    (:mod:`regauge.ir.scales.scaling`), or a function
                   of the node
    ``layer``      the ``torch.nn`` layer that computes a node, as source text; None from it where there is none
    ``shape``      ``shape(*operands, **attributes)``, a short way to the shape of the only result of common operators;
                   None where the operands do not plainly fit. The type of the result is that of the operands where all
                   are of one type and either floating or only moved, or ``gives``; else ``evaluate`` says it of single
                   elements.
                   Without it ``evaluate`` is asked on meta tensors, for which torch imports parts of its compiler
    ``gives``      the type of a result with a ``shape``, where it is the same whatever the operands are
    ``random``     whether two runs may differ
    ``sized_by_data`` whether values of operands decide the sizes of results, which who builds a node then states
    ``commutative`` whether its two operands may be exchanged
    ``zeroed_by``  slots of which one, zero at an index, makes the result zero there, where symmetry does not tell
                   :mod:`regauge.ir.dims.masking`: without it a product is zeroed by any factor, what has another
                   symmetry than POINTWISE by all its operands together. ``()`` says the latter. A given ``bias`` must
                   be zero besides
    ``coding``     whether it turns its first operand into codes, or codes into numbers: the code that stands for zero
                   counts as zero for :mod:`regauge.ir.dims.masking`
    ``expands``    whether it makes constants larger that are stored small on purpose, so that it is never folded
    ``with_gradients`` stands for ``evaluate`` in inference when gradients are to reach operands and torch lacks them
    """

    name: str
    evaluate: Callable[..., Any]
    rule: str | RuleFunction
    element: Element | None = None
    aten: Mapping[str, Adapter | None] = field(default_factory=dict)
    onnx: Mapping[str, Adapter | OnnxForm | None] = field(default_factory=dict)
    spell: Speller | None = None
    spelled_for_torch: bool | Callable[[Node], bool] = False
    macs: Callable[[Cost], Size] | None = None
    samples: Callable[[], Iterable[Sample]] | None = None
    symmetry: Symmetry | Callable[[Node], Symmetry] = Symmetry.POINTWISE
    scaling: Scaling | Callable[[Node], Scaling | None] | None = None
    layer: Callable[[Node], str | None] | None = None
    shape: Callable[..., Sequence[Size] | None] | None = None
    gives: torch.dtype | None = None
    random: bool = False
    sized_by_data: bool = False
    commutative: bool = False
    zeroed_by: tuple[str, ...] | None = None
    coding: bool = False
    expands: bool = False
    with_gradients: Callable[..., Any] | None = None

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.evaluate)

    @cached_property
    def direct_forms(self) -> tuple[str, ...]:
        """The standard ONNX operators that a node of this record may be written as, as it stands."""
        return tuple(
            name
            for name, form in self.onnx.items()
            if "::" not in name and (form is None or isinstance(form, OnnxForm) and (form.direct or form.read is None))
        )

    @property
    def in_onnx(self) -> bool:
        """True if new nodes of this record can be written to ONNX."""
        return self.spell is not None or bool(self.direct_forms)

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of the operand slots; a variadic one comes last and starts with a star."""
        kinds = inspect.Parameter
        names = []
        for parameter in self.signature.parameters.values():
            if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
            elif parameter.kind is kinds.VAR_POSITIONAL:
                names.append("*" + parameter.name)
        return tuple(names)

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Attribute names with their defaults (``inspect.Parameter.empty`` where one must be given)."""
        return {
            parameter.name: parameter.default
            for parameter in self.signature.parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "regions"
        }

    def bind(self, operands: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check a call against the signature and fill in default attributes; raises OperatorError."""
        unknown = [name for name in attributes if name not in self.attributes]
        if unknown:
            raise OperatorError(
                f"{self.name} has no attribute {unknown[0]!r}: it takes {', '.join(self.attributes) or 'none'}"
            )
        full: dict[str, Any] = {}
        for name, default in self.attributes.items():
            value = attributes.get(name, default)
            if value is inspect.Parameter.empty:
                raise OperatorError(f"{self.name} needs the attribute {name!r}")
            full[name] = _frozen(value)
        variadic = bool(self.slots) and self.slots[-1].startswith("*")
        given = tuple(operands)
        while not variadic and given and given[-1] is None:
            given = given[:-1]
        if not variadic and len(given) > len(self.slots):
            raise OperatorError(
                f"{self.name} takes {len(self.slots)} operands ({', '.join(self.slots)}), got {len(given)}"
            )
        return given, full


def _frozen(value: Any) -> Any:
    """Attributes are values: lists become tuples, so that nodes can be compared, hashed and shared."""
    if isinstance(value, list | tuple | torch.Size):
        return tuple(_frozen(v) for v in value)
    return value


_BY_NAME: dict[str, Operator] = {}
_BY_ATEN: dict[str, tuple[Operator, Adapter | None]] = {}
_BY_ONNX: dict[tuple[str, str], tuple[Operator, OnnxForm]] = {}


def register_operator(record: Operator, *, replace: bool = False) -> Operator:
    """Add an operator to the registry, which :func:`regauge.check_operator` then checks by its samples.

    Raises OperatorError when its name, an ATen or an ONNX name is taken or cannot be one, when its rule does not fit
    its function, or when the function has no source that could be emitted; RuleSyntaxError for a malformed rule.
    """
    if not replace and record.name in _BY_NAME:
        raise OperatorError(f"operator {record.name!r} is registered already: pass replace=True to replace it")
    check_record(record)
    onnx = {_onnx_key(name): form for name, form in record.onnx.items()}
    if not replace:
        _check_free(_BY_ATEN, record.aten, record.name)
        _check_free(_BY_ONNX, onnx, record.name)
    _BY_NAME[record.name] = record
    for name, adapter in record.aten.items():
        _BY_ATEN[name] = record, adapter
    for key, form in onnx.items():
        _BY_ONNX[key] = record, form if isinstance(form, OnnxForm) else OnnxForm(read=form)
    return record


def _onnx_key(full_name: str) -> tuple[str, str]:
    domain, _, op_type = full_name.rpartition("::")
    return domain, op_type


def _check_free(table: Mapping[Any, tuple[Operator, Any]], keys: Iterable[Any], name: str) -> None:
    for key in keys:
        if key in table and table[key][0].name != name:
            raise OperatorError(f"{key} is mapped to operator {table[key][0].name!r} already, not to {name!r}")


def operator(
    function: Callable[..., Any] | None = None, *, name: str | None = None, **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator form of :func:`register_operator`: the decorated function is the operator's semantics."""

    def register(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        register_operator(Operator(name=name or evaluate.__name__, evaluate=evaluate, **fields))
        return evaluate

    if function is not None:
        raise OperatorError("use @operator(rule=...), with at least a rule")
    return register


def get_operator(name: str) -> Operator:
    found = _BY_NAME.get(name)
    if found is not None:
        return found
    _load_operators()
    try:
        return _BY_NAME[name]
    except KeyError:
        from difflib import get_close_matches

        close = get_close_matches(name, _BY_NAME, 1)
        raise OperatorError(
            f"no operator is called {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
        ) from None


def find_aten(name: str) -> tuple[Operator, Adapter | None] | None:
    """The record for an ATen overload such as ``add.Tensor``; the name without the overload serves all overloads."""
    _load_operators()
    return _BY_ATEN.get(name) or _BY_ATEN.get(name.partition(".")[0])


def find_onnx(domain: str, op_type: str) -> tuple[Operator, OnnxForm] | None:
    _load_operators()
    return _BY_ONNX.get(("" if domain == "ai.onnx" else domain, op_type))


def all_operators() -> Mapping[str, Operator]:
    _load_operators()
    return dict(_BY_NAME)


def _load_operators() -> None:
    """The built-in records register themselves when their modules are imported."""
    import regauge.ir.ops  # noqa: F401
