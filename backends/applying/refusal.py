"""The message for a module that cannot express a cut: which parts failed, over which Dims, and how to leave them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from regauge.backends.applying.layers import Changed
from regauge.ir.graph import Graph

_SHOWN = 6


def refusal(graph: Graph, model: nn.Module, changed: Changed, failure: str, failed: str | None) -> str:
    """The message; ``failed`` is the path of the module in whose forward it went wrong, None where none raised."""
    head = f"{type(model).__name__} cannot express these sizes"
    tried = f"with all tensors replaced and its integer attributes searched, {failure}"
    end = "The model is as it was; graph.to_torch() gives a module of its own"
    cuts = _cuts(graph)
    gone = _gone(graph, model)
    if gone:
        return (
            f"{type(model).__name__} cannot express what passes changed: it still has {_listed(gone)}, and the graph "
            f"does not. apply_to() follows cuts, not nodes that are gone or rewritten, as simplify and depth leave "
            f"them. {end}"
        )
    if failed is None and not cuts and not changed:
        return (
            f"{type(model).__name__} cannot express what passes changed: no tensor has another size, but with the "
            f"graph's in place {failure}. apply_to() follows cuts, not rewritten nodes as simplify leaves them. {end}"
        )
    if failed is None:
        names = [f"{name}: {sizes}" for name, sizes in cuts.items()]
        names = names or [f"{name}: {list(old)} -> {list(new)}" for name, (old, new) in changed.items()]
        return f"{head}: {_listed(names)}; {tried}. {end}"
    dims = _dims_in(graph, failed, cuts)
    part = f"{failed or 'the model itself'} ({type(model.get_submodule(failed)).__name__})"
    if not dims:
        return f"{head}: {tried}, in {part}. {end}"
    named = _listed([f"{name}: {cuts[name]}" for name in dims])
    patterns = dict.fromkeys(_alike(model, name) for name in dims)
    excluded = ",".join(f'"{pattern}"' for pattern in patterns)
    return f"{head}: {tried}, in {part}, where {named}. {end}, exclude=[{excluded}] leaves these Dims uncut"


def _gone(graph: Graph, model: nn.Module) -> list[str]:
    """What of the model the graph has no more, removed or folded into other weights: whole modules, or parameters."""
    known = {name for parameter in graph.all_parameters() for name in parameter.names}
    names = [name for name, _ in model.named_parameters()]
    kept = [name for name in names if name in known]

    def outermost(name: str) -> str:
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        return next((path for path in paths if not any(other.startswith(path + ".") for other in kept)), name)

    return list(dict.fromkeys(outermost(name) for name in names if name not in known))


def _listed(names: list[str]) -> str:
    return "; ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _cuts(graph: Graph) -> dict[str, str]:
    """The Dims that were cut, with their sizes before and after, by name: those of an axis in its order."""
    found = sorted(edit.sizes for edit in graph.history if edit.sizes is not None)
    return {name: f"{before} -> {after}" for name, before, after in found if before != after}


def _dims_in(graph: Graph, path: str, cuts: Iterable[str]) -> list[str]:
    """Cut Dims of parameters at or below a path; where some occur nowhere else, only those."""
    prefix = path + "." if path else ""
    groups = {group.name: group for group in graph.groups()}
    inside, touching = [], []
    for name in cuts:
        members = [m.parameter.name for m in groups[name].members] if name in groups else [name]
        below = [member.startswith(prefix) for member in members]
        touching += [name] if any(below) else []
        inside += [name] if all(below) else []
    return inside or touching


def _alike(model: nn.Module, name: str) -> str:
    """The Dim of this place in all layers of a stack: ``blocks.0.attn.qkv.weight:0`` -> ``blocks.*.attn...``.

    A number stands for the others where its neighbours are of the same class, one of the user's own.
    """
    path, _, leaf = name.partition(":")[0].rpartition(".")
    parts = path.split(".") if path else []
    alike = list(parts)
    for place, part in enumerate(parts):
        stack, layer = (model.get_submodule(".".join(parts[:end])) for end in (place, place + 1))
        own = not type(layer).__module__.startswith("torch.nn.")
        if part.isdigit() and own and sum(type(other) is type(layer) for other in stack.children()) > 1:
            alike[place] = "*"
    return ".".join([*alike, leaf]) + name[len(path) + len(leaf) + bool(path) :]


def failing_module(model: nn.Module, call: Any) -> str | None:
    """The path of the module of the user's own in whose forward ``call`` raises; None where it does not raise.

    A standard layer fails for what it is handed, so the module around it is named.
    """
    paths = {module: path for path, module in model.named_modules()}
    running: list[nn.Module] = []
    hooks: list[Any] = []
    for module in paths:
        hooks.append(module.register_forward_pre_hook(lambda entered, _: running.append(entered)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        call()
    except Exception:  # whatever the user's code raises
        own = [module for module in running if not type(module).__module__.startswith("torch.nn.")]
        return paths[(own or running)[-1]] if running else ""
    finally:
        for hook in hooks:
            hook.remove()
    return None
