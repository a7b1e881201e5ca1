"""Shapes, layout, and the property the paper rests on: P4M's features do not change under the
symmetries of the square, AlexNet's do."""

import copy

import pytest
import torch

from lib.groups import P4M
from lib.models import BACKBONES, P4MCNN, AlexNet, Sobel, build

NARROW = dict.fromkeys(BACKBONES, (2, 4, 8)) | {"alexnet": (8, 16, 24, 24, 16, 64)}


def images(n=4, seed=0, dtype=torch.float32):
    x = torch.rand(n, 1, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1
    return torch.nn.functional.avg_pool2d(x, 5, 1, 2)  # smooth, like a film


def trained_statistics(model, n=16):
    """Batch norm that has seen data: an untrained one hides what it does."""
    with torch.no_grad():
        for seed in range(3):
            model.train()(images(n, seed, next(model.parameters()).dtype))
    return model.eval()


def changes(model, x):
    """Relative change of the features under each of the eight elements of p4m."""
    with torch.inference_mode():
        reference = model.features(x)
        moved = (model.features(P4M.act_on_grid(x, g)) - reference for g in range(8))
        return [(difference.norm() / reference.norm()).item() for difference in moved]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("width", [None, "narrow"])
def test_shapes(backbone, width):
    model = build(backbone, 7, NARROW[backbone] if width else None).eval()
    x = images(1 if width is None else 2)
    features, logits, maps = model.features(x), model(x), model.maps(x)
    assert features.shape == (len(x), model.feature_dim)
    assert logits.shape == (len(x), 7)
    read = model.standardise(model.activated(features))
    torch.testing.assert_close(logits, model.top_layer(read))
    assert maps.ndim == 4
    assert min(maps.shape[2:]) > 1
    assert maps.min() >= 0


@pytest.mark.parametrize(
    ("dtype", "bound", "width"),
    [
        (torch.float32, 1e-5, (4, 8, 16)),
        (torch.float64, 1e-12, (4, 8, 16)),
        (torch.float32, 1e-5, None),
    ],
)
def test_p4m_features_are_invariant(dtype, bound, width):
    model = trained_statistics(build("p4m", 5, width).to(dtype), n=16 if width else 2)
    assert max(changes(model, images(4 if width else 1, 9, dtype))) < bound


@pytest.mark.parametrize("backbone", ["alexnet", "p4", "cnn_params", "cnn_flops"])
def test_p4_features_are_invariant_under_turns_alone_and_the_others_not_at_all(backbone):
    width = (4, 8, 16) if backbone != "alexnet" else NARROW["alexnet"]
    moved = changes(trained_statistics(build(backbone, 5, width)), images(4, 9))
    turned, mirrored = moved[1:4], moved[4:]
    assert max(turned) < 1e-5 if backbone == "p4" else min(turned) > 1e-3
    assert min(mirrored) > 1e-3


def test_published_layout():
    alexnet = AlexNet(200)
    convolutions = [m for m in alexnet.convolutions if isinstance(m, torch.nn.Conv2d)]
    layers = [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in convolutions]
    assert layers == [(96, 11, 4), (256, 5, 1), (384, 3, 1), (384, 3, 1), (256, 3, 1)]
    linear = [m.out_features for m in alexnet.classifier if isinstance(m, torch.nn.Linear)]
    assert linear == [4096, 4096]
    shapes = [tuple(block[0].weight.shape) for block in P4MCNN(200).blocks]
    assert shapes == [(64, 1, 1, 5, 5), (128, 64, 8, 3, 3), (256, 128, 8, 3, 3)]


def test_sobel_sees_edges_only():
    sobel = Sobel()
    assert sobel(torch.ones(1, 1, 8, 8)).abs().max() == 0
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    horizontal, vertical = sobel(ramp)[0]
    assert horizontal[:, 1:-1].abs().eq(8).all()
    assert vertical.abs().max() == 0
    assert not any(True for _ in sobel.parameters())


def test_top_layer_is_drawn_anew():
    model = build("p4m", 5, (2, 4, 8))
    states = [copy.deepcopy(model.state_dict())]
    for _ in range(2):
        model.reset_top_layer(torch.Generator().manual_seed(1))
        states.append(copy.deepcopy(model.state_dict()))
    before, first, again = states
    assert all(torch.equal(v, first[k]) for k, v in again.items())
    changed = {k for k, v in first.items() if not torch.equal(v, before[k])}
    assert "top_layer.weight" in changed <= {"top_layer.weight", "top_layer.bias"}
    assert len(model.body_parameters()) == len(list(model.parameters())) - 2


@pytest.mark.parametrize(
    ("backbone", "width", "message"),
    [("resnet", None, "alexnet, p4m"), ("p4m", (2, 4), "3 widths"), ("p4m", (0, 1, 1), "least")],
)
def test_bad_arguments_are_named(backbone, width, message):
    with pytest.raises(ValueError, match=message):
        build(backbone, 5, width)
