"""The compiler read top to bottom: a graph, passes, another graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regauge.ir.dims.extents import Dim
    from regauge.ir.fusion.footprint import Footprint
    from regauge.ir.fusion.region import Region
    from regauge.ir.graph import Graph
    from regauge.ir.timing import Timing
    from regauge.passes.catalog import Passes


def optimize(graph: Graph, passes: Passes, data: Any = None) -> Graph:
    """A new graph: ``graph`` after ``passes``, which are a pipeline text, a Pass, or a sequence of either.

        small = regauge.optimize(graph, "prune{ratio=0.5}")
        print(small.report)

    The given graph is never changed; weights are shared until a pass writes them. ``data`` is an iterable of batches
    (each a tensor, a tuple or a mapping of tensors), or a function that gives one, for passes that need it. The
    result's ``report`` says what each pass did: parameters, MACs, bytes, seconds, and the error of exact passes.

    Raises PassError for an unknown pass or option, a budget that cannot be met, or a pass that breaks its contract.
    """
    # Imported on use: the package imports this module at once, so that its name is the function's, and must stay light.
    from regauge.passes.catalog import as_passes
    from regauge.passes.pipeline import run_passes

    return run_passes(graph, as_passes(passes), data, measure=_measure, footprints=_footprint)


def _measure(graphs: Sequence[Graph], inputs: Any) -> list[Timing]:
    """For passes that ask for times: only then the backends are loaded."""
    from regauge.backends.latency import measure

    return measure(graphs, inputs)


def _footprint(region: Region, sizes: Mapping[Dim, int]) -> Footprint | None:
    """For passes that plan kernels."""
    from regauge.backends.triton_kernels.footprint import footprint

    return footprint(region, sizes)
