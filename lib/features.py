"""Features of a whole data set, and their PCA-whitening: what stands between a network and its
clustering.

DeepCluster (Caron et al. 2018, section 3.3) clusters features after PCA, whitening and scaling to
unit length, not the raw ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.linalg.blas
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
        raise ValueError(
            f"images must be uint8 of shape (B, H, W), got {images.dtype} of shape {tuple(images.shape)}"
        )
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
        Has ``features(x)``, (B, 1, H, W) in [-1, 1] to (B, D), and lies on `device`. It runs in
        evaluation mode without gradients; afterwards each of its modules is in the mode it was in
        before.
    images : ndarray, memory map or Tensor, shape (N, H, W), uint8
    batch_size : int
        Images a pass; in evaluation mode it changes speed and memory, and results only by rounding.
        Halved, with a warning, where the GPU's memory is too small for it.
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
            tqdm(
                total=len(images),
                desc="features",
                unit="image",
                mininterval=0.5,
                disable=not progress,
            ) as bar,
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
                    rows = torch.empty(
                        len(images), features.shape[1], device=device if on_device else "cpu"
                    )
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
    """Features of a batch; None where the GPU's memory does not do for it and could do for half of
    it.
    """
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
        raise FloatingPointError(
            f"features of image {first} are NaN or infinite: the network has diverged; lower the learning rate"
        )


class CovarianceSums(NamedTuple):
    """What PCA needs of some rows; sums of several sets of rows, about one `shift`, are those of
    their union.

    count : Tensor, shape (); sum : Tensor, shape (D,); outer : Tensor, shape (D, D), all float64.
    The last two are of ``x - shift``."""

    count: Tensor
    sum: Tensor
    outer: Tensor


def covariance_sums(x: np.ndarray | Tensor, shift: np.ndarray | Tensor) -> CovarianceSums:
    """Number of rows, and sum and sum of outer products of ``x - shift``, in chunks of rows and in
    float64.

    Products of float32 would be faster, but round at 1e-7 of the largest variance: components with
    less, which real features have, would be lost among that noise and rank could not be told.

    Parameters
    ----------
    x : ndarray, memory map or Tensor, shape (N, D)
        Read chunk by chunk, never copied whole; N may be 0.
    shift : ndarray or Tensor, shape (D,)
        Near the mean of all rows, so that no digits are lost; the same for all sets of rows that
        are to be added.

    Returns
    -------
    CovarianceSums
        On the device of `x`.
    """
    rows = _rows(x, "features")
    d = rows.shape[1]
    shift = torch.as_tensor(shift, dtype=torch.float64, device=rows.device)
    total = torch.zeros(d, dtype=torch.float64, device=rows.device)
    # BLAS' symmetric product computes one triangle, half the work; torch has none. It wants columns
    # one after another.
    on_cpu = rows.device.type == "cpu"
    outer = torch.zeros(d, d, dtype=torch.float64, device=rows.device)
    triangle = np.zeros((d, d), order="F") if on_cpu else None
    for chunk in _chunks(rows):
        centred = chunk.sub_(shift)
        total += centred.sum(dim=0)
        if on_cpu:
            triangle = scipy.linalg.blas.dsyrk(1.0, centred.numpy().T, 1.0, triangle, overwrite_c=1)
        else:
            outer.addmm_(centred.T, centred)
    if on_cpu:
        outer = torch.from_numpy(triangle).T  # the lower triangle, rows one after another
        outer += outer.tril(-1).T
    return CovarianceSums(
        torch.tensor(len(rows), dtype=torch.float64, device=rows.device), total, outer
    )


class PCAWhiten:
    """PCA to `n_components`, each scaled to unit variance, then (optionally) each row to unit
    length.

    The principal axes come from the D x D covariance matrix, or from the N x N Gram matrix where N
    < D, both accumulated in float64 over chunks of rows: no second copy of tall data is held, and a
    memory map is read chunk by chunk. Attributes equal those of
    ``sklearn.decomposition.PCA(whiten=True)``; the sign of each axis is fixed so that its largest
    loading is positive.

    Parameters
    ----------
    n_components : int
        Components to keep, at least 1. Where the data hold fewer (at most min(N - 1, D) directions
        can vary, and fewer do in rank-deficient features), those are kept and a warning names the
        numbers: scaling a direction of no variance would blow up noise.
    l2 : bool
        Scale every row of the result to length 1 (a row of zeros stays zero), as DeepCluster does
        before K-means.
    reduce : callable or None
        To fit over the shards of several processes: ``reduce(tensor)`` gets a float64 tensor on the
        data's device and returns its sum over all processes, as in `lib.kmeans.KMeans`. Each
        process then calls `fit` with its own rows and ends with the same axes.

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
    Caron, Bojanowski, Joulin and Douze 2018, *Deep Clustering for Unsupervised Learning of Visual
    Features*, section 3.3; Jegou and Chum 2012, *Negative evidences and co-occurrences in image
    retrieval*, for whitening."""

    def __init__(
        self,
        n_components: int,
        l2: bool = True,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        self.n_components = n_components
        self.l2 = l2
        self.reduce = reduce

    def fit(self, features: np.ndarray | Tensor) -> PCAWhiten:
        """Find mean, axes and variances of `features`.

        Parameters
        ----------
        features : ndarray or Tensor, shape (N, D), floating
            With `reduce`, the rows of this process.

        Raises
        ------
        ValueError
            Not two axes, fewer than 2 rows, NaN or infinite values, or all rows equal.
        """
        x = _rows(features, "features")
        d = x.shape[1]
        total = torch.zeros(d + 1, dtype=torch.float64, device=x.device)
        for chunk in x.split(4096):
            total[:d] += chunk.sum(dim=0, dtype=torch.float64)
        total[d] = len(x)
        total = self._sum(total)
        n = round(float(total[d]))
        if n < 2:
            raise ValueError(f"PCA needs at least 2 rows, got {n}")
        mean = total[:d] / n
        if not torch.isfinite(mean).all():
            bad = first_bad_row(x)
            where = f", first in row {bad}" if bad >= 0 else " in the rows of another process"
            raise ValueError(f"features hold NaN or infinite values{where}")

        precision = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        if (
            n < d and self.reduce is None
        ):  # the Gram matrix has the same non-zero eigenvalues, and is the smaller one
            centred = torch.cat([chunk - mean for chunk in _chunks(x)])
            matrix = centred @ centred.T / (n - 1)
            return self._keep(
                matrix, mean, (centred**2).mean(dim=0), n, precision, features, centred
            )
        matrix, mean, n = _covariance(
            CovarianceSums(*map(self._sum, covariance_sums(x, mean))), mean
        )
        return self._keep(matrix, mean, matrix.diagonal(), n, precision, features)

    def fit_from_sums(
        self,
        sums: CovarianceSums | tuple[Tensor, Tensor, Tensor],
        shift: np.ndarray | Tensor,
        precision: torch.dtype = torch.float32,
    ) -> PCAWhiten:
        """Find mean, axes and variances from the sums of `covariance_sums`, added over any number
        of sets of rows.

        Parameters
        ----------
        sums : CovarianceSums
            ``CovarianceSums(*(a + b for a, b in zip(first, second)))`` joins two.
        shift : ndarray or Tensor, shape (D,)
            The one the sums are about. The fitted attributes are of its kind.
        precision : torch.float32 or torch.float64
            Type of the features, whose rounding says which variances are real.

        Raises
        ------
        ValueError
            Fewer than 2 rows, sums that are not finite, or all rows equal.
        """
        matrix, mean, n = _covariance(
            CovarianceSums(*sums),
            torch.as_tensor(shift, dtype=torch.float64, device=sums[2].device),
        )
        return self._keep(matrix, mean, matrix.diagonal(), n, precision, shift)

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.reduce is None else self.reduce(tensor)

    def _keep(
        self,
        matrix: Tensor,
        mean: Tensor,
        power: Tensor,
        n: int,
        precision: torch.dtype,
        kind: np.ndarray | Tensor,
        centred: Tensor | None = None,
    ) -> PCAWhiten:
        """Set the attributes from the covariance matrix, or from the Gram matrix of the rows
        `centred`.
        """
        d = len(mean)
        variance, vectors = _top_eigenpairs(matrix, min(self.n_components, n, d))
        # A direction is real if it rises above the rounding of the stored features (relative to a
        # feature's size, mean included) and above that of the matrix. Sixteen units in the last
        # place: what a few layers of float32 arithmetic leave.
        resolution = 16 * torch.finfo(precision).eps * (power + mean**2).max().sqrt()
        floor = max(
            float(resolution) ** 2,
            float(variance[0]) * len(matrix) * torch.finfo(torch.float64).eps,
        )
        kept = int((variance > floor).sum())
        if kept == 0:
            raise ValueError(
                f"all {n} rows of the features are equal: there is no variance to whiten (has the network collapsed?)"
            )
        if kept < self.n_components:
            warnings.warn(
                f"PCA keeps {kept} components instead of n_components={self.n_components}: {n} rows of {d} features hold no more",
                RuntimeWarning,
                stacklevel=3,
            )
        variance, vectors = variance[:kept], vectors[:, :kept]
        components = (
            vectors.T if centred is None else (centred.T @ vectors / ((n - 1) * variance).sqrt()).T
        )  # (n_components_, D)
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        components = (components * largest.sign()).contiguous()

        self.n_components_ = kept
        self.mean_ = as_kind(mean, kind)
        self.components_ = as_kind(components, kind)
        self.explained_variance_ = as_kind(variance, kind)
        self.explained_variance_ratio_ = as_kind(variance / matrix.trace(), kind)
        return self

    def transform(self, features: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Whitened components of `features`.

        Parameters
        ----------
        features : ndarray or Tensor, shape (N, D)

        Returns
        -------
        ndarray or Tensor, shape (N, n_components_)
            Same kind and device as `features`; float64 if they are, else float32.

        Raises
        ------
        RuntimeError
            Called before `fit`.
        ValueError
            Another number of features than fitted.
        """
        if not hasattr(self, "components_"):
            raise RuntimeError("PCAWhiten is not fitted yet: call fit first")
        x = _rows(features, "features")
        mean, components, variance = (
            torch.as_tensor(a, device=x.device)
            for a in (self.mean_, self.components_, self.explained_variance_)
        )
        if x.shape[1] != len(mean):
            raise ValueError(
                f"features have {x.shape[1]} columns, but PCA was fitted on {len(mean)}"
            )
        axes = components.T / variance.sqrt()
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        whitened = torch.empty((len(x), axes.shape[1]), dtype=dtype, device=x.device)
        start = 0
        for chunk in _chunks(x):
            z = chunk.sub_(mean) @ axes
            if self.l2:
                z = nn.functional.normalize(z, dim=1)
            whitened[start : start + len(z)] = z
            start += len(z)
        return as_kind(whitened, features)

    def fit_transform(self, features: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """``fit(features).transform(features)``."""
        return self.fit(features).transform(features)


def as_rows(values: np.ndarray | Tensor, name: str) -> Tensor:
    """`values`, called `name` in errors, as a float32 or float64 tensor (N, D), without a copy
    where they are one already.

    It may share memory with `values`, even read-only memory: it must not be written to.
    """
    rows = _rows(values, name)
    return rows if rows.dtype == torch.float64 else rows.float()


def _rows(values: np.ndarray | Tensor, name: str) -> Tensor:
    """`as_rows` without a change of type, for what is read in chunks."""
    if isinstance(values, Tensor):
        rows = values.detach()
    else:
        with (
            warnings.catch_warnings()
        ):  # torch would have the whole of a read-only memory map copied
            warnings.filterwarnings(
                "ignore", message="The given NumPy array is not writable", category=UserWarning
            )
            rows = torch.from_numpy(np.ascontiguousarray(values))
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(rows.shape)}")
    return rows


def as_kind(result: Tensor, values: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """`result` as a tensor on the device of `values` if those are a tensor, else as an array."""
    return result.to(values.device) if isinstance(values, Tensor) else result.cpu().numpy()


def _chunks(x: Tensor, size: int = 4096) -> Iterator[Tensor]:
    """Copies of the rows of `x` in float64, `size` at a time."""
    return (chunk.to(torch.float64, copy=True) for chunk in x.split(size))


def first_bad_row(x: Tensor) -> int:
    """Index of the first row of `x` that holds NaN or an infinite value; -1 if none does."""
    start = 0
    for block in x.split(4096):
        bad = ~torch.isfinite(block).all(dim=1)
        if bad.any():
            return start + int(bad.nonzero()[0])
        start += len(block)
    return -1


def _covariance(sums: CovarianceSums, shift: Tensor) -> tuple[Tensor, Tensor, int]:
    """Covariance matrix (D, D), mean (D,) and number of the rows whose sums about `shift` are
    given.
    """
    n = round(float(sums.count))
    if n < 2:
        raise ValueError(f"PCA needs at least 2 rows, got {n}")
    if not torch.isfinite(sums.outer).all():
        raise ValueError("the sums hold NaN or infinite values: check the features they come from")
    # about the mean: the shift lies near it, so little cancels
    return (
        torch.addr(sums.outer, sums.sum, sums.sum, alpha=-1 / n).div_(n - 1),
        shift + sums.sum / n,
        n,
    )


def _top_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, falling, and their eigenvectors (n, k) of a symmetric matrix (n,
    n).
    """
    n = len(matrix)
    if matrix.device.type == "cpu":  # SciPy can stop at the k wanted, torch cannot
        values, vectors = map(
            torch.from_numpy, scipy.linalg.eigh(matrix.numpy(), subset_by_index=[n - k, n - 1])
        )
    else:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[n - k :], vectors[:, n - k :]
    return values.flip(0), vectors.flip(1)
