"""DeepCluster (Caron et al. 2018): cluster the features, train on the cluster numbers, repeat."""

import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
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


def fit(
    images: np.ndarray,
    config: TrainConfig,
    run_dir: Path | str,
    *,
    groups: np.ndarray | None = None,
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
        May be a memory map, and must be that of a file if `nproc` is above 1. No label is read.
    run_dir : Path
        Gets config.json at the start; checkpoint.pt, metrics.csv and assignments.npy after each
        epoch; features.npy and clustering.npz at the end.
    groups : ndarray int, shape (N,), for `lib.beyond.labels.GROUPED` only
        A label of each image from 0 to K - 1, or its patient.
    nproc : int
        Processes that train together, on GPUs one each.
    restart, progress : bool
        Move an existing run aside and start anew; show a bar over epochs.

    Raises
    ------
    ValueError, RunMismatchError
        Images of another shape or dtype, K > N, or fewer images per batch than processes; the
        folder holds a run of other settings or images.
    FloatingPointError, OSError, RuntimeError
        Loss or features are not finite; the disk is full; one of several processes failed. What was
        finished is kept. A clustering that collapses and a run begun by other code get a
        RuntimeWarning only."""
    run_dir = Path(run_dir)
    _check(images, config, nproc, groups)
    if nproc > 1:
        _launch(images, config, run_dir, nproc, restart)
        return load_run(run_dir)
    with parallel.join(config.device) as world, parallel.freed_memory_kept():
        if restart and world.main:
            runs.set_aside(run_dir)
        world.barrier()
        training = Training(images, config, run_dir, world, groups)
        if training.epoch == config.epochs and is_complete(run_dir, config):
            return load_run(run_dir)
        left = range(training.epoch + 1, config.epochs + 1)
        quiet = not (progress and world.main)
        bar = tqdm(left, initial=training.epoch, total=config.epochs, disable=quiet)
        for epoch in bar:
            with training.timed("seconds_features"):
                features = training.extract()  # (N, D)
            with training.timed("seconds_cluster"):
                assignments = training.cluster(features, epoch)[0]  # (N,)
            with training.timed("seconds_train"):
                earlier = training.assignments
                pseudo_labels = labels_to_train_on(assignments, earlier, config, groups)
                training.reset_top_layer(epoch, features, pseudo_labels)
                network = training.model, [training.body, training.top]
                data = training.images, pseudo_labels
                loss = train_epoch(*network, *data, config, epoch, world)
            row = training.record(assignments, loss)
            bar.set_postfix(loss=f"{loss:.3f}", nmi=f"{row['nmi_prev']:.3f}", refresh=False)
        training.finish()
    return load_run(run_dir)


def cluster(
    features: np.ndarray | Tensor, config: TrainConfig, epoch: int
) -> tuple[np.ndarray, PCAWhiten, ClusterMixin]:
    """Features (N, D) -> PCA -> whitening -> unit length -> clusters (N,), with the fitted steps.

    The clusterer runs on the CPU; it gets N x `pca_dim` numbers, 29 MB for the paper's."""
    whiten = PCAWhiten(min(config.pca_dim, *features.shape))
    points = _array(whiten.fit_transform(features))  # (N, d)
    seed = int(stream(config, epoch, CLUSTERS).integers(2**31))
    clusterer = make_clusterer(config.clusterer, config.n_clusters, seed)
    # two threads add two partial sums: the same bits in either order
    with threadpool_limits(2), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters")  # `occupancy` counts them
        assignments = clusterer.fit_predict(points)
    return assignments.astype(np.int64), whiten, clusterer


def uniform_over_clusters(pseudo_labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices (N,) of one epoch: every cluster in use is drawn equally often, small ones with
    repetition (Caron et al. 2018, section 3.3)."""
    clusters = np.unique(pseudo_labels)
    share = len(pseudo_labels) // len(clusters) + 1
    drawn = []
    for number in clusters:
        members = np.flatnonzero(pseudo_labels == number)
        drawn.append(rng.choice(members, share, replace=len(members) < share))
    return rng.permutation(np.concatenate(drawn))[: len(pseudo_labels)]


def labels_to_train_on(
    assignments: np.ndarray, earlier: np.ndarray, config: TrainConfig, groups: Any = None
) -> np.ndarray:
    """Pseudo-labels (N,) of an epoch from its clusters (N,), all earlier ones (epochs, N) and, if
    the kind of labels takes some, `groups` (N,)."""
    if config.pseudo_labels in runs.LABELS:
        return runs.LABELS[config.pseudo_labels](assignments, earlier, groups)
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
    """One pass of cross-entropy over uint8 images (N, 64, 64) with their pseudo-labels (N,).

    Returns the mean loss over the images drawn, in nats; ln K is chance. `epoch` counts from 1.
    FloatingPointError if the loss of a batch is not finite."""
    device, n = next(model.parameters()).device, len(images)
    order = uniform_over_clusters(pseudo_labels, stream(config, epoch, ORDER))
    limit = config.rotation_degrees
    angles = stream(config, epoch, ANGLES).uniform(-limit, limit, n).astype(np.float32)
    cuts = range(config.batch_size, n, config.batch_size)
    batches = list(zip(np.split(order, cuts), np.split(angles, cuts), strict=True))
    if len(batches[-1][0]) < max(2, world.size):  # batch norm cannot train on one image
        batches.pop()
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    losses: list[Tensor] = []
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(stream(config, epoch, DROPOUT).integers(2**63)) ^ world.rank)
        for batch, turns in batches:
            mine = world.share(len(batch))
            rows = batch[mine]
            x = normalise(torch.as_tensor(images[rows]).to(device))  # (B, 1, 64, 64)
            if limit:
                x = rotate(x, torch.from_numpy(turns[mine]))
            targets = torch.as_tensor(pseudo_labels[rows], dtype=torch.long, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(x)  # (B, K)
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum") / len(batch)
            model.zero_grad()
            loss.backward()
            world.sum_gradients(parameters)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
            # looking at a GPU's number waits for it
            if len(losses) % 50 == 0 or len(losses) == len(batches):
                _check_loss(losses, config, epoch)
    sizes = [len(batch) for batch, _ in batches]
    return float(np.average(world.sum(torch.stack(losses)).cpu().double(), weights=sizes))


def _check_loss(losses: list[Tensor], config: TrainConfig, epoch: int) -> None:
    """FloatingPointError that names the first batch whose loss is not finite."""
    bad = (~torch.isfinite(torch.stack(losses))).nonzero()
    if len(bad):
        number = int(bad[0])
        raise FloatingPointError(
            f"the loss is {float(losses[number])} in epoch {epoch}, batch {number + 1}: "
            f"lower lr ({config.lr:g}); finished epochs are kept"
        )


class Training:
    """What changes from epoch to epoch: network, optimisers, metrics, assignments. All of it is in
    one checkpoint; random numbers need none, see `stream`."""

    SAVED = ("model", "body", "top", "scheduler")  # what has a state_dict

    def __init__(
        self, images: np.ndarray, config: TrainConfig, run_dir: Path, world: World, groups: Any
    ) -> None:
        self.config, self.world, self.run_dir, self.n = config, world, run_dir, len(images)
        self.rows: list[dict[str, Any]] = []
        self.assignments = np.empty((0, self.n), dtype=np.int32)
        self.seconds: dict[str, float] = {}
        settings = runs.check_same_run(run_dir, runs.identity(config, images, groups))
        self.model = parallel.share_batch_norm(runs.network(config).to(world.device), world)
        body = self.model.body_parameters()
        self.body = torch.optim.Adam(body, config.lr, weight_decay=config.weight_decay)
        self.top = self._top_optimizer()
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.body)
        if (run_dir / "checkpoint.pt").exists():
            self._load()
        if self.epoch > config.epochs:
            found = f"{show(run_dir)} has {self.epoch} epochs, {config.epochs} asked"
            raise RunMismatchError(f"{found}; {MOVE_ASIDE}")
        self.on_gpu = world.device.type == "cuda"  # then the images are there, too
        self.images = torch.tensor(images, device=world.device) if self.on_gpu else images
        world.barrier()  # everybody has read before rank 0 writes
        if world.main:
            save_json(run_dir / "config.json", settings)
            for leftover in run_dir.glob(".*.tmp"):  # of a killed process
                leftover.unlink(missing_ok=True)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.rows)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note in `seconds` how long a block takes, with what it gives the GPU to do."""
        start = time.perf_counter()
        yield
        if self.on_gpu:
            torch.cuda.synchronize(self.world.device)
        self.seconds[step] = round(time.perf_counter() - start, 3)

    def extract(self, autocast: bool = True) -> np.ndarray | Tensor | None:
        """Features (N, D) of all images; None on processes other than the first."""
        if self.config.bn_statistics == "fresh":
            chosen = stream(self.config, 0, STATISTICS).permutation(self.n)  # in every epoch
            estimate_statistics(self.model, self.images, chosen[:STATISTICS_IMAGES], self.world)
        mine = self.images[self.world.share(self.n)]
        options = {"on_device": self.on_gpu, "autocast": autocast and self.on_gpu}
        features = extract(self.model, mine, self.config.batch_size, self.world.device, **options)
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

    def reset_top_layer(self, epoch: int, features: Any, pseudo_labels: np.ndarray) -> None:
        """Draw the top layer anew, or set it to the centroids of features (N, D), None on all
        processes but the first, with these labels (N,). Adam's moments belong to the old one."""
        seed = int(stream(self.config, epoch, TOP_LAYER).integers(2**63))
        self.model.reset_top_layer(torch.Generator().manual_seed(seed))
        if self.config.head == "centroids":
            read = self.model.activated(torch.as_tensor(features)) if self.world.main else None
            self.model.top_layer.follow(read, pseudo_labels)
            self.world.sum(self.model.top_layer.weight)
        self.top = self._top_optimizer()

    def record(self, assignments: np.ndarray, loss: float) -> dict[str, Any]:
        """Finish an epoch: lower the learning rate if the loss stalls, add a row, save."""
        self.scheduler.step(loss)
        row = {"epoch": self.epoch + 1, "nmi_prev": math.nan, "ami_prev": math.nan, "loss": loss}
        if self.epoch:
            row["nmi_prev"] = metrics.nmi(self.assignments[-1], assignments)
            row["ami_prev"] = metrics.ami(self.assignments[-1], assignments)
        row |= metrics.occupancy(assignments, self.config.n_clusters)
        row |= {"lr": self.body.param_groups[0]["lr"], **self.seconds}
        self.rows.append(row)
        self.assignments = np.concatenate([self.assignments, assignments[None].astype(np.int32)])
        if self.world.main:
            self._save()
            used, largest = row["clusters_used"], row["largest_cluster"]
            if largest > 0.5 or used < self.config.n_clusters / 2:
                found = f"{used} of {self.config.n_clusters} clusters in use, the largest holds"
                found = f"epoch {row['epoch']}: {found} {largest:.0%} of the images"
                message = f"{found}: the clustering is collapsing"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        return row

    def finish(self) -> None:
        """Features and clusters of the network after the last epoch."""
        features = self.extract(autocast=False)  # in float32 on every device
        assignments, whiten, clusterer = self.cluster(features, self.config.epochs + 1)
        if self.world.main:
            self._save()  # with the statistics that these features were extracted with
            save_npy(self.run_dir / "features.npy", _array(features))
            found = {"epochs": self.config.epochs, "assignments": assignments.astype(np.int32)}
            found["centroids"] = clusterer.cluster_centers_
            found |= {name: _array(getattr(whiten, f"{name}_")) for name in runs.WHITENING}
            with atomic_write(self.run_dir / "clustering.npz") as handle:
                np.savez(handle, **found)
        self.world.barrier()

    def _save(self) -> None:
        """The checkpoint first: the tables are written again from it when a run continues."""
        state = {name: getattr(self, name).state_dict() for name in self.SAVED}
        state |= {"rows": self.rows, "assignments": torch.from_numpy(self.assignments)}
        with atomic_write(self.run_dir / "checkpoint.pt") as handle:
            torch.save(state, handle)
        with atomic_write(self.run_dir / "metrics.csv", "w") as handle:
            # a float is written with all its digits: equal runs give equal bytes
            table = pd.DataFrame(self.rows, columns=COLUMNS)
            table.to_csv(handle, index=False, lineterminator="\n")
        save_npy(self.run_dir / "assignments.npy", self.assignments)

    def _load(self) -> None:
        state = runs.load_checkpoint(self.run_dir / "checkpoint.pt")
        for name in self.SAVED:
            getattr(self, name).load_state_dict(state[name])
        self.rows, self.assignments = state["rows"], state["assignments"].numpy()


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    return torch.as_tensor(values).cpu().numpy()


def _check(images: np.ndarray, config: TrainConfig, nproc: int, groups: Any) -> None:
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != shape:
        found = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", "")
        raise ValueError(f"images must be a uint8 array of shape (N, 64, 64), got {found}")
    if len(images) < config.n_clusters:
        found = f"n_clusters = {config.n_clusters} is more than the {len(images)} images"
        raise ValueError(f"{found}; lower n_clusters or add images")
    if not 1 <= nproc <= config.batch_size:
        raise ValueError(f"nproc must be 1 to batch_size ({config.batch_size}), got {nproc}")
    if runs.beyond:
        runs.beyond.check(groups, config.pseudo_labels, len(images), config.n_clusters, nproc)


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
        threads = str(max(1, parallel.cores() // nproc))  # torchrun would give each process one
        try:
            parallel.run_process(command, env={"OMP_NUM_THREADS": threads}, echo=True)
        except parallel.ProcessFailed as error:
            failed = f"training with {nproc} processes failed (status {error.status})"
            again = "the same call continues from the last epoch"
            raise RuntimeError(f"{failed}; {again}\n{error.tail}") from error
