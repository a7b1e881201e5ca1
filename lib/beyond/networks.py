"""The head of DeepCluster-v2, and networks with one more symmetry at the parameters of P4M."""

import math
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import gconv
from lib.groups import PointGroup

TEMPERATURE = 0.1


class CentroidLayer(nn.Linear):
    """The classifier of DeepCluster-v2 (Caron et al. 2020, *Unsupervised Learning of Visual
    Features by Contrasting Cluster Assignments*, appendix): the logit of a cluster is the cosine
    between feature and centroid, divided by the temperature 0.1. Centroids are set once per epoch
    (`follow`) and not trained, so no layer has to be learnt anew.

    Unlike there, a centroid is the mean of the epoch's own features, standardised and at length 1,
    and not of a memory bank; K-means itself runs on whitened features as in the rest of the loop.
    """

    def __init__(self, feature_dim: int, n_clusters: int) -> None:
        super().__init__(feature_dim, n_clusters)  # draws as many random numbers as any top layer
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), -10 to 10, of standardised features (N, D)."""
        return F.linear(F.normalize(x, dim=1), self.weight) / TEMPERATURE

    @torch.no_grad()
    def follow(self, features: Tensor | None, labels: np.ndarray) -> None:
        """Set the weights to the centroids, at length 1, of features (N, D) with labels (N,); all
        to zero if there are no features here. The weights of an empty cluster are zero."""
        self.weight.zero_()
        if features is not None:
            x = features.to(self.weight)
            x = F.normalize((x - x.mean(0)) / (x.std(0, correction=0) + 1e-5), dim=1)
            self.weight.index_add_(0, torch.as_tensor(labels, device=x.device), x)
            self.weight.copy_(F.normalize(self.weight, dim=1))


class MirrorGroup(PointGroup):
    """The identity, and the mirror that swaps left and right."""

    @cached_property
    def matrices(self) -> np.ndarray:
        return np.array([[[1, 0], [0, 1]], [[1, 0], [0, -1]]])

    def act_on_grid(self, x: Tensor, g: int) -> Tensor:
        return x.flip(-1) if self.element(g) else x


MIRROR = MirrorGroup("mirror", 2)


class MirrorConvZ2(gconv.GroupConv):
    """Lift images (N, C, H, W) to functions on `MIRROR`, (N, C', 2, H', W'), computed densely."""

    group, lifting = MIRROR, True


class MirrorConvMirror(gconv.GroupConv):
    """Convolve functions on `MIRROR`, (N, C, 2, H, W) to (N, C', 2, H', W'), computed densely."""

    group, lifting = MIRROR, False


def matched(order: int, a: int, b: int, c: int) -> tuple[int, int, int]:
    """Fields of a network with a group of `order` elements (1, 2 or 4) that has the parameters of
    the P4M network with a, b, c fields, top layer left out: about sqrt(8 / order) times as many."""
    total = 25 * a + 72 * a * b + 72 * b * c + 2 * (a + b + c)  # P4M: filters and batch norms
    first, second = (max(1, round(math.sqrt(8 / order) * n)) for n in (a, b))
    rest = total - (25 * first + 9 * order * first * second + 2 * (first + second))
    return first, second, max(1, round(rest / (9 * order * second + 2)))


def backbones(p4m: type[nn.Module], p4: type[nn.Module]) -> dict[str, type[nn.Module]]:
    """Networks like `lib.models.P4MCNN` and `P4CNN`, by name, with P4M's parameters."""

    class MirrorCNN(p4m):
        """`P4MCNN` with the mirror alone: left and right swapped leaves its features unchanged,
        turns do not. Each field is 2 real channels."""

        LAYERS = (MirrorConvZ2, MirrorConvMirror, MirrorConvMirror)
        channels = staticmethod(partial(matched, MIRROR.order))

    class MatchedP4CNN(p4):
        """`P4CNN` with more fields: as many parameters as the P4M network of this `width`."""

        channels = staticmethod(partial(matched, 4))

    return {"p4_params": MatchedP4CNN, "mirror": MirrorCNN}
