"""DeepCluster (Caron et al. 2018): cluster the features, train on the cluster numbers, again and
again.
"""

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
from lib.clusterers import Clusterer, make_clusterer
from lib.features import PCAWhiten, extract, normalise
from lib.images import rotate
from lib.kmeans import KMeans
from lib.memory import freed_memory_kept
from lib.models import IMAGE_SIZE, Backbone, build
from lib.parallel import ALONE, TIMEOUT, World, join, resolve_device, share_layers
from lib.paths import atomic_write, save_json, save_npy, show
from lib.runs import (
    MOVE_ASIDE,
    Run,
    RunMismatchError,
    TrainConfig,
    check_same_run,
    check_settings,
    identity,
    is_complete,
    load_newest_checkpoint,
    load_run,
    save_checkpoint,
    set_aside,
)

__all__ = [
    "CollapseError",
    "Run",
    "RunMismatchError",
    "TrainConfig",
    "cluster",
    "fit",
    "load_run",
    "resolve_device",
    "train_epoch",
    "uniform_over_clusters",
]

COLUMNS = [
    "epoch",
    "nmi_prev",
    "ami_prev",
    "loss",
    "clusters_used",
    "largest_cluster",
    "perplexity",
    "lr",
]
COLUMNS += ["seconds_features", "seconds_cluster", "seconds_train"]


class CollapseError(RuntimeError):
    """The clustering collapsed, and the run was asked to end then. What was finished is kept."""


def uniform_over_clusters(pseudo_labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of one epoch, (N,): every cluster in use is drawn equally often, small ones with
    repetition (Caron et al. 2018, sec. 3.3).
    """
    clusters = np.unique(pseudo_labels)
    share = len(pseudo_labels) // len(clusters) + 1
    drawn = []
    for cluster in clusters:
        members = np.flatnonzero(pseudo_labels == cluster)
        drawn.append(rng.choice(members, share, replace=len(members) < share))
    return rng.permutation(np.concatenate(drawn))[: len(pseudo_labels)]


def _rng(config: TrainConfig, epoch: int, purpose: int) -> np.random.Generator:
    """One stream for each purpose of each epoch: a resumed run needs no saved random state to draw
    what an unbroken one draws.
    """
    return np.random.default_rng([config.seed, epoch, purpose])


ORDER, DROPOUT, ANGLES, CLUSTERS, TOP_LAYER, SHUFFLE = range(6)


def _torch_seed(config: TrainConfig, epoch: int, purpose: int) -> int:
    return int(_rng(config, epoch, purpose).integers(2**63))


def _isolated(device: torch.device) -> Any:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _autocast(config: TrainConfig, device: torch.device) -> bool:
    return config.amp == "auto" and device.type == "cuda"


def cluster(
    features: np.ndarray | Tensor,
    config: TrainConfig,
    epoch: int,
    world: World = ALONE,
    earlier: np.ndarray | None = None,
) -> tuple[np.ndarray, PCAWhiten, KMeans | Clusterer]:
    """Features (N, D) -> PCA -> whitening -> L2 -> K-means -> assignments (N,), with the fitted
    steps.

    `earlier` are the assignments (N,) of the epoch before, from which a warm start begins. In a
    `world` of several, `features` are this process's share of the rows, and the assignments are
    those of all."""
    seed = int(_rng(config, epoch, CLUSTERS).integers(2**31))
    n = int(world.sum(torch.tensor(len(features))))
    reduce = world.sum if world.size > 1 else None
    whiten = PCAWhiten(min(config.pca_dim, n, features.shape[1]), l2=True, reduce=reduce)
    options: dict[str, Any] = {}
    if config.clusterer == "kmeans":
        options = {
            "engine": config.kmeans_engine,
            "reduce": reduce,
            "shard": (world.rank, world.size),
        }
        if config.warm_start and earlier is not None:
            options["init"] = earlier[world.share(n)]
    clusterer = make_clusterer(config.clusterer, config.n_clusters, seed, **options)
    assignments = torch.as_tensor(clusterer.fit_predict(whiten.fit_transform(features)))
    return world.all_rows(assignments, n).cpu().numpy(), whiten, clusterer


class _Batches:
    """Computes the gradients of a batch in one pass, or in as many parts as the GPU's memory needs.

    After an out-of-memory error the parts are halved for the rest of the run and their gradients
    are added up. Batch norm then sees a part at a time, so its statistics are those of fewer images
    (and the part that failed has moved its running mean): the run goes on, but is no longer the run
    that a larger GPU would have made."""

    def __init__(self) -> None:
        self.parts = 1

    def backward(
        self,
        loss_of: Callable[[slice], Tensor],
        rows: slice,
        total: int,
        reset: Callable[[], None],
        world: World,
    ) -> Tensor:
        """Add the gradients of the mean loss over `total` images, of which `rows` are here; this
        share of the loss.
        """
        while True:
            try:
                reset()
                loss = torch.zeros((), device=world.device)
                for part in _cut(rows, self.parts):
                    share = loss_of(part) * ((part.stop - part.start) / total)
                    share.backward()
                    loss += share.detach()
                return loss
            except torch.OutOfMemoryError as error:
                if (
                    world.size > 1
                ):  # the other processes are in the middle of a sum and cannot begin anew
                    error.add_note(
                        "with several processes a batch is not cut: lower batch_size, or start more processes"
                    )
                    raise
                if len(_cut(rows, self.parts)) == len(_cut(rows, 2 * self.parts)):
                    raise
            # outside `except`: the error holds what the failed pass had allocated
            self.parts *= 2
            torch.cuda.empty_cache()
            warnings.warn(
                f"the GPU's memory is too small for a batch of {total} images: going on with {len(_cut(rows, self.parts))} parts of it, "
                "whose gradients are added; batch norm sees a part at a time, so the numbers differ from those of a larger GPU",
                RuntimeWarning,
                stacklevel=3,
            )


def _cut(rows: slice, parts: int) -> list[slice]:
    """`rows` in at most `parts` slices of nearly equal length; none of one row, on which batch norm
    cannot train, unless it is the only.
    """
    n = rows.stop - rows.start
    parts = max(1, min(parts, n // 2))
    return [
        slice(rows.start + i * n // parts, rows.start + (i + 1) * n // parts) for i in range(parts)
    ]


def labels_to_train_on(
    assignments: np.ndarray, earlier: np.ndarray, config: TrainConfig
) -> np.ndarray:
    """Pseudo-labels (N,) of an epoch, from its clusters (N,) and those of the epochs before
    (epochs, N): see ``TrainConfig``.
    """
    if config.pseudo_labels == "index":
        return np.arange(len(assignments)) % config.n_clusters
    if config.pseudo_labels == "shuffled":
        first = earlier[0] if len(earlier) else assignments
        return _rng(config, 0, SHUFFLE).permutation(
            first
        )  # from the seed alone: the same in every epoch, resumed or not
    return assignments


def train_epoch(
    model: Backbone,
    optimizers: list[torch.optim.Optimizer],
    images: np.ndarray | Tensor,
    pseudo_labels: np.ndarray,
    config: TrainConfig,
    epoch: int,
    world: World | None = None,
    batches: _Batches | None = None,
) -> float:
    """One pass of cross-entropy on the pseudo-labels.

    Parameters
    ----------
    images : uint8, shape (N, 64, 64)
        All of them, also where `world` has several processes; each reads its rows of every batch
        only.
    pseudo_labels : int, shape (N,)
        Label i belongs to image i.
    epoch : int
        Counted from 1.
    world : World, optional
        The processes that share each batch; this one alone if not given.
    batches : optional
        What is known from earlier epochs of how much of a batch fits into memory.

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
    world, batches = world or World(device=device), batches or _Batches()
    n = len(images)
    order = (
        uniform_over_clusters(pseudo_labels, _rng(config, epoch, ORDER))
        if config.uniform_sampling
        else _rng(config, epoch, ORDER).permutation(n)
    )
    angles = (
        _rng(config, epoch, ANGLES)
        .uniform(-config.rotation_degrees, config.rotation_degrees, n)
        .astype(np.float32)
    )
    order_, angles_ = torch.as_tensor(order).to(device), torch.from_numpy(angles).to(device)
    targets = torch.as_tensor(pseudo_labels, dtype=torch.long, device=device)[order_]
    parameters = [
        p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    ]

    def loss_of(rows: slice) -> Tensor:
        batch = (
            images[order_[rows]]
            if isinstance(images, Tensor)
            else torch.from_numpy(images[order[rows]]).to(device)
        )
        x = normalise(batch)
        if config.rotation_degrees:
            x = rotate(x, angles_[rows], config.rotation_interpolation, config.rotation_corners)
        with torch.autocast(device.type, torch.bfloat16, enabled=_autocast(config, device)):
            return nn.functional.cross_entropy(model(x), targets[rows])

    def reset() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    # batch norm cannot train on one image, nor a process on none: a last batch that is too small is
    # left out
    starts = [
        s
        for s in range(0, n, config.batch_size)
        if min(n - s, config.batch_size) >= max(2, world.size)
    ]
    sizes = [min(n - s, config.batch_size) for s in starts]
    losses: list[Tensor] = []
    model.train()
    with _isolated(device):
        torch.manual_seed(_torch_seed(config, epoch, DROPOUT))
        for start, size in zip(starts, sizes, strict=True):
            mine = world.share_of_batch(size)
            losses.append(
                batches.backward(
                    loss_of, slice(start + mine.start, start + mine.stop), size, reset, world
                )
            )
            world.sum_gradients(parameters)
            for optimizer in optimizers:
                optimizer.step()
            if len(losses) % LOOK == 0:
                _check_losses(losses[-LOOK:], len(losses) - LOOK, len(starts), config, epoch)
    values = world.sum(torch.stack(losses)).tolist()
    _check_losses(losses, 0, len(starts), config, epoch)
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


LOOK = 50  # batches after which the loss is looked at: to look, one waits for the GPU


def _check_losses(
    losses: list[Tensor], before: int, batches: int, config: TrainConfig, epoch: int
) -> None:
    for number, value in enumerate(torch.stack(losses).tolist(), before + 1):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} in epoch {epoch}, batch {number} of {batches}: lower lr ({config.lr:g}); "
                "the checkpoint of the epoch before is kept"
            )


def _check_images(images: np.ndarray, config: TrainConfig) -> None:
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE)
    ):
        found = (
            f"{images.dtype} {images.shape}"
            if isinstance(images, np.ndarray)
            else type(images).__name__
        )
        raise ValueError(
            f"images must be a uint8 array of shape (N, {IMAGE_SIZE}, {IMAGE_SIZE}), got {found}"
        )
    if len(images) < config.n_clusters:
        raise ValueError(
            f"n_clusters = {config.n_clusters} is more than the {len(images)} images; lower n_clusters or add images"
        )


def _check_world(config: TrainConfig, world: World) -> None:
    if config.batch_size < world.size:
        raise ValueError(
            f"batch_size = {config.batch_size} is less than one image for each of {world.size} processes"
        )
    if config.kmeans_engine == "sklearn" and world.size > 1:
        raise ValueError(
            "kmeans_engine='sklearn' runs in one process; use 'auto' or 'torch' with several"
        )
    if config.clusterer != "kmeans" and world.size > 1:
        raise ValueError(
            f"clusterer={config.clusterer!r} runs in one process; use 'kmeans' with several"
        )


def fit(
    images: np.ndarray,
    config: TrainConfig,
    run_dir: Path | str,
    *,
    restart: bool = False,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    timeout: float = TIMEOUT,
) -> Run:
    """Run DeepCluster, or what is left of it, in `run_dir`.

    Image i, feature i, cluster i and pseudo-label i are the same image at every step: features are
    extracted in the order of `images`, and only the order in which batches are drawn is random.

    Called in the processes that ``torchrun`` has started (see ``lib.train``), it trains one run
    with all of them: `images` and `run_dir` are then on a disk that all see, each process extracts
    and clusters its share of the images and trains on its share of each batch, and the first one
    writes. `batch_size` is that of all together.

    Parameters
    ----------
    images : ndarray uint8, shape (N, 64, 64)
        May be a memory map. No label is read.
    config : TrainConfig
    run_dir : Path
        Gets config.json at the start; checkpoint.pt, metrics.csv and assignments.npy after each
        epoch (and the checkpoints of ``config.keep_checkpoints`` - 1 epochs before as
        checkpoint.1.pt, ...); features.npy and clustering.npz at the end. A run that was stopped
        anywhere goes on from its last whole epoch and ends with the numbers of an unbroken one.
    restart : bool
        Move a run that is there aside and start anew.
    progress : bool
        Show a bar over epochs.
    on_epoch : callable, optional
        Called with each epoch's row of metrics once it is on the disk (by the first process only).
    timeout : float
        Seconds after which a process that waits for another one ends with an error.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        Images of another shape or type, K > N, or a batch with fewer images than there are
        processes.
    RunMismatchError
        The folder holds a run of other settings or images.
    CollapseError
        ``config.stop_on_collapse``, and one cluster holds more than half of the images or fewer
        than half of the clusters are in use.
    FloatingPointError
        Loss or features are not finite; what was finished is kept.
    OSError
        The disk is full or the folder cannot be written; nothing half-written is left.

    Warns
    -----
    RuntimeWarning
        The clustering collapses; the GPU's memory is too small for a batch, which is then cut; the
        newest checkpoint is damaged and the one before is taken; the run was begun by other code.
    """
    run_dir = Path(run_dir)
    _check_images(images, config)
    with join(config.device, timeout) as world, freed_memory_kept():
        _check_world(config, world)
        if restart and world.main:
            set_aside(run_dir)
        world.barrier()
        ours = check_same_run(run_dir, identity(config, images))
        training = _Training(config, len(images), world, run_dir / "checkpoint.pt", ours)
        if training.epoch > config.epochs:
            raise RunMismatchError(
                f"{show(run_dir)} has {training.epoch} epochs, {config.epochs} asked; {MOVE_ASIDE}"
            )
        world.check_equal(training.epoch, "the epochs that are finished")
        if world.main:
            save_json(run_dir / "config.json", ours)
            _sweep(run_dir)
            for path in (
                training.damaged
            ):  # or it would take the place of a whole one when the next is written
                path.replace(path.with_name("checkpoint.damaged.pt"))
        # a finished run whose last checkpoint is damaged makes its last epoch again
        if is_complete(run_dir, config) and training.epoch in (0, config.epochs):
            return load_run(run_dir)
        if training.rows:
            _look_for_collapse(training.rows[-1], config, world)

        device, model, held = world.device, training.model, _hold(images, world.device)
        mine = world.share(len(images))
        on_device, autocast = device.type == "cuda", _autocast(config, device)
        batches = _Batches()
        hidden = not (progress and world.main)
        with tqdm(
            total=config.epochs,
            initial=training.epoch,
            desc=run_dir.parent.name,
            mininterval=1,
            disable=hidden,
        ) as bar:
            while training.epoch < config.epochs:
                epoch, clock = training.epoch + 1, [_now(device)]
                features = extract(
                    model,
                    held[mine],
                    config.batch_size,
                    device,
                    on_device=on_device,
                    autocast=autocast,
                )
                clock.append(_now(device))
                assignments, _, _ = cluster(
                    features, config, epoch, world, training.last_assignments
                )
                pseudo_labels = labels_to_train_on(
                    assignments, training.assignments.numpy(), config
                )
                clock.append(_now(device))
                if config.reset_top_layer:
                    training.reset_top_layer(epoch)
                loss = train_epoch(
                    model,
                    [training.body, training.top],
                    held,
                    pseudo_labels,
                    config,
                    epoch,
                    world,
                    batches,
                )
                training.reduce_lr(loss)
                clock.append(_now(device))
                row = training.record(assignments, loss, clock)
                if world.main:
                    training.save()
                    training.write_tables()
                bar.set_postfix(
                    loss=f"{loss:.3f}",
                    nmi=f"{row['nmi_prev']:.3f}",
                    clusters=row["clusters_used"],
                    refresh=False,
                )
                bar.update()
                if on_epoch and world.main:
                    on_epoch(row)
                _look_for_collapse(row, config, world)

        # in float32 on every device: what is published and measured should not depend on where it
        # was trained
        features = extract(model, held[mine], config.batch_size, device, on_device=on_device)
        assignments, whiten, kmeans = cluster(
            features, config, config.epochs + 1, world, training.last_assignments
        )
        features = world.collect(torch.as_tensor(features).cpu().numpy(), len(images))
        if world.main:
            if not training.checkpoint.exists():  # no epoch was trained
                training.save()
            training.write_tables()
            save_npy(run_dir / "features.npy", features)
            with atomic_write(run_dir / "clustering.npz") as handle:
                np.savez(
                    handle,
                    epochs=config.epochs,
                    assignments=assignments.astype(np.int32),
                    centroids=_array(kmeans.cluster_centers_),
                    mean=_array(whiten.mean_),
                    components=_array(whiten.components_),
                    explained_variance=_array(whiten.explained_variance_),
                )
        world.barrier()
        return load_run(run_dir)


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    return torch.as_tensor(values).cpu().numpy()


def _hold(images: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """Images where batches are made of them: 112,120 are 459 MB, so on a GPU they live there and no
    loader is needed.
    """
    if device.type != "cuda":
        return images
    try:
        return torch.from_numpy(np.array(images)).to(device)
    except torch.OutOfMemoryError:
        warnings.warn(
            f"{images.nbytes >> 20} MiB of images do not fit on the GPU: batches are read from the disk",
            RuntimeWarning,
            stacklevel=3,
        )
        return images


def _sweep(run_dir: Path) -> None:
    """Remove what a killed process had begun to write."""
    for leftover in [*run_dir.glob(".*.tmp"), *run_dir.glob(".checkpoint.new.pt")]:
        leftover.unlink(missing_ok=True)


def to_channels_last(model: nn.Module) -> None:
    """Lay planar filters out with the channels innermost, in place: the maps they make follow.
    Group convolutions' filters stay.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:  # PyTorch's own ``model.to`` refuses filters of more axes
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


class _Training:
    """What changes from epoch to epoch: network, optimisers, scheduler, rows of metrics,
    assignments. Kept in one checkpoint.

    A checkpoint needs no state of random numbers: every draw comes from a stream of its own for
    (seed, epoch, purpose), see `_rng`."""

    def __init__(
        self,
        config: TrainConfig,
        n_images: int,
        world: World,
        checkpoint: Path,
        settings: dict[str, Any],
    ) -> None:
        self.config, self.checkpoint, self.settings = config, checkpoint, settings
        self.rows: list[dict[str, Any]] = []
        self.assignments = torch.empty((0, n_images), dtype=torch.int32)
        self.model = share_layers(
            build(config.backbone, config.n_clusters, config.width, seed=config.seed).to(
                world.device
            ),
            world,
        )
        if config.channels_last:
            to_channels_last(self.model)
        if config.compile:  # in place: the names in a state_dict stay
            self.model.features = torch.compile(self.model.features)
        self.body = torch.optim.Adam(
            self.model.body_parameters(), config.lr, weight_decay=config.weight_decay
        )
        self.top = self._top_optimizer()
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.body)
        state, self.damaged = load_newest_checkpoint(checkpoint)
        if state is not None:
            self._load(state)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.rows)

    @property
    def last_assignments(self) -> np.ndarray | None:
        """Clusters (N,) of the last finished epoch."""
        return self.assignments[-1].numpy() if len(self.assignments) else None

    @property
    def lr(self) -> float:
        return self.body.param_groups[0]["lr"]

    def _top_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            self.model.top_layer.parameters(), self.lr, weight_decay=self.config.weight_decay
        )

    def reset_top_layer(self, epoch: int) -> None:
        self.model.reset_top_layer(
            torch.Generator().manual_seed(_torch_seed(self.config, epoch, TOP_LAYER))
        )
        self.top = self._top_optimizer()  # Adam's moments belong to the layer that is gone

    def reduce_lr(self, loss: float) -> None:
        self.scheduler.step(loss)
        self.top.param_groups[0]["lr"] = self.lr

    def record(self, pseudo_labels: np.ndarray, loss: float, clock: list[float]) -> dict[str, Any]:
        """Add the epoch's row and assignments; `clock` holds its four times in seconds."""
        previous = self.assignments[-1].numpy() if self.epoch else None
        row = {
            "epoch": self.epoch + 1,
            "nmi_prev": math.nan
            if previous is None
            else float(metrics.nmi(previous, pseudo_labels)),
            "ami_prev": math.nan
            if previous is None
            else float(metrics.ami(previous, pseudo_labels)),
            "loss": loss,
            **metrics.occupancy(pseudo_labels, self.config.n_clusters),
            "lr": self.lr,
            **dict(zip(COLUMNS[-3:], np.round(np.diff(clock), 3).tolist(), strict=True)),
        }
        self.rows.append(row)
        self.assignments = torch.cat(
            [self.assignments, torch.as_tensor(pseudo_labels, dtype=torch.int32)[None]]
        )
        return row

    def _stateful(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "body", "top", "scheduler")}

    def save(self) -> None:
        """The checkpoint is written before the tables: they are written again from it when a run
        goes on.
        """
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        state |= {"rows": self.rows, "assignments": self.assignments, "settings": self.settings}
        save_checkpoint(self.checkpoint, state, self.config.keep_checkpoints)

    def _load(self, state: dict[str, Any]) -> None:
        check_settings(
            self.checkpoint, state.get("settings", self.settings), self.settings
        )  # config.json may be gone
        if state["assignments"].shape[1:] != self.assignments.shape[1:]:
            theirs, ours = state["assignments"].shape[1], self.assignments.shape[1]
            raise RunMismatchError(
                f"{show(self.checkpoint)} was trained on {theirs} images, not {ours}; {MOVE_ASIDE}"
            )
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


def _look_for_collapse(row: dict[str, Any], config: TrainConfig, world: World) -> None:
    """Warn, or end the run if the settings ask for it, when one cluster passes half of the images
    or half of the clusters are empty.
    """
    if row["largest_cluster"] <= 0.5 and row["clusters_used"] >= config.n_clusters / 2:
        return
    what = (
        f"epoch {row['epoch']}: {row['clusters_used']} of {config.n_clusters} clusters in use, the largest holds "
        f"{row['largest_cluster']:.0%} of the images: the clustering is collapsing"
    )
    if config.stop_on_collapse:
        raise CollapseError(
            f"{what}; the epochs so far are kept. To go on all the same, set stop_on_collapse to False"
        )
    if world.main:
        warnings.warn(what, RuntimeWarning, stacklevel=3)
