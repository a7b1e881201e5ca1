"""A small data set with two finished runs, as the notebooks leave them."""

from lib import data, paths
from lib.data import preprocess, sources
from lib.deepcluster import TrainConfig, fit

DATASET = "phantom-tiny"
WIDTHS = {"alexnet": (4, 4, 4, 4, 4, 8), "p4m": (1, 2, 4)}


def make(n=72, epochs=2, n_clusters=4):
    """Write ``data/phantom-tiny`` and a run of each arm; CXR_DATA_DIR must point to a folder that
    may be written."""
    raw, out = paths.raw_dir(DATASET), paths.dataset_dir(DATASET)
    sources.fetch("phantom", raw, n, 0)
    preprocess.preprocess(raw, out)
    images = data.load_images(out)
    for arm, width in WIDTHS.items():
        options = {"batch_size": 32, "width": width, "device": "cpu"}
        config = TrainConfig(arm, n_clusters, pca_dim=4, epochs=epochs, **options)
        fit(images, config, paths.run_dir(DATASET, arm, 0), progress=False)
    return images
