"""A training run as files: its settings, who owns the folder, and reading a finished run back."""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib.clusterers import CLUSTERERS
from lib.images import CORNERS, INTERPOLATIONS
from lib.models import BACKBONES, Backbone, build
from lib.paths import atomic_write, load_json, show


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on besides the images.

    Attributes
    ----------
    backbone : str
        A key of ``lib.models.BACKBONES``.
    n_clusters : int
        K of K-means and width of the top layer.
    pca_dim : int
        Components kept before whitening.
    epochs : int
        Rounds of clustering and training; 0 gives the features of the untrained network. Raising it
        continues a finished run.
    batch_size : int
        Images per step.
    lr, weight_decay : float
        Adam's; ``ReduceLROnPlateau`` (PyTorch's defaults) divides the rate by 10 when the epoch's
        loss stops falling.
    width : tuple of int or None
        See ``lib.models.build``; None means the paper's.
    rotation_degrees : float
        Each image is turned by a fresh uniform angle in [-rotation_degrees, rotation_degrees] each
        time it is trained on; 0 means no augmentation.
    rotation_interpolation : {"bilinear", "nearest"}
    rotation_corners : {"black", "reflect"}
        See ``lib.images.rotate``.
    reset_top_layer : bool
        Draw the top layer anew each epoch, as DeepCluster does.
    uniform_sampling : bool
        Draw the epoch's N images uniformly over clusters, as DeepCluster does; else each image
        once.
    pseudo_labels : {"clusters", "index", "shuffled"}
        What is trained on: the epoch's own clusters, as DeepCluster does, or one of two controls
        that know nothing of the images: ``"index"``, the image's number modulo K, or
        ``"shuffled"``, the first epoch's clusters shuffled once and kept. The metrics and
        assignments that are recorded are those of the clusters all the same.
    seed : int
        Of weights, order, angles, dropout and K-means.
    device : {"auto", "cpu", "cuda", "mps"}
    kmeans_engine : {"auto", "sklearn", "torch"}
        See ``lib.kmeans.KMeans``. The engines draw other starts, so their clusterings differ as two
        seeds do. ``auto`` takes torch on a GPU or on several processes, else scikit-learn.
    clusterer : {"kmeans", "minibatch", "hierarchical", "graph"}
        See ``lib.clusterers``; all but the first run in one process.
    warm_start : bool
        K-means begins at the clusters of the epoch before instead of k-means++: fewer iterations,
        but consecutive clusterings agree more because of it, so NMI(t, t-1) says less
        (``tests/bench/kmeans.py`` prints by how much).
    amp : {"auto", "off"}
        ``auto``: bfloat16 autocast on a GPU, float32 on a CPU. ``off``: float32 everywhere. The
        last features, those that are kept, are extracted in float32 either way.
    channels_last : bool
        Keep the filters of planar convolutions, and so their maps, with the channels innermost. On
        two CPU cores AlexNet of the quick preset trains 1.9 and extracts 3.2 times as fast with it
        (``tests/bench/switches.py``); it is off by default because it rounds otherwise, so that
        runs are no longer equal bit for bit to those made without.
    compile : bool
        Compile the network with ``torch.compile``. On the same cores it made steps 1.01 and
        features 1.2 times as fast, after 40 s.
    keep_checkpoints : int
        Number of epochs whose checkpoints are kept, the last one included.
    stop_on_collapse : bool
        End a run whose clustering collapses with an error, instead of a warning only.

    Notes
    -----
    `IDENTITY_FREE` names the settings that do not make another run: `epochs`, those that say how
    numbers are computed (`device`, `amp`, `channels_last`, `compile`: equal up to rounding) and
    those that say what is kept. A run may go on with others."""

    backbone: str
    n_clusters: int = 200
    pca_dim: int = 64
    epochs: int = 20
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    width: tuple[int, ...] | None = None
    rotation_degrees: float = 0.0
    reset_top_layer: bool = True
    uniform_sampling: bool = True
    pseudo_labels: str = "clusters"
    seed: int = 0
    device: str = "auto"
    rotation_interpolation: str = "bilinear"
    rotation_corners: str = "black"
    kmeans_engine: str = "auto"
    clusterer: str = "kmeans"
    warm_start: bool = False
    amp: str = "auto"
    channels_last: bool = False
    compile: bool = False
    keep_checkpoints: int = 2
    stop_on_collapse: bool = False

    def __post_init__(self) -> None:
        if self.width is not None:
            object.__setattr__(self, "width", tuple(int(w) for w in self.width))
        if self.backbone not in BACKBONES:
            raise ValueError(
                f"backbone {self.backbone!r} is unknown; choose one of {', '.join(BACKBONES)}"
            )
        bounds = {
            "n_clusters": 2,
            "pca_dim": 1,
            "epochs": 0,
            "batch_size": 2,
            "seed": 0,
            "weight_decay": 0,
            "rotation_degrees": 0,
        }
        bounds["keep_checkpoints"] = 1
        for name, low in bounds.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.rotation_degrees > 180:
            raise ValueError(
                f"rotation_degrees is the half range and at most 180, got {self.rotation_degrees}"
            )
        choices = {
            "device": ("auto", "cpu", "cuda", "mps"),
            "rotation_interpolation": INTERPOLATIONS,
            "rotation_corners": tuple(CORNERS),
            "kmeans_engine": ("auto", "sklearn", "torch"),
            "clusterer": tuple(CLUSTERERS),
            "amp": ("auto", "off"),
            "pseudo_labels": ("clusters", "index", "shuffled"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}"
                )
        if self.warm_start and self.clusterer != "kmeans":
            raise ValueError(
                f"warm_start is an option of K-means, not of clusterer {self.clusterer!r}"
            )


# settings that may change while a run goes on: it stays the same run, to rounding
IDENTITY_FREE = (
    "epochs",
    "device",
    "amp",
    "channels_last",
    "compile",
    "keep_checkpoints",
    "stop_on_collapse",
)


class RunMismatchError(ValueError):
    """The run folder holds a run of other settings or other images."""


@dataclass(frozen=True)
class Run:
    """A finished run, as read from its folder.

    Attributes
    ----------
    config : TrainConfig
    metrics : DataFrame
        One row an epoch; ``epoch`` counts from 1, ``nmi_prev`` of epoch e compares the
        pseudo-labels of e and e - 1.
    assignments : ndarray, shape (epochs, N)
        Row e - 1 holds the pseudo-labels trained on in epoch e.
    features : ndarray, shape (N, D), float32
        Of the network after the last epoch (a memory map).
    final_assignments : ndarray, shape (N,)
        The clusters of ``features``.
    path : Path
    """

    config: TrainConfig
    metrics: pd.DataFrame
    assignments: np.ndarray
    features: np.ndarray
    final_assignments: np.ndarray
    path: Path


def fingerprint(images: np.ndarray) -> str:
    """SHA-256 of shape and pixels."""
    digest = hashlib.sha256(str(images.shape).encode())
    for start in range(0, len(images), 8192):
        digest.update(np.ascontiguousarray(images[start : start + 8192]))
    return digest.hexdigest()


MOVE_ASIDE = "use --restart (restart=True) to move the old run aside, or another dataset name"


CORE = ("*.py", "fast/*.py", "fast/*.c")  # the sources that decide a run's numbers


def code_fingerprint() -> str:
    """SHA-256 of the core's sources and the kernel's."""
    digest = hashlib.sha256()
    for pattern in CORE:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def identity(config: TrainConfig, images: np.ndarray) -> dict[str, Any]:
    """What config.json holds: the settings with the width spelt out, the images' shape and SHA-256,
    the code and the torch that ran.
    """
    data = {"shape": list(images.shape), "sha256": fingerprint(images)}
    width = list(config.width or BACKBONES[config.backbone].WIDTH)
    return {
        **asdict(config),
        "width": width,
        "data": data,
        "code": code_fingerprint(),
        "torch": str(torch.__version__),
    }


def check_same_run(run_dir: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """RunMismatchError if config.json in `run_dir` describes another run.

    More epochs, another device or torch are the same run (`IDENTITY_FREE`); so is other code, of
    which a warning tells. A setting that config.json does not name is younger than the run, which
    had its default. Returns what config.json is to hold: `ours`, with the code that the run was
    begun with."""
    path = run_dir / "config.json"
    theirs = load_json(path) if path.exists() else ours
    check_settings(run_dir, theirs, ours)
    if theirs.get("code") != ours["code"]:
        warnings.warn(
            f"{show(run_dir)} was begun by another version of this code; {MOVE_ASIDE}",
            RuntimeWarning,
            stacklevel=3,
        )
    return {**ours, "code": theirs.get("code")}


def check_settings(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """RunMismatchError, which names `path`, if two `identity` are of different runs."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    same_run = (*IDENTITY_FREE, "torch", "code")
    theirs_or_default = {k: theirs.get(k, defaults.get(k)) for k in ours if k not in same_run}
    differ = {k: f"{k} {v}, now {ours[k]}" for k, v in theirs_or_default.items() if v != ours[k]}
    if "data" in differ:
        differ["data"] = "other images"
    if differ:
        raise RunMismatchError(
            f"{show(path)} holds another run ({'; '.join(differ.values())}); {MOVE_ASIDE}"
        )


def set_aside(run_dir: Path) -> Path | None:
    """Rename a run folder to the first free ``<name>.old<k>``, so that nothing computed is lost.
    None if there is no run.
    """
    if not run_dir.exists():
        return None
    free = next(
        p
        for k in range(1, 10**6)
        if not (p := run_dir.with_name(f"{run_dir.name}.old{k}")).exists()
    )
    run_dir.rename(free)
    return free


def is_complete(run_dir: Path, config: TrainConfig) -> bool:
    """Whether the last files of a run are there and belong to this number of epochs."""
    path = run_dir / "clustering.npz"
    if not path.exists() or not (run_dir / "features.npy").exists():
        return False
    with np.load(path) as clustering:
        return int(clustering["epochs"]) == config.epochs


def checkpoint_paths(path: Path) -> list[Path]:
    """Checkpoints that are there, the newest first: ``checkpoint.pt``, ``checkpoint.1.pt`` of the
    epoch before, and so on.
    """
    older = {
        int(p.suffixes[-2][1:]): p
        for p in path.parent.glob(f"{path.stem}.*{path.suffix}")
        if p.suffixes[-2][1:].isdigit()
    }
    return [path] * path.exists() + [older[age] for age in sorted(older)]


def save_checkpoint(path: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Write `state` to `path`, and keep the `keep` - 1 checkpoints before it as
    ``checkpoint.1.pt``, ``checkpoint.2.pt``, ...

    The new file is whole on the disk before any older one is moved. Killed between two renames, the
    folder holds the older ones under the next numbers, and `checkpoint_paths` still lists them in
    their order."""
    written = path.with_name(f".{path.stem}.new{path.suffix}")
    with atomic_write(written) as handle:
        torch.save(state, handle)
    numbered = [
        path,
        *(path.with_name(f"{path.stem}.{age}{path.suffix}") for age in range(1, keep)),
    ]
    for newer, older in list(itertools.pairwise(numbered))[::-1]:
        if newer.exists():
            os.replace(newer, older)
    os.replace(written, path)
    for old in checkpoint_paths(path)[keep:]:
        old.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only; ValueError naming it if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"{show(path)} cannot be read ({type(error).__name__}); delete it to train this run anew"
        ) from error


def load_newest_checkpoint(path: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """The newest checkpoint that can be read, None if there is none; and the damaged files that are
    newer.

    Raises
    ------
    ValueError
        There are some, and all are damaged; the message names the newest.

    Warns
    -----
    RuntimeWarning
        The newest is damaged and an older one was taken.
    """
    first, damaged = None, []
    for candidate in checkpoint_paths(path):
        try:
            state = load_checkpoint(candidate)
        except ValueError as error:
            first = first or error
            damaged.append(candidate)
            continue
        if first is not None:
            reason = str(first).split("; ")[0]
            warnings.warn(
                f"{reason}; going on from {candidate.name}, of epoch {len(state['rows'])}",
                RuntimeWarning,
                stacklevel=2,
            )
        return state, damaged
    if first is not None:
        raise first
    return None, []


def load_run(run_dir: Path | str) -> Run:
    """Read a finished run.

    Raises
    ------
    FileNotFoundError
        The run is missing or unfinished; the message says which notebook makes it.
    """
    run_dir = Path(run_dir)
    missing = [
        f
        for f in ("config.json", "metrics.csv", "assignments.npy", "features.npy", "clustering.npz")
        if not (run_dir / f).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"{show(run_dir)} holds no finished run ({', '.join(missing)} missing): run the training notebook first"
        )
    stored = load_json(run_dir / "config.json")
    config = TrainConfig(
        **{f.name: stored[f.name] for f in fields(TrainConfig) if f.name in stored}
    )
    if not is_complete(run_dir, config):
        raise FileNotFoundError(
            f"{show(run_dir)} is not finished: run the training notebook again, it goes on where it stopped"
        )
    with np.load(run_dir / "clustering.npz") as clustering:
        final = clustering["assignments"].astype(np.int64)
    return Run(
        config,
        pd.read_csv(run_dir / "metrics.csv"),
        np.load(run_dir / "assignments.npy"),
        np.load(run_dir / "features.npy", mmap_mode="r"),
        final,
        run_dir,
    )


def load_model(run: Run, device: str | torch.device = "cpu") -> Backbone:
    """The network of a finished run, in evaluation mode."""
    model = build(
        run.config.backbone, run.config.n_clusters, run.config.width, seed=run.config.seed
    )
    model.load_state_dict(load_checkpoint(run.path / "checkpoint.pt")["model"])
    return model.to(device).eval()


def embed(run: Run, features: np.ndarray) -> np.ndarray:
    """Features (M, D) of a finished run's network -> what was clustered, (M, d): the run's own PCA,
    whitening and L2.
    """
    with np.load(run.path / "clustering.npz") as c:
        embedding = (features - c["mean"]) @ c["components"].T / np.sqrt(c["explained_variance"])
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    return (embedding / np.maximum(norm, 1e-12)).astype(np.float32)


def assign(run: Run, features: np.ndarray) -> np.ndarray:
    """Features (M, D) of a finished run's network -> its clusters (M,), the nearest of the run's
    centroids.
    """
    with np.load(run.path / "clustering.npz") as c:
        centroids = c["centroids"]
    # |x - c|^2 without the |x|^2 that is the same for all clusters
    return np.argmin((centroids**2).sum(1) - 2 * embed(run, features) @ centroids.T, axis=1)


def curves(runs: Mapping[int, Run]) -> pd.DataFrame:
    """The metrics of several seeds below each other, with a column ``seed``."""
    return pd.concat(
        [run.metrics.assign(seed=seed) for seed, run in runs.items()], ignore_index=True
    )
