"""From images to what is clustered: features, then PCA, whitening and unit length (Caron et al.
2018, section 3.3)."""

import warnings
from contextlib import contextmanager
from typing import Self

import numpy as np
import scipy.linalg
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import validate_data
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.images import normalise
from lib.parallel import ALONE, World

STATISTICS_BATCH = 256  # images per batch when batch-norm statistics are estimated


@contextmanager
def _modes_kept(model: nn.Module):
    """Afterwards each module is in the mode it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def estimate_statistics(
    model: nn.Module, images: np.ndarray | Tensor, rows: np.ndarray, world: World = ALONE
) -> None:
    """Estimate the batch norms' means and variances anew, from the images (N, H, W) in `rows` (M,).

    Running statistics remember about ten steps, in which the weights move on: in evaluation mode,
    the network that is clustered is then not the one that was trained. Here every batch norm
    averages over equal batches in train mode, with dropout off; each process takes its share."""
    # not the head's, which no feature passes
    inside = [m for name, m in model.named_modules() if name != "standardise"]
    norms = [module for module in inside if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    with _modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # a cumulative average: every batch counts the same
        for batch in np.array_split(rows, max(1, len(rows) // STATISTICS_BATCH)):
            mine = batch[world.share(len(batch))]
            model.features(normalise(torch.as_tensor(images[mine]).to(device)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def extract(
    model: nn.Module,
    images: np.ndarray | Tensor,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    *,
    on_device: bool = False,
    autocast: bool = False,
) -> np.ndarray | Tensor:
    """Features (N, D), float32, of all images in evaluation mode: row i belongs to image i.

    ValueError if there are no images, FloatingPointError if features are NaN or infinite.

    Parameters
    ----------
    model : Module
        Has ``features(x)``, (B, 1, H, W) in [-1, 1] to (B, D).
    images : ndarray, memory map or Tensor, shape (N, H, W), uint8
    batch_size : int
        Images per pass: changes speed and memory, and results only by rounding.
    on_device, autocast : bool
        Return a tensor on `device` instead of an array; compute in bfloat16."""
    if len(images) == 0:
        raise ValueError("there are no images to extract features from: images has length 0")
    device = torch.device(device)
    kept_on = device if on_device else "cpu"
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
    rows: Tensor | None = None
    with _modes_kept(model), torch.inference_mode(), bfloat16:
        model.eval()
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            # np.array copies: a read-only memory map must not become a writable tensor
            batch = batch if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))
            features = model.features(normalise(batch.to(device, non_blocking=True)))
            if rows is None:
                rows = torch.empty(len(images), features.shape[1], device=kept_on)
            rows[start : start + len(batch)] = features
    bad = _first_bad_row(rows)
    if bad is not None:
        raise FloatingPointError(
            f"features of image {bad} are NaN or infinite: the network has diverged; lower lr"
        )
    return rows if on_device else rows.numpy()


class PCAWhiten(TransformerMixin, BaseEstimator):
    """PCA to `n_components`, each scaled to unit variance, then each row to unit length (Jegou and
    Chum 2012, *Negative evidences and co-occurrences in image retrieval*).

    Parameters
    ----------
    n_components : int
        Components to keep. If the data hold fewer, those are kept, with a warning: scaling a
        direction of no variance would blow up noise.
    l2 : bool
        Scale every row of the result to length 1, as DeepCluster does before K-means.

    Attributes
    ----------
    mean_ (D,), components_ (n_components_, D), explained_variance_ (n_components_,) : float64
        As in ``sklearn.decomposition.PCA(whiten=True)``; the largest loading of each axis is
        positive. Arrays, or tensors on the data's device after fitting a tensor."""

    def __init__(self, n_components: int = 64, l2: bool = True) -> None:
        self.n_components = n_components
        self.l2 = l2

    def fit(self, features: np.ndarray | Tensor, y: None = None) -> Self:
        """Find mean, axes and variances of `features`, (N, D) floating; ValueError if there are
        fewer than 2 rows, all are equal, or one is not finite."""
        x = self._rows(features, reset=True)
        n, d = x.shape
        if self.n_components < 1 or n < 2:
            raise ValueError(f"PCA needs 2 rows and 1 component; got {n} rows, {self.n_components}")
        mean = sum(chunk.double().sum(0) for chunk in x.split(4096)) / n
        if n < d:  # the Gram matrix has the same non-zero eigenvalues and is the smaller one
            centred = x.double() - mean
            matrix, power = centred @ centred.T / (n - 1), centred.square().mean(0)
        else:
            matrix = torch.zeros(d, d, dtype=torch.float64, device=x.device)
            for chunk in x.split(4096):
                centred = chunk.double() - mean
                matrix.addmm_(centred.T, centred, alpha=1 / (n - 1))
            power = matrix.diagonal()
        variance, vectors = _top_eigenpairs(matrix, min(self.n_components, n, d))
        # A direction is real if its variance exceeds rounding: 16 units in the last place of the
        # largest feature (a few layers of float32), or machine epsilon of the matrix.
        precision = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32)
        resolution = 16 * precision.eps * (power + mean**2).max().sqrt()
        epsilon = torch.finfo(torch.float64).eps
        floor = max(float(resolution) ** 2, float(variance[0]) * len(matrix) * epsilon)
        kept = int((variance > floor).sum())
        if kept == 0:
            raise ValueError(f"all {n} rows of the features are equal: has the network collapsed?")
        if kept < min(self.n_components, n, d):
            why = f"{n} rows of {d} features hold no more"
            message = f"PCA keeps {kept} components instead of {self.n_components}: {why}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        variance, components = variance[:kept], vectors[:, :kept].T  # (kept, D or N)
        if n < d:
            components = components @ centred / ((n - 1) * variance).sqrt()[:, None]
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        self.n_components_ = kept
        self.mean_ = _like(mean, features)
        self.components_ = _like(components * largest.sign(), features)
        self.explained_variance_ = _like(variance, features)
        return self

    def transform(self, features: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Whitened components (N, n_components_) of features (N, D): float64 if they are."""
        x = self._rows(features)
        fitted = (self.mean_, self.components_, self.explained_variance_)
        mean, components, variance = (torch.as_tensor(a, device=x.device) for a in fitted)
        axes = components.T / variance.sqrt()  # (D, n_components_)
        z = torch.cat([(chunk.double() - mean) @ axes for chunk in x.split(4096)])
        if self.l2:
            z = nn.functional.normalize(z, dim=1)
        return _like(z if x.dtype == torch.float64 else z.float(), features)

    def _rows(self, values: np.ndarray | Tensor, reset: bool = False) -> Tensor:
        """`values` (N, D), finite, as a tensor that shares their memory; arrays pass scikit-learn's
        checks."""
        if isinstance(values, Tensor) and values.ndim != 2:
            raise ValueError(f"features must have shape (N, D), got {tuple(values.shape)}")
        if not isinstance(values, Tensor):
            how = {"dtype": [np.float64, np.float32], "order": "C", "ensure_all_finite": False}
            values = validate_data(self, values, reset=reset, ensure_min_samples=1 + reset, **how)
            with warnings.catch_warnings(action="ignore"):  # a read-only memory map is only read
                values = torch.from_numpy(values)
        bad = _first_bad_row(values)
        if bad is not None:
            raise ValueError(f"features hold NaN or infinite values, first in row {bad}")
        return values.detach() if values.is_floating_point() else values.double()


def _like(result: Tensor, values: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """`result` as a tensor if `values` are one, else as an array."""
    return result if isinstance(values, Tensor) else result.numpy()


def _first_bad_row(x: Tensor) -> int | None:
    """Index of the first row with NaN or an infinite value."""
    finite = torch.cat([torch.isfinite(block).all(dim=1) for block in x.split(8192)])
    return None if finite.all() else int(finite.logical_not().nonzero()[0])


def _top_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, descending, and eigenvectors (n, k) of a symmetric matrix."""
    if matrix.device.type == "cpu":  # SciPy can stop at the k wanted, torch cannot
        last = [len(matrix) - k, len(matrix) - 1]
        found = map(torch.from_numpy, scipy.linalg.eigh(matrix.numpy(), subset_by_index=last))
    else:
        found = torch.linalg.eigh(matrix)
    values, vectors = found
    return values.flip(0)[:k], vectors.flip(1)[:, :k]
