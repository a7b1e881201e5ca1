"""Figures of the benchmarks: a table in, a matplotlib `Figure` out, in the look of `lib.plots`."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from lib.plots.style import MARKERS, PALETTE, context, finish, new_figure

METHOD_TITLES = {
    "kmeans": "K-means",
    "minibatch": "mini-batch K-means",
    "hierarchical": "hierarchical K-means",
    "graph": "graph of neighbours, Leiden",
}


@context()
def kmeans_quality(table: pd.DataFrame, dataset_label: str) -> Figure:
    """Quality of each clusterer against its time, a line over the numbers of points.

    Parameters
    ----------
    table : DataFrame
        Columns method (a key of `METHOD_TITLES`), points, seconds, inertia_ratio (1 for K-means;
        less is better), nmi (with the planted clusters, 0 to 1); a row for each method and number
        of points. Markers grow with the number of points.
    dataset_label : str
        What was clustered, on what.

    Raises
    ------
    ValueError
        A column or a method is not known.
    """
    missing = {"method", "points", "seconds", "inertia_ratio", "nmi"} - set(table.columns)
    if missing:
        raise ValueError(
            f"the table has no column {sorted(missing)[0]!r}: it has {', '.join(table.columns)}"
        )
    unknown = set(table.method) - set(METHOD_TITLES)
    if unknown:
        raise ValueError(
            f"unknown method {sorted(unknown)[0]!r}: known are {', '.join(METHOD_TITLES)}"
        )
    figure = new_figure(2, 3.0)
    axes = figure.subplots(1, 2)
    sizes = {n: 2.5 + 1.4 * i for i, n in enumerate(sorted(table.points.unique()))}
    methods = [name for name in METHOD_TITLES if name in set(table.method)]
    for axis, column, title in zip(
        axes,
        ("inertia_ratio", "nmi"),
        ("Inertia, as a share of K-means' (lower is better)", "NMI with the planted clusters"),
        strict=True,
    ):
        for name, color, marker in zip(methods, PALETTE, MARKERS, strict=False):
            rows = table[table.method == name].sort_values("points")
            axis.plot(rows.seconds, rows[column], color=color, linewidth=0.9, alpha=0.7)
            for row in rows.itertuples():
                axis.plot(
                    row.seconds,
                    getattr(row, column),
                    marker=marker,
                    color=color,
                    markersize=sizes[row.points],
                    linestyle="none",
                )
        axis.set_xscale("log")
        axis.set_xlabel("Seconds for one fit")
        axis.set_title(title, loc="left")
        axis.grid(True)
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(
            FixedLocator([10.0**e for e in range(-3, 5) if low <= 10.0**e <= high])
        )
        axis.xaxis.set_minor_locator(NullLocator())
    axes[1].set_ylim(top=1.0)
    handles = [
        Line2D([], [], color=color, marker=marker, linewidth=0.9, label=METHOD_TITLES[name])
        for name, color, marker in zip(methods, PALETTE, MARKERS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    counts = sorted(sizes)
    note = f"One marker for each N: {', '.join(f'{n:,}' for n in counts)}; larger markers, more points."
    return finish(figure, dataset_label, note)
