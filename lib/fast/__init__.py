"""Faster ways to compute the layers of `lib.gconv`, equal to rounding.

The folder is optional: without it every layer is computed densely. On a CPU, ``gfourier`` is the
method, ``gfourier.c`` and ``gkernel`` are the compiled kernel, ``operators`` is PyTorch's view of
both. On a GPU, ``gtriton`` computes a block's norm, ReLU and pool at once. This module says when
they are taken."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lib.fast import gkernel, operators
from lib.fast.gfourier import GROUPS

try:
    from lib.fast import gtriton
except ImportError:  # Triton comes with PyTorch for CUDA
    gtriton = None

# (a, b) by the group's order and whether the compiled kernel is there. Fourier is the faster if
# a / out_channels + b / (in_channels * k * k) <= 1: all channels share the cost of the transforms,
# so wide layers gain. From tests/bench/gconv.py --layers, forward and training step.
FOURIER_FROM = {(8, True): (1, 1), (4, True): (2, 2), (8, False): (24, 40), (4, False): (64, 48)}


def faster(layer: nn.Module, x: Tensor) -> bool:
    """Whether the Fourier transform is the faster way for this group convolution and input."""
    compiled = gkernel.available()
    if not possible(layer, x) or (layer.lifting and not compiled):
        return False
    a, b = FOURIER_FROM[layer.group.order, compiled]
    return a / layer.out_channels + b / (layer.in_channels * layer.kernel_size**2) <= 1


def possible(layer: nn.Module, x: Tensor) -> bool:
    """Whether the input is one that the fast ways are made for: on a CPU, in single precision."""
    if x.device.type != "cpu" or not x.dtype == layer.weight.dtype == torch.float32:
        return False
    special = torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting()
    return not special and not needs_dense(layer, x)


def needs_dense(layer: nn.Module, x: Tensor) -> bool:
    """Whether a transform of `torch.func`, forward differentiation or a tracer is at work."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    duals = map(forward_ad.unpack_dual, (x, *layer.parameters()))
    return any(dual.tangent is not None for dual in duals)


@torch.compiler.assume_constant_result  # else a tracer takes the answer to be False
def _to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def fast_conv(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The group convolution by the Fourier transform, or None if the dense one is to be taken:
    it knows p4 and p4m.

    The ``algorithm`` of the `lib.gconv.GroupConv` is "auto" (Fourier if `faster`) or "fourier"
    (always). The result has the wider of the dtypes of `x` and the weight; autocast does not narrow
    it. NotImplementedError for "fourier" under `torch.func`'s transforms, forward differentiation,
    TorchScript and export to ONNX, and in a backward pass whose gradient is asked for."""
    if layer.group.order not in GROUPS:
        return None
    if layer.algorithm == "auto":
        if not faster(layer, x):
            return None
    elif _to_onnx() or needs_dense(layer, x):
        raise NotImplementedError(f"torch.func, jvp, jit.trace and ONNX need {operators.DENSE}")
    dtype = torch.promote_types(x.dtype, layer.weight.dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    geometry = (layer.group.order, layer.stride, layer.padding)
    return operators.conv(x.to(dtype), layer.weight.to(dtype), bias, geometry)


def fast_block(block: nn.Sequential, x: Tensor) -> Tensor | None:
    """A `lib.gconv.GroupBlock` by the compiled kernel or, on a GPU, by Triton's; None if its
    modules are to be called.

    With statistics of the batch, the norm's come with the convolution of `x`; else the norm is
    folded into the filters, on a GPU into the pool."""
    conv, norm, _, pool = block
    hooks = (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in block)
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if (
        conv.algorithm == "dense"
        or conv.group.order not in GROUPS
        or len(x) == 0
        or any(tensor is None or tensor.dtype != torch.float32 for tensor in parameters)
        or (norm.training and conv.bias is not None)  # which the norm takes out again
        or any(hooks)
        or torch.compiler.is_compiling()
    ):
        return None
    geometry = (conv.group.order, conv.stride, conv.padding)
    suits = possible if conv.algorithm == "fourier" else faster
    if x.device.type == "cuda":
        special = torch.compiler.is_exporting() or needs_dense(conv, x) or conv.bias is not None
        special |= torch.is_grad_enabled() and not norm.training
        if gtriton is None or special or conv.algorithm != "auto":
            return None
        out, statistics = gtriton.block(conv, norm, x)
    elif not suits(conv, x) or (norm.training and not gkernel.available()):
        return None
    elif norm.training:
        weights = conv.weight, norm.weight, norm.bias
        out, statistics = operators.Block.apply(x, *weights, norm.eps, geometry)
    else:
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        folded = conv.weight * scale[:, None, None, None, None]
        many = len(x) >= 2 * torch.get_num_threads()  # a thread computes whole images
        if many and gkernel.available() and not torch.is_grad_enabled():
            return operators.pooled_conv(x, folded, shift, geometry)
        y = operators.conv(x, folded, shift, geometry)
        return operators.ReluPool.apply(y) if gkernel.available() else pool(y.relu_())
    if norm.training:
        track(norm, statistics)
    return out


@torch.no_grad()
def track(norm: nn.Module, statistics: Tensor) -> None:
    """Follow mean, variance and unbiased variance (3, C) as PyTorch does: with momentum None the
    running statistics are means."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(statistics[0].float(), momentum)
    norm.running_var.lerp_(statistics[2].float(), momentum)
