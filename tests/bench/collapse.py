"""Does the published P4M collapse come with lagging batch-norm statistics?

    python tests/bench/collapse.py --data-set nih-9k [--fields 16 32 64] [--epochs 20]

The published P4M run had 12,226 of 16,258 images in one cluster. Its labels were the image's index
modulo K, so they do not depend on the clusters, and its features were extracted with the running
statistics of batch norm. This script trains that arm once (linear head, K = 200), then extracts and
clusters the features of the same network twice: with running statistics and with fresh ones. It
prints the largest cluster, the clusters in use and the perplexity after each epoch count given with
``--at``, and writes figures/<data set>/published_collapse.json. A stopped call resumes."""

import argparse
from dataclasses import replace

import numpy as np
import project  # noqa: F401

from lib import metrics, paths
from lib.data import load_images
from lib.deepcluster import STATISTICS, TrainConfig, cluster, fit, stream
from lib.features import estimate_statistics, extract
from lib.runs import load_model

PUBLISHED = {"images": 16258, "clusters_used": 69, "largest_cluster": 12226 / 16258}


def occupancy(features: np.ndarray, config: TrainConfig) -> dict[str, float]:
    """Sizes of the clusters of `features`, (N, D), and how far their mean is from zero."""
    assignments = cluster(features, config, config.epochs + 1)[0]
    spread = float(np.median(np.abs(features.mean(0)) / (features.std(0) + 1e-12)))
    return {**metrics.occupancy(assignments, config.n_clusters), "mean_over_spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-set", default="nih-9k", help="its folder in data/")
    parser.add_argument("--fields", type=int, nargs=3, default=[16, 32, 64])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--at", type=int, nargs="*", default=[1, 5, 10, 15, 20])
    options = parser.parse_args()
    images = load_images(paths.dataset_dir(options.data_set))
    page = {"pseudo_labels": "index", "head": "linear", "bn_statistics": "running"}
    page["pca_dim"] = options.fields[-1] // 2
    config = TrainConfig("p4m", n_clusters=200, width=options.fields, **page)
    run_dir = paths.run_dir(options.data_set, "p4m-collapse", 0)
    target = paths.figures_dir(options.data_set) / "published_collapse.json"
    rows = []
    for epochs in sorted({*(e for e in options.at if e < options.epochs), options.epochs}):
        run = fit(images, replace(config, epochs=epochs), run_dir)
        model = load_model(run)
        running = extract(model, images)
        shuffled = stream(config, 0, STATISTICS).permutation(len(images))
        estimate_statistics(model, images, shuffled[:2048])
        fresh = extract(model, images)
        row = {"epoch": epochs, "loss": float(run.metrics.loss.iloc[-1])}
        row |= {f"running_{k}": v for k, v in occupancy(running, run.config).items()}
        row |= {f"fresh_{k}": v for k, v in occupancy(fresh, run.config).items()}
        rows.append(row)
        print(row, flush=True)
        found = {"dataset": options.data_set, "images": len(images)}
        for name in ("n_clusters", "width", "batch_size", "pca_dim", "seed"):
            found[name] = getattr(config, name)
        paths.save_json(target, found | {"published": PUBLISHED, "epochs": rows})


if __name__ == "__main__":
    main()
