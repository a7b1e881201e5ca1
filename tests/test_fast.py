"""The fast ways against the dense one: values, gradients, statistics, and when they are taken."""

import copy
import io
import logging
import pickle
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lib import fast
from lib.fast import gfourier, gkernel, operators
from lib.gconv import GroupAvgBlurPool, P4ConvP4, P4ConvZ2, P4MConvP4M, P4MConvZ2
from lib.groups import P4, P4M
from tests.test_gconv import ALL_LAYERS, LAYERS, block, make, make_input, one_thread  # noqa: F401

COMPILED = pytest.mark.skipif(not gkernel.available(), reason="no C compiler here")


def close(value, expected, tolerance):
    limit = tolerance * max(expected.abs().max().item(), 1) if expected.numel() else 0
    torch.testing.assert_close(value.to(expected), expected, rtol=0, atol=limit)


def test_as_few_products_as_promised():
    for order, promised in {4: 5, 8: 11}.items():
        assert len(gfourier.bilinear_algorithm(order)[0]) == gfourier.PRODUCTS[order] == promised


def outcome(module, x, gradient=True):
    """Output, gradients and state of a layer or block after one pass."""
    module.zero_grad()
    x = x.clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        y = module(x)
    results = {"y": y.detach(), **{f"state of {k}": v for k, v in module.state_dict().items()}}
    if gradient:
        (y * torch.linspace(-1, 1, y.numel()).view_as(y).to(y)).sum().backward()
        results["gradient of x"] = x.grad
        results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return results


@ALL_LAYERS
@pytest.mark.parametrize(
    ("channels", "fields", "kernel_size", "stride", "padding", "size"),
    [
        *((3, 5, 3, 1, 1, (9, 8)), (19, 33, 3, 2, 1, (9, 9)), (2, 3, 5, 1, 2, (20, 150))),
        *((1, 17, 5, 1, 0, (12, 12)), (2, 3, 3, 3, 4, (5, 6)), (40, 2, 1, 1, 0, (1, 1))),
        (2, 2, 3, 1, 3, (2, 3)),
    ],
)
def test_values_and_gradients_are_the_dense_ones(
    layer, channels, fields, kernel_size, stride, padding, size, monkeypatch
):
    conv = make(layer, channels, fields, kernel_size, stride, padding, algorithm="dense")
    x = make_input(conv, 3, *size)
    expected = outcome(conv, x)
    conv.algorithm = "fourier"
    for name, value in outcome(conv, x).items():
        close(value, expected[name], 1e-12)
    conv, x = conv.float(), x.float()
    for kernel in (gkernel.kernel, lambda: None):
        monkeypatch.setattr(gkernel, "kernel", kernel)
        for name, value in outcome(conv, x).items():
            close(value, expected[name], 1e-5)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("layer", "channels"), [(P4MConvZ2, 1), (P4ConvP4, 2), (P4MConvP4M, 7)])
def test_threads_change_nothing(layer, channels, threads):
    conv = make(layer, channels, 5, padding=1, dtype=torch.float32, algorithm="fourier")
    for n in (1, 5):
        x = make_input(conv, n, 20, 20, torch.float32)
        torch.set_num_threads(1)
        expected = outcome(conv, x)
        torch.set_num_threads(threads)
        found = outcome(conv, x)
        for name in ("y", "gradient of weight"):
            assert torch.equal(found[name], expected[name])


def fused(monkeypatch):
    """Names of the fused ways taken since."""
    taken = []
    for name in ("Block", "ReluPool"):
        original = getattr(operators, name).apply

        class Spy:
            def apply(*args, name=name, original=original):
                taken.append(name)
                return original(*args)

        monkeypatch.setattr(operators, name, Spy)
    return taken


@COMPILED
@given(
    st.sampled_from(LAYERS),
    st.integers(2, 5),  # behind a norm the gradient of a single number is 0, lost in rounding
    st.integers(1, 20),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 3),
    st.tuples(st.integers(5, 26), st.integers(5, 26)),
    st.booleans(),
    st.sampled_from([0.1, None]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_block_is_its_modules(
    layer, channels, fields, kernel_size, n, size, training, momentum, compiled
):
    torch.manual_seed(0)
    group = P4 if layer in (P4ConvZ2, P4ConvP4) else P4M
    ours = block(layer.lifting, group, channels, fields, kernel_size).train(training)
    ours[0].algorithm, ours[1].momentum = "fourier", momentum
    modules = copy.deepcopy(ours)
    modules[0].algorithm = "dense"
    exact = copy.deepcopy(modules).double()
    x = make_input(ours[0], n, *size, torch.float32)
    normalised = copy.deepcopy(exact)[:2](x.double())
    assume(normalised.abs().min() > 2e-6)  # rounding may not decide about a ReLU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "IMAGES", 2)
        if not compiled:
            patch.setattr(gkernel, "kernel", lambda: None)
        taken = fused(patch)
        results = outcome(ours, x)
        assert taken == (["Block" if training else "ReluPool"] if compiled else [])
        if compiled and not training:  # then image by image
            assert torch.equal(outcome(ours, x, gradient=False)["y"], results["y"])
    theirs = outcome(modules, x)
    for name, expected in outcome(exact, x.double()).items():
        rounding = (theirs[name] - expected).abs().max() + 2e-6 * max(1, expected.abs().max())
        assert (results[name] - expected).abs().max() < 4 * rounding, name


@COMPILED
def test_statistics_of_a_block_without_gradients():
    """As when fresh statistics are estimated: train mode, no gradients, cumulative average. The
    mean is a thousand times the standard deviation."""
    ours = block(False, P4M, 4, 16, 3).train()
    ours[0].algorithm, ours[1].momentum = "fourier", None
    ours[1].reset_running_stats()
    exact = copy.deepcopy(ours).double()
    exact[0].algorithm = "dense"
    for _ in range(3):
        x = torch.randn(3, 4, 8, 12, 12) + 1e3
        for module, maps in ((ours, x), (exact, x.double())):
            outcome(module, maps, gradient=False)
    close(ours[1].running_mean, exact[1].running_mean, 1e-6)
    close(ours[1].running_var, exact[1].running_var, 1e-2)
    assert ours[1].num_batches_tracked == 3


@COMPILED
def test_when_a_block_is_fused(monkeypatch):
    module, x = block(False, P4M, 16, 16, 3), torch.randn(2, 16, 8, 9, 9)
    taken = fused(monkeypatch)

    def ways(module, x):
        taken.clear()
        module(x)
        return list(taken)

    assert ways(module, x) == ["Block"]
    assert ways(module.eval(), x) == ["ReluPool"]
    monkeypatch.setattr(operators, "pooled_conv", lambda *_: taken.append("pooled"))
    with torch.no_grad():
        assert ways(module, x) + ways(module, x[:1]) == ["pooled", "ReluPool"]
    module[1].train()  # the norm's own mode counts
    assert ways(module, x) == ["Block"]
    for other, maps in ((module, x[:0]), (copy.deepcopy(module).double(), x.double())):
        assert ways(other, maps) == []
    seen = []
    handle = module[2].register_forward_hook(lambda *_: seen.append(1))
    assert ways(module, x) == []
    assert seen
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert ways(module, x) == []
    dense = copy.deepcopy(module)
    dense[0].algorithm = "dense"
    assert ways(dense, x) == []
    module[1] = nn.SyncBatchNorm(16).eval()  # or another norm that processes share
    assert ways(module, x) == []
    monkeypatch.setattr(gkernel, "kernel", lambda: None)
    assert ways(block(False, P4M, 16, 16, 3), x) == []


def test_auto_takes_what_is_faster_and_possible(monkeypatch):
    conv, x = P4MConvP4M(64, 64), torch.randn(1, 64, 8, 5, 5)
    assert fast.faster(conv, x)
    assert not fast.faster(copy.deepcopy(conv).double(), x.double())
    assert not fast.faster(copy.deepcopy(conv).to("meta"), x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    monkeypatch.setattr(gkernel, "kernel", lambda: None)
    assert fast.faster(conv, x)
    assert not fast.faster(P4MConvP4M(64, 2), x)  # few fields share the input's transforms
    assert not fast.faster(P4MConvZ2(1, 64), x[:, :1, 0])


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


# of opcheck itself, torch >= 2.15
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("layer", "dtype"), [(P4MConvP4M, torch.float32), (P4ConvZ2, torch.float64)]
)
def test_operator_is_sound_for_pytorch(layer, dtype):
    conv = make(layer, 2, 3, dtype=dtype)
    x = make_input(conv, 2, 5, 5, dtype).requires_grad_()
    torch.library.opcheck(operators.conv, (x, conv.weight, None, [conv.group.order, 1, 1]))


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize("algorithm", ["auto", "dense", "fourier"])
@pytest.mark.parametrize("training", [True, False])
def test_compile_and_export(algorithm, training):
    torch.manual_seed(0)
    lifting = P4MConvZ2(1, 8, 3, padding=1, algorithm=algorithm)
    net = nn.Sequential(lifting, nn.ReLU(), GroupAvgBlurPool(), block(False, P4M, 8, 16, 3))
    net.train(training)[3][0].algorithm = algorithm
    x = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(net, (x,))
    for program in (compiled, exported.module()):
        torch.testing.assert_close(program(x), net(x), rtol=1e-4, atol=1e-4)
    # without the Fourier operator, the program needs PyTorch alone
    assert ("cxr" in str(exported.graph)) == (algorithm == "fourier")


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about its older exporter
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx(dynamo):
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not required")
    from onnx import load_from_string
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    net = nn.Sequential(P4MConvZ2(1, 16, 3, padding=1), block(False, P4M, 16, 16, 3)).eval()
    x, kind = torch.randn(2, 1, 6, 6), {"dynamo": dynamo, "verbose": False}
    torch.onnx.export(net, (x,), file := io.BytesIO(), **kind)
    program = ReferenceEvaluator(load_from_string(file.getvalue()))
    (y,) = program.run(None, {program.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x), rtol=1e-4, atol=1e-4)
    net[0].algorithm = "fourier"
    with pytest.raises((NotImplementedError, torch.onnx.errors.OnnxExporterError), match="dense"):
        torch.onnx.export(net, (x,), io.BytesIO(), **kind)


def surroundings(conv, x):
    """What programs do with any layer; each gives what the layer gives."""

    def meta():
        with torch.device("meta"):
            other = P4MConvP4M(16, 16, 3, padding=1, algorithm=conv.algorithm)
        assert other(x.to("meta")).shape == x.shape
        other.to_empty(device="cpu").load_state_dict(conv.state_dict())
        return other(x)

    def ensemble():
        weights, buffers = torch.func.stack_module_state([conv, conv])
        call = partial(torch.func.functional_call, copy.deepcopy(conv).to("meta"))
        return torch.vmap(lambda w, b: call((w, b), (x,)))(weights, buffers)[1]

    def any_batch():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(conv, (x,), dynamic_shapes=({0: batch},))
        return torch.cat([program.module()(image[None]) for image in x])

    return {
        "meta": meta,
        "pickle": lambda: pickle.loads(pickle.dumps(conv))(x),
        "weight_norm": lambda: nn.utils.parametrizations.weight_norm(copy.deepcopy(conv))(x),
        "checkpoint": lambda: checkpoint(conv, x, use_reentrant=False),
        "ensemble": ensemble,
        "any batch": any_batch,
    }


@pytest.mark.parametrize("kind", list(surroundings(None, torch.zeros(1))))
@pytest.mark.parametrize("algorithm", ["auto", "dense", "fourier"])
def test_surroundings(kind, algorithm):
    conv = make(P4MConvP4M, 16, 16, 3, padding=1, dtype=torch.float32, algorithm=algorithm)
    x = torch.randn(2, 16, 8, 5, 5)
    if algorithm == "fourier" and kind == "ensemble":
        with pytest.raises(NotImplementedError, match='algorithm="dense"'):
            surroundings(conv, x)[kind]()
        return
    torch.testing.assert_close(surroundings(conv, x)[kind](), conv(x), rtol=1e-4, atol=1e-4)


def derivatives(conv, x):
    """Derivatives of a layer that the operator does not have itself."""
    v = torch.linspace(-1, 1, x.numel()).view_as(x)

    def twice():
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(conv(leaf).pow(3).sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), leaf)[0]

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(conv(forward_ad.make_dual(x, v))).tangent

    return {
        "forward AD": dual,
        "torch.func": lambda: torch.func.grad(lambda x: conv(x).square().sum())(x),
        "trace": lambda: torch.jit.trace(conv, x, check_trace=False)(x),
        "double backward": twice,
    }


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("kind", list(derivatives(None, torch.zeros(1))))
@pytest.mark.parametrize("algorithm", ["auto", "fourier"])
@pytest.mark.parametrize("whole", [False, True], ids=["layer", "block"])
def test_other_derivatives_are_right_or_name_the_dense_way(kind, algorithm, whole):
    module, x = block(False, P4M, 16, 16, 3).eval(), torch.randn(2, 16, 8, 5, 5)
    module = module if whole else nn.Sequential(module[0])
    conv = module[0]
    conv.algorithm = algorithm
    assert fast.faster(conv, x)
    if algorithm == "fourier" or kind == "double backward":
        with pytest.raises(NotImplementedError, match='algorithm="dense"'):
            derivatives(module, x)[kind]()
        return
    result = derivatives(module, x)[kind]()
    conv.algorithm = "dense"
    torch.testing.assert_close(result, derivatives(module, x)[kind](), rtol=1e-4, atol=1e-3)
