"""A training run as files: its settings, its identity, and reading back what it left."""

import hashlib
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib import kmeans
from lib.features import PCAWhiten
from lib.models import BACKBONES, HEADS, Backbone, build
from lib.paths import load_json, show

try:
    from lib.beyond import labels as beyond
except ImportError:  # without lib/beyond there are three kinds of pseudo-labels
    beyond = None

LABELS = {} if beyond is None else beyond.LABELS
CHOICES = {"backbone": tuple(BACKBONES), "head": HEADS, "clusterer": kmeans.CLUSTERERS}
CHOICES |= {"pseudo_labels": ("clusters", "index", "shuffled", *LABELS)}
CHOICES |= {"bn_statistics": ("fresh", "running"), "device": ("auto", "cpu", "cuda")}
LEAST = {"n_clusters": 2, "pca_dim": 1, "epochs": 0, "batch_size": 2, "seed": 0}
LEAST |= {"weight_decay": 0, "rotation_degrees": 0}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the paper's but for `head` and `bn_statistics`.

    ValueError if one is out of range, naming it and its value."""

    backbone: str
    n_clusters: int = 200  # K
    pca_dim: int = 64  # components kept before whitening
    epochs: int = 20  # 0 leaves the network untrained: a control
    batch_size: int = 256  # of all processes together
    lr: float = 1e-3  # of Adam; ReduceLROnPlateau lowers it if the loss stalls
    weight_decay: float = 1e-4  # of Adam
    width: tuple[int, ...] | None = None  # see lib.models.build
    rotation_degrees: float = 0.0  # each image is turned by up to this, either way
    # "clusters" trains on the epoch's own. The others are controls that know nothing of the images:
    # "index" is the image's number modulo K, "shuffled" the first epoch's clusters shuffled once.
    # `lib.beyond.labels` holds more.
    pseudo_labels: str = "clusters"
    # "standardised" gives the top layer features of zero mean and unit variance, and five times the
    # body's learning rate. "linear" is the page's way, "centroids" DeepCluster-v2's (lib.beyond).
    head: str = "standardised"
    # "fresh" estimates batch-norm statistics anew before features are extracted. "running" is the
    # page's way: the statistics lag behind the weights.
    bn_statistics: str = "fresh"
    clusterer: str = "kmeans"  # see lib.kmeans.make_clusterer
    seed: int = 0  # of weights, order, angles, dropout and clustering
    device: str = "auto"  # "auto", "cpu" or "cuda"

    def __post_init__(self) -> None:
        if self.width is not None:
            object.__setattr__(self, "width", tuple(int(w) for w in self.width))
        for name, valid in CHOICES.items():
            if (found := getattr(self, name)) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}; got {found!r}")
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


# of what config.json holds, what may change while a run goes on, or is compared by itself
MAY_DIFFER = ("epochs", "device", "code", "torch", "data")
WHITENING = ("mean", "components", "explained_variance")  # of a fitted PCA, in clustering.npz
CORE = ("*.py", "fast/*.py", "fast/*.c", "beyond/*.py")  # the sources that decide a run's numbers
MOVE_ASIDE = "use --restart (restart=True) to move the old run aside, or another dataset name"


class RunMismatchError(ValueError):
    """The run folder holds a run of other settings or other images."""


@dataclass(frozen=True)
class Run:
    """A finished run, as read from its folder."""

    config: TrainConfig
    metrics: pd.DataFrame  # one row per epoch, from 1; nmi_prev compares with the epoch before
    assignments: np.ndarray  # (epochs, N): the clusters of each epoch, before its training
    features: np.ndarray  # (N, D) float32, a memory map: of the network after the last epoch
    final_assignments: np.ndarray  # (N,): the clusters of `features`
    path: Path


def fingerprint(images: np.ndarray) -> str:
    """SHA-256 of shape and pixels."""
    digest = hashlib.sha256(str(images.shape).encode())
    for start in range(0, len(images), 8192):
        digest.update(np.ascontiguousarray(images[start : start + 8192]))
    return digest.hexdigest()


def code_fingerprint() -> str:
    """SHA-256 of the core's sources and the kernel's."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CORE for path in Path(__file__).parent.glob(pattern)):
        if path.name not in ("__main__.py", "notebooks.py"):
            digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def identity(config: TrainConfig, images: np.ndarray, groups: Any = None) -> dict[str, Any]:
    """What config.json holds: settings with the width spelt out, images, groups, code, torch."""
    found = asdict(config) | {"width": list(config.width or BACKBONES[config.backbone].WIDTH)}
    found["data"] = {"shape": list(images.shape), "sha256": fingerprint(images)}
    found |= {} if groups is None else {"groups": fingerprint(groups)}
    return found | {"code": code_fingerprint(), "torch": str(torch.__version__)}


def check_same_run(run_dir: Path, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json is to hold: `ours`, with the code that the run began with (a warning says if
    it is another). RunMismatchError if it describes another run, more epochs excepted."""
    path = run_dir / "config.json"
    theirs = load_json(path) if path.exists() else ours
    fixed = [name for name in ours if name not in MAY_DIFFER]
    differ = [f"{k} {theirs.get(k)}, now {ours[k]}" for k in fixed if theirs.get(k) != ours[k]]
    if theirs.get("data") != ours["data"]:
        differ.append("other images")
    if differ:
        reasons = "; ".join(differ)
        raise RunMismatchError(f"{show(run_dir)} holds another run ({reasons}); {MOVE_ASIDE}")
    if theirs.get("code") != ours["code"]:
        other = f"{show(run_dir)} was begun by another version of this code; {MOVE_ASIDE}"
        warnings.warn(other, RuntimeWarning, stacklevel=3)
    return {**ours, "code": theirs.get("code")}


def set_aside(run_dir: Path) -> None:
    """Rename a run folder to the first free ``<name>.old<k>``: nothing computed is lost."""
    if run_dir.exists():
        names = (run_dir.with_name(f"{run_dir.name}.old{k}") for k in itertools.count(1))
        run_dir.rename(next(path for path in names if not path.exists()))


def is_complete(run_dir: Path, config: TrainConfig) -> bool:
    """Whether the last files of a run exist and belong to this number of epochs."""
    path = run_dir / "clustering.npz"
    if not path.exists() or not (run_dir / "features.npy").exists():
        return False
    with np.load(path) as clustering:
        return int(clustering["epochs"]) == config.epochs


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only; ValueError naming it if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        why = f"cannot be read ({type(error).__name__}); delete it to train this run anew"
        raise ValueError(f"{show(path)} {why}") from error


def load_run(run_dir: Path | str) -> Run:
    """Read a finished run; FileNotFoundError if it is missing or unfinished."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").exists():
        raise FileNotFoundError(f"{show(run_dir)} holds no run: run the training notebook first")
    stored = load_json(run_dir / "config.json")
    settings = {f.name: stored[f.name] for f in fields(TrainConfig) if f.name in stored}
    config = TrainConfig(**settings)
    if not is_complete(run_dir, config):
        again = "run the training notebook again, it continues"
        raise FileNotFoundError(f"{show(run_dir)} is not finished: {again}")
    with np.load(run_dir / "clustering.npz") as clustering:
        final = clustering["assignments"].astype(np.int64)
    table = pd.read_csv(run_dir / "metrics.csv")
    assignments = np.load(run_dir / "assignments.npy")
    features = np.load(run_dir / "features.npy", mmap_mode="r")
    return Run(config, table, assignments, features, final, run_dir)


def network(config: TrainConfig) -> Backbone:
    """The network of a run before training."""
    return build(config.backbone, config.n_clusters, config.width, config.seed, config.head)


def load_model(run: Run, device: str | torch.device = "cpu") -> Backbone:
    """The network of a finished run, in evaluation mode."""
    model = network(run.config)
    model.load_state_dict(load_checkpoint(run.path / "checkpoint.pt")["model"])
    return model.to(device).eval()


def whitening(arrays: Mapping[str, np.ndarray], l2: bool = True) -> PCAWhiten:
    """The fitted PCA of a run from the `WHITENING` arrays of its clustering.npz."""
    whiten = PCAWhiten(len(arrays["components"]), l2)
    for name in WHITENING:
        setattr(whiten, f"{name}_", arrays[name])
    return whiten


def embed(run: Run, features: np.ndarray) -> np.ndarray:
    """Features (M, D) of a run's network to what was clustered, (M, d) float32: the run's own PCA,
    whitening and unit length."""
    with np.load(run.path / "clustering.npz") as stored:
        return whitening(stored).transform(np.asarray(features))


def assign(run: Run, features: np.ndarray) -> np.ndarray:
    """Features (M, D) of a run's network to the nearest of the run's centroids, (M,)."""
    with np.load(run.path / "clustering.npz") as stored:
        return kmeans.nearest(embed(run, features), stored["centroids"])


def curves(runs: Mapping[int, Run]) -> pd.DataFrame:
    """The metrics of several seeds below each other, with a column ``seed``."""
    return pd.concat([run.metrics.assign(seed=seed) for seed, run in runs.items()])
