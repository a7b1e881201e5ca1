"""DeepCluster (Caron et al. 2018): cluster the features, train on the cluster numbers, repeat."""

from __future__ import annotations

import csv
import math
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import ClusterMixin
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from lib import metrics, parallel, runs
from lib.features import PCAWhiten, estimate_statistics, extract
from lib.images import normalise, rotate
from lib.kmeans import make_clusterer
from lib.models import IMAGE_SIZE, Backbone
from lib.parallel import ALONE, World
from lib.paths import atomic_write, save_json, save_npy, show
from lib.runs import MOVE_ASIDE, Run, RunMismatchError, TrainConfig, is_complete, load_run

__all__ = ["TrainConfig", "cluster", "fit", "train_epoch", "uniform_over_clusters"]

COLUMNS = ["epoch", "nmi_prev", "ami_prev", "loss", "clusters_used", "largest_cluster"]
COLUMNS += ["perplexity", "lr", "seconds_features", "seconds_cluster", "seconds_train"]
ORDER, DROPOUT, ANGLES, CLUSTERS, TOP_LAYER, SHUFFLE, STATISTICS = range(7)
STATISTICS_IMAGES = 2048  # images over which batch-norm statistics are estimated anew
# Adam moves a weight by about lr per step, and the top layer has one epoch to learn. With features
# of unit variance it needs larger steps than the body, chosen on digits (docs/learning.md).
TOP_LAYER_RATE = 5


def stream(config: TrainConfig, epoch: int, purpose: int) -> np.random.Generator:
    """The random numbers of one purpose in one epoch: a resumed run needs no saved random state."""
    return np.random.default_rng([config.seed, epoch, purpose])


def torch_seed(config: TrainConfig, epoch: int, purpose: int) -> int:
    """A seed for torch from `stream`."""
    return int(stream(config, epoch, purpose).integers(2**63))


def fit(
    images: np.ndarray,
    config: TrainConfig,
    run_dir: Path | str,
    *,
    nproc: int = 1,
    restart: bool = False,
    progress: bool = True,
) -> Run:
    """Run DeepCluster, or what is left of it, in `run_dir`.

    Image i, feature i, cluster i and pseudo-label i are the same image at every step. A stopped run
    continues from its last whole epoch and ends with the numbers of an unbroken one.

    Parameters
    ----------
    images : ndarray uint8, shape (N, 64, 64)
        May be a memory map. No label is read.
    config : TrainConfig
    run_dir : Path
        Gets config.json at the start; checkpoint.pt, metrics.csv and assignments.npy after each
        epoch; features.npy and clustering.npz at the end.
    nproc : int
        Processes that train together, on GPUs one each; `images` must then be the memory map of a
        file.
    restart, progress : bool
        Move an existing run aside and start anew; show a bar over epochs.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        Images of another shape or dtype, K > N, or fewer images per batch than processes.
    RunMismatchError
        The folder holds a run of other settings or images.
    FloatingPointError, OSError, RuntimeError
        Loss or features are not finite; the disk is full; one of several processes failed. What was
        finished is kept.

    Warns
    -----
    RuntimeWarning
        The clustering collapses, or the run was begun by other code.
    """
    run_dir = Path(run_dir)
    _check(images, config, nproc)
    if nproc > 1:
        _launch(images, config, run_dir, nproc, restart)
        return load_run(run_dir)
    with parallel.join(config.device) as world, parallel.freed_memory_kept():
        training = Training(images, config, run_dir, world, restart)
        if training.epoch == config.epochs and is_complete(run_dir, config):
            return load_run(run_dir)
        quiet = not (progress and world.main)
        with tqdm(total=config.epochs, initial=training.epoch, disable=quiet) as bar:
            while training.epoch < config.epochs:
                epoch, clock = training.epoch + 1, [training.now()]
                features = training.extract()  # (N, D)
                clock.append(training.now())
                assignments = training.cluster(features, epoch)[0]  # (N,)
                pseudo_labels = labels_to_train_on(assignments, training.assignments, config)
                clock.append(training.now())
                training.reset_top_layer(epoch)
                optimizers = [training.body, training.top]
                data = training.images, pseudo_labels
                loss = train_epoch(training.model, optimizers, *data, config, epoch, world)
                clock.append(training.now())
                row = training.record(assignments, loss, clock)
                bar.set_postfix(loss=f"{loss:.3f}", nmi=f"{row['nmi_prev']:.3f}", refresh=False)
                bar.update()
        training.finish()
    return load_run(run_dir)


def cluster(
    features: np.ndarray | Tensor, config: TrainConfig, epoch: int
) -> tuple[np.ndarray, PCAWhiten, ClusterMixin]:
    """Features (N, D) -> PCA -> whitening -> unit length -> clusters (N,), with the fitted steps.

    The clusterer runs on the CPU; it gets N x `pca_dim` numbers, 29 MB for the paper's.
    """
    whiten = PCAWhiten(min(config.pca_dim, *features.shape))
    points = torch.as_tensor(whiten.fit_transform(features)).cpu().numpy()  # (N, d)
    seed = int(stream(config, epoch, CLUSTERS).integers(2**31))
    clusterer = make_clusterer(config.clusterer, config.n_clusters, seed)
    # two threads add two partial sums: the same bits in either order
    with threadpool_limits(2), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters")  # `occupancy` counts them
        assignments = clusterer.fit_predict(points)
    return assignments.astype(np.int64), whiten, clusterer


def uniform_over_clusters(pseudo_labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices (N,) of one epoch: every cluster in use is drawn equally often, small ones with
    repetition (Caron et al. 2018, section 3.3).
    """
    clusters = np.unique(pseudo_labels)
    share = len(pseudo_labels) // len(clusters) + 1
    drawn = []
    for number in clusters:
        members = np.flatnonzero(pseudo_labels == number)
        drawn.append(rng.choice(members, share, replace=len(members) < share))
    return rng.permutation(np.concatenate(drawn))[: len(pseudo_labels)]


def labels_to_train_on(
    assignments: np.ndarray, earlier: np.ndarray, config: TrainConfig
) -> np.ndarray:
    """Pseudo-labels (N,) of an epoch from its clusters (N,) and `earlier` ones, (epochs, N); see
    ``TrainConfig.pseudo_labels``.
    """
    if config.pseudo_labels == "index":
        return np.arange(len(assignments)) % config.n_clusters
    if config.pseudo_labels == "shuffled":
        first = earlier[0] if len(earlier) else assignments
        return stream(config, 0, SHUFFLE).permutation(first)  # the same in every epoch
    return assignments


def train_epoch(
    model: Backbone,
    optimizers: list[torch.optim.Optimizer],
    images: np.ndarray | Tensor,
    pseudo_labels: np.ndarray,
    config: TrainConfig,
    epoch: int,
    world: World = ALONE,
) -> float:
    """One pass of cross-entropy on the pseudo-labels.

    Parameters
    ----------
    images : uint8, shape (N, 64, 64)
    pseudo_labels : int, shape (N,)
    epoch : int
        Counted from 1.

    Returns
    -------
    float
        Mean loss over the images drawn, in nats; ln K is chance. FloatingPointError if the loss of
        a batch is not finite.
    """
    device, n = next(model.parameters()).device, len(images)
    order = uniform_over_clusters(pseudo_labels, stream(config, epoch, ORDER))
    limit = config.rotation_degrees
    angles = stream(config, epoch, ANGLES).uniform(-limit, limit, n).astype(np.float32)
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    # batch norm cannot train on one image: a last batch that is too small is left out
    starts = [s for s in range(0, n, config.batch_size) if n - s >= max(2, world.size)]
    losses, sizes = [], []
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch_seed(config, epoch, DROPOUT) ^ world.rank)
        for start in starts:
            batch = order[start : start + config.batch_size]
            mine = world.share(len(batch))
            rows = batch[mine]
            x = normalise(torch.as_tensor(images[rows]).to(device))  # (B, 1, 64, 64)
            if limit:
                x = rotate(x, torch.from_numpy(angles[start : start + len(batch)][mine]).to(device))
            targets = torch.as_tensor(pseudo_labels[rows], dtype=torch.long, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x)  # (B, K)
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum") / len(batch)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            world.sum_gradients(parameters)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
            sizes.append(len(batch))
            # looking at a GPU's number waits for it
            if len(losses) % 50 == 0 or start == starts[-1]:
                _check_loss(losses, config, epoch)
    return float(np.average(world.sum(torch.stack(losses)).cpu().double(), weights=sizes))


def _check_loss(losses: list[Tensor], config: TrainConfig, epoch: int) -> None:
    bad = (~torch.isfinite(torch.stack(losses))).nonzero()
    if len(bad):
        number = int(bad[0])
        raise FloatingPointError(
            f"the loss is {float(losses[number])} in epoch {epoch}, batch {number + 1}: "
            f"lower lr ({config.lr:g}); finished epochs are kept"
        )


class Training:
    """What changes from epoch to epoch: network, optimisers, metrics, assignments. All of it is in
    one checkpoint; random numbers need none, see `stream`.
    """

    def __init__(
        self, images: np.ndarray, config: TrainConfig, run_dir: Path, world: World, restart: bool
    ) -> None:
        self.config, self.world, self.run_dir, self.n = config, world, run_dir, len(images)
        self.rows: list[dict[str, Any]] = []
        self.assignments = np.empty((0, self.n), dtype=np.int32)
        if restart and world.main:
            runs.set_aside(run_dir)
        world.barrier()
        settings = runs.check_same_run(run_dir, runs.identity(config, images))
        model = runs.network(config)
        self.model = parallel.share_batch_norm(model.to(world.device), world)
        self.body = torch.optim.Adam(
            self.model.body_parameters(), config.lr, weight_decay=config.weight_decay
        )
        self.top = self._top_optimizer()
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.body)
        if (run_dir / "checkpoint.pt").exists():
            self._load()
        if self.epoch > config.epochs:
            raise RunMismatchError(
                f"{show(run_dir)} has {self.epoch} epochs, {config.epochs} asked; {MOVE_ASIDE}"
            )
        # on a GPU the images live there: 112,120 are 459 MB
        on_gpu = world.device.type == "cuda"
        self.images = torch.from_numpy(np.array(images)).to(world.device) if on_gpu else images
        world.barrier()  # everybody has read before rank 0 writes
        if world.main:
            save_json(run_dir / "config.json", settings)
            for leftover in run_dir.glob(".*.tmp"):  # of a killed process
                leftover.unlink(missing_ok=True)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.rows)

    def now(self) -> float:
        """Seconds, after what the GPU has been given to do."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return time.perf_counter()

    def extract(self, autocast: bool = True) -> np.ndarray | Tensor | None:
        """Features (N, D) of all images; None on processes other than the first."""
        if self.config.bn_statistics == "fresh":
            rng = stream(self.config, 0, STATISTICS)  # the same images for every epoch
            rows = rng.permutation(self.n)[:STATISTICS_IMAGES]
            estimate_statistics(self.model, self.images, rows, self.world)
        device = self.world.device
        on_gpu = device.type == "cuda"
        mine = self.images[self.world.share(self.n)]
        options = {"on_device": on_gpu, "autocast": autocast and on_gpu}
        features = extract(self.model, mine, self.config.batch_size, device, **options)
        return self.world.gather(features, self.n)

    def cluster(self, features: np.ndarray | Tensor | None, epoch: int) -> tuple:
        """`cluster` on the first process; assignments (N,) on all."""
        found = cluster(features, self.config, epoch) if self.world.main else (None, None, None)
        return self.world.broadcast(found[0], self.n), *found[1:]

    def _top_optimizer(self) -> torch.optim.Adam:
        rate = TOP_LAYER_RATE if self.config.head == "standardised" else 1
        lr = rate * self.body.param_groups[0]["lr"]
        parameters = self.model.top_layer.parameters()
        return torch.optim.Adam(parameters, lr, weight_decay=self.config.weight_decay)

    def reset_top_layer(self, epoch: int) -> None:
        """Draw the top layer anew; Adam's moments belong to the old one."""
        seed = torch_seed(self.config, epoch, TOP_LAYER)
        self.model.reset_top_layer(torch.Generator().manual_seed(seed))
        self.top = self._top_optimizer()

    def record(self, assignments: np.ndarray, loss: float, clock: list[float]) -> dict[str, Any]:
        """Finish an epoch: lower the learning rate if the loss stalls, add a row, save."""
        self.scheduler.step(loss)
        previous = self.assignments[-1] if self.epoch else None
        first = previous is None
        row = {
            "epoch": self.epoch + 1,
            "nmi_prev": math.nan if first else metrics.nmi(previous, assignments),
            "ami_prev": math.nan if first else metrics.ami(previous, assignments),
            "loss": loss,
            **metrics.occupancy(assignments, self.config.n_clusters),
            "lr": self.body.param_groups[0]["lr"],
            **dict(zip(COLUMNS[-3:], np.round(np.diff(clock), 3).tolist(), strict=True)),
        }
        self.rows.append(row)
        self.assignments = np.concatenate([self.assignments, assignments[None].astype(np.int32)])
        if self.world.main:
            self._save()
            _warn_of_collapse(row, self.config)
        return row

    def finish(self) -> None:
        """Features and clusters of the network after the last epoch."""
        features = self.extract(autocast=False)  # in float32 on every device
        assignments, whiten, clusterer = self.cluster(features, self.config.epochs + 1)
        if self.world.main:
            self._save()  # with the statistics that these features were extracted with
            save_npy(self.run_dir / "features.npy", torch.as_tensor(features).cpu().numpy())
            fitted = (whiten.mean_, whiten.components_, whiten.explained_variance_)
            mean, components, variance = (torch.as_tensor(a).cpu().numpy() for a in fitted)
            with atomic_write(self.run_dir / "clustering.npz") as handle:
                np.savez(
                    handle,
                    epochs=self.config.epochs,
                    assignments=assignments.astype(np.int32),
                    centroids=clusterer.cluster_centers_,
                    mean=mean,
                    components=components,
                    explained_variance=variance,
                )
        self.world.barrier()

    def _save(self) -> None:
        """The checkpoint first: the tables are written again from it when a run continues."""
        parts = ("model", "body", "top", "scheduler")
        state = {name: getattr(self, name).state_dict() for name in parts}
        state |= {"rows": self.rows, "assignments": torch.from_numpy(self.assignments)}
        runs.save_checkpoint(self.run_dir / "checkpoint.pt", state)
        with atomic_write(self.run_dir / "metrics.csv", "w") as handle:
            writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
            writer.writeheader()
            # a float is written with all its digits: equal runs give equal bytes
            writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in self.rows)
        save_npy(self.run_dir / "assignments.npy", self.assignments)

    def _load(self) -> None:
        path = self.run_dir / "checkpoint.pt"
        state = runs.load_checkpoint(path)
        try:
            for name in ("model", "body", "top", "scheduler"):
                getattr(self, name).load_state_dict(state[name])
        except (RuntimeError, ValueError) as error:
            raise RunMismatchError(
                f"{show(path)} belongs to another network; {MOVE_ASIDE}"
            ) from error
        self.rows, self.assignments = state["rows"], state["assignments"].numpy()


def _check(images: np.ndarray, config: TrainConfig, nproc: int) -> None:
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != shape:
        found = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", "")
        raise ValueError(f"images must be a uint8 array of shape (N, 64, 64), got {found}")
    if len(images) < config.n_clusters:
        raise ValueError(
            f"n_clusters = {config.n_clusters} is more than the {len(images)} images; "
            "lower n_clusters or add images"
        )
    if not 1 <= nproc <= config.batch_size:
        raise ValueError(f"nproc must be 1 to batch_size ({config.batch_size}), got {nproc}")


def _launch(
    images: np.ndarray, config: TrainConfig, run_dir: Path, nproc: int, restart: bool
) -> None:
    """`fit` in `nproc` processes that ``torchrun`` starts on this machine."""
    file = getattr(images, "filename", None)
    if file is None:
        raise ValueError(f"nproc = {nproc} needs the memory map that data.load_images returns")
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.json"
        save_json(settings, asdict(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(nproc), "-m", "lib", "train"]
        command += ["--images", str(Path(file).absolute()), "--config", str(settings)]
        command += ["--run-dir", str(run_dir.absolute()), *["--restart"] * restart]
        # torchrun would give each process one thread
        threads = {"OMP_NUM_THREADS": str(max(1, parallel.cores() // nproc))}
        try:
            parallel.run_process(command, env=threads, echo=True)
        except parallel.ProcessFailed as error:
            raise RuntimeError(
                f"training with {nproc} processes failed (status {error.status}); "
                f"the same call continues from the last epoch\n{error.tail}"
            ) from error


def _warn_of_collapse(row: dict[str, Any], config: TrainConfig) -> None:
    """Warn if one cluster holds over half of the images, or over half of the clusters are empty."""
    if row["largest_cluster"] > 0.5 or row["clusters_used"] < config.n_clusters / 2:
        warnings.warn(
            f"epoch {row['epoch']}: {row['clusters_used']} of {config.n_clusters} clusters in use, "
            f"the largest holds {row['largest_cluster']:.0%} of the images: "
            "the clustering is collapsing",
            RuntimeWarning,
            stacklevel=3,
        )
