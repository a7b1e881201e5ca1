"""The cluster atlas: one row a cluster, for print. Data in, a matplotlib Figure out;
`lib.plots.save` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
from matplotlib.figure import Figure

from lib.plots.style import COLUMN_INCHES, DARK, GRAY, PALETTE, context, finish
from lib.study.atlas import Cluster

ROWS = 20  # a page is then about 11 inches high
ROW_INCHES, HEAD_INCHES, FOOT_INCHES = 0.52, 0.42, 0.42
MOST_FINDINGS = 3


def pages(
    images: np.ndarray,
    clusters: Sequence[Cluster],
    n_images: int,
    title: str,
    dataset_label: str,
    rows: int = ROWS,
) -> Iterator[Figure]:
    """The atlas of a run, page by page.

    Parameters
    ----------
    images : uint8, shape (N, H, W)
    clusters : sequence of Cluster
        As `lib.study.atlas.atlas` gives them.
    n_images : int
        Images that were clustered: shares are of these.
    title : str
        Names the run.
    dataset_label : str
        Names the dataset.
    rows : int
        Clusters a page, at least 1.

    Yields
    ------
    Figure

    Raises
    ------
    ValueError
        No cluster, `rows` < 1, or no `dataset_label`.
    """
    if not clusters:
        raise ValueError("there is no cluster to show: clusters is empty")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    count = ceil(len(clusters) / rows)
    for number in range(count):
        part = clusters[number * rows : (number + 1) * rows]
        place = f"clusters {number * rows + 1} to {number * rows + len(part)} of {len(clusters)}, the largest first"
        yield _page(images, part, n_images, f"{title}: {place}", dataset_label)


@context()
def _page(
    images: np.ndarray, clusters: Sequence[Cluster], n_images: int, title: str, dataset_label: str
) -> Figure:
    height = HEAD_INCHES + FOOT_INCHES + ROW_INCHES * len(clusters)
    figure = Figure(
        figsize=(COLUMN_INCHES[2], height)
    )  # rows of one height on every page: no layout engine
    figure.suptitle(title, x=0.01, y=1 - 0.06 / height, ha="left", va="top", fontsize=8)
    per_row = max(len(c.nearest) for c in clusters)
    side, gap = ROW_INCHES * 0.94, ROW_INCHES * 0.06
    left = 0.66
    # mean, medoid and nearest members stand apart by a wider gap, so that the three read as groups
    # without a line
    starts = [left, left + side + 3 * gap] + [
        left + 2 * side + 6 * gap + k * (side + gap) for k in range(per_row)
    ]
    text_at = starts[-1] + side + 3 * gap
    width = COLUMN_INCHES[2]
    top = 1 - HEAD_INCHES / height
    heads = dict(zip(starts, ["mean", "medoid", "nearest to the centroid"], strict=False))
    heads |= {0.06: "cluster", text_at: "more often than elsewhere"}
    for x, name in heads.items():
        figure.text(
            x / width, top + 0.03 / height, name, fontsize=6.5, color=DARK, ha="left", va="bottom"
        )
    for row, cluster in enumerate(clusters):
        bottom = 1 - (HEAD_INCHES + (row + 1) * ROW_INCHES) / height
        shown = [cluster.mean, images[cluster.medoid], *(images[i] for i in cluster.nearest)]
        for x, image in zip(starts, shown, strict=False):
            axes = figure.add_axes((x / width, bottom, side / width, side / height))
            axes.imshow(
                image, cmap="gray", vmin=0, vmax=255, interpolation="none"
            )  # SVG keeps the 64 x 64 pixels
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=x == starts[1], color=PALETTE[1], linewidth=1.4)
        middle = bottom + side / 2 / height
        figure.text(
            0.06 / width,
            middle,
            f"{cluster.number}",
            fontsize=8,
            fontweight="bold",
            ha="left",
            va="bottom",
        )
        size = f"{cluster.size:,} ({cluster.size / n_images:.1%})"
        figure.text(
            0.06 / width,
            middle - 0.02 / height,
            size,
            fontsize=5.5,
            color=GRAY,
            ha="left",
            va="top",
        )
        lines = [
            f"{name.replace('_', ' ')} {share:.0%} / {base:.0%}"
            for name, share, base, _ in cluster.enriched[:MOST_FINDINGS]
        ]
        if len(cluster.enriched) > MOST_FINDINGS:
            lines.append(f"and {len(cluster.enriched) - MOST_FINDINGS} more")
        text = "\n".join(lines) or "none"
        figure.text(
            text_at / width,
            middle,
            text,
            fontsize=6,
            color=DARK if lines else GRAY,
            ha="left",
            va="center",
            linespacing=1.25,
        )
    more = "share in the cluster / in all others, false-discovery rate at most 5 % (Fisher's exact test); the medoid is framed"
    return finish(figure, dataset_label, more)
