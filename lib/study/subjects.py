"""What is measured: a run, or a baseline without a network, on images and what is known of them."""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch

from lib import data, images, kmeans
from lib.deepcluster import cluster
from lib.features import extract
from lib.parallel import resolve_device
from lib.runs import Run, TrainConfig, assign, embed, load_model
from lib.study import retrieval


@dataclass(frozen=True)
class Effort:
    """How much is looked at: fixed numbers, so that large data sets cost little more."""

    n_turned: int = 96  # images that are turned
    n_moved: int = 240  # images in the probes of moved images
    n_map: int = 300  # images in each t-SNE map, one map per perplexity and seed
    perplexities: tuple[int, ...] = (10, 30)
    map_seeds: tuple[int, ...] = (0, 1)
    n_neighbors: int = 10
    k: int = 5  # matches that are retrieved
    n_boot: int = 1000  # samples of the test patients


EFFORT = Effort()


@dataclass(frozen=True)
class Material:
    """Images (N, 64, 64) uint8 and what is known of them; `turned`: see `turned_phantoms`. For
    `Given` they are embeddings (N, D)."""

    images: np.ndarray
    metadata: pd.DataFrame
    turned: np.ndarray | None = None
    effort: Effort = EFFORT

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return data.label_set(self.metadata)

    @cached_property
    def targets(self) -> np.ndarray:
        """Which of `labels` each image has, (N, F) bool."""
        return data.finding_matrix(self.metadata["findings"], self.labels)

    @cached_property
    def codes(self) -> np.ndarray:
        """Label combination of each image, (N,); -1 if not stated."""
        return data.label_combinations(self.metadata["findings"])

    @cached_property
    def patients(self) -> np.ndarray:
        """Patient of each image, (N,) int; each image its own if the split is not by patient."""
        split = self.metadata["split"].to_numpy()
        patients = np.unique(data.patient_groups(self.metadata), return_inverse=True)[1]
        shared = np.intersect1d(patients[split == "train"], patients[split == "test"])
        return np.arange(len(patients)) if len(shared) else patients

    def rows(self, stated: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Rows for training and for testing; with `stated` only those with labels."""
        split, of = self.metadata["split"].to_numpy(), (self.codes >= 0) | (not stated)
        return np.flatnonzero((split == "train") & of), np.flatnonzero((split == "test") & of)

    def own_rows(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows with labels for training and for testing, patients split 80 to 20 with `seed`."""
        patients = np.random.default_rng([seed, 2]).random(self.patients.max() + 1)
        tested = (patients < 0.2)[self.patients]
        stated = self.codes >= 0
        return np.flatnonzero(~tested & stated), np.flatnonzero(tested & stated)

    def sample(self, size: int, seed: int = 0) -> np.ndarray:
        """At most `size` random rows, ascending."""
        n = len(self.images)
        return np.sort(np.random.default_rng(seed).choice(n, min(size, n), replace=False))


class Network:
    """A finished run: ``features`` (N, D) for probes, the clustered ``embedding`` (N, d),
    ``assignments`` (N,). `describe` gives unit vectors (N, C) to retrieve by. `Pixels` and `Random`
    are measured in the same way."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.seed = run, run.config, run.config.seed
        self.n_clusters, device = self.config.n_clusters, resolve_device(run.config.device)
        model = load_model(run, device)
        self.extract = partial(extract, model, device=device)
        self.describe = partial(retrieval.describe, model, device=device)
        self.embed, self.assign = partial(embed, run), partial(assign, run)
        self.features = np.asarray(run.features)
        self.embedding, self.assignments = self.embed(self.features), run.final_assignments


class Pixels:
    """Raw pixels (N, 4096) in [-1, 1], clustered with PCA size, K and seed of the arms."""

    def __init__(self, pictures: np.ndarray, config: TrainConfig) -> None:
        self.config, self.seed, self.n_clusters = config, config.seed, config.n_clusters
        self.features = self.extract(pictures)
        found = cluster(self.features, config, config.epochs + 1)
        self.assignments, self.whiten, self.clusterer = found
        self.embedding = self.embed(self.features)

    def extract(self, pictures: np.ndarray) -> np.ndarray:
        return images.normalise(torch.from_numpy(np.array(pictures))).flatten(1).numpy()

    def embed(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(self.whiten.transform(features))

    def assign(self, features: np.ndarray) -> np.ndarray:
        return kmeans.nearest(self.embed(features), self.clusterer.cluster_centers_)

    def describe(self, pictures: np.ndarray) -> np.ndarray:
        return retrieval.centred(self.extract(pictures))


class Given(Pixels):
    """Embeddings (N, D) that a network elsewhere has made: they take the place of the pictures."""

    def extract(self, pictures: np.ndarray) -> np.ndarray:
        return np.asarray(pictures, np.float32)


class Random(Pixels):
    """Clusters drawn anew for each image that is asked about: a control that knows nothing."""

    def __init__(self, pictures: np.ndarray, config: TrainConfig) -> None:
        super().__init__(pictures, config)
        self.rng = np.random.default_rng([config.seed, 1])
        self.assignments = self.assign(self.features)

    def assign(self, features: np.ndarray) -> np.ndarray:
        return self.rng.integers(self.n_clusters, size=len(features))


class Gaussian(Pixels):
    """Gaussian points in place of whitened features: clusters that nothing but chance has made."""

    def extract(self, pictures: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 3])
        return rng.normal(size=(len(pictures), self.config.pca_dim)).astype(np.float32)


class Metadata:
    """View, sex and age as features (N, D), and no image."""

    def __init__(self, metadata: pd.DataFrame, config: TrainConfig) -> None:
        self.seed = config.seed
        kinds = pd.get_dummies(metadata[["view_position", "sex"]].fillna("")).to_numpy()
        age = metadata["age"].to_numpy(dtype=float)
        years = np.nan_to_num(age, nan=0 if np.isnan(age).all() else np.nanmean(age))
        self.features = np.column_stack([kinds, np.isnan(age), years, years**2]).astype(np.float64)
