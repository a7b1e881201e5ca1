"""Group convolutions for p4 and p4m, exact and weight-compatible with GrouPy, with batch norm and
pooling that keep the symmetry.

Feature maps are ``(N, C, S, H, W)``: C fields, each a function on the group with S = 4 (p4) or 8
(p4m) values per pixel, element ``4*m + r`` (see `lib.groups`). A layer computes Cohen and Welling
(2016), eq. 10-11, ``[f * psi](g) = sum_h f(h) psi(g^-1 h)``: ``y(x, g)`` is the correlation of the
input at x with the filter moved by g.

**Where it is exact.** Turning or mirroring a square input turns or mirrors the output, to rounding,
if the sampling grid is symmetric: ``H + 2*padding - kernel_size`` divisible by `stride`, and
likewise W. Every stride-1 layer is. A stride-2 layer is on odd sizes and is *not* on even ones: the
last row and column are never a window's centre. To halve even sizes exactly, use
`GroupAvgBlurPool`. ``nn.MaxPool2d`` breaks the symmetry as 3x3/2 on even sizes and as 2x2/2 on odd
ones."""

import math
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.groups import P4, P4M, PointGroup, filter_bank

try:
    from lib.fast import fast_block, fast_conv
except ImportError:  # without lib/fast every layer is computed densely, equal to rounding

    def fast_conv(layer: nn.Module, x: Tensor) -> None:
        """No faster way."""

    fast_block = fast_conv

ALGORITHMS = ("auto", "dense", "fourier")


class GroupConv(nn.Module):
    """Base of the four layers; use `P4ConvZ2`, `P4ConvP4`, `P4MConvZ2` or `P4MConvP4M`.

    ValueError for an even kernel size, a size below 1, a negative padding, an unknown algorithm,
    or an input of another shape.

    Parameters
    ----------
    in_channels, out_channels : int
        Number of planar channels (lifting layers, input only) or of fields.
    kernel_size, stride, padding : int or (int, int)
        As in `torch.nn.Conv2d`, but the same for rows and columns. `kernel_size` is odd.
    bias : bool
        One bias per field, shared by its S values. Anything else would break the symmetry.
    algorithm : {"auto", "dense", "fourier"}
        How to compute it; may be changed at any time. "dense" expands the filters to a planar bank
        and calls one planar convolution, as public libraries do. "fourier" computes the same, to
        rounding, with 3.2 (p4) to 5.8 (p4m) times fewer multiplications (`lib.fast.gfourier`); it
        is differentiable once. "auto" takes the faster one for the layer and its input.

    Attributes
    ----------
    weight : Parameter, shape (out_channels, in_channels, S_in, k, k)
        GrouPy's order and convention; He initialisation (He et al. 2015, eq. 10) with fan-in
        ``in_channels * S_in * k * k``.
    bias : Parameter, shape (out_channels,), or None
        Starts at zero."""

    group: PointGroup
    lifting: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
        self.algorithm = algorithm
        self.in_channels = _integer("in_channels", in_channels, 1)
        self.out_channels = _integer("out_channels", out_channels, 1)
        self.kernel_size = _integer("kernel_size", kernel_size, 1)
        self.stride = _integer("stride", stride, 1)
        self.padding = _integer("padding", padding, 0)
        self.stabilizer_in = 1 if self.lifting else self.group.order
        # not persistent: a state_dict holds what GrouPy's holds, weight and bias
        self.register_buffer("filter_index", None, persistent=False)
        shape = (self.stabilizer_in, self.kernel_size, self.kernel_size)
        self.weight = nn.Parameter(torch.empty(self.out_channels, self.in_channels, *shape))
        self.bias = nn.Parameter(torch.empty(self.out_channels)) if bias else None
        self._renew_index()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for ReLU networks; biases zero."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight[0].numel()))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _renew_index(self) -> None:
        """Make the index again where the weight is: the index is no data, and can get lost."""
        index = self.group.filter_indices(self.kernel_size, self.stabilizer_in)
        self.filter_index = index.to(self.weight.device)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._renew_index()  # `to_empty` leaves buffers uninitialised
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._renew_index()  # ``assign=True`` brings weights from another device

    def filter_bank(self) -> Tensor:
        """All moved filters as planar ones, (out_channels * S, in_channels * S_in, k, k)."""
        return filter_bank(self.weight, self.filter_index)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, in_channels, H, W), or (N, in_channels, S, H, W) if the layer does not lift.

        Returns
        -------
        Tensor, shape (N, out_channels, S, H', W')"""
        leading = (self.in_channels,) if self.lifting else (self.in_channels, self.group.order)
        if x.ndim != len(leading) + 3 or x.shape[1:-2] != leading:
            expected = ", ".join(("N", *map(str, leading), "H", "W"))
            name = type(self).__name__
            raise ValueError(f"{name} expects input of shape ({expected}), got {tuple(x.shape)}")
        if min(x.shape[-2:]) + 2 * self.padding < self.kernel_size:
            size = f"{tuple(x.shape[-2:])} with padding {self.padding}"
            raise ValueError(f"a window of {self.kernel_size} does not fit into maps of {size}")
        y = None if self.algorithm == "dense" else fast_conv(self, x)
        return self.dense(x) if y is None else y

    def dense(self, x: Tensor) -> Tensor:
        """`forward` as one planar convolution."""
        bias = None if self.bias is None else self.bias.repeat_interleave(self.group.order)
        maps = x if self.lifting else x.flatten(1, 2)
        y = F.conv2d(maps, self.filter_bank(), bias, self.stride, self.padding)
        return y.unflatten(1, (self.out_channels, self.group.order))


def _integer(name: str, value: int | tuple[int, int], least: int) -> int:
    """`value`, or the one number of a pair, as an int of at least `least`."""
    number, *others = set(value) if isinstance(value, tuple | list) else {value}
    if others or not isinstance(number, Integral) or number < least:
        raise ValueError(f"{name} must be one integer of at least {least}, got {value!r}")
    return int(number)


class P4ConvZ2(GroupConv):
    """Lift images (N, C, H, W) to functions on p4, (N, C', 4, H', W'); see `GroupConv`."""

    group, lifting = P4, True


class P4ConvP4(GroupConv):
    """Convolve functions on p4, (N, C, 4, H, W) to (N, C', 4, H', W'); see `GroupConv`."""

    group, lifting = P4, False


class P4MConvZ2(GroupConv):
    """Lift images (N, C, H, W) to functions on p4m, (N, C', 8, H', W'); see `GroupConv`."""

    group, lifting = P4M, True


class P4MConvP4M(GroupConv):
    """Convolve functions on p4m, (N, C, 8, H, W) to (N, C', 8, H', W'); see `GroupConv`."""

    group, lifting = P4M, False


class GroupBatchNorm(nn.BatchNorm3d):
    """Batch norm of (N, C, S, H, W) with one mean and variance per field, over N, S, H and W."""


def group_max_pool(x: Tensor) -> Tensor:
    """Largest value over the group, (N, C, S, H, W) to (N, C, H, W)."""
    if x.ndim != 5:
        raise ValueError(f"group_max_pool expects (N, C, S, H, W), got shape {tuple(x.shape)}")
    return x.amax(2)


class GroupAvgBlurPool(nn.Module):
    """Antialiased average pool of stride 2 (Zhang 2019), exactly equivariant under p4m at every
    size: (N, ..., H, W) to (N, ..., ceil(H/2), ceil(W/2)).

    Each axis has a binomial window on a grid that shares its centre with the image: (1, 3, 3, 1) on
    even sizes, (1, 2, 1) on odd ones, with padding 1. A window is divided by the sum of its weights
    inside the image, so a constant map stays constant."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 4 or 0 in x.shape[-2:]:
            shape = f"pixels (N, C, ..., H, W), got shape {tuple(x.shape)}"
            raise ValueError(f"GroupAvgBlurPool expects {shape}")
        windows, totals = [], []
        for size in x.shape[-2:]:
            window = x.new_tensor([1, 3, 3, 1] if size % 2 == 0 else [1, 2, 1])
            windows.append(window)
            totals.append(F.conv1d(x.new_ones(1, 1, size), window.view(1, 1, -1), None, 2, 1)[0, 0])
        maps = x.flatten(1, -3)
        weight = torch.outer(*windows).expand(maps.shape[1], 1, -1, -1)
        y = F.conv2d(maps, weight, None, 2, 1, groups=maps.shape[1]) / torch.outer(*totals)
        return y.unflatten(1, x.shape[1:-2])


class GroupBlock(nn.Sequential):
    """Group convolution, `GroupBatchNorm`, ReLU and `GroupAvgBlurPool`, in this order.

    `lib.fast` may compute the block as one. A norm of another class, as for several processes, and
    hooks on the modules are respected."""

    def forward(self, x: Tensor) -> Tensor:
        kinds = [type(module) for module in self]
        usual = kinds[1:] == [GroupBatchNorm, nn.ReLU, GroupAvgBlurPool]
        y = fast_block(self, x) if usual else None
        return super().forward(x) if y is None else y


def assert_equivariant(
    module: nn.Module, group: PointGroup, x: Tensor, tolerance: float | None = None
) -> float:
    """Check that ``module(g x)`` is ``g module(x)`` for every element g of the group.

    Parameters
    ----------
    module : Module or callable
        From and to images or planar maps (N, C, H, W), group maps (N, C, S, H, W) or, output only,
        features (N, D), which must not change at all.
    tolerance : float, optional
        1e-5 in single and 1e-12 in double precision if not given.

    Returns
    -------
    float
        The largest difference, relative to the output's largest value. AssertionError if it is
        above `tolerance`, or no number."""
    act = {2: lambda y, g: y, 4: group.act_on_grid, 5: group.act_on_maps}  # by number of axes
    if tolerance is None:
        tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
    with torch.no_grad():
        y, elements = module(x), range(group.order)
        moved = [(module(act[x.ndim](x, g)), act[y.ndim](y, g)) for g in elements]
        errors = torch.stack([(there - here).abs().max() for there, here in moved])
        error = float(errors.max() / y.abs().max())
    if not error <= tolerance:
        worst = f"{error:.1e} for g = {int(errors.argmax())}, above {tolerance:.0e}"
        raise AssertionError(f"not equivariant under {group.name}: relative error {worst}")
    return error
