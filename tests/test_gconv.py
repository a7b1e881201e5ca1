"""The layers against the definition written out pixel by pixel, under all elements of the group,
with controls that must fail."""

import copy
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib import gconv
from lib.fast import gkernel
from lib.gconv import P4ConvP4, P4ConvZ2, P4MConvP4M, P4MConvZ2, assert_equivariant
from lib.groups import P4M
from tests.test_groups import matrix

LAYERS = [P4ConvZ2, P4ConvP4, P4MConvZ2, P4MConvP4M]
ALL_LAYERS = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are no work to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["dense", "fourier", "fourier without a compiler"])
def algorithm(request, monkeypatch):
    """Each way to compute a layer; the compiled kernel takes single precision only."""
    if "without" in request.param:
        monkeypatch.setattr(gkernel, "kernel", lambda: None)
    return request.param.split()[0]


def make(layer, *args, dtype=torch.float64, **kwargs):
    """A layer with random weight and bias."""
    torch.manual_seed(0)
    conv = layer(*args, **kwargs)
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
    return conv.to(dtype)


def make_input(conv, n, height, width, dtype=torch.float64):
    group_axis = () if conv.lifting else (conv.group.order,)
    return torch.randn(n, conv.in_channels, *group_axis, height, width, dtype=dtype)


def block(lifting, group, channels, fields, kernel_size):
    """A block of random norm, as training leaves it."""
    layer = LAYERS[2 * (group is P4M) + (not lifting)]
    norm = gconv.GroupBatchNorm(fields)
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    conv = layer(channels, fields, kernel_size, padding=kernel_size // 2, bias=False)
    return gconv.GroupBlock(conv, norm, nn.ReLU(), gconv.GroupAvgBlurPool())


def reference(x, weight, bias, order, stride, padding):
    """Eq. 10-11 of Cohen and Welling (2016) and nothing else: loops over elements, output pixels,
    input elements and taps.

    ``y(x, g) = bias + sum_u sum_t f(stride * x + t, u) psi(g^-1 u, g^-1 t)``, with elements as
    GrouPy's matrices M(m) R(r)."""
    x, weight = x.numpy(), weight.numpy()
    stabilizer_in, k = weight.shape[2], weight.shape[-1]
    x = x.reshape(len(x), weight.shape[1], stabilizer_in, *x.shape[-2:])
    height, width = x.shape[-2:]
    rows, columns = ((size + 2 * padding - k) // stride + 1 for size in (height, width))
    y = np.zeros((len(x), len(weight), order, rows, columns)) + bias.numpy()[:, None, None, None]
    matrices = [matrix(g) for g in range(order)]
    taps = list(itertools.product(range(k), range(k)))
    places = map(range, (order, rows, columns, stabilizer_in))
    for g, i, j, u, t in itertools.product(*places, taps):
        row, column = i * stride - padding + t[0], j * stride - padding + t[1]
        if 0 <= row < height and 0 <= column < width:
            inverse = matrices[g].T
            tap = inverse @ (np.array(t) - k // 2) + k // 2
            moved = [(matrices[h] == inverse @ matrices[u]).all() for h in range(order)]
            source = 0 if stabilizer_in == 1 else moved.index(True)
            y[:, :, g, i, j] += x[:, :, u, row, column] @ weight[:, :, source, tap[0], tap[1]].T
    return torch.from_numpy(y)


@ALL_LAYERS
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "size"),
    [(1, 1, 0, (2, 3)), (3, 1, 1, (3, 4)), (3, 2, 0, (5, 6)), (5, 1, 2, (3, 3)), (5, 2, 1, (5, 4))],
)
def test_equals_the_definition(layer, kernel_size, stride, padding, size, algorithm):
    conv = make(layer, 2, 3, kernel_size, stride, padding, algorithm=algorithm)
    x = make_input(conv, 2, *size)
    with torch.no_grad():
        expected = reference(x, conv.weight, conv.bias, conv.group.order, stride, padding)
        scale = expected.abs().max().item()
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12 * scale)
        single = conv.float()(x.float()).double()
        torch.testing.assert_close(single, expected, rtol=0, atol=3e-6 * scale)


@ALL_LAYERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "size"),
    [(1, 1, 0, 4), (3, 1, 1, 8), (3, 1, 0, 7), (5, 1, 2, 9), (3, 2, 1, 9), (5, 3, 1, 9)],
)
def test_layers_are_equivariant(layer, dtype, kernel_size, stride, padding, size, algorithm):
    conv = make(layer, 3, 4, kernel_size, stride, padding, dtype=dtype, algorithm=algorithm)
    x = make_input(conv, 2, size, size, dtype)
    assert_equivariant(conv, conv.group, x)
    assert_equivariant(lambda x: gconv.group_max_pool(conv(x)), conv.group, x)
    assert_equivariant(lambda x: conv(x).mean((2, 3, 4)), conv.group, x)


FAULTY = make(P4MConvZ2, 2, 2, 3, padding=1, algorithm="dense", dtype=torch.float32)
FAULTY.filter_index[1, :2] = FAULTY.filter_index[1, :2].flip(0)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (FAULTY, 8),
        (P4MConvZ2(2, 2, 3, stride=2, padding=1), 8),
        (nn.MaxPool2d(3, 2, 1), 8),
        (nn.MaxPool2d(2), 9),
        (nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.Unflatten(1, (2, 8))), 6),
        (lambda x: x * float("nan"), 6),
    ],
    ids=["one index", "stride", "even pool", "odd pool", "plain convolution", "not a number"],
)
def test_what_is_not_equivariant_is_noticed(layer, size):
    with pytest.raises(AssertionError, match="p4m"):
        assert_equivariant(layer, P4M, torch.randn(1, 2, size, size), 1e-2)


def test_memory_formats_slices_and_empty_batches(algorithm):
    conv = make(P4MConvP4M, 3, 4, 3, padding=1, dtype=torch.float32, algorithm=algorithm)
    x = torch.randn(2, 3, 8, 6, 6)
    expected = conv(x)
    torch.testing.assert_close(conv(x.contiguous(memory_format=torch.channels_last_3d)), expected)
    torch.testing.assert_close(conv(torch.stack([x, x], -1)[..., 0]), expected)
    torch.autograd.grad(conv(x).sum(), conv.weight)  # an expanded gradient
    lift = make(P4MConvZ2, 3, 4, 3, dtype=torch.float32, algorithm=algorithm)
    image = torch.randn(2, 3, 6, 6)
    last = image.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(lift(last), lift(image))
    for layer, maps in ((conv, x), (lift, image)):
        empty = maps[:0].clone().requires_grad_()
        y = layer(empty)
        y.sum().backward()
        assert y.shape[:3] == (0, 4, 8)
        assert empty.grad.shape == empty.shape
        assert not layer.weight.grad.any()


def test_signature_and_state_dict_are_groupys(algorithm):
    conv = P4ConvP4(np.int64(4), np.int64(6), (3, 3), stride=(2, 2), padding=(1, 1))
    assert (conv.in_channels, conv.kernel_size, conv.stride, conv.padding) == (4, 3, 2, 1)
    assert P4MConvZ2(1, 2)(torch.zeros(1, 1, 5, 5)).shape == (1, 2, 8, 3, 3)
    conv = make(P4MConvP4M, 4, 4, dtype=torch.float32, algorithm=algorithm)
    shapes = {name: tuple(v.shape) for name, v in conv.state_dict().items()}
    assert shapes == {"weight": (4, 4, 8, 3, 3), "bias": (4,)}
    with torch.device("meta"):
        other = P4MConvP4M(4, 4, algorithm="dense")
    other.load_state_dict(conv.state_dict(), assign=True)  # without: test_fast.py, surroundings
    x = torch.randn(1, 4, 8, 5, 5)
    for copied in (copy.deepcopy(conv), other):
        torch.testing.assert_close(copied(x), conv(x), rtol=1e-4, atol=1e-5)


@ALL_LAYERS
def test_initial_variance_counts_the_group(layer):
    conv = layer(64, 64, 3)
    expected = 2 / (64 * conv.stabilizer_in * 9)
    assert conv.weight.var().item() == pytest.approx(expected, rel=0.05)
    assert not conv.bias.any()


@given(st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None)
def test_blur_pool_is_exact_at_every_size(height, width):
    x = torch.randn(1, 2, 8, height, width, dtype=torch.float64)
    pool = gconv.GroupAvgBlurPool()
    assert pool(x).shape[-2:] == ((height + 1) // 2, (width + 1) // 2)
    assert_equivariant(pool, P4M, x, 1e-13)
    torch.testing.assert_close(pool(torch.ones_like(x)), torch.ones_like(pool(x)))
    assert pool(x[:0]).shape == (0, *pool(x).shape[1:])


def test_blur_pool_is_the_binomial_window():
    line = [16, 32, 80, 48, 96, 0]
    even = [(3 * 16 + 3 * 32 + 80) / 7, (32 + 3 * 80 + 3 * 48 + 96) / 8, (48 + 3 * 96) / 7]
    odd = [(2 * 16 + 32) / 3, (32 + 2 * 80 + 48) / 4, (48 + 2 * 96) / 3]
    for pixels, expected in ((line, even), (line[:5], odd)):
        row = torch.tensor([[[pixels]]], dtype=torch.float64)
        for maps, axis in ((row, 3), (row.mT, 2)):
            pooled = gconv.GroupAvgBlurPool()(maps)
            assert pooled.shape[axis] == 3
            wanted = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(pooled.flatten(), wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("kernel_size", 4), ("kernel_size", (3, 5)), ("stride", 0), ("padding", -1)),
        *(("padding", "same"), ("in_channels", 0), ("out_channels", 2.5), ("algorithm", "fft")),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(str(value))}"):
        P4MConvP4M(**({"in_channels": 1, "out_channels": 1} | {name: value}))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (P4MConvP4M(2, 2), (1, 2, 4, 5, 5), r"\(N, 2, 8, H, W\).*\(1, 2, 4, 5, 5\)"),
        (P4ConvZ2(2, 2), (1, 3, 5, 5), r"\(N, 2, H, W\).*\(1, 3, 5, 5\)"),
        (P4ConvZ2(1, 1, 5), (1, 1, 3, 3), r"5.*\(3, 3\)"),
        (gconv.GroupAvgBlurPool(), (1, 1, 8, 0, 4), "pixel"),
        (gconv.group_max_pool, (1, 1, 4, 4), r"\(N, C, S, H, W\)"),
    ],
)
def test_bad_inputs_are_named(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))
