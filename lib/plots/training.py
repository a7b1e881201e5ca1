"""Figures of the data and of training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from lib.plots.style import (
    ARM_TITLES,
    COLUMN_INCHES,
    DARK,
    FINDINGS,
    GRAY,
    LIGHT,
    MARKERS,
    NO_FINDING,
    PALETTE,
    absent,
    arm_name,
    arm_order,
    arm_title,
    context,
    finish,
    legend_below,
    new_figure,
)


def _by_seed(
    runs: Mapping[str, pd.DataFrame], arm: str, column: str, scale: float = 1.0
) -> pd.DataFrame | None:
    """Table epoch x seed of one arm, without the epochs at which no seed has a value (NMI has none
    at epoch 1).
    """
    if arm not in runs:
        return None
    missing = {"epoch", "seed", column} - set(runs[arm].columns)
    if missing:
        raise ValueError(
            f"runs[{arm!r}] has no column {', '.join(sorted(missing))}; it needs epoch, seed and {column}"
        )
    return runs[arm].pivot(index="epoch", columns="seed", values=column).dropna(how="all") / scale


def _seeds(axes: Axes, table: pd.DataFrame, color: str, marker: str) -> None:
    """Each seed as a thin line, their mean as a thick one, their range as a band over the epochs
    that all seeds have.
    """
    n_seeds = table.shape[1]
    if n_seeds == 1:
        axes.plot(
            table.index,
            table.iloc[:, 0],
            color=color,
            marker=marker,
            label="this run, 1 seed",
            zorder=4,
        )
        return
    whole = table.dropna()
    axes.plot(
        whole.index,
        whole.mean(axis=1),
        color=color,
        marker=marker,
        label=f"mean of {n_seeds} seeds",
        zorder=4,
    )
    label = f"{n_seeds} seeds, min to max"
    axes.fill_between(
        whole.index,
        whole.min(axis=1),
        whole.max(axis=1),
        color=color,
        alpha=0.2,
        linewidth=0,
        label=label,
        zorder=2,
    )
    axes.plot(table.index, table, color=color, linewidth=0.5, alpha=0.8, zorder=3)


def _published(
    axes: Axes,
    published: pd.DataFrame | None,
    arm: str,
    column: str,
    n_clusters: int,
    scale: float = 1.0,
) -> None:
    if published is None:
        return
    rows = published[published["arm"] == arm].dropna(subset=[column])
    if len(rows):
        look = {
            "color": DARK,
            "linestyle": ":",
            "marker": "o",
            "markerfacecolor": "white",
            "markersize": 2.5,
            "markeredgewidth": 0.6,
        }
        axes.plot(
            rows["epoch"],
            rows[column] / scale,
            **look,
            linewidth=1.1,
            label=f"published (K = {n_clusters})",
            zorder=3,
        )


def _curve_panels(
    runs: Mapping[str, pd.DataFrame], columns: int
) -> tuple[Figure, list[tuple[str, Axes]]]:
    """Two panels a row with shared axes, one an arm."""
    arms = arm_order(runs)
    n_rows = -(-len(arms) // 2)
    figure = new_figure(columns, n_rows * 3.4)
    grid = figure.subplots(n_rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(arms) :]:
        axes.set_axis_off()
    for arm, axes in zip(arms, grid, strict=False):
        axes.set_title(arm_title(arm) if columns == 2 else arm_title(arm).replace(", ", "\n"))
        axes.set_xlabel("epoch")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    return figure, list(zip(arms, grid, strict=False))


# --------------------------------------------------------------------------------------------------


@context()
def nmi_curves(
    runs: Mapping[str, pd.DataFrame],
    published: pd.DataFrame | None,
    chance: Mapping[str, float],
    dataset_label: str,
    published_n_clusters: int = 200,
    published_chance: float | None = None,
    columns: int = 2,
) -> Figure:
    """NMI between the assignments of consecutive epochs, AlexNet left, P4M right.

    Parameters
    ----------
    runs : mapping of arm to DataFrame
        Columns ``epoch``, ``seed``, ``nmi_prev`` (NaN at epoch 1) and, if it is to be drawn,
        ``ami_prev``. An arm may be missing.
    published : DataFrame or None
        Columns ``arm``, ``epoch``, ``nmi_prev``.
    chance : mapping of arm to float
        NMI of two random assignments with this run's numbers of images and clusters: NMI, unlike
        AMI, is not 0 there.
    dataset_label : str
        Names the dataset, e.g. ``"synthetic phantom, 2,000 images"``.
    published_n_clusters, published_chance : int, float or None
        K of the published curve, and the same chance level for it.
    columns : {1, 2}
        Width in columns of a journal (3.4 or 7 in).

    Raises
    ------
    ValueError
        A column is missing, an epoch of a seed stands twice, or `dataset_label` is empty.
    """
    figure, panels = _curve_panels(runs, columns)
    for (arm, axes), color, marker in zip(panels, cycle(PALETTE), cycle(MARKERS), strict=False):
        table = _by_seed(runs, arm, "nmi_prev")
        if table is None or table.empty:
            absent(axes, "no run of this arm" if table is None else "needs two epochs")
        else:
            _seeds(axes, table, color, marker)
            if "ami_prev" in runs[arm]:
                ami = _by_seed(runs, arm, "ami_prev").dropna().mean(axis=1)
                axes.plot(
                    ami.index,
                    ami,
                    color=color,
                    linestyle="--",
                    linewidth=1,
                    label="AMI (chance is 0)",
                    zorder=3,
                )
        _published(axes, published, arm, "nmi_prev", published_n_clusters)
        if arm in chance:
            axes.axhline(
                chance[arm],
                color=GRAY,
                linestyle="-.",
                linewidth=1,
                label=f"chance, this run: {chance[arm]:.2f}",
            )
        if published is not None and published_chance is not None and arm in ARM_TITLES:
            label = f"chance, K = {published_n_clusters}: {published_chance:.2f}"
            axes.axhline(published_chance, color=GRAY, linestyle=":", linewidth=1, label=label)
        legend_below(axes, 0.42, ncols=columns, fontsize=7 if columns == 2 else 6)
    panels[0][1].set(ylim=(0, 1), ylabel="NMI of consecutive epochs")
    return finish(figure, dataset_label)


@context()
def loss_curves(
    runs: Mapping[str, pd.DataFrame],
    published: pd.DataFrame | None,
    n_clusters: int,
    dataset_label: str,
    published_n_clusters: int = 200,
    columns: int = 2,
) -> Figure:
    """Mean training loss per epoch in units of ln K, AlexNet left, P4M right.

    The cross-entropy of a uniform guess over K clusters is ln K, so losses at different K compare
    only after division by it: 1 is chance for every curve. The right-hand scale gives this run's
    loss in nats.

    Parameters
    ----------
    runs : mapping of arm to DataFrame
        Columns ``epoch``, ``seed``, ``loss`` (nats). An arm may be missing.
    published : DataFrame or None
        Columns ``arm``, ``epoch``, ``loss`` (nats).
    n_clusters, published_n_clusters : int
        K of this run and of the published curve, at least 2.
    dataset_label : str
        Names the dataset.
    columns : {1, 2}
        Width in columns of a journal.

    Raises
    ------
    ValueError
        K < 2, a column is missing, an epoch of a seed stands twice, or `dataset_label` is empty.
    """
    for name, k in (("n_clusters", n_clusters), ("published_n_clusters", published_n_clusters)):
        if k < 2:
            raise ValueError(f"{name} must be at least 2 (ln K is the unit of the loss), got {k}")
    unit, published_unit = np.log(n_clusters), np.log(published_n_clusters)
    figure, panels = _curve_panels(runs, columns)
    for (arm, axes), color, marker in zip(panels, cycle(PALETTE), cycle(MARKERS), strict=False):
        table = _by_seed(runs, arm, "loss", unit)
        if table is None or table.empty:
            absent(axes, "no run of this arm" if table is None else "no epoch yet")
        else:
            _seeds(axes, table, color, marker)
        _published(axes, published, arm, "loss", published_n_clusters, published_unit)
        axes.axhline(1, color=GRAY, linestyle="-.", linewidth=1, label="chance (uniform guess)")
        legend_below(axes, 0.42, ncols=columns, fontsize=7 if columns == 2 else 6)
    panels[0][1].set_ylim(bottom=0)
    panels[0][1].set_ylabel("training loss / ln K")
    nats = panels[1][1].secondary_yaxis("right", functions=(lambda y: y * unit, lambda y: y / unit))
    nats.set_ylabel(f"this run's loss, nats (K = {n_clusters})")
    note = f"ln K: this run ln {n_clusters} = {unit:.2f}"
    return finish(
        figure,
        dataset_label,
        note
        if published is None
        else f"{note}; published ln {published_n_clusters} = {published_unit:.2f}",
    )


@context()
def tsne_maps(
    points: Mapping[str, np.ndarray],
    clusters: Mapping[str, np.ndarray],
    findings: Sequence[str],
    dataset_label: str,
    n_findings: int = 6,
    columns: int = 2,
) -> Figure:
    """t-SNE maps, a column for each arm: coloured by cluster above, by finding below.

    Parameters
    ----------
    points : mapping of arm to array, shape (M, 2)
        Map of each arm; the unit and the direction of the axes mean nothing. An arm may be missing.
    clusters : mapping of arm to int array, shape (M,)
    findings : sequence of M str
        Findings of each image, joined by ``|``.
    dataset_label : str
        Names the dataset.
    n_findings : int
        How many of the most frequent single findings get a colour of their own, 0 to 6.
    columns : {1, 2}
        Width in columns of a journal.

    Raises
    ------
    ValueError
        The lengths of points, clusters and findings differ, or `n_findings` or `dataset_label` is
        out of range.
    """
    if not 0 <= n_findings < len(PALETTE):
        raise ValueError(
            f"n_findings must be 0 to {len(PALETTE) - 1} (one colour and marker each), got {n_findings}"
        )
    findings = np.asarray(findings, dtype=object)
    for arm, xy in points.items():
        if np.shape(xy) != (len(findings), 2) or np.shape(clusters.get(arm)) != (len(findings),):
            shapes = f"points {np.shape(xy)}, clusters {np.shape(clusters.get(arm))}, findings ({len(findings)},)"
            raise ValueError(
                f"arm {arm!r}: need points (M, 2), clusters (M,) and findings (M,) of one M, got {shapes}"
            )
    single = Counter(f for f in findings if "|" not in f and f != NO_FINDING)
    frequent = sorted(single, key=lambda f: (-single[f], f))[:n_findings]
    groups = {NO_FINDING: (findings == NO_FINDING, {"c": LIGHT, "marker": "o"})}
    several = np.array(["|" in f for f in findings], dtype=bool)
    other = ~several & ~np.isin(findings, [NO_FINDING, *frequent])
    groups["several findings"] = (several, {"c": GRAY, "marker": "x", "linewidths": 0.5})
    groups["another single finding"] = (other, {"c": PALETTE[-1], "marker": "+", "linewidths": 0.5})
    for name, color, marker in zip(frequent, PALETTE, MARKERS, strict=False):
        groups[name.replace("_", " ")] = (findings == name, {"c": color, "marker": marker})

    arms = arm_order(points)
    side = COLUMN_INCHES[columns] / len(arms)
    spec = new_figure(columns, 2 * side + 1.3).add_gridspec(
        3, len(arms), height_ratios=[side, side, {1: 0.75, 2: 0.45}[columns]]
    )
    figure = spec.figure
    grid = spec[:2, :].subgridspec(2, len(arms)).subplots(squeeze=False)
    size = float(np.clip(9000 / max(len(findings), 1), 1.5, 9)) * columns / 2
    dots = {
        "s": size,
        "linewidths": 0,
        "rasterized": len(findings) > 5000,
    }  # more outlines would make the SVG slow to open
    styles = [(c, m) for m in MARKERS for c in PALETTE]
    for column, arm in enumerate(arms):
        above, below = grid[:, column]
        for axes in (above, below):
            axes.set(xticks=[], yticks=[], box_aspect=1)
            axes.set_aspect("equal", adjustable="datalim")
            axes.spines[:].set(visible=True, color=LIGHT)
        above.set_title(arm_title(arm) if columns == 2 else arm_title(arm).replace(", ", "\n"))
        if arm not in points:
            absent(above, "no run of this arm")
            absent(below, "no run of this arm")
            continue
        xy, ids = np.asarray(points[arm]), np.unique(clusters[arm], return_inverse=True)
        for index, (color, marker) in enumerate(styles):
            chosen = xy[ids[1] % len(styles) == index]
            above.scatter(*chosen.T, **dots, c=color, marker=marker, alpha=0.85)
        above.set_xlabel(f"{len(ids[0])} clusters", fontsize=7)
        for mask, look in groups.values():
            below.scatter(*xy[mask].T, **{**dots, **look})
    grid[0, 0].set_ylabel("by cluster")
    grid[1, 0].set_ylabel("by finding")
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            color=look["c"],
            marker=look["marker"],
            markersize=4.5,
            label=f"{name} ({mask.sum():,})",
        )
        for name, (mask, look) in groups.items()
        if mask.any()
    ]
    key = figure.add_subplot(spec[2, :])
    key.set_axis_off()
    key.legend(
        handles=handles,
        loc="center",
        ncols=columns + 1,
        fontsize=7 if columns == 2 else 5.5,
        handletextpad=0.1,
    )
    return finish(
        figure,
        dataset_label,
        f"{len(findings):,} images a map; colours and markers of clusters repeat after {len(styles)}",
    )


@context()
def samples(
    images: np.ndarray,
    findings: Sequence[str],
    dataset_label: str,
    examples_per_finding: int = 4,
    seed: int = 0,
) -> Figure:
    """Example radiographs, one row a finding, in three columns of findings.

    Images with that finding alone come first; one that shows others too is marked with a plus sign.

    Parameters
    ----------
    images : uint8 array, shape (N, H, W)
    findings : sequence of N str
        Findings of each image, joined by ``|``. Names outside the 14 of ChestX-ray14 get rows of
        their own after them.
    dataset_label : str
        Names the dataset.
    examples_per_finding : int
    seed : int
        The choice of examples depends on it and on nothing else.

    Raises
    ------
    ValueError
        `images` and `findings` differ in length, or `examples_per_finding` < 1, or no
        `dataset_label`.
    """
    if images.ndim != 3 or len(images) != len(findings):
        raise ValueError(
            f"images must be (N, H, W) with one entry of findings each, got {images.shape} and {len(findings)} findings"
        )
    if examples_per_finding < 1:
        raise ValueError(f"examples_per_finding must be at least 1, got {examples_per_finding}")
    parts = [set(f.split("|")) for f in findings]
    names = [*FINDINGS[:-1], *sorted(set().union(*parts) - set(FINDINGS)), NO_FINDING]
    n_rows, gap = -(-len(names) // 3), 3
    height, width = images.shape[1:]
    row_inches = COLUMN_INCHES[2] / 3 / examples_per_finding * height / width + 0.22
    figure = new_figure(2, n_rows * row_inches + 0.35)
    grid = figure.subplots(n_rows, 3, squeeze=False)
    order = np.random.default_rng(seed).permutation(len(images))
    for axes in grid.ravel():
        axes.set_axis_off()
    for axes, name in zip(grid.T.ravel(), names, strict=False):
        having = [i for i in order if name in parts[i]]
        chosen = sorted(having, key=lambda i: len(parts[i]) > 1)[
            :examples_per_finding
        ]  # a stable sort: single findings first
        for position, i in enumerate(chosen):
            left = position * (width + gap)
            axes.imshow(
                images[i],
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="bicubic",
                extent=(left, left + width, height, 0),
            )
            if len(parts[i]) > 1:
                plate = {
                    "boxstyle": "square,pad=0.1",
                    "facecolor": "black",
                    "edgecolor": "none",
                    "alpha": 0.7,
                }
                axes.text(
                    left + width - 3,
                    3,
                    "+",
                    color="white",
                    fontsize=7,
                    fontweight="bold",
                    ha="right",
                    va="top",
                    bbox=plate,
                )
        axes.set(
            xlim=(0, examples_per_finding * (width + gap) - gap), ylim=(height, 0), aspect="equal"
        )
        axes.set_title(f"{name.replace('_', ' ')} ({len(having):,})", loc="left", fontsize=7, pad=2)
        if not chosen:
            absent(axes, "none in this dataset")
    return finish(
        figure, dataset_label, "in brackets: images with that finding; +: shows other findings too"
    )


@context()
def clusters(
    images: np.ndarray,
    embedding: np.ndarray,
    assignments: np.ndarray,
    dataset_label: str,
    n_rows: int = 6,
    per_row: int = 10,
) -> Figure:
    """The largest clusters, a row each: the mean of all its images, then those nearest to the
    centroid.

    Parameters
    ----------
    images : uint8 array, shape (N, H, W)
    embedding : array, shape (N, d)
        What was clustered.
    assignments : int array, shape (N,)
    dataset_label : str
        Names the dataset.
    n_rows, per_row : int
        Clusters shown at most, and images of each at most.

    Raises
    ------
    ValueError
        Lengths that differ, `n_rows` or `per_row` < 1, or no `dataset_label`.
    """
    if not len(images) == len(embedding) == len(assignments):
        raise ValueError(
            f"{len(images)} images, {len(embedding)} rows of the embedding and {len(assignments)} assignments are not as many"
        )
    if min(n_rows, per_row) < 1:
        raise ValueError(f"n_rows and per_row must be at least 1, got {n_rows} and {per_row}")
    numbers, sizes = np.unique(assignments, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:n_rows]
    figure = new_figure(2, 0.2 + 0.62 * len(order))
    grid = figure.subplots(len(order), per_row + 1, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, place in zip(grid, order, strict=True):
        members = np.flatnonzero(assignments == numbers[place])
        distance = np.linalg.norm(embedding[members] - embedding[members].mean(axis=0), axis=1)
        shown = members[np.argsort(distance, kind="stable")[:per_row]]
        for axes, image in zip(
            row, [np.asarray(images[members]).mean(axis=0), *images[shown]], strict=False
        ):
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        row[0].text(
            -0.1,
            0.5,
            f"{sizes[place]:,}",
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=6,
        )
    grid[0, 0].set_title("mean", fontsize=6)
    if per_row > 1:
        where = {
            "xy": (0, 1),
            "xycoords": "axes fraction",
            "xytext": (0, 6),
            "textcoords": "offset points",
        }  # level with the title
        grid[0, 1].annotate("nearest to the centroid →", **where, fontsize=6).set_in_layout(
            False
        )  # wider than its column
    return finish(
        figure,
        dataset_label,
        f"{len(order)} largest of {len(numbers)} clusters, number of images at the left",
    )


@context()
def probe_bars(table: pd.DataFrame, dataset_label: str, columns: int = 1) -> Figure:
    """Scores of linear probes as dots with 95 % intervals, each beside its majority baseline and
    the published value.

    Parameters
    ----------
    table : DataFrame
        One row a probe, grouped by target: ``target`` (what is predicted; ``"findings"`` is scored
        by mean AUROC, all else by accuracy), ``arm``, ``accuracy`` (the score), ``ci_low``,
        ``ci_high`` (95 % interval; may be NaN), ``baseline`` (score of always answering the most
        frequent class); and, if known, ``published``, ``published_baseline`` and ``n_seeds``. All 0
        to 1.
    dataset_label : str
        Names the dataset.
    columns : {1, 2}
        Width in columns of a journal.

    Raises
    ------
    ValueError
        No rows, a column is missing, an accuracy lies outside its interval, or `dataset_label` is
        empty.
    """
    missing = {"target", "arm", "accuracy", "ci_low", "ci_high", "baseline"} - set(table.columns)
    if missing or table.empty:
        raise ValueError(
            f"table has {len(table)} rows and lacks column {', '.join(sorted(missing)) or 'none'}: nothing to draw"
        )
    outside = table[(table["accuracy"] < table["ci_low"]) | (table["accuracy"] > table["ci_high"])]
    if len(outside):
        raise ValueError(f"accuracy outside its interval in table: {outside.iloc[0].to_dict()}")
    figure = new_figure(columns, 0.24 * (len(table) + 1.3 * table["target"].nunique()) + 1.3)
    axes = figure.subplots()
    y, ticks, heads = 0.0, {}, set()
    looks = {  # column: marker, legend entry, the rest
        "baseline": (
            "|",
            "majority baseline, this run",
            {"color": DARK, "markersize": 10, "markeredgewidth": 1.6},
        ),
        "published": (
            "D",
            "published",
            {"color": DARK, "markerfacecolor": "white", "markersize": 4.5, "markeredgewidth": 0.8},
        ),
        "published_baseline": (
            "|",
            "majority baseline, published",
            {"color": GRAY, "markersize": 7, "markeredgewidth": 0.8},
        ),
    }
    colors = dict(
        zip(
            arm_order(dict.fromkeys(table["arm"])),
            cycle(zip(PALETTE, MARKERS, strict=True)),
            strict=False,
        )
    )
    for target, group in table.groupby("target", sort=False):
        ticks[y] = (
            "findings (mean AUROC)"
            if target == "findings"
            else f"{target.replace('_', ' ')} (accuracy)"
        )
        heads.add(ticks[y])
        for row in group.to_dict("records"):
            y += 1
            color, marker = colors[row["arm"]]
            n_seeds = row.get("n_seeds", np.nan)
            seeds = "" if pd.isna(n_seeds) else f" ({n_seeds:.0f} seed{'s' if n_seeds > 1 else ''})"
            ticks[y] = arm_name(row["arm"]) + seeds
            # what was published stands half a line lower, or it would cover a dot of the same
            # height
            axes.plot(
                [row["ci_low"], row["ci_high"]],
                [y, y],
                color=color,
                linewidth=1.5,
                solid_capstyle="butt",
                zorder=3,
            )
            axes.plot(row["accuracy"], y, color=color, marker=marker, markersize=5, zorder=4)
            for column, (shape, _, look) in looks.items():
                if not pd.isna(row.get(column, np.nan)):
                    lower = 0.36 if column.startswith("published") else 0
                    axes.plot(
                        row[column],
                        y + lower,
                        marker=shape,
                        linestyle="",
                        zorder=3 if column == "published" else 2,
                        **look,
                    )
        y += 1.3
    axes.set(xlim=(0, 1), ylim=(y - 0.6, -0.6), xlabel="score of a linear probe")
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    for label in axes.get_yticklabels():
        if label.get_text() in heads:
            label.set(fontweight="bold")
    handles = [
        Line2D([], [], color=DARK, marker="o", markersize=4.5, label="this run, 95 % interval")
    ]
    for column, (shape, label, look) in looks.items():
        if column in table and table[column].notna().any():
            handles.append(Line2D([], [], linestyle="", marker=shape, label=label, **look))
    legend_below(axes, 0.42, handles=handles, ncols=columns, fontsize=7 if columns == 2 else 6)
    return finish(figure, dataset_label)


def _planar_example(n: int = 90, k: int = 3) -> tuple[np.ndarray, ...]:
    """One cloud of n points after PCA, whitening and L2, its k-means centroids and labels:
    computed, so that the picture is true.
    """
    generator = np.random.default_rng(4)
    centers = np.array([[-1.5, -0.4], [0.5, 1.1], [1.2, -0.9]])
    points = np.repeat(centers, n // k, axis=0) + generator.normal(0, 0.42, (n // k * k, 2))
    raw = points @ np.array([[1.5, 0.85], [0.1, 0.55]])
    centered = raw - raw.mean(0)
    rotated = centered @ np.linalg.svd(centered, full_matrices=False)[2].T
    white = rotated / rotated.std(0)
    unit = white / np.linalg.norm(white, axis=1, keepdims=True)
    means = unit[[0, n // k, 2 * n // k]]
    for _ in range(20):
        labels = ((unit[:, None] - means) ** 2).sum(-1).argmin(1)
        means = np.stack([unit[labels == c].mean(0) for c in range(k)])
    return rotated, white, unit, means, labels


@context()
def pipeline(image: np.ndarray, dataset_label: str | None = None) -> Figure:
    """The method at a glance: two backbones, one clustering loop. Every small picture is computed,
    from `image` or from 90 points.

    Parameters
    ----------
    image : uint8 array, shape (H, H)
        A radiograph to show.
    dataset_label : str, optional
        Names the dataset of `image`.

    Raises
    ------
    ValueError
        `image` is not a square gray image.
    """
    if image.ndim != 2 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image must be one square gray image (H, H), got shape {image.shape}")
    width, height = COLUMN_INCHES[2], 3.75
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))  # the unit is the inch
    axes.set_axis_off()
    blue, red = PALETTE[:2]

    def box(x, y, w, h, edge=DARK, face="white", **look):
        patch = FancyBboxPatch(
            (x, y),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=0.07",
            edgecolor=edge,
            facecolor=face,
            linewidth=0.8,
        )
        axes.add_patch(patch).set(**look)

    def arrow(*path, color=DARK, **look):
        look = {
            "arrowstyle": "-|>",
            "mutation_scale": 8,
            "linewidth": 1.1,
            "shrinkA": 0,
            "shrinkB": 0,
            "zorder": 4,
            **look,
        }
        for start, stop in pairwise(path[:-1]):  # corners first, the head on the last stretch
            axes.plot(
                *zip(start, stop, strict=True),
                color=color,
                linewidth=1.1,
                solid_capstyle="projecting",
                zorder=4,
            )
        axes.add_patch(FancyArrowPatch(path[-2], path[-1], color=color, **look))

    def text(x, y, words, size=6.5, **look):
        axes.text(
            x,
            y,
            words,
            **{
                "fontsize": size,
                "ha": "center",
                "va": "center",
                "linespacing": 1.15,
                "zorder": 6,
                **look,
            },
        )

    def picture(values, x, y, side, **look):
        look = {"cmap": "gray", "interpolation": "bicubic", "zorder": 3, **look}
        axes.imshow(values, extent=(x, x + side, y, y + side), **look)
        axes.add_patch(
            Rectangle(
                (x, y),
                side,
                side,
                fill=False,
                edgecolor="white",
                linewidth=0.5,
                zorder=look["zorder"],
            )
        )

    def dots(values, x, y, side, color):
        values = values / np.abs(values).max() * side / 2
        axes.scatter(x + values[:, 0], y + values[:, 1], s=3.2, c=color, linewidths=0, zorder=5)

    # ---- input
    picture(image, 0.12, 2.02, 0.98, vmin=0, vmax=255)
    text(0.61, 3.16, "chest X-ray", fontweight="bold", size=7)
    text(0.61, 1.86, "64 × 64 pixels\nno labels are read")
    arrow((1.12, 2.6), (1.19, 2.6), (1.19, 3.1), (1.45, 3.1), color=blue)
    arrow((1.12, 2.42), (1.19, 2.42), (1.19, 1.92), (1.46, 1.92), color=red)

    # ---- AlexNet branch
    box(1.27, 1.29, 4.54, 2.43, edge=GRAY, linestyle="--", zorder=0)
    box(1.34, 2.56, 4.4, 1.1, edge=blue, face="#EFF5FA")
    text(
        1.44,
        3.56,
        "AlexNet with rotation augmentation",
        size=7,
        ha="left",
        color=blue,
        fontweight="bold",
    )
    gray = np.asarray(image, dtype=np.float64)
    for position, angle in enumerate((-20, 75, 160)):
        turned = ndimage.rotate(gray, angle, reshape=False, order=1, mode="constant")
        picture(
            turned,
            1.5 + 0.17 * position,
            3.0 - 0.055 * position,
            0.42,
            vmin=0,
            vmax=255,
            zorder=3 + 0.1 * position,
        )
    text(1.87, 2.7, "random rotations")
    arrow((2.32, 3.1), (2.52, 3.1), color=blue)
    for position, axis in enumerate((1, 0)):
        edges = ndimage.sobel(ndimage.gaussian_filter(gray, 0.7), axis=axis)
        limit = np.percentile(np.abs(edges), 99)
        picture(edges, 2.57 + 0.48 * position, 2.87, 0.45, vmin=-limit, vmax=limit)
    text(3.04, 2.7, "fixed Sobel filters")
    arrow((3.56, 3.1), (3.76, 3.1), color=blue)
    layers = (
        (0.09, 0.6),
        (0.12, 0.46),
        (0.14, 0.36),
        (0.14, 0.36),
        (0.14, 0.3),
        (0.06, 0.52),
        (0.06, 0.52),
    )
    for position, (deep, tall) in enumerate(layers):
        left = 3.84 + 0.245 * position
        axes.add_patch(
            Rectangle(
                (left, 3.1 - tall / 2),
                deep,
                tall,
                facecolor=blue,
                alpha=0.35 if position < 5 else 0.8,
                zorder=3,
            )
        )
    text(4.4, 2.7, "5 convolutions")
    text(5.22, 2.7, "2 dense")

    # ---- P4M branch
    box(1.34, 1.36, 4.4, 1.1, edge=red, face="#FCF3EC")
    text(
        1.44,
        2.36,
        "P4M-equivariant CNN, no augmentation",
        size=7,
        ha="left",
        color=red,
        fontweight="bold",
    )
    corner = np.array(
        [[0, 0, 3, 0, 0], [0, 0, 3, 0, 0], [0, 0, 3, 3, 2], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    )
    for mirror in range(2):
        for turns in range(4):
            filter_ = np.rot90(np.fliplr(corner) if mirror else corner, turns)
            picture(
                filter_,
                1.5 + 0.32 * turns,
                1.94 - 0.32 * mirror,
                0.28,
                cmap="Oranges",
                vmin=-0.5,
                vmax=4,
                interpolation="nearest",
            )
    text(2.12, 1.5, "8 poses of each filter")
    arrow((2.86, 1.92), (3.06, 1.92), color=red)
    for position, (deep, tall) in enumerate(((0.07, 0.44), (0.09, 0.34), (0.12, 0.24))):
        for pose in range(8):
            place = (3.14 + 0.44 * position + 0.028 * pose, 1.92 - tall / 2 - 0.06 + 0.018 * pose)
            layer = Rectangle(
                place,
                deep,
                tall,
                facecolor="#F2C5A0",
                edgecolor=red,
                linewidth=0.4,
                zorder=4 - 0.1 * pose,
            )
            axes.add_patch(layer)
    text(3.78, 1.5, "3 group convolutions")
    arrow((4.46, 1.92), (4.66, 1.92), color=red)
    axes.add_patch(
        Polygon(
            [(4.74, 2.2), (4.74, 1.64), (5.02, 1.8), (5.02, 2.04)],
            facecolor=red,
            alpha=0.35,
            zorder=3,
        )
    )
    axes.add_patch(Rectangle((5.1, 1.8), 0.06, 0.24, facecolor=red, alpha=0.8, zorder=3))
    text(5.05, 1.5, "maximum over poses,\nmean over space", size=6)

    # ---- features
    arrow((5.83, 3.1), (5.96, 3.1), (5.96, 2.66), (6.1, 2.66), color=blue)
    arrow((5.83, 1.92), (5.96, 1.92), (5.96, 2.36), (6.1, 2.36), color=red)
    values = np.random.default_rng(1).random((9, 6))
    axes.imshow(
        values,
        extent=(6.14, 6.82, 2.08, 2.95),
        cmap="gray",
        vmin=-0.3,
        vmax=1.2,
        aspect="auto",
        interpolation="nearest",
        zorder=3,
    )
    text(6.48, 3.14, "features", fontweight="bold", size=7)
    text(6.48, 1.94, "N images × D")

    # ---- clustering, from right to left, so that the loop closes under the backbones
    rotated, white, unit, means, labels = _planar_example()
    colors = np.array([PALETTE[2], PALETTE[3], PALETTE[4]])
    side, y = 0.74, 0.36
    lefts = [6.13 - 0.95 * step for step in range(6)]
    names = ("PCA", "whitening", "L2 norm", "K-means", "pseudo-labels", "cross-entropy")
    for left, name in zip(lefts, names, strict=True):
        box(left, y, side, side, edge=GRAY, zorder=2)
        text(left + side / 2, y - 0.12, name, fontweight="bold")
    for start, stop in pairwise(lefts):
        arrow((start - 0.02, y + side / 2), (stop + side + 0.03, y + side / 2))
    middles = [(left + side / 2, y + side / 2) for left in lefts]
    arrow((6.5, 1.84), (6.5, y + side + 0.03))
    for values, middle in zip((rotated, white, unit), middles, strict=False):
        dots(values, *middle, 0.6, DARK)
    dots(unit, *middles[3], 0.6, colors[labels])
    for mean, color in zip(means, colors, strict=True):
        axes.plot(
            middles[3][0] + 0.3 * mean[0],
            middles[3][1] + 0.3 * mean[1],
            "X",
            color=color,
            markeredgecolor="black",
            markersize=5,
        )
    axes.add_patch(Circle(middles[2], 0.3, fill=False, edgecolor=GRAY, linewidth=0.4, zorder=4))
    for row, cluster in enumerate((1, 0, 2)):
        x, middle = lefts[4] + 0.2, y + 0.585 - 0.215 * row
        text(x, middle, f"$x_{row + 1}$")
        arrow((x + 0.1, middle), (x + 0.24, middle), linewidth=0.6, mutation_scale=5)
        axes.add_patch(
            Rectangle((x + 0.27, middle - 0.075), 0.15, 0.15, facecolor=colors[cluster], zorder=3)
        )
        text(x + 0.345, middle - 0.005, str(cluster + 1), size=5.5)
    for row, share in enumerate((0.62, 0.2, 0.12)):
        place = (lefts[5] + 0.1, y + 0.52 - 0.15 * row)
        axes.add_patch(
            Rectangle(place, 0.8 * share, 0.1, facecolor=colors[(1, 0, 2)[row]], zorder=3)
        )
    text(middles[5][0], y + 0.1, r"$-\ln\, p_{\mathrm{label}}$")
    arrow((middles[5][0], y + side), (middles[5][0], 1.27))
    text(
        middles[5][0] + 0.08,
        1.19,
        "train, and repeat every epoch (the same loop for each backbone, run separately)",
        ha="left",
        size=6,
    )
    if dataset_label:
        text(0.1, 0.08, f"X-ray: {dataset_label}", size=6, ha="left", color=GRAY)
    return figure
