"""What the tests of ``simplify`` share: a module simplified and compared, and the reasons why a graph stays."""

import torch
from torch import nn

import regauge
from regauge.ir.graph import Graph
from regauge.ir.rewriting.rewrite import RuleSet, rewrite_graph
from regauge.ir.running.interpret import run


def shaken(model: nn.Module) -> nn.Module:
    """The module in float64 and evaluation, with statistics of batch norms that are not those of a new one."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=generator)
            tensor.data = drawn + 0.5 if name.endswith("running_var") else drawn - 0.5
    return model.double().eval()


def simplified(model: nn.Module, *inputs: torch.Tensor, passes: str = "simplify", dynamic: object = None) -> Graph:
    """The simplified graph of a module, whose results and whose emitted module's are the module's."""
    model = shaken(model)
    given = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        expected = model(*given)
    graph = regauge.optimize(regauge.capture(model, given, **({"dynamic": dynamic} if dynamic else {})), passes)
    for found in (run(graph, list(given))[0], graph.to_torch()(*given)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    return graph


def refusals(graph: Graph, rules: RuleSet) -> str:
    """Why rules leave a graph as it is; fails where they do not."""
    text = str(graph)
    log = rewrite_graph(graph, rules)
    assert not log.total and str(graph) == text, log.counts
    return "\n".join(f"{name}: {miss.reason}" for name, miss in log.misses.items() if miss.refused)
