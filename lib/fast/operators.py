"""The group convolution and its block as operators of PyTorch, differentiable once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from lib.fast import gkernel
from lib.fast.gfourier import GROUPS, TorchLayer, out_size
from lib.groups import filter_bank

IMAGES = 16  # a block's backward pass makes the convolution's gradient for so many at a time
DENSE = 'algorithm="dense" (an attribute of the layer)'


def _compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and gkernel.available()


def once() -> None:
    """Called by backward passes, in which PyTorch records only if it is to differentiate them."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"the gradient of a gradient needs {DENSE}")


@torch.library.custom_op("cxr::group_conv", mutates_args=())
def conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Tensor:
    """Group convolution of x, (n, C, H, W) for a lifting layer, else (n, C, S, H, W).

    weight (N, C, S_in, k, k); bias (N,). `geometry` is the group's order S, 4 for p4 and 8 for p4m,
    and stride and padding as in `torch.nn.Conv2d`. Returns (n, N, S, H', W')."""
    x, weight = x.contiguous(), weight.contiguous()
    y = _conv_like(x, weight, bias, geometry)
    if _compiled(x):
        gkernel.forward(x, weight, bias, y, *geometry[1:])
        return y
    with torch.autocast(x.device.type, enabled=False):
        TorchLayer(x, weight, *geometry).forward(x, y)
    return y if bias is None else y.add_(bias[:, None, None, None])


def pooled_conv(x: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int]) -> Tensor:
    """`conv`, ReLU and blur pool by the compiled kernel, without gradient: a thread computes all of
    an image, whose maps between convolution and pool stay in the processor's cache."""
    order, stride, padding = geometry
    size = (len(x), len(weight), order, *out_size(x, weight.shape[-1], stride, padding))
    out = x.new_empty(*size[:3], (size[3] + 1) // 2, (size[4] + 1) // 2)
    gkernel.forward_pool(x.contiguous(), weight.contiguous(), bias, out, size, stride, padding)
    return out


@conv.register_fake
def _conv_like(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Tensor:
    order, stride, padding = geometry
    size = out_size(x, weight.shape[-1], stride, padding)
    return x.new_empty(x.shape[0], weight.shape[0], order, *size)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, geometry, *into: Tensor | None) -> None:
    """Write the gradients of `conv` for x and the weight `into` two tensors, unless None."""
    (order, stride, padding), (dx, dweight) = geometry, into
    with torch.autocast(x.device.type, enabled=False):
        if not _compiled(x):
            TorchLayer(x, weight, *geometry).backward(x, dy, dx, dweight)
            return
        if dweight is not None:
            gkernel.weight_gradient(x, dy, dweight, stride, padding)
        if dx is not None and x.ndim == 5 and stride == 1 and padding < weight.shape[-1]:
            gkernel.input_gradient(dy, weight, dx, padding)
        elif dx is not None:
            index = GROUPS[order].filter_indices(weight.shape[-1], weight.shape[2])
            bank, shape = filter_bank(weight, index), (x if x.ndim == 4 else x.flatten(1, 2)).shape
            dx.copy_(conv2d_input(shape, bank, dy.flatten(1, 2), stride, padding).view_as(x))


@torch.library.custom_op("cxr::group_conv_backward", mutates_args=())
def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of `conv` for x and the weight, each of size 0 if it is not needed."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    gradients = _gradients_like(dy, x, weight, geometry, needs)
    wanted = (of if need else None for of, need in zip(gradients, needs, strict=True))
    _gradients(dy, x, weight, geometry, *wanted)
    return gradients


@conv_backward.register_fake
def _gradients_like(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs[0] else 0)
    return dx, weight.new_empty(weight.shape if needs[1] else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.bias, ctx.geometry = inputs[0], inputs[1], inputs[2] is not None, inputs[3]
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy: Tensor) -> tuple:
    once()
    needs = ctx.needs_input_grad[:2]
    gradients = conv_backward(dy, *ctx.saved_tensors, ctx.geometry, needs)
    dx, dweight = (of if need else None for of, need in zip(gradients, needs, strict=True))
    return dx, dweight, dy.sum((0, 2, 3, 4)) if ctx.bias else None, None


conv.register_autograd(_backward, setup_context=_save)


class ReluPool(torch.autograd.Function):
    """ReLU and blur pool of group maps (n, N, S, H, W), by the compiled kernel."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        out = _half(y)
        gkernel.pool(y, out)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> Tensor:
        once()
        (y,) = ctx.saved_tensors
        dy = torch.empty_like(y)
        gkernel.pool_gradient(y, dout.contiguous(), dy)
        return dy


class Block(torch.autograd.Function):
    """Group convolution, norm by the batch's statistics, ReLU, blur pool, by the compiled kernel.

    x, weight and geometry are those of `conv`; gamma and beta, shape (N,), are the norm's. It
    returns the pooled maps and, without gradient, mean, variance and unbiased variance of the
    convolution's fields, float64 (3, N). Nothing but x and the convolution is kept for `backward`.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, geometry) -> tuple[Tensor, Tensor]:
        x, weight = x.contiguous(), weight.contiguous()
        y = _conv_like(x, weight, None, geometry)
        out, statistics = _half(y), torch.empty(3, len(weight), dtype=torch.float64)
        gkernel.forward(x, weight, None, y, *geometry[1:], statistics)
        gkernel.pool(y, out, (gamma, beta, statistics, eps))
        ctx.save_for_backward(x, weight, y, gamma, beta, statistics)
        ctx.eps, ctx.geometry = eps, geometry
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    def backward(ctx, dout: Tensor, _: Tensor) -> tuple:
        once()
        x, weight, y, *norm = ctx.saved_tensors
        norm, dout, needs = (*norm, ctx.eps), dout.contiguous(), ctx.needs_input_grad[:2]
        sums = y.new_empty(3, len(weight), dtype=torch.float64), y.new_empty(2, len(weight))
        gkernel.pool_gradient(y, dout, None, *sums, norm=norm)
        dx = torch.empty_like(x) if needs[0] else None
        dweights = []
        for part in (slice(i, i + IMAGES) for i in range(0, len(x), IMAGES)):
            dy = torch.empty_like(y[part])
            gkernel.pool_gradient(y[part], dout[part], dy, *sums, norm=norm)
            dweights.append(torch.empty_like(weight) if needs[1] else None)
            dx_part = None if dx is None else dx[part]
            _gradients(dy, x[part], weight, ctx.geometry, dx_part, dweights[-1])
        return dx, sum(dweights[1:], dweights[0]) if needs[1] else None, *sums[1], None, None


def _half(y: Tensor) -> Tensor:
    return y.new_empty(*y.shape[:3], (y.shape[3] + 1) // 2, (y.shape[4] + 1) // 2)
