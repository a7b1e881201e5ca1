"""What was tried so that the loop learns: variants of head and batch-norm statistics, on digits.

    python tests/bench/learning.py [--variants page ...] [--arms p4m ...] [--seeds 0 1 2] [--jobs 2]
    python tests/bench/learning.py --table        prints what the file holds, trains nothing

The classes of the digits are known, so a loop that learns must come closer to them than its own
untrained network (docs/learning.md). A run trains on all 1,797: K = 20, 10 epochs of 57 steps of
32, the widths of the preset `quick`, 16 components, no image turned. Each result is a line of the
file --out; a call that was stopped goes on with what is missing."""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import project  # noqa: F401
import torch
from torch import nn

from lib import deepcluster, metrics, models, parallel, paths
from lib.data.digits import make_digits
from lib.study import report

WIDTHS = {"alexnet": (24, 48, 64, 64, 48, 192), "p4m": (4, 8, 32), "cnn_params": (4, 8, 32)}
SETTINGS = {"n_clusters": 20, "pca_dim": 16, "batch_size": 32, "device": "cpu"}
MEASURES = {"untrained": "NMI with the classes, untrained", "trained": "trained"}
MEASURES |= {"loss": "last loss / ln K", "nmi_prev": "NMI(t, t-1)", "perplexity": "perplexity"}


def rate(times: float) -> AbstractContextManager:
    """The top layer learns with `times` the body's rate."""
    return mock.patch.object(deepcluster, "TOP_LAYER_RATE", times)


def torch_start() -> AbstractContextManager:
    """The top layer is drawn as PyTorch draws any linear layer."""
    ours = models.Backbone.reset_top_layer

    @torch.no_grad()
    def reset(self: models.Backbone, generator: torch.Generator | None = None) -> None:
        if generator is None:  # a network is made: the body's random numbers stay as they are
            ours(self)
            return
        nn.init.kaiming_uniform_(self.top_layer.weight, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(self.top_layer.in_features)
        nn.init.uniform_(self.top_layer.bias, -bound, bound, generator=generator)

    return mock.patch.object(models.Backbone, "reset_top_layer", reset)


def centroid_start() -> AbstractContextManager:
    """A cluster's weights start as the mean of what the layer reads of its images, at length 1."""
    reset = deepcluster.Training.reset_top_layer

    @torch.no_grad()
    def start(self: Any, epoch: int, features: np.ndarray, labels: np.ndarray) -> None:
        reset(self, epoch, features, labels)
        read = self.model.activated(torch.as_tensor(features))  # (N, D)
        read = (read - read.mean(0)) / (read.std(0) + 1e-5)
        for k in np.unique(labels):
            mean = read[torch.from_numpy(labels == k)].mean(0)
            self.model.top_layer.weight[k] = nn.functional.normalize(mean, dim=0)

    return mock.patch.object(deepcluster.Training, "reset_top_layer", start)


VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {  # settings, and what is patched
    "page": ({"head": "linear", "bn_statistics": "running"}, nullcontext),
    "linear+fresh": ({"head": "linear"}, nullcontext),
    "standardised+running": ({"bn_statistics": "running"}, nullcontext),
    "default": ({}, nullcontext),  # standardised, fresh, five times the body's rate
    "rate-1": ({}, lambda: rate(1)),
    "rate-10": ({}, lambda: rate(10)),
    "torch-start": ({}, torch_start),
    "centroid-start": ({}, centroid_start),
    "batch-16": ({"batch_size": 16}, nullcontext),  # a longer epoch: 113 steps
    "lr-3e-3": ({"lr": 3e-3}, nullcontext),
}


def train(variant: str, arm: str, seed: int, epochs: int) -> dict[str, Any]:
    """One run, as a line of the file."""
    images, digits = make_digits()
    settings, patch = VARIANTS[variant]
    settings = {**SETTINGS, "width": WIDTHS[arm], "epochs": epochs, "seed": seed, **settings}
    config = deepcluster.TrainConfig(arm, **settings)
    row: dict[str, Any] = {"variant": variant, "arm": arm, "seed": seed, "epochs": epochs}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, patch():
        try:
            run = deepcluster.fit(images, config, folder, progress=False)
        except FloatingPointError as error:
            return {**row, "error": str(error)}
        last, final = run.metrics.iloc[-1], run.final_assignments
        return {
            **row,
            "untrained": metrics.nmi(digits.findings, run.assignments[0]),
            "trained": metrics.nmi(digits.findings, final),
            "loss": float(last.loss) / math.log(config.n_clusters),
            "nmi_prev": float(last.nmi_prev),
            "perplexity": metrics.occupancy(final, config.n_clusters)["perplexity"],
            "seconds": round(time.perf_counter() - begin, 1),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per variant and arm, means over seeds with the smallest and largest."""

    def cell(values: list[float]) -> str:
        spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}" if values else "failed"

    lines = []
    for variant, arm in product(VARIANTS, WIDTHS):
        runs = [row for row in rows if (row["variant"], row["arm"]) == (variant, arm)]
        good = [row for row in runs if "error" not in row]
        if runs:
            rose = f"{sum(row['trained'] > row['untrained'] for row in good)} of {len(runs)} seeds"
            cells = [cell([row[name] for row in good]) for name in MEASURES]
            lines.append([variant, arm, rose, *cells])
    header = ["variant", "arm", "rose above untrained", *MEASURES.values()]
    return report.table(header, lines, figures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--arms", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    parser.add_argument("--out", type=Path, default=paths.figures_root() / "bench/learning.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    options = parser.parse_args()
    text = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # without a line that a kill cut off
    rows = [json.loads(line) for line in whole.splitlines()]
    done = {(row["variant"], row["arm"], row["seed"], row["epochs"]) for row in rows}
    wanted = product(options.variants, options.arms, options.seeds, [options.epochs])
    jobs = [] if options.table else [job for job in wanted if job not in done]
    if jobs:
        # the children read it when they import PyTorch
        os.environ["OMP_NUM_THREADS"] = str(max(1, parallel.cores() // options.jobs))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(whole, encoding="utf-8")
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for run in as_completed([pool.submit(train, *job) for job in jobs]):
            rows.append(run.result())
            print(rows[-1], file=sys.stderr, flush=True)
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table([row for row in rows if row["epochs"] == options.epochs]))


if __name__ == "__main__":
    main()
