"""Rotation: exact at quarter turns, right way round, black corners, and equal to torchvision's
where that can be imported.
"""

import pytest
import torch

from lib.images import rotate


@pytest.mark.parametrize("size", [9, 64])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_quarter_turns_equal_rot90(size, turns, interpolation):
    x = torch.rand(3, 2, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    turned = rotate(x, torch.full((3,), 90.0 * turns), interpolation)
    torch.testing.assert_close(turned, torch.rot90(x, turns, (2, 3)), atol=2e-5, rtol=0)


def test_each_image_gets_its_own_angle():
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, torch.tensor([0.0, 180.0]))
    torch.testing.assert_close(turned[0], x[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[1], x[1].flip(1, 2), atol=1e-5, rtol=0)


def test_corners():
    white = torch.ones(1, 1, 32, 32)
    black = rotate(white, torch.tensor([45.0]), corners="black")
    assert black[0, 0, 0, 0] == -1
    assert black[0, 0, 16, 16] == 1
    torch.testing.assert_close(rotate(white, torch.tensor([45.0]), corners="reflect"), white)


def test_there_and_back_is_nearly_the_image():
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    there = rotate(ramp, torch.tensor([30.0]))
    back = rotate(there, torch.tensor([-30.0]))
    assert (back - ramp)[..., 20:44, 20:44].abs().max() < 0.01
    assert (there - ramp)[..., 20:44, 20:44].abs().max() > 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("corners", ["black", "reflect"])
def test_free_angles_do_not_ring(interpolation, corners):
    """Every new pixel is a mean of old ones: no value leaves their range, at the hardest edges. A
    cubic kernel fails this.
    """
    edges = (torch.rand(24, 1, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5) * 2.0 - 1
    angles = torch.linspace(-180, 180, 24)
    assert rotate(edges, angles, interpolation, corners).abs().max() <= 1 + 1e-6
    theta = torch.tensor([[[0.8, -0.6, 0.0], [0.6, 0.8, 0.0]]]).expand(24, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [24, 1, 64, 64], align_corners=False)
    assert (
        torch.nn.functional.grid_sample(edges, grid, mode="bicubic", align_corners=False)
        .abs()
        .max()
        > 1.2
    )


def turned_wave_error(period, interpolation):
    """Error (root mean square over angles and the image's inner disc, relative to the wave) of
    turning waves of a period in pixels.
    """
    y, x = torch.meshgrid(*[torch.arange(64.0) - 31.5] * 2, indexing="ij")
    inside = x**2 + y**2 < 28**2
    angles = torch.arange(7.0, 90, 6)
    wave = torch.cos(2 * torch.pi * x / period + 0.4)
    a = torch.deg2rad(angles)[:, None, None]
    expected = torch.cos(2 * torch.pi * (a.cos() * x - a.sin() * y) / period + 0.4)
    found = rotate(wave.expand(len(angles), 1, 64, 64), angles, interpolation)[:, 0]
    return (
        ((found - expected)[:, inside].square().mean() / expected[:, inside].square().mean())
        .sqrt()
        .item()
    )


def test_what_turning_does_to_fine_detail():
    """The numbers of the docstring: waves of 16, 8 and 4 pixels."""
    bilinear, nearest = (
        [turned_wave_error(period, kind) for period in (16, 8, 4)]
        for kind in ("bilinear", "nearest")
    )
    assert bilinear == pytest.approx([0.014, 0.055, 0.213], abs=0.005)
    assert nearest == pytest.approx([0.112, 0.225, 0.445], abs=0.01)


def test_bad_arguments_are_named():
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"one angle an image.*\(3,\)"):
        rotate(x, torch.zeros(3))
    with pytest.raises(ValueError, match="cubic"):
        rotate(x, torch.zeros(2), interpolation="cubic")


def test_equals_torchvision():
    try:
        from torchvision.transforms.v2 import functional as tv
    except Exception as error:  # a torchvision built for another torch raises more than ImportError
        pytest.skip(f"torchvision cannot be imported here: {error}")
    x = torch.rand(1, 1, 33, 33, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = tv.rotate(x, 37.0, interpolation=tv.InterpolationMode.NEAREST, fill=-1.0)
    assert (rotate(x, torch.tensor([37.0]), "nearest") - theirs).abs().gt(
        1e-4
    ).float().mean() < 0.02
