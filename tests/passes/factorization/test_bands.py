"""Moments in bands of frequencies."""

import pytest
import torch
from torch import nn

import regauge
from layer_kinds import drawn
from regauge.passes.factorization.bands import EDGES, Spectrum


@pytest.mark.parametrize("places", [(9,), (8, 8), (7, 10), (2, 3), (1, 1), (4, 9, 8)])
@pytest.mark.parametrize("most", [0, 40, 1000])
@pytest.mark.parametrize("few", [True, False])
def test_bands_are_those_of_the_fourier_transform(places: tuple[int, ...], most: int, few: bool) -> None:
    """However many rows of a band are kept, those of the fast one, too, or what the others leave of the whole."""
    rows = drawn(3, *places, 5)
    flat = rows.reshape(-1, 5)
    spectrum = Spectrum(5, flat.t() @ flat, most, few)
    for part in rows.split(2):
        spectrum.add(part.reshape(-1, 5), places)
    axes = tuple(range(1, 1 + len(places)))
    waves = torch.fft.fftn(rows, dim=axes, norm="ortho")
    cycles = [(torch.fft.fftfreq(size) * size).abs().round() for size in places]
    radius = torch.stack(torch.meshgrid(*cycles, indexing="ij")).amax(0)
    bands = torch.bucketize(radius, torch.tensor(EDGES), right=True)
    assert {*spectrum.sums} == {*bands.flatten().tolist()}
    for band, found in spectrum.sums.items():
        own = waves[:, bands == band].reshape(-1, 5)
        torch.testing.assert_close(found, (own.mH @ own).real, rtol=1e-4, atol=1e-4)
        assert spectrum.counts[band] == 3 * int((bands == band).sum())
        gram = spectrum.grams(0.0)[band]
        assert (gram.rows is not None) == (spectrum.counts[band] <= most and (few or band < len(EDGES)))
        torch.testing.assert_close(gram.matrix(), found, rtol=1e-6, atol=1e-5)


def test_few_examples_do_not_let_errors_fall_below_nothing() -> None:
    """Moments of gradients of eight examples have no full rank, and rounded ones less than nothing: links grew by turns
    until they gave a thousand times what the layers did."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(128, 128, 3, padding=1) for _ in range(2)]
    network = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Conv2d(128, 128, 1)).eval()
    graph = regauge.capture(network, (torch.randn(2, 128, 2, 2),), dynamic={0: {0: "batch"}})
    seen, fresh = torch.randn(8, 128, 2, 2).relu(), torch.randn(64, 128, 2, 2).relu()
    small = regauge.optimize(graph, "factorize{form=tucker,params=0.8}", data=[seen])
    assert small.report.passes[0].cuts
    for images, most in ((seen, 1e-6), (fresh, 0.2)):
        (wanted,), (found,) = graph.run(images), small.run(images)
        assert float((found - wanted).square().mean()) < most * float(wanted.var())
