"""Faster ways to compute the layers of `lib.gconv` on a CPU, equal to rounding. Optional: without
this folder every layer is computed densely."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lib.fast import gfourier, gkernel

# (a, b) by the group's order and whether the compiled kernel is there. Fourier is the faster if
# a / out_channels + b / (in_channels * k * k) <= 1: all channels share the cost of the transforms,
# so wide layers gain. From tests/bench/gconv_auto.py, forward and training step.
FOURIER_FROM = {(8, True): (4, 8), (4, True): (8, 16), (8, False): (24, 40), (4, False): (64, 48)}


def faster(layer: nn.Module, x: Tensor) -> bool:
    """Whether the Fourier transform is the faster way for this group convolution and input."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or layer.weight.dtype != x.dtype:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or needs_dense(layer, x):
        return False
    compiled = gkernel.available()
    if layer.lifting:  # the dense gradient of these few filters is the cheaper one
        trains = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
        return compiled and layer.out_channels >= 16 and not trains
    a, b = FOURIER_FROM[layer.group.order, compiled]
    return a / layer.out_channels + b / (layer.in_channels * layer.kernel_size**2) <= 1


def needs_dense(layer: nn.Module, x: Tensor) -> bool:
    """Whether a transform of `torch.func`, forward differentiation or a tracer is at work."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in (x, *layer.parameters())
    )


def convolve(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The group convolution by the Fourier transform, or None if the dense one is to be taken.

    Parameters
    ----------
    layer : lib.gconv.GroupConv
        Its ``algorithm`` is "auto" (take Fourier if `faster`) or "fourier" (take it always).
    x : Tensor
        The layer's input.

    Returns
    -------
    Tensor or None
        Of the wider of the dtypes of `x` and the weight; autocast does not narrow it.

    Raises
    ------
    NotImplementedError
        For "fourier" under `torch.func`'s transforms, forward differentiation and TorchScript; in
        the backward pass also if its gradient is asked for.
    """
    if layer.algorithm == "auto":
        if not faster(layer, x):
            return None
    elif needs_dense(layer, x):
        raise NotImplementedError(f"torch.func, jvp and jit.trace need {gfourier.DENSE}")
    dtype = torch.promote_types(x.dtype, layer.weight.dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    geometry = (layer.group.order, layer.stride, layer.padding)
    return gfourier.correlate(x.to(dtype), layer.weight.to(dtype), bias, *geometry)
