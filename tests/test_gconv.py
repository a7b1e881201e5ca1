"""The layers against the definition written out pixel by pixel, under all elements of the group,
with controls that must fail.
"""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.fast import gfourier, gkernel
from lib.gconv import (
    GroupAvgBlurPool,
    GroupBatchNorm,
    GroupMaxPool,
    P4ConvP4,
    P4ConvZ2,
    P4MConvP4M,
    P4MConvZ2,
    blur_matrix,
    fold_batch_norms,
    group_max_pool,
)
from lib.groups import P4, P4M
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
    """Each way to compute a layer; the compiled kernel takes float32, so the third differs from the
    second there only.
    """
    if "without" in request.param:
        monkeypatch.setattr(gkernel, "kernel", lambda: None)
    return request.param.split()[0]


def make(layer, *args, seed=0, dtype=torch.float64, **kwargs):
    """A layer with random weight and bias."""
    torch.manual_seed(seed)
    conv = layer(*args, **kwargs)
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
    return conv.to(dtype)


def make_input(conv, n, height, width, dtype=torch.float64):
    group_axis = () if conv.lifting else (conv.group.order,)
    return torch.randn(n, conv.in_channels, *group_axis, height, width, dtype=dtype)


def act(group, x, g):
    return group.act_on_maps(x, g) if x.ndim == 5 else group.act_on_grid(x, g)


def equivariance_error(group, module, x):
    """Largest relative difference between module(g x) and g module(x), over all elements."""
    with torch.no_grad():
        y = module(x)
        errors = [
            (module(act(group, x, g)) - act(group, y, g)).abs().max() / y.abs().max()
            for g in range(group.order)
        ]
    return max(errors).item()


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
    for g, i, j, u, t in itertools.product(
        range(order),
        range(rows),
        range(columns),
        range(stabilizer_in),
        itertools.product(range(k), range(k)),
    ):
        row, column = i * stride - padding + t[0], j * stride - padding + t[1]
        if 0 <= row < height and 0 <= column < width:
            inverse = matrices[g].T
            tap = inverse @ (np.array(t) - k // 2) + k // 2
            source = (
                0
                if stabilizer_in == 1
                else next(h for h in range(order) if (matrices[h] == inverse @ matrices[u]).all())
            )
            y[:, :, g, i, j] += x[:, :, u, row, column] @ weight[:, :, source, tap[0], tap[1]].T
    return torch.from_numpy(y)


@ALL_LAYERS
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "size"),
    [
        (1, 1, 0, (2, 3)),
        (3, 1, 1, (3, 4)),
        (3, 2, 0, (5, 6)),
        (3, 2, 1, (4, 4)),
        (5, 1, 2, (3, 3)),
        (5, 2, 1, (5, 4)),
    ],
)
def test_equals_the_definition(layer, kernel_size, stride, padding, size, monkeypatch):
    conv = make(layer, 2, 3, kernel_size, stride=stride, padding=padding)
    x = make_input(conv, 2, *size)
    with torch.no_grad():
        expected = reference(x, conv.weight, conv.bias, conv.group.order, stride, padding)
        scale = expected.abs().max().item()
        for conv.algorithm in ("dense", "fourier"):
            torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12 * scale)
        single = conv.float()(x.float())
        torch.testing.assert_close(single.double(), expected, rtol=0, atol=3e-6 * scale)
        monkeypatch.setattr(gkernel, "kernel", lambda: None)
        torch.testing.assert_close(conv(x.float()), single, rtol=0, atol=3e-6 * scale)


@ALL_LAYERS
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "size"),
    [(1, 1, 0, 4), (3, 1, 1, 8), (3, 1, 0, 7), (5, 1, 2, 9), (3, 2, 1, 9), (5, 3, 1, 9)],
)
def test_layers_are_equivariant(
    layer, dtype, tolerance, kernel_size, stride, padding, size, algorithm
):
    conv = make(
        layer, 3, 4, kernel_size, stride=stride, padding=padding, dtype=dtype, algorithm=algorithm
    )
    assert equivariance_error(conv.group, conv, make_input(conv, 2, size, size, dtype)) < tolerance


@given(
    st.sampled_from(LAYERS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_layers_commute_with_the_group(
    layer, channels, fields, kernel_size, stride, padding, steps
):
    size = kernel_size - 2 * padding + steps * stride  # the condition in the module's docstring
    conv = make(layer, channels, fields, kernel_size, stride=stride, padding=padding)
    if size > 0:
        assert equivariance_error(conv.group, conv, make_input(conv, 1, size, size)) < 1e-12


@ALL_LAYERS
def test_stride_two_on_even_sizes_is_not_exact(layer):
    conv = make(layer, 2, 2, 3, stride=2, padding=1)
    assert equivariance_error(conv.group, conv, make_input(conv, 1, 8, 8)) > 1e-2


@ALL_LAYERS
def test_one_wrong_index_is_noticed(layer):
    conv = make(layer, 2, 2, 3, padding=1, algorithm="dense")
    conv.filter_index[1, :2] = conv.filter_index[1, :2].flip(0)
    assert equivariance_error(conv.group, conv, make_input(conv, 1, 6, 6)) > 1e-3


@ALL_LAYERS
def test_one_wrong_transform_is_noticed(layer):
    conv = make(layer, 2, 2, 3, padding=1, algorithm="fourier")
    x = make_input(conv, 1, 6, 6)
    expected = conv(x)
    conv.fourier_transform[1].neg_()
    assert (conv(x) - expected).abs().max() > 1e-3


def test_a_plain_convolution_is_noticed():
    plain = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.Unflatten(1, (2, 8))).double()
    assert equivariance_error(P4M, plain, torch.randn(1, 2, 6, 6, dtype=torch.float64)) > 1e-2


@ALL_LAYERS
@pytest.mark.parametrize("algorithm", ["dense", "fourier"])
def test_gradients(layer, algorithm):
    conv = make(layer, 2, 2, 3, stride=2, padding=1, algorithm=algorithm)
    x = make_input(conv, 2, 4, 3).requires_grad_()

    def run(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(run, (x, conv.weight, conv.bias), fast_mode=True)


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
def test_algorithms_agree_in_value_and_gradient(
    layer, channels, fields, kernel_size, stride, padding, size, compiled, monkeypatch
):
    conv = make(layer, channels, fields, kernel_size, stride=stride, padding=padding)
    x = make_input(conv, 3, *size).requires_grad_()

    def run(conv, x):
        y = conv(x)
        return y, *torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum(),
            (x, conv.weight, conv.bias),
        )

    conv.algorithm = "dense"
    expected = run(conv, x)
    conv.algorithm = "fourier"
    for value, other in zip(run(conv, x), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12 * other.abs().max().item())
    if compiled and gkernel.kernel() is None:
        pytest.skip("no C compiler here")
    if not compiled:
        monkeypatch.setattr(gkernel, "kernel", lambda: None)
    for value, other in zip(
        run(conv.float(), x.detach().float().requires_grad_()), expected, strict=True
    ):
        torch.testing.assert_close(
            value.double(), other, rtol=0, atol=2e-5 * other.abs().max().item()
        )


@pytest.mark.parametrize("order", [4, 8])
def test_bilinear_algorithm_is_the_group_correlation(order):
    into, filters, out = gfourier.bilinear_algorithm(order)
    group = P4 if order == 4 else P4M
    expected = np.zeros((order, order, order))  # (g, u, h): y(g) takes P(u) phi(h) where h = g^-1 u
    for g, u in itertools.product(range(order), range(order)):
        expected[g, u, group.product(group.inverse(g), u)] = 1
    np.testing.assert_allclose(np.einsum("eg,eu,eh->guh", out, into, filters), expected, atol=1e-15)
    assert len(into) == gfourier.PRODUCTS[order] == {4: 5, 8: 11}[order]
    *_, right, _, recover = map(np.array, gfourier.STRASSEN if order == 8 else gfourier.GAUSS)
    np.testing.assert_array_equal(recover @ right, np.eye(order // 2))


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


@pytest.mark.parametrize("algorithm", ["dense", "fourier"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("layer", [P4ConvZ2, P4MConvP4M])
def test_a_batch_may_be_empty(algorithm, compiled, layer, monkeypatch):
    if not compiled:
        monkeypatch.setattr(gkernel, "kernel", lambda: None)
    conv = layer(2, 3, 3, algorithm=algorithm)
    x = torch.randn(0, 2, *[conv.stabilizer_in] * (not conv.lifting), 5, 5, requires_grad=True)
    y = conv(x)
    y.sum().backward()
    assert y.shape == (0, 3, conv.group.order, 3, 3)
    assert x.grad.shape == x.shape
    assert not conv.weight.grad.any()


def test_auto_takes_what_is_faster_and_possible(monkeypatch):
    conv, x = P4MConvP4M(32, 32, 3), torch.randn(1, 32, 8, 5, 5)
    calls = []
    original = gfourier.fourier_conv
    monkeypatch.setattr(
        gfourier, "fourier_conv", lambda *arguments: calls.append(1) or original(*arguments)
    )

    def used(conv, x):
        calls.clear()
        conv(x)
        return bool(calls)

    assert used(conv, x)
    assert not used(P4MConvP4M(2, 2, 3), x[:, :2])
    assert not used(P4MConvP4M(32, 2, 3), x)  # the input's transforms are shared by few fields
    lift, image = P4MConvZ2(1, 32, 5), torch.randn(1, 1, 9, 9)
    assert not used(lift, image)
    with torch.no_grad():
        assert used(lift, image) == gkernel.available()
    assert not used(copy.deepcopy(conv).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(conv, x)
        assert conv(x).dtype == torch.bfloat16
    conv.algorithm = "dense"
    assert not used(conv, x)


def test_without_a_compiler_it_still_works_and_says_so_once(monkeypatch, tmp_path, caplog):
    gkernel.kernel.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    caplog.set_level(logging.INFO, logger="lib.fast.gkernel")
    try:
        conv, x = P4MConvP4M(2, 2, 3, algorithm="fourier"), torch.randn(1, 2, 8, 5, 5)
        values = [conv(x), conv(x)]
        conv.algorithm = "dense"
        torch.testing.assert_close(values[1], conv(x), rtol=1e-4, atol=1e-5)
        assert [record.message.split(":")[0] for record in caplog.records] == [
            "group convolutions use PyTorch operations, not the compiled kernel"
        ]
    finally:
        gkernel.kernel.cache_clear()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of opcheck itself, torch >= 2.15
def test_operator_is_sound_for_pytorch():
    for conv, dtype in ((P4MConvP4M(2, 3, 3), torch.float32), (P4ConvZ2(2, 3, 3), torch.float64)):
        x = make_input(conv, 2, 5, 5, dtype).requires_grad_()
        entries, taps = (
            gfourier.bilinear_algorithm(conv.group.order)[0].shape[0],
            len(gfourier.filter_transform(conv.group.order, 3, conv.lifting)[0]),
        )
        filters = torch.randn(entries, 2 * taps, 3, dtype=dtype, requires_grad=True)
        torch.library.opcheck(gfourier.correlate, (x, filters, None, conv.group.order, 1, 1, 3))


@pytest.mark.parametrize("algorithm", ["auto", "dense", "fourier"])
def test_compile_and_export(algorithm):
    torch.manual_seed(0)
    net = nn.Sequential(
        P4MConvZ2(1, 4, 3, padding=1, algorithm=algorithm),
        nn.ReLU(),
        GroupAvgBlurPool(),
        P4MConvP4M(4, 4, 3, algorithm=algorithm),
    )
    x = torch.randn(2, 1, 8, 8)
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)


def test_memory_formats_slices_and_empty_batches(algorithm):
    conv = make(P4MConvP4M, 3, 4, 3, padding=1, dtype=torch.float32, algorithm=algorithm)
    x = torch.randn(2, 3, 8, 6, 6)
    expected = conv(x)
    torch.testing.assert_close(conv(x.contiguous(memory_format=torch.channels_last_3d)), expected)
    torch.testing.assert_close(conv(torch.stack([x, x], -1)[..., 0]), expected)
    assert conv(x[:0]).shape == (0, 4, 8, 6, 6)
    torch.autograd.grad(conv(x).sum(), conv.weight)  # an expanded gradient
    lift = make(P4MConvZ2, 3, 4, 3, dtype=torch.float32, algorithm=algorithm)
    image = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(
        lift(image.contiguous(memory_format=torch.channels_last)), lift(image)
    )


def test_copies_and_state_dicts(algorithm):
    conv = make(P4MConvP4M, 4, 4, 3, dtype=torch.float32, algorithm=algorithm)
    x = torch.randn(1, 4, 8, 5, 5)
    assert set(conv.state_dict()) == {"weight", "bias"}  # GrouPy's
    assert conv.weight.shape == (4, 4, 8, 3, 3)
    torch.testing.assert_close(copy.deepcopy(conv)(x), conv(x))
    other = P4MConvP4M(4, 4, 3, algorithm="dense")
    other.load_state_dict(conv.state_dict())
    torch.testing.assert_close(other(x), conv(x), rtol=1e-4, atol=1e-5)
    meta = P4MConvP4M(4, 4, 3).to("meta")
    assert all(tensor.device.type == "meta" for tensor in (*meta.parameters(), *meta.buffers()))
    assert len(list(meta.buffers())) == 2


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net = nn.parallel.DistributedDataParallel(
            nn.Sequential(P4MConvP4M(4, 4, 3), GroupBatchNorm(4))
        )
        net(torch.randn(2, 4, 8, 5, 5)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_batch_norm_folds_into_the_filters():
    net = network().double()
    for norm in (module for module in net if isinstance(module, GroupBatchNorm)):
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    folded = fold_batch_norms(net)
    assert not any(isinstance(module, GroupBatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-10, atol=1e-10)
    assert equivariance_error(P4M, folded, x) < 1e-12


def test_agrees_with_escnn():
    """A regular layer of escnn is one of ours: read its filters at the identity, match elements by
    how they move an image.
    """
    pytest.importorskip(
        "escnn", reason="escnn is optional: its release needs an older NumPy and a Fortran compiler"
    )
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.flipRot2dOnR2(4)
    trivial = enn.FieldType(space, [space.trivial_repr])
    image = torch.randn(1, 1, 5, 5)
    elements = list(space.fibergroup.elements)
    moved = [enn.GeometricTensor(image, trivial).transform(element).tensor for element in elements]
    ours = [
        next(g for g in range(8) if torch.allclose(P4M.act_on_grid(image, g), picture, atol=1e-5))
        for picture in moved
    ]
    fields = enn.FieldType(space, 2 * [space.regular_repr])
    theirs = enn.R2Conv(fields, fields, kernel_size=3, padding=1, bias=False).eval()
    bank = theirs.expand_parameters()[0].detach().unflatten(1, (2, 8)).unflatten(0, (2, 8))
    conv = P4MConvP4M(2, 2, 3, padding=1, bias=False)
    conv.weight.data[:, :, ours] = bank[:, ours.index(0)]
    x = torch.randn(1, 2, 8, 9, 9)
    expected = theirs(enn.GeometricTensor(x[:, :, ours].flatten(1, 2), fields)).tensor.unflatten(
        1, (2, 8)
    )
    torch.testing.assert_close(conv(x)[:, :, ours], expected, rtol=1e-4, atol=1e-5)


@ALL_LAYERS
def test_initial_variance_counts_the_group(layer):
    conv = layer(64, 64, 3)
    expected = 2 / (64 * conv.stabilizer_in * 9)
    assert conv.weight.var().item() == pytest.approx(expected, rel=0.05)
    assert not conv.bias.any()


def network(group=P4M):
    """The reference network's shape: lifting 5, 3, 3, with every kind of layer."""
    lift, conv = (P4MConvZ2, P4MConvP4M) if group is P4M else (P4ConvZ2, P4ConvP4)
    return nn.Sequential(
        *(lift(1, 4, 5, padding=2), GroupBatchNorm(4), nn.ReLU(), GroupAvgBlurPool()),
        *(conv(4, 6, 3, padding=1), GroupBatchNorm(6), nn.ReLU(), GroupAvgBlurPool()),
        *(conv(6, 8, 3, padding=1), GroupBatchNorm(8), nn.ReLU(), GroupAvgBlurPool()),
    )


@pytest.mark.parametrize("group", [P4, P4M], ids=lambda group: group.name)
@pytest.mark.parametrize("size", [16, 15, 14])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_network_is_equivariant(group, size, training):
    torch.manual_seed(0)
    net = network(group)
    for norm in (module for module in net if isinstance(module, GroupBatchNorm)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    net.train(training)
    x = torch.randn(2, 1, size, size)
    pooled = nn.Sequential(copy.deepcopy(net), GroupMaxPool())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        assert equivariance_error(group, net.to(dtype), x.to(dtype)) < tolerance
        assert equivariance_error(group, pooled.to(dtype), x.to(dtype)) < tolerance


def test_batch_norm_normalises_each_field_over_the_group():
    y = GroupBatchNorm(3)(torch.randn(4, 3, 8, 5, 5) * 3 + 7)
    torch.testing.assert_close(y.mean((0, 2, 3, 4)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        y.var((0, 2, 3, 4), unbiased=False), torch.ones(3), atol=1e-3, rtol=0
    )
    with pytest.raises(ValueError, match="5D"):
        GroupBatchNorm(3)(torch.randn(4, 3, 5, 5))


@given(st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None)
def test_blur_pool_is_exact_at_every_size(height, width):
    x = torch.randn(1, 2, 8, height, width, dtype=torch.float64)
    pool = GroupAvgBlurPool()
    assert pool(x).shape[-2:] == ((height + 1) // 2, (width + 1) // 2)
    assert equivariance_error(P4M, pool, x) < 1e-13
    torch.testing.assert_close(pool(torch.ones_like(x)), torch.ones_like(pool(x)))


def test_blur_pool_is_the_binomial_window():
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    expected = nn.functional.conv2d(x, torch.outer(kernel, kernel)[None, None], stride=2, padding=1)
    torch.testing.assert_close(GroupAvgBlurPool()(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    assert blur_matrix(5)[:, 1].tolist() == [0, 0.25, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("pool", "size"),
    [(nn.MaxPool2d(3, 2, 1), 8), (nn.MaxPool2d(2), 9)],
    ids=["3x3/2 on even", "2x2/2 on odd"],
)
def test_plain_max_pools_break_the_symmetry(pool, size):
    assert equivariance_error(P4M, pool, torch.randn(1, 2, size, size)) > 1e-2


def test_bad_arguments_are_named():
    for size in (0, 2, 4):
        with pytest.raises(ValueError, match=f"kernel_size must be odd.*got {size}"):
            P4MConvZ2(1, 1, size)
    for arguments, message in (
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"padding": -1}, "padding must be an integer of at least 0, got -1"),
        ({"algorithm": "fft"}, "algorithm must be one of auto, dense, fourier; got 'fft'"),
        ({"padding": "same"}, "padding must be an integer of at least 0, got 'same'"),
    ):
        with pytest.raises(ValueError, match=message):
            P4MConvP4M(1, 1, 3, **arguments)
    with pytest.raises(ValueError, match="in_channels must be an integer of at least 1, got 0"):
        P4ConvZ2(0, 1, 3)
    with pytest.raises(
        ValueError,
        match=r"P4MConvP4M expects input of shape \(N, 2, 8, H, W\), got \(1, 2, 4, 5, 5\)",
    ):
        P4MConvP4M(2, 2, 3)(torch.zeros(1, 2, 4, 5, 5))
    with pytest.raises(
        ValueError, match=r"P4ConvZ2 expects input of shape \(N, 2, H, W\), got \(1, 3, 5, 5\)"
    ):
        P4ConvZ2(2, 2, 3)(torch.zeros(1, 3, 5, 5))
    with pytest.raises(
        ValueError, match=r"a window of 5 does not fit into maps of \(3, 3\) with padding 0"
    ):
        P4ConvZ2(1, 1, 5)(torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="at least one pixel"):
        GroupAvgBlurPool()(torch.zeros(1, 1, 8, 0, 4))
    with pytest.raises(ValueError, match=r"\(N, C, S, H, W\)"):
        group_max_pool(torch.zeros(1, 1, 4, 4))
