"""Images that are made of nothing but statistics of natural ones.

Pink noise has their spectrum, amplitudes that fall as 1 / frequency (Field 1987, Relations between the statistics of
natural images); dead leaves have their edges and flat places, discs with radii of density 1 / r^3 that hide one another
(Lee, Mumford and Huang 2001). Networks learn more from the latter than from any noise without edges (Baradad et al.
2021, Learning to see by looking at noise). The channels of a colour image go together, and images differ in brightness
and contrast, as photographs do.
"""

from __future__ import annotations

import math

import torch

_COLOURS = 4  # an input of more channels is no colour image, and its channels are independent
_SHARED = 0.9  # share of the amplitude that the channels of a colour image have in common
_BRIGHTNESS = 0.8  # deviation of an image's mean
_CONTRAST = 0.7  # middle of an image's own deviation
_SPREAD = 0.5  # deviation of its logarithm
_DISCS = 100
_GRAIN = 0.25  # pink noise on dead leaves, which are else of one colour


def image_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Images [examples, channels, places...] of about zero mean and unit variance over all; every second of leaves.

    Signals and volumes, with one or three axes of places, are pink noise all.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = len(shape)
    images = pink_noise(shape, generator)
    if rank == 4:
        leaves = dead_leaves((len(images[::2]), *shape[1:]), generator)
        images[::2] = leaves + _GRAIN * images[::2]
    ones = [1] * (rank - 2)
    contrast = _CONTRAST * torch.exp(_SPREAD * torch.randn(shape[0], 1, *ones, generator=generator))
    return _BRIGHTNESS * _channels((*shape[:2], *ones), generator) + contrast * images


def pink_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise with a 1 / frequency spectrum; each image has zero mean and unit variance."""
    places, axes = shape[2:], tuple(range(2, len(shape)))
    square = torch.zeros(*places[:-1], places[-1] // 2 + 1)
    for axis, size in enumerate(places):
        steps = torch.fft.rfftfreq(size) if axis == len(places) - 1 else torch.fft.fftfreq(size)
        square = square + steps.square().reshape([-1 if a == axis else 1 for a in range(len(places))])
    frequency = square.sqrt().clamp(min=1 / max(places))
    white = _channels(shape, generator)
    image = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) / frequency, s=places, dim=axes)
    centred = image - image.mean(axes, keepdim=True)
    deviation = centred.square().mean(tuple(range(1, len(shape))), keepdim=True).sqrt()
    found: torch.Tensor = centred / deviation.clamp(min=1e-6)
    return found


def dead_leaves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Images [examples, channels, height, width] of discs of normal colours, the later before the earlier."""
    count, _, height, width = shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    largest = max(height, width)
    image = _channels((count, shape[1], 1, 1), generator).expand(shape)
    for _ in range(_DISCS):
        u = torch.rand(count, 1, 1, generator=generator)
        square = 1 / (1 / largest**2 + u * (1 - 1 / largest**2))  # of a radius from 1 to the size of the image
        y, x = (torch.rand(count, 1, 1, generator=generator) * size for size in (height, width))
        inside = (rows - y).square() + (columns - x).square() < square
        image = torch.where(inside[:, None], _channels((count, shape[1], 1, 1), generator), image)
    return image


def _channels(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of unit variance, of colour images mostly the same in all channels."""
    own = torch.randn(shape, generator=generator)
    if not 1 < shape[1] <= _COLOURS:
        return own
    shared = torch.randn(shape[0], 1, *shape[2:], generator=generator)
    return _SHARED * shared + math.sqrt(1 - _SHARED**2) * own
