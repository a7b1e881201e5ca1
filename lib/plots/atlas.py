"""The cluster atlas: a row per cluster, for print."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from lib.plots import style
from lib.plots.style import DARK, GRAY, PALETTE

HEADS = {0: "cluster", 1: "mean", 2: "medoid", 3: "nearest", -1: "more often than elsewhere"}
NOTES = (
    "mean: orange is brighter than the mean of all images, blue darker; the medoid is framed",
    "share in the cluster / in all others, false-discovery rate at most 5 % (Fisher's test)",
)


def pages(images, clusters, n_images: int, title, dataset_label, rows=20) -> Iterator[Figure]:
    """The atlas of a run, which `title` names, page by page: `rows` of `clusters` each, as of
    `lib.study.clusters.atlas`. Sizes are shares of the `n_images` that were clustered."""
    sizes = [cluster.size for cluster in clusters]
    overall = np.average([cluster.mean for cluster in clusters], axis=0, weights=sizes)
    for first in range(0, len(clusters), rows):
        part = clusters[first : first + rows]
        place = f"{first + 1} to {first + len(part)} of {len(clusters)}, the largest first"
        with style.context():
            figure = style.new_figure(0.5 + 0.52 * len(part), f"{title}: clusters {place}", 2)
            _fill(figure, images, part, overall, n_images)
            style.finish(figure, dataset_label, *NOTES)
        yield figure


def _fill(figure: Figure, images: np.ndarray, clusters: Sequence, overall, n_images: int) -> None:
    """Fill a page, a row per cluster."""
    count = max(len(cluster.nearest) for cluster in clusters)
    widths = [1.3, 1, 1, *[1] * count, 3]
    grid = style.blank_panels(figure, len(clusters), count + 4, width_ratios=widths)
    for cluster, (name, mean, *pictures, words) in zip(clusters, grid, strict=True):
        size = f"{cluster.size:,} ({cluster.size / n_images:.1%})"
        name.text(0, 0.5, f"{cluster.number}", fontsize=8, fontweight="bold", va="bottom")
        name.text(0, 0.45, size, fontsize=6, color=GRAY, va="top")
        style.picture(mean, cluster.mean - overall, cmap="PuOr_r", vmin=-60, vmax=60)
        for axes, index in zip(pictures, (cluster.medoid, *cluster.nearest), strict=False):
            style.picture(axes, images[index])
        style.frame(pictures[0], PALETTE[1], 1.4)
        more = [f"{style.shown(name)} {a:.0%} / {b:.0%}" for name, a, b, _ in cluster.enriched]
        more[3:] = [f"and {len(more) - 3} more"] if len(more) > 3 else []
        color = DARK if more else GRAY
        words.text(0, 0.5, "\n".join(more) or "none", fontsize=6, color=color, va="center")
    for column, head in HEADS.items():
        grid[0, column].set_title(head, loc="left", fontsize=6, pad=3)
