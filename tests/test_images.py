"""Normalising, exact symmetries and free turns."""

import numpy as np
import pytest
import torch

from lib.images import SYMMETRIES, moved, normalise, rotate, turned


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_normalise_maps_uint8_to_minus_one_to_one_and_refuses_what_may_be_so_already():
    x = normalise(torch.tensor([[[0, 255], [51, 204]]], dtype=torch.uint8))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([[[[-1.0, 1.0], [-0.6, 0.6]]]]))
    for bad in (torch.zeros(2, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            normalise(bad)


@pytest.mark.parametrize("size", [9, 64])
def test_quarter_turns_equal_rot90_and_each_image_has_its_own(size):
    x, turns = noise(5, 2, size, size), (0, 1, 2, 3, -1)
    expected = torch.stack([torch.rot90(y, k, (1, 2)) for y, k in zip(x, turns, strict=True)])
    torch.testing.assert_close(rotate(x, 90.0 * torch.tensor(turns)), expected, atol=2e-5, rtol=0)


def test_corners_are_black_and_nothing_rings():
    assert rotate(torch.ones(1, 1, 32, 32), torch.tensor([45.0]))[0, 0, 0, 0] == -1
    edges = noise(24, 1, 64, 64).sign()
    assert rotate(edges, torch.linspace(-180, 180, 24)).abs().max() <= 1 + 1e-6


def test_what_turning_does_to_fine_detail():
    """The numbers of the docstring: waves of 16, 8 and 4 pixels."""
    y, x = torch.meshgrid(*[torch.arange(64.0) - 31.5] * 2, indexing="ij")
    inside = x**2 + y**2 < 28**2
    angles = torch.arange(7.0, 90, 6)
    a = torch.deg2rad(angles)[:, None, None]
    errors = []
    for period in (16, 8, 4):
        wave = torch.cos(2 * torch.pi * x / period + 0.4)
        expected = torch.cos(2 * torch.pi * (a.cos() * x - a.sin() * y) / period + 0.4)
        found = rotate(wave.expand(len(angles), 1, 64, 64), angles)[:, 0]
        ratio = (found - expected)[:, inside].square().mean() / expected[:, inside].square().mean()
        errors.append(ratio.sqrt().item())
    assert errors == pytest.approx([0.014, 0.055, 0.213], abs=0.005)


def test_the_eight_symmetries_are_exact_and_different():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64), dtype=np.uint8)
    copies = [moved(images, *symmetry) for symmetry in SYMMETRIES]
    assert len({copy.tobytes() for copy in copies}) == 8
    np.testing.assert_array_equal(copies[0], images)
    np.testing.assert_array_equal(copies[5], np.rot90(images[:, :, ::-1], 1, (1, 2)))
    np.testing.assert_array_equal(turned(images, -90), moved(images, False, 3))
    assert np.abs(turned(images, 359.999).astype(int) - images)[:, 8:-8, 8:-8].max() <= 1
