"""Knowledge distillation from the original to the pruned network, as one term of the loss.

    small = regauge.optimize(graph, "prune{macs=0.5}")
    student = small.to_torch().train()
    distil = regauge.training.Distillation(model, student, graph, small, features=["layer1", "layer2"])
    logits = student(images)
    loss = criterion(logits, labels) + distil(logits, images)

Features of different widths need no projector: the cut of the graph says which of the teacher's channels the student
kept, and these are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from regauge.ir.axis_rules.rules import Axes
from regauge.ir.dims.kept import Keep, part_kept
from regauge.ir.dims.resize import kept_indices
from regauge.ir.errors import PassError, RegaugeWarning
from regauge.ir.graph import Graph, Node, Value

Selection = tuple[Axes, Keep]  # the axes of the teacher's feature, and what the student has of their Dims


def soft_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0, axis: int = -1
) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over all but the axis of classes.

    T^2 keeps the size of the gradients when T changes (Hinton et al. 2015, Distilling the Knowledge in a Neural
    Network, section 2). No gradient reaches the teacher.
    """
    target = F.log_softmax(teacher.detach().float() / temperature, axis)
    found = F.log_softmax(student.float() / temperature, axis)
    divergence = F.kl_div(found, target, reduction="none", log_target=True).sum(axis)
    return divergence.mean() * temperature**2


def feature_distance(student: torch.Tensor, teacher: torch.Tensor, *, normalised: bool = True) -> torch.Tensor:
    """|student - teacher|^2 / |teacher|^2, or with ``normalised=False`` the mean of squared differences.

    Divided by the teacher's norm no layer outweighs the others because its numbers are large: the normalised feature
    distillation of LAPTOP-Diff (Zhang et al. 2024, arXiv 2404.11098). Deviation: each term is divided by the square of
    its own norm, so that it is a relative error; a factor that all terms share is left out.
    """
    target = teacher.detach().float()
    squared = (student.float() - target).square()
    return squared.sum() / target.square().sum().clamp(min=1e-12) if normalised else squared.mean()


class Distillation:
    """The loss of a student against its teacher: of logits, and of features inside.

    ``features`` are paths of modules (``layer1.0``), or names of values of the original graph that such a module
    gives; a mapping says for each of the student which one of the teacher it follows, where depth was cut. ``original``
    and ``pruned`` are the teacher's graph and the one that the student was emitted from; they may be left out where
    the features have the same sizes, as when a sparsifier trains a copy of the teacher.

    The teacher runs in the mode that it is in: call ``teacher.eval()`` first.

    The value is ``logits`` times the divergence of the outputs (``output="kl"``, at a ``temperature``, classes along
    ``axis``; or ``"mse"``), plus ``weight`` times the mean of :func:`feature_distance`. ``remove()`` takes the hooks
    off both modules. Raises PassError for a module or a value that is not there, or features of different sizes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        original: Graph | None = None,
        pruned: Graph | None = None,
        *,
        features: Sequence[str] | Mapping[str, str] = (),
        output: Literal["kl", "mse"] = "kl",
        temperature: float = 2.0,
        axis: int = -1,
        logits: float = 1.0,
        weight: float = 1.0,
        normalised: bool = True,
    ) -> None:
        if temperature <= 0:
            raise PassError(f"temperature={temperature:g} is out of range: write a number above 0")
        self.teacher, self.student = teacher, student
        self.output, self.temperature, self.axis = output, temperature, axis
        self.logits, self.weight, self.normalised = logits, weight, normalised
        pairs = dict(features) if isinstance(features, Mapping) else {name: name for name in features}
        paths = {name: _path(original, name) for pair in pairs.items() for name in pair}
        self._pairs = {paths[own]: paths[other] for own, other in pairs.items()}
        for own, other in self._pairs.items():
            if own == other and original is not None and pruned is not None:
                _check_same_value(original, pruned, own)
        self._kept = {other: _selection(original, pruned, other) for other in self._pairs.values()}
        self._seen: dict[tuple[str, str], torch.Tensor] = {}
        self._teacher_was_seen = False
        self._hooks = [self._watch("student", student, path) for path in self._pairs]
        self._hooks += [self._watch("teacher", teacher, path) for path in dict.fromkeys(self._pairs.values())]

    def _watch(self, which: str, model: nn.Module, path: str) -> RemovableHandle:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            names = [name for name, _ in model.named_modules() if name]
            raise PassError(f"the {which} has no module {path!r}; it has {', '.join(names[:12])}") from None

        def note(_: nn.Module, __: Any, result: Any) -> None:
            self._seen[which, path] = first_tensor(result)

        return module.register_forward_hook(note)

    def __call__(self, result: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss for what the student just gave for these arguments; runs the teacher on them, without gradients."""
        if not self._teacher_was_seen:
            self._teacher_was_seen = True
            _warn_of_training(self.teacher)
        with torch.no_grad():
            expected = first_tensor(self.teacher(*args, **kwargs))
        found = first_tensor(result)
        if self.output == "kl":
            total = self.logits * soft_cross_entropy(found, expected, self.temperature, self.axis)
        else:
            total = self.logits * F.mse_loss(found.float(), expected.float())
        distances = [self._distance(own, other) for own, other in self._pairs.items()]
        self._seen.clear()
        return total + self.weight * torch.stack(distances).mean() if distances else total

    def _distance(self, own: str, other: str) -> torch.Tensor:
        if ("student", own) not in self._seen:
            raise PassError(
                f"the student did not run {own!r} since the last call: call it first, then the distillation"
            )
        student, teacher = self._seen["student", own], self._seen["teacher", other]
        teacher = part_kept(teacher, *self._kept[other])
        if student.shape != teacher.shape:
            raise PassError(
                f"{own!r} gives {list(student.shape)} and the teacher's {other!r} {list(teacher.shape)} where the "
                "student kept channels: give both graphs, or compare other layers"
            )
        return feature_distance(student, teacher, normalised=self.normalised)

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _warn_of_training(teacher: nn.Module) -> None:
    """A teacher that is left in training mode is another one at every step, and its statistics become the student's."""
    for name, module in teacher.named_modules():
        if module.training and isinstance(module, _BatchNorm | _DropoutNd):
            warnings.warn(
                f"the teacher is in training mode, where {name} ({type(module).__name__}) gives something else at "
                "every step: call teacher.eval()",
                RegaugeWarning,
                stacklevel=3,
            )
            return


def first_tensor(result: Any) -> torch.Tensor:
    """The tensor that a module gave: itself, ``logits`` of an output object, or the first of several."""
    if isinstance(result, torch.Tensor):
        return result
    logits = getattr(result, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    parts = list(result.values()) if isinstance(result, Mapping) else list(result)
    return first_tensor(parts[0])


def _selection(original: Graph | None, pruned: Graph | None, path: str) -> Selection:
    if original is None or pruned is None:
        return [], {}
    return original.axes.of[_result_of(original, path)], kept_indices(original, pruned)


def _check_same_value(original: Graph, pruned: Graph, path: str) -> None:
    """Raise PassError where a module gives another value of the network than it did: that of a norm folded into it."""
    was, now = _result_of(original, path), list(_exits(pruned, path))
    others = {value.name for value in original.values()} - {was.name}
    is_result = any(output in now for output in pruned.outputs)  # which keeps its name, whatever gives it
    if len(now) == 1 and now[0].name in others and not is_result:
        raise PassError(
            f"{path!r} gives {now[0].name} in the student and {was.name} in the teacher, since passes rewrote it: name "
            f"the module of the teacher that gives {now[0].name}, features={{{path!r}: ...}}"
        )


def _path(graph: Graph | None, name: str) -> str:
    """The path of the module that is meant: the name itself, or the module that gives the value of this name."""
    if graph is None or any(name == path for node in graph.nodes for path, _ in node.scope):
        return name
    value = graph.find(name)
    scope = value.producer.scope if value.producer is not None else ()
    for path, _ in reversed(scope):
        if path and list(_exits(graph, path)) == [value]:
            return path
    inner = next((path for path, _ in reversed(scope) if path), None)
    around = f" (it is made in {inner!r})" if inner else ""
    raise PassError(f"{name} is not what one module gives{around}: name the path of a module")


def _result_of(graph: Graph, path: str) -> Value:
    found = list(_exits(graph, path))
    if len(found) != 1:
        raise PassError(f"the module {path!r} gives {len(found)} values, not one: compare another layer")
    return found[0]


def _exits(graph: Graph, path: str) -> Iterator[Value]:
    """The values that are made in a module and read outside it."""

    def inside(node: Node) -> bool:
        return any(path == own for own, _ in node.scope)

    for node in graph.nodes:
        if inside(node):
            for value in node.outputs:
                if any(output is value for output in graph.outputs) or not all(map(inside, value.consumers())):
                    yield value
