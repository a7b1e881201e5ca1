"""The paper's two backbones, AlexNet behind a fixed Sobel filter and a P4M group-equivariant CNN,
and networks to compare them with: P4M's layout without the mirror, or without the symmetry."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import gconv

try:
    from lib.beyond import networks as beyond
except ImportError:  # without lib/beyond there are two heads and five backbones
    beyond = None

IMAGE_SIZE = 64
HEADS = ("standardised", "linear", *(["centroids"] if beyond else []))


class Backbone(nn.Module):
    """What the loop asks of a network: ``features(x)`` of width D, `feature_dim`; a linear
    ``top_layer`` with K logits, `n_clusters`; ``forward(x)``.

    With any head but "linear", what the top layer reads is first brought to zero mean and unit
    variance (batch norm without weights). The top layer is drawn anew each epoch; features with a
    mean of several times their spread would make its logits start as one large constant. The head
    "centroids" is `lib.beyond.networks.CentroidLayer`."""

    def __init__(self, feature_dim: int, n_clusters: int, head: str = "standardised") -> None:
        super().__init__()
        self.feature_dim, self.n_clusters = feature_dim, n_clusters
        norm = nn.BatchNorm1d(feature_dim, affine=False)
        self.standardise = nn.Identity() if head == "linear" else norm
        layer = beyond.CentroidLayer if head == "centroids" else nn.Linear
        self.top_layer = layer(feature_dim, n_clusters)
        self.reset_top_layer()

    @torch.no_grad()
    def reset_top_layer(self, generator: torch.Generator | None = None) -> None:
        """Draw the top layer anew, N(0, 0.01) with zero bias: cluster numbers mean nothing from one
        epoch to the next. `generator` is a CPU's, so every device gets the same numbers."""
        weight = torch.empty(self.top_layer.weight.shape).normal_(0.0, 0.01, generator=generator)
        self.top_layer.weight.copy_(weight)
        self.top_layer.bias.zero_()

    def body_parameters(self) -> list[nn.Parameter]:
        """All parameters but the top layer's, which live one epoch only."""
        return [p for name, p in self.named_parameters() if not name.startswith("top_layer.")]

    def features(self, x: Tensor) -> Tensor:
        """Images (N, 1, 64, 64) in [-1, 1] to features (N, D), which are clustered."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> Tensor:
        """Images (N, 1, 64, 64) in [-1, 1] to the last maps with an extent, (N, C, H, W) >= 0."""
        raise NotImplementedError

    def activated(self, features: Tensor) -> Tensor:
        """What of the features the head reads, (N, D) to (N, D)."""
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 64, 64) in [-1, 1] to logits (N, K)."""
        return self.top_layer(self.standardise(self.activated(self.features(x))))


class Sobel(nn.Module):
    """Horizontal and vertical Sobel derivative, (N, 1, H, W) to (N, 2, H, W), not trained."""

    def __init__(self) -> None:
        super().__init__()
        horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("weight", torch.stack([horizontal, horizontal.T])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        # repeat the border: padding with 0 (mid gray in [-1, 1]) would draw a frame
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.weight)


class AlexNet(Backbone):
    """AlexNet (Krizhevsky et al. 2012) as DeepCluster lays it out (Caron et al. 2018), at 64x64.

    Sobel, five convolutions with batch norm and ReLU, three 3x3/2 max pools, two fully connected
    layers with dropout. At 64x64 the last map is 1x1 (6x6 at 224x224), so the first fully connected
    layer reads 256 numbers instead of 9,216. ``features`` is the second one before its ReLU.

    `width`: channels of the five convolutions, and of the fully connected layers."""

    WIDTH = (96, 256, 384, 384, 256, 4096)
    LAYOUT = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding

    def __init__(self, n_clusters: int, width: Sequence[int] = WIDTH, head: str = HEADS[0]) -> None:
        *conv, hidden = width
        super().__init__(hidden, n_clusters, head)
        layers: list[nn.Module] = [Sobel()]
        for index, (c_in, c_out) in enumerate(pairwise([2, *conv])):
            layers.append(nn.Conv2d(c_in, c_out, *self.LAYOUT[index]))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            if index in (0, 1, 4):
                layers.append(nn.MaxPool2d(3, 2))
        self.convolutions = nn.Sequential(*layers)  # (N, 1, 64, 64) -> (N, 256, 1, 1)
        first = nn.Dropout(0.5), nn.Linear(conv[-1], hidden), nn.ReLU(inplace=True)
        second = nn.Dropout(0.5), nn.Linear(hidden, hidden)
        self.classifier = nn.Sequential(nn.Flatten(), *first, *second)  # -> (N, 4096)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module is not self.top_layer:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        return self.classifier(self.convolutions(x))

    def maps(self, x: Tensor) -> Tensor:
        return self.convolutions[:-1](x)  # (N, 256, 3, 3): the last pool would leave one pixel

    def activated(self, features: Tensor) -> Tensor:
        return torch.relu(features)


class BlockCNN(Backbone):
    """Three blocks of convolution (kernels 5, 3, 3), batch norm, ReLU and antialiased average pool
    of stride 2 (Cohen and Welling 2016; sizes from Zhuang and Islam 2025).

    `width`: regular fields per block of the P4M network, or of the P4M network to match."""

    WIDTH = (64, 128, 256)
    LAYERS: tuple[type[nn.Module], ...]  # the three convolutions
    NORM: type[nn.Module]
    BLOCK = nn.Sequential

    def __init__(self, n_clusters: int, width: Sequence[int] = WIDTH, head: str = HEADS[0]) -> None:
        channels = self.channels(*width)
        super().__init__(channels[-1], n_clusters, head)
        self.blocks = nn.Sequential()
        sizes = pairwise((1, *channels))
        for layer, (c_in, c_out), k in zip(self.LAYERS, sizes, (5, 3, 3), strict=True):
            conv = layer(c_in, c_out, k, padding=k // 2, bias=False)  # batch norm subtracts a bias
            if isinstance(conv, nn.Conv2d):  # group convolutions start like this
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            rest = self.NORM(c_out), nn.ReLU(inplace=True), gconv.GroupAvgBlurPool()
            self.blocks.append(self.BLOCK(conv, *rest))

    @staticmethod
    def channels(a: int, b: int, c: int) -> tuple[int, int, int]:
        """Channels, or fields, of the three blocks."""
        return a, b, c

    def features(self, x: Tensor) -> Tensor:
        return self.maps(x).mean(dim=(2, 3))  # (N, C, 8, 8) -> (N, C)


class P4MCNN(BlockCNN):
    """p4m blocks and a maximum over the group: features that no quarter turn and no mirror can
    change. Each field is 8 real channels."""

    LAYERS = (gconv.P4MConvZ2, gconv.P4MConvP4M, gconv.P4MConvP4M)
    NORM = gconv.GroupBatchNorm
    BLOCK = gconv.GroupBlock

    def maps(self, x: Tensor) -> Tensor:
        return gconv.group_max_pool(self.blocks(x))  # (N, C, S, 8, 8) -> (N, C, 8, 8)


class P4CNN(P4MCNN):
    """`P4MCNN` without the mirror: quarter turns leave its features unchanged, mirrors do not.
    Each field is 4 real channels."""

    LAYERS = (gconv.P4ConvZ2, gconv.P4ConvP4, gconv.P4ConvP4)


class PlainCNN(BlockCNN):
    """P4M's layout with planar convolutions: no symmetry built in."""

    LAYERS = (nn.Conv2d, nn.Conv2d, nn.Conv2d)
    NORM = nn.BatchNorm2d

    def maps(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # (N, 1, 64, 64) -> (N, C, 8, 8)


class MatchedFlopsCNN(PlainCNN):
    """`PlainCNN` with the FLOPs of the P4M network of this `width`, computed densely: 8 channels
    per field, hence about 8 times its parameters."""

    @staticmethod
    def channels(a: int, b: int, c: int) -> tuple[int, int, int]:
        return 8 * a, 8 * b, 8 * c


class MatchedParametersCNN(PlainCNN):
    """`PlainCNN` with the parameters of the P4M network of this `width`, without the top layer:
    about sqrt(8) channels per field, since a group filter between fields holds 8 planar ones."""

    @staticmethod
    def channels(a: int, b: int, c: int) -> tuple[int, int, int]:
        total = 25 * a + 72 * a * b + 72 * b * c + 2 * (a + b + c)  # P4M: filters and batch norms
        first, second = (max(1, round(math.sqrt(8) * n)) for n in (a, b))
        rest = total - (25 * first + 9 * first * second + 2 * (first + second))
        return first, second, max(1, round(rest / (9 * second + 2)))


BACKBONES: dict[str, type[Backbone]] = {"alexnet": AlexNet, "p4m": P4MCNN, "p4": P4CNN}
BACKBONES |= {"cnn_params": MatchedParametersCNN, "cnn_flops": MatchedFlopsCNN}
BACKBONES |= beyond.backbones(P4MCNN, P4CNN) if beyond else {}


def build(
    backbone: str,
    n_clusters: int,
    width: Sequence[int] | None = None,
    seed: int = 0,
    head: str = HEADS[0],
) -> Backbone:
    """Make a network of `BACKBONES` with weights drawn from `seed`; the global random state stays
    as it was. `head` as in `Backbone`.

    `width` has six numbers for `AlexNet` and three for all others (`BlockCNN`); it is the paper's
    if not given. ValueError for an unknown backbone, a wrong number of widths, or a width below 1.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone {backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
    kind = BACKBONES[backbone]
    width = tuple(width or kind.WIDTH)
    if len(width) != len(kind.WIDTH) or min(width) < 1:
        wanted = f"{len(kind.WIDTH)} widths of at least 1, like {kind.WIDTH}"
        raise ValueError(f"{backbone} needs {wanted}; got {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(n_clusters, width, head)
    # channels innermost: on a CPU AlexNet's steps take 1.9, its features 3.2 times less time
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return model
