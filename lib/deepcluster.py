"""DeepCluster (Caron et al. 2018): cluster the features, train on the cluster numbers, again and again."""

from __future__ import annotations

import csv
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib import metrics
from lib.augment import rotate
from lib.features import PCAWhiten, extract, normalise
from lib.kmeans import KMeans
from lib.models import IMAGE_SIZE, Backbone, build
from lib.paths import atomic_write, save_json, save_npy, show
from lib.runs import (
    MOVE_ASIDE,
    Run,
    RunMismatchError,
    TrainConfig,
    check_same_run,
    identity,
    is_complete,
    load_checkpoint,
    load_run,
    set_aside,
)

__all__ = ["Run", "RunMismatchError", "TrainConfig", "cluster", "fit", "load_run", "resolve_device", "train_epoch", "uniform_over_clusters"]

COLUMNS = ["epoch", "nmi_prev", "ami_prev", "loss", "clusters_used", "largest_cluster", "perplexity", "lr"]
COLUMNS += ["seconds_features", "seconds_cluster", "seconds_train"]


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is a CUDA GPU if there is one, else the CPU. RuntimeError if a GPU is asked for and missing."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        raise RuntimeError(f"device {device!r} is not available here; use --device cpu or auto")
    return torch.device(device)


def uniform_over_clusters(pseudo_labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of one epoch, (N,): every cluster in use is drawn equally often, small ones with repetition (Caron et al. 2018, sec. 3.3)."""
    clusters = np.unique(pseudo_labels)
    share = len(pseudo_labels) // len(clusters) + 1
    drawn = []
    for cluster in clusters:
        members = np.flatnonzero(pseudo_labels == cluster)
        drawn.append(rng.choice(members, share, replace=len(members) < share))
    return rng.permutation(np.concatenate(drawn))[: len(pseudo_labels)]


def _rng(config: TrainConfig, epoch: int, purpose: int) -> np.random.Generator:
    """One stream for each purpose of each epoch: a resumed run needs no saved random state to draw what an unbroken one draws."""
    return np.random.default_rng([config.seed, epoch, purpose])


ORDER, DROPOUT, ANGLES, CLUSTERS, TOP_LAYER, SHUFFLE = range(6)


def _torch_seed(config: TrainConfig, epoch: int, purpose: int) -> int:
    return int(_rng(config, epoch, purpose).integers(2**63))


def _isolated(device: torch.device) -> Any:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def cluster(features: np.ndarray, config: TrainConfig, epoch: int) -> tuple[np.ndarray, PCAWhiten, KMeans]:
    """Features (N, D) -> PCA -> whitening -> L2 -> K-means -> assignments (N,), with the fitted steps."""
    whiten = PCAWhiten(min(config.pca_dim, *features.shape), l2=True)
    kmeans = KMeans(config.n_clusters, seed=int(_rng(config, epoch, CLUSTERS).integers(2**31)))
    return np.asarray(kmeans.fit_predict(whiten.fit_transform(features))), whiten, kmeans


def labels_to_train_on(assignments: np.ndarray, earlier: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Pseudo-labels (N,) of an epoch, from its clusters (N,) and those of the epochs before (epochs, N): see ``TrainConfig``."""
    if config.pseudo_labels == "index":
        return np.arange(len(assignments)) % config.n_clusters
    if config.pseudo_labels == "shuffled":
        first = earlier[0] if len(earlier) else assignments
        return _rng(config, 0, SHUFFLE).permutation(first)  # from the seed alone: the same in every epoch, resumed or not
    return assignments


def train_epoch(
    model: Backbone,
    optimizers: list[torch.optim.Optimizer],
    images: np.ndarray | Tensor,
    pseudo_labels: np.ndarray,
    config: TrainConfig,
    epoch: int,
) -> float:
    """One pass of cross-entropy on the pseudo-labels.

    Parameters
    ----------
    images : uint8, shape (N, 64, 64)
    pseudo_labels : int, shape (N,)
        Label i belongs to image i.
    epoch : int
        Counted from 1.

    Returns
    -------
    float
        Mean loss over the images drawn, in nats; ln K is chance.

    Raises
    ------
    FloatingPointError
        The loss of a batch is not finite.
    """
    device = next(model.parameters()).device
    n = len(images)
    order = (
        uniform_over_clusters(pseudo_labels, _rng(config, epoch, ORDER))
        if config.uniform_sampling
        else _rng(config, epoch, ORDER).permutation(n)
    )
    angles = _rng(config, epoch, ANGLES).uniform(-config.rotation_degrees, config.rotation_degrees, n).astype(np.float32)
    # batch norm cannot train on one image: a last batch of one is left out
    starts = [s for s in range(0, n, config.batch_size) if min(n - s, config.batch_size) > 1]
    labels = torch.as_tensor(pseudo_labels, dtype=torch.long, device=device)
    total, seen = 0.0, 0
    model.train()
    with _isolated(device):
        torch.manual_seed(_torch_seed(config, epoch, DROPOUT))
        for number, start in enumerate(starts, 1):
            index = order[start : start + config.batch_size]
            batch = images[torch.as_tensor(index, device=images.device)] if isinstance(images, Tensor) else torch.from_numpy(images[index])
            x = normalise(batch.to(device))
            if config.rotation_degrees:
                x = rotate(x, torch.from_numpy(angles[start : start + config.batch_size]).to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = nn.functional.cross_entropy(model(x), labels[torch.as_tensor(index, device=device)])
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} in epoch {epoch}, batch {number} of {len(starts)}: lower lr ({config.lr:g}); "
                    "the checkpoint of the epoch before is kept"
                )
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total, seen = total + value * len(index), seen + len(index)
    return total / seen


def _check_images(images: np.ndarray, config: TrainConfig) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images must be a uint8 array of shape (N, {IMAGE_SIZE}, {IMAGE_SIZE}), got {found}")
    if len(images) < config.n_clusters:
        raise ValueError(f"n_clusters = {config.n_clusters} is more than the {len(images)} images; lower n_clusters or add images")


def fit(
    images: np.ndarray,
    config: TrainConfig,
    run_dir: Path | str,
    *,
    restart: bool = False,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Run DeepCluster, or what is left of it, in `run_dir`.

    Image i, feature i, cluster i and pseudo-label i are the same image at every step: features are extracted in the order of `images`,
    and only the order in which batches are drawn is random.

    Parameters
    ----------
    images : ndarray uint8, shape (N, 64, 64)
        May be a memory map. No label is read.
    config : TrainConfig
    run_dir : Path
        Gets config.json at the start, checkpoint.pt, metrics.csv and assignments.npy after each epoch, features.npy and clustering.npz at
        the end. A run that was stopped anywhere goes on from its last whole epoch and ends with the numbers of an unbroken one.
    restart : bool
        Move a run that is there aside and start anew.
    progress : bool
        Show a bar over epochs.
    on_epoch : callable, optional
        Called with each epoch's row of metrics once it is on the disk.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        Images of another shape or type, K > N.
    RunMismatchError
        The folder holds a run of other settings or images.
    FloatingPointError
        Loss or features are not finite; what was finished is kept.
    OSError
        The disk is full or the folder cannot be written; nothing half-written is left.
    """
    run_dir = Path(run_dir)
    _check_images(images, config)
    device = resolve_device(config.device)
    if restart:
        set_aside(run_dir)
    ours = check_same_run(run_dir, identity(config, images))
    training = _Training(config, len(images), device, run_dir / "checkpoint.pt")
    if training.epoch > config.epochs:
        raise RunMismatchError(f"{show(run_dir)} has {training.epoch} epochs, {config.epochs} asked; {MOVE_ASIDE}")
    save_json(run_dir / "config.json", ours)
    if is_complete(run_dir, config):
        return load_run(run_dir)

    # 112,120 images are 459 MB: on a GPU they live there and no loader is needed
    held = torch.from_numpy(np.array(images)).to(device) if device.type == "cuda" else images
    model = training.model
    with tqdm(total=config.epochs, initial=training.epoch, desc=run_dir.parent.name, mininterval=1, disable=not progress) as bar:
        while training.epoch < config.epochs:
            epoch, clock = training.epoch + 1, [_now(device)]
            features = extract(model, held, config.batch_size, device)
            clock.append(_now(device))
            assignments, _, _ = cluster(features, config, epoch)
            pseudo_labels = labels_to_train_on(assignments, training.assignments.numpy(), config)
            clock.append(_now(device))
            if config.reset_top_layer:
                training.reset_top_layer(epoch)
            loss = train_epoch(model, [training.body, training.top], held, pseudo_labels, config, epoch)
            training.reduce_lr(loss)
            clock.append(_now(device))
            row = training.record(assignments, loss, clock)
            training.save()
            training.write_tables()
            bar.set_postfix(loss=f"{loss:.3f}", nmi=f"{row['nmi_prev']:.3f}", clusters=row["clusters_used"], refresh=False)
            bar.update()
            _warn_of_collapse(row, config)
            if on_epoch:
                on_epoch(row)

    features = extract(model, held, config.batch_size, device)
    assignments, whiten, kmeans = cluster(features, config, config.epochs + 1)
    training.save()
    training.write_tables()
    save_npy(run_dir / "features.npy", features)
    with atomic_write(run_dir / "clustering.npz") as handle:
        np.savez(
            handle,
            epochs=config.epochs,
            assignments=assignments.astype(np.int32),
            centroids=kmeans.cluster_centers_,
            mean=whiten.mean_,
            components=whiten.components_,
            explained_variance=whiten.explained_variance_,
        )
    return load_run(run_dir)


class _Training:
    """What changes from epoch to epoch: network, optimisers, scheduler, rows of metrics, assignments. Kept in one checkpoint."""

    def __init__(self, config: TrainConfig, n_images: int, device: torch.device, checkpoint: Path) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.rows: list[dict[str, Any]] = []
        self.assignments = torch.empty((0, n_images), dtype=torch.int32)
        self.model = build(config.backbone, config.n_clusters, config.width, seed=config.seed).to(device)
        self.body = torch.optim.Adam(self.model.body_parameters(), config.lr, weight_decay=config.weight_decay)
        self.top = self._top_optimizer()
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.body)
        if checkpoint.exists():
            self._load()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.rows)

    @property
    def lr(self) -> float:
        return self.body.param_groups[0]["lr"]

    def _top_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.model.top_layer.parameters(), self.lr, weight_decay=self.config.weight_decay)

    def reset_top_layer(self, epoch: int) -> None:
        self.model.reset_top_layer(torch.Generator().manual_seed(_torch_seed(self.config, epoch, TOP_LAYER)))
        self.top = self._top_optimizer()  # Adam's moments belong to the layer that is gone

    def reduce_lr(self, loss: float) -> None:
        self.scheduler.step(loss)
        self.top.param_groups[0]["lr"] = self.lr

    def record(self, pseudo_labels: np.ndarray, loss: float, clock: list[float]) -> dict[str, Any]:
        """Add the epoch's row and assignments; `clock` holds its four times in seconds."""
        previous = self.assignments[-1].numpy() if self.epoch else None
        row = {
            "epoch": self.epoch + 1,
            "nmi_prev": math.nan if previous is None else float(metrics.nmi(previous, pseudo_labels)),
            "ami_prev": math.nan if previous is None else float(metrics.ami(previous, pseudo_labels)),
            "loss": loss,
            **metrics.occupancy(pseudo_labels, self.config.n_clusters),
            "lr": self.lr,
            **dict(zip(COLUMNS[-3:], np.round(np.diff(clock), 3).tolist(), strict=True)),
        }
        self.rows.append(row)
        self.assignments = torch.cat([self.assignments, torch.as_tensor(pseudo_labels, dtype=torch.int32)[None]])
        return row

    def _stateful(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "body", "top", "scheduler")}

    def save(self) -> None:
        """The checkpoint is written before the tables: they are written again from it when a run goes on."""
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        with atomic_write(self.checkpoint) as handle:
            torch.save({**state, "rows": self.rows, "assignments": self.assignments}, handle)

    def _load(self) -> None:
        state = load_checkpoint(self.checkpoint)
        if state["assignments"].shape[1:] != self.assignments.shape[1:]:
            theirs, ours = state["assignments"].shape[1], self.assignments.shape[1]
            raise RunMismatchError(f"{show(self.checkpoint)} was trained on {theirs} images, not {ours}; {MOVE_ASIDE}")
        try:
            for name, part in self._stateful().items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError) as error:
            raise RunMismatchError(
                f"{show(self.checkpoint)} belongs to another network than {self.config.backbone} {self.config.width}; {MOVE_ASIDE}"
            ) from error
        self.rows, self.assignments = state["rows"], state["assignments"]

    def write_tables(self) -> None:
        run_dir = self.checkpoint.parent
        with atomic_write(run_dir / "metrics.csv", "w") as handle:
            writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
            writer.writeheader()
            # a float is written with all its digits, so equal runs give equal bytes
            writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in self.rows)
        save_npy(run_dir / "assignments.npy", self.assignments.numpy())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _warn_of_collapse(row: dict[str, Any], config: TrainConfig) -> None:
    if row["largest_cluster"] > 0.5 or row["clusters_used"] < config.n_clusters / 2:
        warnings.warn(
            f"epoch {row['epoch']}: {row['clusters_used']} of {config.n_clusters} clusters in use, the largest holds "
            f"{row['largest_cluster']:.0%} of the images: the clustering is collapsing",
            RuntimeWarning,
            stacklevel=3,
        )
