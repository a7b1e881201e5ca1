"""Rotation: exact at quarter turns, right way round, black corners, and equal to torchvision's where that can be imported."""

import pytest
import torch

from lib.augment import rotate


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
    assert (rotate(x, torch.tensor([37.0]), "nearest") - theirs).abs().gt(1e-4).float().mean() < 0.02
