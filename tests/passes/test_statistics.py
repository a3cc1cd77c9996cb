"""Statistics of values over batches: what is collected, what is kept of an interrupted run, what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.statistics import Gram, Range, Spread, Statistics, TokenNorms

X = torch.randn(10, 3, 4, generator=torch.Generator().manual_seed(0)) + 100


def network() -> Graph:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), (X[:2],), dynamic={0: {0: "batch"}})


def registered(graph: Graph) -> tuple[Statistics, tuple[Range, Spread, Gram, TokenNorms]]:
    statistics = Statistics(graph)
    result, given = graph.nodes[-1].output, graph.inputs[0]
    collectors = (Range(axis=-1), Spread(axis=-1), Gram(), TokenNorms())
    places = (result, given, given, result)
    return statistics, tuple(statistics.register(v, c) for v, c in zip(places, collectors, strict=True))  # type: ignore[return-value]


def check(graph: Graph, ranges: Range, spread: Spread, gram: Gram, norms: TokenNorms) -> None:
    (y,) = graph.run(X)
    rows, outputs = X.double().flatten(0, 1), y.double().flatten(0, 1)
    torch.testing.assert_close(ranges.lowest, outputs.amin(0), rtol=1e-6, atol=1e-6)  # float32, in batches
    torch.testing.assert_close(ranges.highest, outputs.amax(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(spread.mean, rows.mean(0))
    torch.testing.assert_close(spread.variance, rows.var(0, unbiased=False))
    torch.testing.assert_close(spread.mean_square, rows.square().mean(0))
    ones = torch.cat([rows, torch.ones(30, 1)], 1)
    torch.testing.assert_close(gram.gram, ones.t() @ ones, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(norms.mean, outputs.norm(dim=1).mean())
    torch.testing.assert_close(norms.state["greatest"], outputs.norm(dim=1).max())


def test_batches_of_any_sizes_give_the_statistics_of_all() -> None:
    graph = network()
    statistics, collectors = registered(graph)
    assert statistics.collect(X.split([1, 4, 5])) == 3
    check(graph, *collectors)


def test_a_loader_of_labelled_examples_is_read() -> None:
    graph = network()
    statistics, collectors = registered(graph)
    statistics.collect(DataLoader(TensorDataset(X, torch.zeros(10)), batch_size=4))
    check(graph, *collectors)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    graph, file = network(), tmp_path / "statistics.safetensors"

    def until(stop: int) -> Iterator[torch.Tensor]:
        for place, batch in enumerate(X.split(2)):
            if place == stop:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        registered(graph)[0].collect(until(3), checkpoint=file)
    statistics, collectors = registered(graph)
    seen: list[int] = []
    graph_run = statistics._add
    statistics._add = lambda inputs: (seen.append(1), graph_run(inputs))[1]  # type: ignore[method-assign]
    assert statistics.collect(until(9), checkpoint=file) == 5 and len(seen) == 2
    check(graph, *collectors)


def test_a_checkpoint_of_other_values_is_refused(tmp_path: Path) -> None:
    graph, file = network(), tmp_path / "statistics.safetensors"
    registered(graph)[0].collect([X], checkpoint=file)
    other = Statistics(graph)
    other.register(graph.inputs[0], Range())
    with pytest.raises(PassError, match="holds statistics of other values"):
        other.collect([X], checkpoint=file)
    file.write_bytes(b"no file")
    with pytest.raises(PassError, match="is no checkpoint"):
        other.collect([X], checkpoint=file)


def test_what_cannot_be_collected_is_told() -> None:
    graph = network()
    statistics = Statistics(graph)
    with pytest.raises(PassError, match="nothing can be collected"):
        statistics.register("0.weight", Range())
    statistics.register(graph.inputs[0], Range())
    with pytest.raises(PassError, match="is not finite on the calibration data"):
        statistics.collect([X * torch.inf])
