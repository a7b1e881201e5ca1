"""The group convolution and its block as operators of PyTorch, differentiable once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from lib.fast import gkernel
from lib.fast.gfourier import GROUPS, TorchLayer, out_size
from lib.groups import filter_bank

DENSE = 'algorithm="dense" (an attribute of the layer)'


def _compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and gkernel.available()


def _once() -> None:
    """Called by backward passes, in which PyTorch records only if it is to differentiate them."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"the gradient of a gradient needs {DENSE}")


@torch.library.custom_op("cxr::group_conv", mutates_args=())
def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: int, stride: int, padding: int
) -> Tensor:
    """Group convolution.

    Parameters
    ----------
    x : Tensor, shape (n, C, H, W) for a lifting layer, else (n, C, S, H, W)
    weight : Tensor, shape (N, C, S_in, k, k)
    bias : Tensor or None, shape (N,)
    order, stride, padding : int
        S, 4 for p4 and 8 for p4m; the others as in `torch.nn.Conv2d`.

    Returns
    -------
    Tensor, shape (n, N, S, H', W')
    """
    x, weight = x.contiguous(), weight.contiguous()
    y = _conv_like(x, weight, bias, order, stride, padding)
    if _compiled(x):
        gkernel.forward(x, weight, bias, y, stride, padding)
        return y
    with torch.autocast(x.device.type, enabled=False):
        TorchLayer(x, weight, order, stride, padding).forward(x, y)
    return y if bias is None else y.add_(bias[:, None, None, None])


@conv.register_fake
def _conv_like(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: int, stride: int, padding: int
) -> Tensor:
    size = out_size(x, weight.shape[-1], stride, padding)
    return x.new_empty(x.shape[0], weight.shape[0], order, *size)


def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: int,
    stride: int,
    padding: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `conv` for x and the weight, each None if it is not needed."""
    dx = torch.empty_like(x) if needs_x else None
    dweight = torch.empty_like(weight) if needs_weight else None
    with torch.autocast(x.device.type, enabled=False):
        if not _compiled(x):
            TorchLayer(x, weight, order, stride, padding).backward(x, dy, dx, dweight)
            return dx, dweight
        if needs_weight:
            gkernel.weight_gradient(x, dy, dweight, stride, padding)
        if needs_x and x.ndim == 5 and stride == 1 and padding < weight.shape[-1]:
            gkernel.input_gradient(dy, weight, dx, padding)
        elif needs_x:
            bank = filter_bank(
                weight, GROUPS[order].filter_indices(weight.shape[-1], weight.shape[2])
            )
            maps = x if x.ndim == 4 else x.flatten(1, 2)
            dx = conv2d_input(maps.shape, bank, dy.flatten(1, 2), stride, padding).view_as(x)
    return dx, dweight


@torch.library.custom_op("cxr::group_conv_backward", mutates_args=())
def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: int,
    stride: int,
    padding: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `conv` for x and the weight, each of size 0 if it is not needed."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    gradients = _conv_backward(dy, x, weight, order, stride, padding, needs_x, needs_weight)
    dx, dweight = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dweight


@conv_backward.register_fake
def _gradients_like(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: int,
    stride: int,
    padding: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_x else 0)
    return dx, weight.new_empty(weight.shape if needs_weight else 0)


def _save_conv(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.geometry = inputs
    ctx.bias = bias is not None
    ctx.save_for_backward(x, weight)


def _conv_gradients(ctx, dy: Tensor) -> tuple:
    _once()
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dx, dweight = conv_backward(dy, *ctx.saved_tensors, *ctx.geometry, needs_x, needs_weight)
    dbias = dy.sum((0, 2, 3, 4)) if ctx.bias and needs_bias else None
    return dx if needs_x else None, dweight if needs_weight else None, dbias, None, None, None


conv.register_autograd(_conv_gradients, setup_context=_save_conv)


class ReluPool(torch.autograd.Function):
    """ReLU and blur pool of group maps (n, N, S, H, W), by the compiled kernel."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        out = y.new_empty(_half(y.shape))
        gkernel.pool(y, out)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> Tensor:
        _once()
        (y,) = ctx.saved_tensors
        dy = torch.empty_like(y)
        gkernel.pool_gradient(y, dout.contiguous(), dy)
        return dy


class Block(torch.autograd.Function):
    """Group convolution, batch norm by the batch's statistics, ReLU and blur pool, by the compiled
    kernel.

    ``Block.apply(x, weight, gamma, beta, eps, order, stride, padding)``: x to padding are those of
    `conv`; gamma and beta, shape (N,), are the norm's. It returns the pooled maps and, without
    gradient, mean, variance and unbiased variance of the convolution's fields, float64 (3, N). The
    backward pass needs x and the convolution; nothing else of their size is kept.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, order, stride, padding) -> tuple[Tensor, Tensor]:
        x, weight = x.contiguous(), weight.contiguous()
        y = _conv_like(x, weight, None, order, stride, padding)
        statistics = torch.empty(3, weight.shape[0], dtype=torch.float64)
        out = y.new_empty(_half(y.shape))
        gkernel.forward(x, weight, None, y, stride, padding, statistics)
        gkernel.pool(y, out, (gamma, beta, statistics, eps))
        ctx.save_for_backward(x, weight, y, gamma, beta, statistics)
        ctx.eps, ctx.geometry = eps, (order, stride, padding)
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    def backward(ctx, dout: Tensor, _: Tensor) -> tuple:
        _once()
        x, weight, y, *norm = ctx.saved_tensors
        dy, gradients = torch.empty_like(y), y.new_empty(2, len(weight))
        gkernel.pool_gradient(y, dout.contiguous(), dy, (*norm, ctx.eps), gradients)
        dx, dweight = _conv_backward(dy, x, weight, *ctx.geometry, *ctx.needs_input_grad[:2])
        return dx, dweight, *gradients, None, None, None, None


def _half(shape: torch.Size) -> tuple[int, ...]:
    return *shape[:3], (shape[3] + 1) // 2, (shape[4] + 1) // 2
