"""Features of a whole data set, and their PCA-whitening: what stands between a network and its clustering.

DeepCluster (Caron et al. 2018, section 3.3) clusters features after PCA, whitening and scaling to unit length, not the raw ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from tqdm import tqdm


def normalise(images: Tensor) -> Tensor:
    """Pixels of stored images as a network takes them: ``x / 127.5 - 1``.

    Parameters
    ----------
    images : Tensor, shape (B, H, W), uint8
        Stored pixels, 0 to 255, on any device.

    Returns
    -------
    Tensor, shape (B, 1, H, W), float32
        Values in [-1, 1], on the same device.

    Raises
    ------
    ValueError
        Another type than uint8 (which may have been normalised before) or another number of axes.
    """
    if images.dtype != torch.uint8 or images.ndim != 3:
        raise ValueError(f"images must be uint8 of shape (B, H, W), got {images.dtype} of shape {tuple(images.shape)}")
    return images.float().div_(127.5).sub_(1.0).unsqueeze(1)


def extract(
    model: nn.Module,
    images: np.ndarray | Tensor,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    progress: bool = False,
    *,
    on_device: bool = False,
    autocast: bool = False,
) -> np.ndarray | Tensor:
    """Features of all images in their stored order: row i belongs to image i.

    Parameters
    ----------
    model : Module
        Has ``features(x)``, (B, 1, H, W) in [-1, 1] to (B, D), and lies on `device`. It runs in evaluation mode without gradients;
        afterwards each of its modules is in the mode it was in before.
    images : ndarray, memory map or Tensor, shape (N, H, W), uint8
    batch_size : int
        Images a pass; in evaluation mode it changes speed and memory, and results only by rounding. Halved, with a warning, where the
        GPU's memory is too small for it.
    device : str or torch.device
        Where the batches go.
    progress : bool
        Show a progress bar.
    on_device : bool
        Leave the features on `device` and return a tensor.
    autocast : bool
        Compute in bfloat16 where that is safe; the features are float32 all the same.

    Returns
    -------
    ndarray or Tensor, shape (N, D), float32

    Raises
    ------
    ValueError
        No images, a batch size below 1, or features that are not (B, D).
    FloatingPointError
        A feature is NaN or infinite; the message names the first image it happens to.
    """
    if len(images) == 0:
        raise ValueError("there are no images to extract features from: images has length 0")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = torch.device(device)
    rows = torch.empty(0, 0)
    start = 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
            tqdm(total=len(images), desc="features", unit="image", mininterval=0.5, disable=not progress) as bar,
        ):
            while start < len(images):
                batch = images[start : start + batch_size]
                # np.array copies: a read-only memory map must not be wrapped as a writable tensor
                batch = batch if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))
                features = _features_or_none(model, batch, device)
                if features is None:
                    batch_size = max(1, len(batch) // 2)
                    warnings.warn(
                        f"the GPU's memory is too small for the features of {len(batch)} images at once: going on with {batch_size}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    continue
                if features.ndim != 2 or len(features) != len(batch):
                    raise ValueError(
                        f"model.features must give ({len(batch)}, D) for {len(batch)} images, got shape {tuple(features.shape)}"
                    )
                if start == 0:
                    rows = torch.empty(len(images), features.shape[1], device=device if on_device else "cpu")
                rows[start : start + len(batch)] = features
                if rows.device.type == "cpu":  # on a GPU a look at each batch would wait for it
                    _check_finite(rows[start : start + len(batch)], start)
                start += len(batch)
                bar.update(len(batch))
            if rows.device.type != "cpu":
                for number, chunk in enumerate(rows.split(8192)):
                    _check_finite(chunk, number * 8192)
    finally:
        for module, mode in modes:
            module.training = mode
    return rows if on_device else rows.numpy()


def _features_or_none(model: nn.Module, batch: Tensor, device: torch.device) -> Tensor | None:
    """Features of a batch; None where the GPU's memory does not do for it and could do for half of it."""
    try:
        return model.features(normalise(batch.to(device, non_blocking=True)))
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    return None


def _check_finite(rows: Tensor, start: int) -> None:
    """FloatingPointError that names the first image, `rows` being those from image `start` on."""
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        first = start + int((~finite).nonzero()[0])
        raise FloatingPointError(f"features of image {first} are NaN or infinite: the network has diverged; lower the learning rate")


class PCAWhiten:
    """PCA to `n_components`, each scaled to unit variance, then (optionally) each row to unit length.

    The principal axes come from the D x D covariance matrix, or from the N x N Gram matrix where N < D, both accumulated in float64 over
    chunks of rows, so no second copy of the data is ever held. Attributes equal those of ``sklearn.decomposition.PCA(whiten=True)``; the
    sign of each axis is fixed so that its largest loading is positive.

    Parameters
    ----------
    n_components : int
        Components to keep, at least 1. Where the data hold fewer (at most min(N - 1, D) directions can vary, and fewer do in
        rank-deficient features), those are kept and a warning names the numbers: scaling a direction of no variance would blow up noise.
    l2 : bool
        Scale every row of the result to length 1 (a row of zeros stays zero), as DeepCluster does before K-means.

    Attributes
    ----------
    mean_ : (D,)
    components_ : (n_components_, D), orthonormal rows
    explained_variance_ : (n_components_,), falling; with N - 1 in the denominator, as scikit-learn
    explained_variance_ratio_ : (n_components_,), shares of the total variance
    n_components_ : int
        float64; arrays after fitting an array, tensors on the data's device after fitting a tensor.

    References
    ----------
    Caron, Bojanowski, Joulin and Douze 2018, *Deep Clustering for Unsupervised Learning of Visual Features*, section 3.3;
    Jegou and Chum 2012, *Negative evidences and co-occurrences in image retrieval*, for whitening.
    """

    def __init__(self, n_components: int, l2: bool = True) -> None:
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        self.n_components = n_components
        self.l2 = l2

    def fit(self, features: np.ndarray | Tensor) -> PCAWhiten:
        """Find mean, axes and variances of `features`.

        Parameters
        ----------
        features : ndarray or Tensor, shape (N, D), floating

        Raises
        ------
        ValueError
            Not two axes, fewer than 2 rows, NaN or infinite values, or all rows equal.
        """
        x = as_rows(features, "features")
        n, d = x.shape
        if n < 2:
            raise ValueError(f"PCA needs at least 2 rows, got {n}")
        mean = sum(chunk.sum(dim=0) for chunk in _chunks(x)) / n
        if not torch.isfinite(mean).all():
            bad = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
            raise ValueError(f"features hold NaN or infinite values, first in row {bad}")

        if n < d:  # the Gram matrix has the same non-zero eigenvalues, and is the smaller one
            centred = torch.cat([chunk - mean for chunk in _chunks(x)])
            matrix = centred @ centred.T / (n - 1)
            power = (centred**2).mean(dim=0)
        else:
            matrix = sum((chunk - mean).T @ (chunk - mean) for chunk in _chunks(x)) / (n - 1)
            power = matrix.diagonal()
        variance, vectors = _top_eigenpairs(matrix, min(self.n_components, n, d))

        # A direction is real if it rises above the rounding of the stored features (relative to a feature's size, mean included)
        # and above that of the matrix. Sixteen units in the last place: what a few layers of float32 arithmetic leave.
        resolution = 16 * torch.finfo(x.dtype).eps * (power + mean**2).max().sqrt()
        floor = max(float(resolution) ** 2, float(variance[0]) * len(matrix) * torch.finfo(torch.float64).eps)
        kept = int((variance > floor).sum())
        if kept == 0:
            raise ValueError(f"all {n} rows of the features are equal: there is no variance to whiten (has the network collapsed?)")
        if kept < self.n_components:
            warnings.warn(
                f"PCA keeps {kept} components instead of n_components={self.n_components}: {n} rows of {d} features hold no more",
                RuntimeWarning,
                stacklevel=2,
            )
        variance, vectors = variance[:kept], vectors[:, :kept]
        components = (centred.T @ vectors / ((n - 1) * variance).sqrt()).T if n < d else vectors.T  # (n_components_, D)
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        components = (components * largest.sign()).contiguous()

        self.n_components_ = kept
        self.mean_ = as_kind(mean, features)
        self.components_ = as_kind(components, features)
        self.explained_variance_ = as_kind(variance, features)
        self.explained_variance_ratio_ = as_kind(variance / matrix.trace(), features)
        return self

    def transform(self, features: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Whitened components of `features`.

        Parameters
        ----------
        features : ndarray or Tensor, shape (N, D)

        Returns
        -------
        ndarray or Tensor, shape (N, n_components_)
            Same kind, type and device as `features`.

        Raises
        ------
        RuntimeError
            Called before `fit`.
        ValueError
            Another number of features than fitted.
        """
        if not hasattr(self, "components_"):
            raise RuntimeError("PCAWhiten is not fitted yet: call fit first")
        x = as_rows(features, "features")
        mean, components, variance = (torch.as_tensor(a, device=x.device) for a in (self.mean_, self.components_, self.explained_variance_))
        if x.shape[1] != len(mean):
            raise ValueError(f"features have {x.shape[1]} columns, but PCA was fitted on {len(mean)}")
        axes = components.T / variance.sqrt()
        whitened = torch.empty((len(x), axes.shape[1]), dtype=x.dtype, device=x.device)
        start = 0
        for chunk in _chunks(x):
            z = (chunk - mean) @ axes
            if self.l2:
                z = nn.functional.normalize(z, dim=1)
            whitened[start : start + len(z)] = z
            start += len(z)
        return as_kind(whitened, features)

    def fit_transform(self, features: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """``fit(features).transform(features)``."""
        return self.fit(features).transform(features)


def as_rows(values: np.ndarray | Tensor, name: str) -> Tensor:
    """`values`, called `name` in errors, as a float32 or float64 tensor (N, D), without a copy where they are one already."""
    rows = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(rows.shape)}")
    return rows if rows.dtype == torch.float64 else rows.float()


def as_kind(result: Tensor, values: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """`result` as a tensor on the device of `values` if those are a tensor, else as an array."""
    return result.to(values.device) if isinstance(values, Tensor) else result.cpu().numpy()


def _chunks(x: Tensor, size: int = 4096) -> Iterator[Tensor]:
    """Rows of `x` in float64, `size` at a time."""
    return (chunk.double() for chunk in x.split(size))


def _top_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, falling, and their eigenvectors (n, k) of a symmetric matrix (n, n)."""
    n = len(matrix)
    if matrix.device.type == "cpu":  # SciPy can stop at the k wanted, torch cannot
        values, vectors = map(torch.from_numpy, scipy.linalg.eigh(matrix.numpy(), subset_by_index=[n - k, n - 1]))
    else:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[n - k :], vectors[:, n - k :]
    return values.flip(0), vectors.flip(1)
