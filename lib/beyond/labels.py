"""Pseudo-labels that are more than the epoch's own clusters: votes, labels from elsewhere, and
labels that the images of one patient share."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

EPOCHS = 3  # that vote


def aligned(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Cluster numbers (N,) renamed to those of `reference` (N,), so that most images agree.

    The names come from the Hungarian method (Kuhn 1955) on the table of common images. Numbers are
    from 0; the result's are below the larger count of the two."""
    size = 1 + max(labels.max(), reference.max())
    common = np.zeros((size, size), int)
    np.add.at(common, (labels, reference), 1)
    return linear_sum_assignment(common, maximize=True)[1][labels]


def most_frequent(places: np.ndarray, labels: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """The label (G,) that is most frequent among the `labels` (M,) of each place; `places` (M,) are
    from 0 to G - 1. Of equally frequent ones `preferred` (G,) is taken, else the smallest."""
    counts = np.zeros((len(preferred), 1 + max(labels.max(), preferred.max())))
    np.add.at(counts, (places, labels), 1)
    counts[np.arange(len(preferred)), preferred] += 0.5
    return counts.argmax(axis=1)


def vote(rows: ArrayLike) -> np.ndarray:
    """Consensus (N,) of several clusterings (T, N) of the same images: each is `aligned` to the
    last, then the majority decides (Dudoit and Fridlyand 2003, BagClust1); in a tie, the last."""
    rows = np.asarray(rows)
    votes = np.concatenate([aligned(row, rows[-1]) for row in rows])
    return most_frequent(np.tile(np.arange(rows.shape[1]), len(rows)), votes, rows[-1])


def shared(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One label for all images of a group, (N,): the most frequent of their `labels` (N,); in a tie
    that of the group's first image. `groups` (N,) are any whole numbers, such as patients."""
    _, first, places = np.unique(groups, return_index=True, return_inverse=True)
    return most_frequent(places, labels, labels[first])[places]


# name -> pseudo-labels (N,) from the epoch's clusters (N,), all earlier ones (epochs, N) and groups
LABELS = {
    "consensus": lambda found, earlier, groups: vote([*earlier[-EPOCHS + 1 :], found]),
    "given": lambda found, earlier, groups: groups,
    "refined": lambda found, earlier, groups: found if len(earlier) else groups,
    "patients": lambda found, earlier, groups: shared(found, groups),
}
GROUPED = ("given", "refined", "patients")  # these need groups


def check(groups: np.ndarray | None, name: str, n: int, n_clusters: int, nproc: int) -> None:
    """ValueError unless `groups` are what the pseudo-labels `name` need: whole numbers (n,) from 0,
    below `n_clusters` if they are labels, for one process; None for all other pseudo-labels."""
    if name not in GROUPED:
        if groups is not None:
            raise ValueError(f"pseudo_labels {name!r} take no groups: only {', '.join(GROUPED)} do")
        return
    found = np.asarray(groups)
    if found.shape != (n,) or found.dtype.kind not in "iu" or found.min() < 0:
        what = f"{found.dtype} of shape {found.shape}"
        wanted = f"need groups (train --labels FILE), {n} whole numbers"
        raise ValueError(f"pseudo_labels {name!r} {wanted}; got {what}")
    if name != "patients" and found.max() >= n_clusters:
        raise ValueError(f"groups go up to {found.max()}, but n_clusters is {n_clusters}")
    if nproc > 1:
        raise ValueError(f"pseudo_labels {name!r} train in one process, not in nproc = {nproc}")
