"""Moments in bands of frequencies."""

import pytest
import torch

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
