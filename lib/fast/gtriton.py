"""Batch norm, ReLU and blur pool of a block on a GPU, in one pass over the maps: Triton kernels.

PyTorch reads and writes the maps seven times forward and more often backward, with one thread block
per field in its norm: four fifths of a training step at the paper's widths. Maps are (N, P, H, W)
with channels innermost, as tensor cores want them; P = C * S, the S values of C fields."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lib.fast.operators import once

TILE, CHANNELS, STEPS = 32, 64, 16  # pixels and channels of a tile; tiles that a program adds up


@triton.jit
def _tile(place, channels, P, inside):
    """Where pixels (B,) and channels (C,) lie, and which of them there are."""
    where = place.to(tl.int64)[:, None] * P + channels[None, :]
    return where, inside[:, None] & (channels < P)[None, :]


@triton.jit
def _sums(x, out, rows, P, B: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr):
    """Sum and sum of squares of x less its first pixel, over a share of the pixels: what is left of
    a mean of many standard deviations would be rounding."""
    channels = tl.program_id(1) * C + tl.arange(0, C)
    first = tl.load(x + channels, channels < P, 0.0).to(tl.float32)[None, :]
    total, squares = tl.zeros([B, C], tl.float32), tl.zeros([B, C], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * B + tl.arange(0, B)
        where, there = _tile(row, channels, P, row < rows)
        value = tl.load(x + where, there, 0.0).to(tl.float32)
        value = tl.where(there, value - first, 0.0)
        total += value
        squares += value * value
    out += tl.program_id(0) * 2 * P + channels
    tl.store(out, tl.sum(total, 0), channels < P)
    tl.store(out + P, tl.sum(squares, 0), channels < P)


@triton.jit
def _pool(x, y, scale, shift, down, across, N, H, W, P, B: tl.constexpr, C: tl.constexpr):
    """y = blur pool of max(0, scale * x + shift): pixel o reads 2o - 1 to 2o + 2 on each axis."""
    channels = tl.program_id(1) * C + tl.arange(0, C)
    pixel, h, w = tl.program_id(0) * B + tl.arange(0, B), (H + 1) // 2, (W + 1) // 2
    image, row, column = pixel // (h * w), pixel // w % h, pixel % w
    slope = tl.load(scale + channels, channels < P, 0.0)[None, :]
    offset = tl.load(shift + channels, channels < P, 0.0)[None, :]
    out, real = _tile(pixel, channels, P, pixel < N * h * w)
    total = tl.zeros([B, C], tl.float32)
    for i in tl.static_range(4):
        u = 2 * row - 1 + i
        for j in tl.static_range(4):
            v = 2 * column - 1 + j
            weight = tl.load(down + 4 * row + i) * tl.load(across + 4 * column + j)
            inside = (u >= 0) & (u < H) & (v >= 0) & (v < W) & (image < N)
            where, there = _tile((image * H + u) * W + v, channels, P, inside)
            value = tl.load(x + where, there, 0.0).to(tl.float32)
            total += weight[:, None] * tl.maximum(value * slope + offset, 0.0)
    tl.store(y + out, total.to(y.dtype.element_ty), real)


@triton.jit
def _relu_gradient(x, dy, scale, shift, down, across, pixel, channels, N, H, W, P):
    """Of pixels (B,) and channels (C,): x, and the gradient of what the norm returns."""
    image, row, column = pixel // (H * W), pixel // W % H, pixel % W
    where, there = _tile(pixel, channels, P, image < N)
    value = tl.load(x + where, there, 0.0).to(tl.float32)
    h, w = (H + 1) // 2, (W + 1) // 2
    total = value * 0.0
    for i in tl.static_range(2):  # row u is tap k of row o = (u + 1 - k) / 2: at most two of them
        k = (row + 1) % 2 + 2 * i
        u = (row + 1 - k) // 2
        known = (row + 1 >= k) & (u < h)
        first = tl.load(down + 4 * u + k, known, 0.0)
        for j in tl.static_range(2):
            m = (column + 1) % 2 + 2 * j
            v = (column + 1 - m) // 2
            inside = known & (column + 1 >= m) & (v < w) & (image < N)
            weight = first * tl.load(across + 4 * v + m, inside, 0.0)
            place, read = _tile((image * h + u) * w + v, channels, P, inside)
            total += weight[:, None] * tl.load(dy + place, read, 0.0).to(tl.float32)
    slope = tl.load(scale + channels, channels < P, 0.0)[None, :]
    offset = tl.load(shift + channels, channels < P, 0.0)[None, :]
    return value, tl.where(value * slope + offset > 0, total, 0.0), where, there


@triton.jit
def _gradient_sums(
    x, dy, out, mean, scale, shift, down, across, N, H, W, P,
    B: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sum of the gradient, and of its product with x - mean, over a share of the pixels."""
    channels = tl.program_id(1) * C + tl.arange(0, C)
    middle = tl.load(mean + channels, channels < P, 0.0)[None, :]
    total, products = tl.zeros([B, C], tl.float32), tl.zeros([B, C], tl.float32)
    for step in range(STEPS):
        pixel = (tl.program_id(0) * STEPS + step) * B + tl.arange(0, B)
        value, gradient, _, _ = _relu_gradient(
            x, dy, scale, shift, down, across, pixel, channels, N, H, W, P
        )
        total += gradient
        products += gradient * (value - middle)
    out += tl.program_id(0) * 2 * P + channels
    tl.store(out, tl.sum(total, 0), channels < P)
    tl.store(out + P, tl.sum(products, 0), channels < P)


@triton.jit
def _input_gradient(
    x, dy, dx, slopes, constants, scale, shift, down, across, N, H, W, P,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dx = scale * gradient + slopes * x + constants."""
    channels = tl.program_id(1) * C + tl.arange(0, C)
    pixel = tl.program_id(0) * B + tl.arange(0, B)
    value, gradient, where, there = _relu_gradient(
        x, dy, scale, shift, down, across, pixel, channels, N, H, W, P
    )
    outer = tl.load(scale + channels, channels < P, 0.0)[None, :]
    slope = tl.load(slopes + channels, channels < P, 0.0)[None, :]
    constant = tl.load(constants + channels, channels < P, 0.0)[None, :]
    result = outer * gradient + slope * value + constant
    tl.store(dx + where, result.to(dx.dtype.element_ty), there)


@lru_cache(maxsize=64)
def _window(size: int, device: torch.device) -> Tensor:
    """Weights of the pool along an axis, (ceil(size / 2), 4): see `lib.gconv.GroupAvgBlurPool`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if size % 2 == 0 else [1.0, 2.0, 1.0, 0.0])
    source = 2 * torch.arange((size + 1) // 2)[:, None] - 1 + torch.arange(4)
    weights = taps * ((source >= 0) & (source < size))
    return (weights / weights.sum(1, keepdim=True)).to(device)


def _grid(pixels: int, planes: int, steps: int = 1) -> tuple[int, int]:
    return triton.cdiv(pixels, TILE * steps), triton.cdiv(planes, CHANNELS)


def _shape(x: Tensor) -> tuple[int, ...]:
    n, planes, height, width = x.shape
    return n, height, width, planes


def _add_up(kernel, x: Tensor, before: tuple, after: tuple) -> Tensor:
    """Two sums per plane, float64 (2, P), of what `kernel` adds up in each of its programs."""
    n, height, width, planes = _shape(x)
    grid = _grid(n * height * width, planes, STEPS)
    parts = x.new_empty(grid[0], 2, planes, dtype=torch.float32)
    kernel[grid](x, *before, parts, *after, planes, TILE, CHANNELS, STEPS)
    return parts.double().sum(0)


def pool(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Blur pool of ``relu(scale * x + shift)``: x (N, P, H, W), channels innermost; scale, shift
    (P,) float32. Same dtype and layout as x."""
    n, planes, height, width = x.shape
    size = n, planes, (height + 1) // 2, (width + 1) // 2
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    windows = _window(height, x.device), _window(width, x.device)
    grid = _grid(n * size[2] * size[3], planes)
    _pool[grid](x, y, scale, shift, *windows, *_shape(x), TILE, CHANNELS)
    return y


class NormReluPool(torch.autograd.Function):
    """Norm by the batch's statistics, ReLU and blur pool of maps x (N, P, H, W), channels
    innermost; gamma and beta (C,) are the norm's. It returns the pooled maps and, without gradient,
    mean, variance and unbiased variance of the fields, float64 (3, C)."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, order: int):
        count = x.numel() // len(gamma)
        pixels = count // order
        first = x[0, :, 0, 0].double()
        total, squares = _add_up(_sums, x, (), (pixels,))
        squares = squares + first * (2 * total + pixels * first)
        of_fields = torch.stack([total + pixels * first, squares]).unflatten(1, (-1, order))
        mean, square = of_fields.sum(2) / count
        variance = (square - mean**2).clamp_(min=0)
        spread = torch.rsqrt(variance + eps)
        scale = gamma * spread
        per_plane = [
            of.float().repeat_interleave(order) for of in (mean, scale, beta - mean * scale)
        ]
        ctx.save_for_backward(x, *per_plane, gamma, spread)
        ctx.order, ctx.count = order, count
        statistics = torch.stack([mean, variance, variance * count / max(1, count - 1)])
        ctx.mark_non_differentiable(statistics)
        return pool(x, *per_plane[1:]), statistics

    @staticmethod
    def backward(ctx, dy: Tensor, _: Tensor) -> tuple:
        once()
        x, mean, scale, shift, gamma, spread = ctx.saved_tensors
        dy, order = dy.contiguous(memory_format=torch.channels_last), ctx.order
        windows = [_window(size, x.device) for size in x.shape[2:]]
        n, height, width, planes = _shape(x)
        fixed = scale, shift, *windows, n, height, width
        sums = _add_up(_gradient_sums, x, (dy,), (mean, *fixed))
        dbeta, products = sums.unflatten(1, (-1, order)).sum(2)
        dgamma = products * spread
        # dx = scale * (g - mean of g - z * mean of g z), where z = (x - mean) * spread
        slopes = (-gamma * spread**2 * dgamma / ctx.count).float().repeat_interleave(order)
        constants = -scale * (dbeta / ctx.count).float().repeat_interleave(order) - slopes * mean
        dx, grid = torch.empty_like(x), _grid(n * height * width, planes)
        _input_gradient[grid](x, dy, dx, slopes, constants, *fixed, planes, TILE, CHANNELS)
        return dx, dgamma.to(gamma.dtype), dbeta.to(gamma.dtype), None, None


def block(conv: torch.nn.Module, norm: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Group convolution without bias, norm, ReLU and pool, (N, C', S, H, W); statistics as of
    `NormReluPool`, None if the norm uses its running ones."""
    order = conv.group.order
    maps = convolve(conv, x)
    if norm.training:
        y, statistics = NormReluPool.apply(maps, norm.weight, norm.bias, norm.eps, order)
    else:
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        of_fields = scale, norm.bias - norm.running_mean * scale
        y = pool(maps, *(of.repeat_interleave(order) for of in of_fields))
        statistics = None
    return y.unflatten(1, (-1, order)), statistics


def convolve(conv: torch.nn.Module, x: Tensor) -> Tensor:
    """A group convolution without bias as planar maps (N, C' * S, H', W'), channels innermost.

    An image's one channel fills no tensor core: its windows are the columns of a product."""
    if not conv.lifting:
        bank = conv.filter_bank().contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x.flatten(1, 2), bank, None, conv.stride, conv.padding)
        return y.contiguous(memory_format=torch.channels_last)
    k, pad, stride = conv.kernel_size, conv.padding, conv.stride
    columns = F.unfold(x, k, padding=pad, stride=stride).transpose(1, 2)  # (N, H' W', C k k)
    # a bank for each image: the sum over pixels in its gradient is shared among all processors
    bank = conv.filter_bank().flatten(1).T.expand(len(x), -1, -1)  # (N, C k k, C' S)
    rows = torch.bmm(columns, bank)  # (N, H' W', C' S)
    sizes = [(size + 2 * pad - k) // stride + 1 for size in x.shape[2:]]
    return rows.unflatten(1, sizes).permute(0, 3, 1, 2)
