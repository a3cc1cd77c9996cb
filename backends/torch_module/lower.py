"""Exported programs without operators of kernels, for places that have no Regauge."""

from __future__ import annotations

import torch

from regauge.backends.torch_module.kernels import NAMESPACE, registered, without_views
from regauge.ir.errors import PassError


def lower(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with each operator of a kernel replaced by its region in torch; all other operators stay.

        program = torch.export.export(graph.to_torch(kernels="triton"), inputs)
        torch.export.save(regauge.lower(program), "anywhere.pt2")

    It computes what the program computes on a CPU, and loads where neither Regauge nor Triton is installed. Weights are
    those of the program. Of a module that is not exported ``graph.to_torch()`` is the form without such operators; it
    loads the same ``state_dict``. Raises PassError for anything but an exported program.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise PassError(
            f"lower: expected what torch.export.export gives, found {type(program).__name__}; of a graph, to_torch() "
            "without kernels has no operators of its own, and loads the state_dict of one that has"
        )
    used = {node.target for node in program.graph.nodes if getattr(node.target, "namespace", None) == NAMESPACE}
    bodies = {made.overload: without_views(made.body) for made in registered() if made.overload in used}
    lowered: torch.export.ExportedProgram = program.run_decompositions(bodies)
    return lowered
