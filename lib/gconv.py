"""Group convolutions for p4 and p4m, exact and weight-compatible with GrouPy, with batch norm and
pooling that keep the symmetry.

Feature maps are ``(N, C, S, H, W)``: C fields, each a function on the group with S = 4 (p4) or 8
(p4m) values a pixel, element ``4*m + r`` (see `lib.groups`). A layer computes Cohen and Welling
2016, eq. 10-11, ``[f * psi](g) = sum_h f(h) psi(g^-1 h)``: ``y(x, g)`` is the correlation of the
input at x with the filter moved by g.

    lift = nn.Sequential(P4MConvZ2(1, 16, 5, padding=2), GroupBatchNorm(16), nn.ReLU(),
    GroupAvgBlurPool()) conv = P4MConvP4M(16, 32, 3, padding=1) y =
    group_max_pool(conv(lift(images)))      # (N, 32, H/2, W/2): turns and mirrors with the images

**Where it is exact.** Turning or mirroring a square input turns or mirrors the output, to rounding,
if the sampling grid is symmetric: ``H + 2*padding - kernel_size`` divisible by `stride` (and
likewise W). Every stride-1 layer is. A stride-2 layer is on odd sizes and is *not* on even ones,
whatever the odd kernel: the last row and column are never a window's centre (it still computes what
GrouPy computes; use `GroupAvgBlurPool` to halve even sizes exactly). The same holds for
``nn.MaxPool2d``: 3x3/2 on even sizes and 2x2/2 on odd ones break the symmetry.

**How it is computed.** ``algorithm="dense"`` expands the filters to a planar bank and calls one
planar convolution, as public libraries do. ``"fourier"`` computes the same, to rounding, with 3.2
(p4) to 5.8 (p4m) times fewer multiplications (see `lib.fast.gfourier`). ``"auto"`` takes the faster
one for the layer's shape, device and dtype. The weight is the same for all three."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lib.fast import gfourier, gkernel
from lib.groups import P4, P4M, PointGroup

ALGORITHMS = ("auto", "dense", "fourier")

# (a, b) by the group's order and whether the compiled kernel is there: the Fourier algorithm is the
# faster where a / out_channels + b / (in_channels * k * k) <= 1, for its transforms cost the less
# the more channels share them. From tests/bench/gconv_auto.py, forward and training step.
FOURIER_FROM = {(8, True): (4, 8), (4, True): (8, 16), (8, False): (24, 40), (4, False): (64, 48)}


class GroupConv(nn.Module):
    """Base of the four layers; use `P4ConvZ2`, `P4ConvP4`, `P4MConvZ2` or `P4MConvP4M`.

    Parameters
    ----------
    in_channels, out_channels : int
        Number of planar channels (lifting layers, input only) or of fields.
    kernel_size : int
        Odd side k of the filters.
    stride, padding : int
        As in `torch.nn.Conv2d`; the module's docstring says where a stride above 1 is exact.
    bias : bool
        One bias a field, shared by its S values (anything else would break the symmetry).
    algorithm : {"auto", "dense", "fourier"}
        How to compute it; may be changed at any time. ``"dense"`` is differentiable any number of
        times and follows autocast; ``"fourier"`` is differentiable once and computes in the inputs'
        dtype.

    Attributes
    ----------
    weight : Parameter, shape (out_channels, in_channels, S_in, k, k)
        GrouPy's order and convention; He initialisation (He et al. 2015, eq. 10) with fan-in
        ``in_channels * S_in * k * k``.
    bias : Parameter, shape (out_channels,), or None
        Starts at zero.

    Raises
    ------
    ValueError
        For an even kernel size, a size below 1, a negative padding, an unknown algorithm, or an
        input of another shape.
    """

    group: PointGroup
    lifting: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("out_channels", out_channels, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
        self.algorithm = algorithm
        self.in_channels, self.out_channels, self.kernel_size = (
            in_channels,
            out_channels,
            kernel_size,
        )
        self.stride, self.padding = stride, padding
        self.stabilizer_in = 1 if self.lifting else self.group.order
        # Not persistent: a state_dict holds what GrouPy's holds, weight and bias.
        self.register_buffer(
            "filter_index",
            self.group.filter_indices(kernel_size, self.stabilizer_in),
            persistent=False,
        )
        transform = gfourier.filter_transform(self.group.order, kernel_size, self.lifting)[1]
        self.register_buffer(
            "fourier_transform", transform.to(torch.get_default_dtype()), persistent=False
        )
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, self.stabilizer_in, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for ReLU networks; biases zero."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight[0].numel()))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def filter_bank(self) -> Tensor:
        """All transformed filters as a planar bank, shape (out_channels * S, in_channels * S_in, k,
        k).
        """
        bank = self.weight.flatten(2)[:, :, self.filter_index]  # (out, in, S, S_in * k * k)
        k = self.kernel_size
        return bank.transpose(1, 2).reshape(
            self.out_channels * self.group.order, self.in_channels * self.stabilizer_in, k, k
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Parameters
        ----------
        x : Tensor, shape (N, in_channels, H, W) for a lifting layer, else (N, in_channels, S, H, W)

        Returns
        -------
        Tensor, shape (N, out_channels, S, H', W')
        """
        leading = (self.in_channels,) if self.lifting else (self.in_channels, self.group.order)
        if x.ndim != len(leading) + 3 or x.shape[1:-2] != leading:
            expected = ", ".join(("N", *map(str, leading), "H", "W"))
            raise ValueError(
                f"{type(self).__name__} expects input of shape ({expected}), got {tuple(x.shape)}"
            )
        if min(gfourier.out_size(x, self.stride, self.padding, self.kernel_size)) < 1:
            raise ValueError(
                f"a window of {self.kernel_size} does not fit into maps of {tuple(x.shape[-2:])} with padding {self.padding}"
            )
        if self.algorithm == "fourier" or (self.algorithm == "auto" and self._fourier_is_faster(x)):
            return gfourier.fourier_conv(
                x,
                self.weight,
                self.bias,
                self.fourier_transform,
                self.group.order,
                self.stride,
                self.padding,
            )
        bias = None if self.bias is None else self.bias.repeat_interleave(self.group.order)
        y = F.conv2d(
            x if self.lifting else x.flatten(1, 2),
            self.filter_bank(),
            bias,
            self.stride,
            self.padding,
        )
        return y.unflatten(1, (self.out_channels, self.group.order))

    def _fourier_is_faster(self, x: Tensor) -> bool:
        """The choice of ``"auto"``: on a CPU in single precision, unless the layer is narrow."""
        if (
            x.device.type != "cpu"
            or x.dtype != torch.float32
            or self.weight.dtype != x.dtype
            or torch.is_autocast_enabled("cpu")
        ):
            return False
        compiled = gkernel.available()
        if self.lifting:  # the dense gradient of these few filters is the cheaper one
            trains = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
            return compiled and self.out_channels >= 16 and not trains
        a, b = FOURIER_FROM[self.group.order, compiled]
        return a / self.out_channels + b / (self.in_channels * self.kernel_size**2) <= 1

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, algorithm={self.algorithm!r}"
        )


class P4ConvZ2(GroupConv):
    """Lift images (N, C, H, W) to functions on p4, (N, C', 4, H', W'); parameters as in
    `GroupConv`.
    """

    group, lifting = P4, True


class P4ConvP4(GroupConv):
    """Convolve functions on p4, (N, C, 4, H, W) to (N, C', 4, H', W'); parameters as in
    `GroupConv`.
    """

    group, lifting = P4, False


class P4MConvZ2(GroupConv):
    """Lift images (N, C, H, W) to functions on p4m, (N, C', 8, H', W'); parameters as in
    `GroupConv`.
    """

    group, lifting = P4M, True


class P4MConvP4M(GroupConv):
    """Convolve functions on p4m, (N, C, 8, H, W) to (N, C', 8, H', W'); parameters as in
    `GroupConv`.
    """

    group, lifting = P4M, False


class GroupBatchNorm(nn.BatchNorm3d):
    """Batch norm with one mean and variance a field, over N, S, H and W: input and output (N, C, S,
    H, W).
    """


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Copy of a model, for evaluation, with each batch norm that follows a group convolution in an
    `nn.Sequential` folded into its filters.

    A group batch norm scales and shifts whole fields, so the folded layer is again a group
    convolution, with a weight of the same shape."""
    model = copy.deepcopy(model).eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(sequence) - 1):
            conv, norm = sequence[index], sequence[index + 1]
            if isinstance(conv, GroupConv) and isinstance(norm, GroupBatchNorm):
                sequence[index], sequence[index + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model


def group_max_pool(x: Tensor) -> Tensor:
    """Largest value over the group at each pixel: (N, C, S, H, W) to (N, C, H, W) (Cohen and
    Welling 2016, sec. 6.3).
    """
    if x.ndim != 5:
        raise ValueError(
            f"group pooling expects maps of shape (N, C, S, H, W), got {tuple(x.shape)}"
        )
    return x.amax(2)


class GroupMaxPool(nn.Module):
    """`group_max_pool` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return group_max_pool(x)


def blur_matrix(size: int) -> Tensor:
    """Weights of an antialiased average pool of stride 2 along one axis, shape (size, (size + 1) //
    2), columns summing to 1.

    A binomial kernel, on a grid of windows symmetric about the centre of the axis: (1, 3, 3, 1) / 8
    with padding 1 on even sizes, (1, 2, 1) / 4 with padding 1 on odd ones. At the border the
    weights of the pixels inside are scaled to sum to 1, so a constant map stays constant."""
    kernel = torch.tensor(
        [1.0, 3.0, 3.0, 1.0] if size % 2 == 0 else [1.0, 2.0, 1.0], dtype=torch.float64
    )
    tap = (
        torch.arange(size)[:, None] - 2 * torch.arange((size + 1) // 2) + 1
    )  # (size, ceil(size / 2))
    weights = kernel[tap.clamp(0, len(kernel) - 1)] * ((tap >= 0) & (tap < len(kernel)))
    return weights / weights.sum(0)


class GroupAvgBlurPool(nn.Module):
    """Antialiased average pool of stride 2 (Zhang 2019) that is exactly equivariant under p4m at
    every size: 64 -> 32 -> 16 -> 8, 65 -> 33.

    Kernel and padding follow the size, axis by axis (see `blur_matrix`): an even kernel on even
    sizes, an odd one on odd sizes, so the sampling grid always shares its centre with the image.
    Input (..., H, W), output (..., ceil(H/2), ceil(W/2))."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or 0 in x.shape[-2:]:
            raise ValueError(
                f"GroupAvgBlurPool expects maps of shape (..., H, W) with at least one pixel, got {tuple(x.shape)}"
            )
        rows, columns = (blur_matrix(size).to(x) for size in x.shape[-2:])
        return rows.T @ (x @ columns)
