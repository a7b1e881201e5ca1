"""The fast ways against the dense one: values, gradients, and when they are taken."""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from torch import nn

from lib import fast
from lib.fast import gfourier, gkernel
from lib.gconv import GroupAvgBlurPool, P4ConvP4, P4ConvZ2, P4MConvP4M, P4MConvZ2
from lib.groups import P4, P4M
from tests.test_gconv import ALL_LAYERS, make, make_input, network, one_thread  # noqa: F401


@pytest.mark.parametrize("order", [4, 8])
def test_bilinear_algorithm_is_the_group_correlation(order):
    into, filters, out = gfourier.bilinear_algorithm(order)
    group = P4 if order == 4 else P4M
    expected = np.zeros((order, order, order))  # (g, u, h): y(g) takes P(u) phi(h) if h = g^-1 u
    for g, u in itertools.product(range(order), range(order)):
        expected[g, u, group.product(group.inverse(g), u)] = 1
    np.testing.assert_allclose(np.einsum("eg,eu,eh->guh", out, into, filters), expected, atol=1e-15)
    assert len(into) == gfourier.PRODUCTS[order] == {4: 5, 8: 11}[order]


@ALL_LAYERS
@pytest.mark.parametrize(
    ("channels", "fields", "kernel_size", "stride", "padding", "size"),
    [
        (3, 5, 3, 1, 1, (9, 8)),
        (19, 33, 3, 2, 1, (9, 9)),
        (2, 3, 5, 1, 2, (20, 150)),
        (1, 17, 5, 1, 0, (12, 12)),
        (2, 3, 3, 3, 4, (5, 6)),
        (40, 2, 1, 1, 0, (1, 1)),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_values_and_gradients_are_the_dense_ones(
    layer, channels, fields, kernel_size, stride, padding, size, compiled, monkeypatch
):
    conv = make(layer, channels, fields, kernel_size, stride, padding)
    x = make_input(conv, 3, *size).requires_grad_()

    def run(conv, x):
        y = conv(x)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum()
        return y, *torch.autograd.grad(loss, (x, conv.weight, conv.bias))

    conv.algorithm = "dense"
    expected = run(conv, x)
    conv.algorithm = "fourier"
    for value, other in zip(run(conv, x), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12 * other.abs().max().item())
    if compiled and gkernel.kernel() is None:
        pytest.skip("no C compiler here")
    if not compiled:
        monkeypatch.setattr(gkernel, "kernel", lambda: None)
    single = run(conv.float(), x.detach().float().requires_grad_())
    for value, other in zip(single, expected, strict=True):
        limit = 2e-5 * other.abs().max().item()
        torch.testing.assert_close(value.double(), other, rtol=0, atol=limit)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("layer", "channels"), [(P4MConvZ2, 1), (P4ConvP4, 2), (P4MConvP4M, 7)])
def test_every_share_of_the_work_gives_the_same_gradient(layer, channels, threads):
    conv = make(layer, channels, 5, 3, padding=1, dtype=torch.float32)
    torch.set_num_threads(threads)
    for n in (1, 5):
        x = make_input(conv, n, 20, 20, torch.float32)
        gradients = []
        for conv.algorithm in ("dense", "fourier"):
            gradients.append(torch.autograd.grad(conv(x).square().mean(), conv.weight)[0])
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * gradients[0].abs().max().item())


@pytest.mark.parametrize("layer", [P4MConvZ2, P4MConvP4M])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_wrong_transform_is_noticed(layer, dtype, monkeypatch):
    conv = make(layer, 2, 2, padding=1, dtype=dtype, algorithm="fourier")
    x = make_input(conv, 1, 6, 6, dtype)
    torch.testing.assert_close(conv(x), conv.dense(x), rtol=1e-4, atol=1e-4)
    original = gfourier.filter_transform

    def wrong(*args, **kwargs):
        offsets, transform = original(*args, **kwargs)
        transform = transform.clone()
        transform[0].neg_()
        return offsets, transform

    monkeypatch.setattr(gfourier, "filter_transform", wrong)
    assert (conv(x) - conv.dense(x)).abs().max() > 1e-3


def test_auto_takes_what_is_faster_and_possible():
    conv, x = P4MConvP4M(32, 32), torch.randn(1, 32, 8, 5, 5)
    assert fast.faster(conv, x)
    assert not fast.faster(P4MConvP4M(2, 2), x[:, :2])
    assert not fast.faster(P4MConvP4M(32, 2), x)  # few fields share the input's transforms
    assert not fast.faster(copy.deepcopy(conv).double(), x.double())
    assert not fast.faster(conv.to("meta"), x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert P4MConvP4M(32, 32)(x).dtype == torch.bfloat16


def test_without_a_compiler_it_says_so_once(monkeypatch, tmp_path, caplog):
    gkernel.kernel.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    caplog.set_level(logging.INFO, logger="lib.fast.gkernel")
    try:
        conv, x = P4MConvP4M(2, 2, 3, algorithm="fourier"), torch.randn(1, 2, 8, 5, 5)
        for _ in range(2):
            torch.testing.assert_close(conv(x), conv.dense(x), rtol=1e-4, atol=1e-5)
        assert len(caplog.records) == 1
        assert "no-such-compiler" in caplog.text
    finally:
        gkernel.kernel.cache_clear()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of opcheck itself, torch >= 2.15
@pytest.mark.parametrize(
    ("layer", "dtype"), [(P4MConvP4M, torch.float32), (P4ConvZ2, torch.float64)]
)
def test_operator_is_sound_for_pytorch(layer, dtype):
    conv = make(layer, 2, 3, dtype=dtype)
    x = make_input(conv, 2, 5, 5, dtype).requires_grad_()
    torch.library.opcheck(gfourier.correlate, (x, conv.weight, None, conv.group.order, 1, 1))


@pytest.mark.parametrize("algorithm", ["auto", "dense", "fourier"])
def test_compile_and_export(algorithm):
    torch.manual_seed(0)
    net = nn.Sequential(
        P4MConvZ2(1, 8, 3, padding=1, algorithm=algorithm),
        nn.ReLU(),
        GroupAvgBlurPool(),
        P4MConvP4M(8, 16, 3, algorithm=algorithm),
    )
    x = torch.randn(2, 1, 8, 8)
    close = {"rtol": 1e-4, "atol": 1e-4}
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), **close)
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x), **close)
    ours = "cxr" in str(exported.graph)
    assert ours == (algorithm == "fourier")  # else the program needs PyTorch alone


def derivatives(conv, x):
    """Derivatives of a layer that the operator does not have itself."""
    v = torch.linspace(-1, 1, x.numel()).view_as(x)

    def loss(x):
        return conv(x[None]).square().sum()

    def twice():
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(conv(leaf).pow(3).sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), leaf)[0]

    return {
        "jvp": lambda: torch.func.jvp(conv, (x,), (v,))[1],
        "forward AD": lambda: dual(conv, x, v),
        "grad": lambda: torch.func.grad(lambda x: conv(x).sum())(x),
        "vmap": lambda: torch.func.vmap(torch.func.grad(loss))(x),
        "trace": lambda: torch.jit.trace(conv, x, check_trace=False)(x),
        "double backward": twice,
    }


def dual(conv, x, v):
    with torch.autograd.forward_ad.dual_level():
        y = conv(torch.autograd.forward_ad.make_dual(x, v))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("kind", list(derivatives(None, torch.zeros(1))))
@pytest.mark.parametrize("algorithm", ["auto", "fourier"])
def test_other_derivatives_are_right_or_name_the_dense_way(kind, algorithm):
    conv = make(P4MConvP4M, 16, 16, padding=1, dtype=torch.float32, algorithm=algorithm)
    x = torch.randn(2, 16, 8, 5, 5)
    assert fast.faster(conv, x)
    if algorithm == "fourier" or kind == "double backward":
        with pytest.raises(NotImplementedError, match='algorithm="dense"'):
            derivatives(conv, x)[kind]()
        return
    result = derivatives(conv, x)[kind]()
    conv.algorithm = "dense"
    torch.testing.assert_close(result, derivatives(conv, x)[kind](), rtol=1e-4, atol=1e-3)
