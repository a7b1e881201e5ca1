"""The positive control: does the loop find classes that are there?

Handwritten digits have ten known classes. The arms are trained on them with the settings of the
other runs, and the clusters of each epoch are compared with the classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from lib import metrics, paths
from lib.data.digits import make_digits
from lib.deepcluster import fit
from lib.runs import Run, TrainConfig


def agreement(run: Run, classes: np.ndarray) -> pd.DataFrame:
    """NMI and AMI of the clusters with known `classes` (N,), one row per epoch from 0, the
    untrained network.
    """
    clusters = [*run.assignments, run.final_assignments]
    return pd.DataFrame(
        {
            "epoch": range(len(clusters)),
            "nmi": [metrics.nmi(found, classes) for found in clusters],
            "ami": [metrics.ami(found, classes) for found in clusters],
        }
    )


def on_digits(
    configs: Mapping[str, TrainConfig],
    seeds: Iterable[int],
    epochs: int,
    turned: bool = False,
    n: int = 1797,
) -> dict[str, pd.DataFrame]:
    """Train arms on digits, or read finished runs, and compare their clusters with the classes.

    Parameters
    ----------
    configs : mapping of arm to TrainConfig
        Settings of other runs; K becomes 20 if it is larger, and no image is rotated.
    seeds : iterable of int
    epochs : int
    turned : bool
        Each digit turned by a random angle, drawn once.
    n : int
        Digits, up to 1,797.

    Returns
    -------
    dict of arm to DataFrame
        Columns ``epoch`` (0: untrained), ``nmi``, ``ami`` and ``seed``.
    """
    images, table = make_digits(turned, n=n)
    dataset = f"control-digits{'-turned' * turned}-{n}"
    tables = {}
    for arm, config in configs.items():
        settings = {"n_clusters": min(20, config.n_clusters), "epochs": epochs}
        same = replace(config, rotation_degrees=0.0, **settings)
        found = []
        for seed in seeds:
            folder = paths.run_dir(dataset, arm, seed)
            run = fit(images, replace(same, seed=seed), folder, progress=False)
            found.append(agreement(run, table["findings"].to_numpy()).assign(seed=seed))
        tables[arm] = pd.concat(found, ignore_index=True)
    return tables
