"""The positive control: does the loop find classes that are there?

Handwritten digits have ten known classes. The arms are trained on them with the settings of the
other runs, and the clusters of each epoch are compared with the classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from lib import metrics, paths
from lib.data.digits import make_digits
from lib.deepcluster import fit
from lib.runs import Run, TrainConfig


def agreement(run: Run, classes: np.ndarray) -> pd.DataFrame:
    """NMI and AMI of the clusters with `classes` (N,) by epoch from 0, the untrained network."""
    clusters = enumerate([*run.assignments, run.final_assignments])
    rows = [(epoch, metrics.nmi(c, classes), metrics.ami(c, classes)) for epoch, c in clusters]
    return pd.DataFrame(rows, columns=["epoch", "nmi", "ami"])


def on_digits(
    configs: Mapping[str, TrainConfig],
    seeds: Iterable[int],
    epochs: int,
    turned: bool = False,
    n: int = 1797,
) -> dict[str, pd.DataFrame]:
    """Train arms on `n` digits (up to 1,797), or read finished runs, and compare their clusters
    with the classes; with `turned` each digit is turned by a random angle, drawn once.

    The settings are those of other runs, but K is at most 20 and no image is rotated. Returns per
    arm the columns ``epoch`` (0: untrained), ``nmi``, ``ami`` and ``seed``."""
    images, table = make_digits(turned, n=n)
    dataset = f"control-digits{'-turned' * turned}-{n}"
    tables = {}
    for arm, config in configs.items():
        settings = {"n_clusters": min(20, config.n_clusters), "epochs": epochs}
        same = replace(config, rotation_degrees=0.0, **settings)
        found = []
        for seed in seeds:
            folder = paths.run_dir(dataset, arm, seed)
            with threadpool_limits(1):  # small steps: a second thread gains little, and may wait
                run = fit(images, replace(same, seed=seed), folder, progress=False)
            found.append(agreement(run, table["findings"].to_numpy()).assign(seed=seed))
        tables[arm] = pd.concat(found, ignore_index=True)
    return tables
