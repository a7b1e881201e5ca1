"""Figures of a data set before any training: arrays and tables in, a matplotlib `Figure` out, in
the look of `lib.plots`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.data import texture
from lib.plots import style
from lib.plots.style import DARK, FINDINGS, GRAY, LIGHT, NO_FINDING, PALETTE


def _names(findings: Sequence[str]) -> list[str]:
    """Findings that occur, in NIH's order; other names after them, and No Finding last."""
    there = set("|".join(findings).split("|")) - {""}
    known = [name for name in FINDINGS if name in there and name != NO_FINDING]
    return [*known, *sorted(there - set(FINDINGS)), *([NO_FINDING] if NO_FINDING in there else [])]


def _shown(name: str) -> str:
    return name.replace("_", " ")


def _check(images: np.ndarray, findings: Sequence[str]) -> None:
    if images.ndim != 3 or len(images) != len(findings):
        raise ValueError(
            f"images must be (N, H, W) with one entry of findings each, got {images.shape} and {len(findings)} findings"
        )


@style.context()
def cooccurrence(findings: Sequence[str], dataset_label: str) -> Figure:
    """Which findings come together: of the images with the finding of the row, how many show that
    of the column.

    Parameters
    ----------
    findings : sequence of N str
        Joined by ``|``.
    dataset_label : str

    Returns
    -------
    Figure
        Colour is the share of the row's images, numbers are images; the diagonal counts all images
        with a finding.

    Raises
    ------
    ValueError
        No image has a finding.
    """
    texts = list(findings)
    names = [name for name in _names(texts) if name != NO_FINDING]
    if not names:
        raise ValueError("no image has a finding, so none come together")
    parts = [set(text.split("|")) for text in texts]
    matrix = np.array([[name in part for name in names] for part in parts], np.int64)
    counts = matrix.T @ matrix
    totals = np.diag(counts)
    share = counts / totals[:, None]
    np.fill_diagonal(share, np.nan)
    figure = style.new_figure(2, 0.6 + 0.27 * len(names) + 0.8)
    axes = figure.subplots()
    top = float(np.nanmax(share)) if len(names) > 1 and np.nanmax(share) > 0 else 1.0
    drawn = axes.imshow(share, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    for row, column in np.ndindex(counts.shape):
        dark = row != column and share[row, column] < 0.6 * top
        weight = "bold" if row == column else "normal"
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=6,
            color="white" if dark else DARK,
            fontweight=weight,
        )
    axes.set_xticks(
        range(len(names)), map(_shown, names), rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(names)), map(_shown, names))
    axes.set(xlabel="also shows", ylabel="images with")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(
        drawn, ax=axes, fraction=0.04, pad=0.02, label="share of the row's images"
    )
    bar.outline.set_visible(False)
    return style.finish(
        figure, dataset_label, "Numbers: images. Diagonal: all images with the finding."
    )


@style.context()
def population(metadata: pd.DataFrame, dataset_label: str) -> Figure:
    """Images of each patient, ages, and views by sex.

    Parameters
    ----------
    metadata : DataFrame
        patient_id, age, sex and view_position as `lib.data.load` returns them.
    dataset_label : str
    """
    figure = style.new_figure(2, 2.2)
    patients, ages, views = figure.subplots(1, 3)
    number = metadata.loc[metadata["patient_id"] != "", "patient_id"].value_counts()
    last = 20  # the few patients with more would stretch the axis
    if len(number):
        bins = np.arange(0.5, min(int(number.max()), last) + 1.5)
        patients.hist(
            number.clip(upper=last), bins=bins, color=PALETTE[0], edgecolor="white", lw=0.3
        )
        patients.set_title(f"{len(number):,} patients, up to {number.max():,} images", loc="left")
        more = f" ({last}: or more)" if number.max() > last else ""
        patients.set(xlabel=f"images of a patient{more}", ylabel="patients")
    else:
        style.absent(patients, "no patients known")
    known = metadata["age"].dropna()
    if len(known):
        ages.hist(
            known,
            bins=np.arange(0, max(100, known.max()) + 5, 5),
            color=PALETTE[0],
            edgecolor="white",
            lw=0.3,
        )
        ages.set_title(
            f"median {known.median():.0f} years, {len(metadata) - len(known):,} unknown", loc="left"
        )
    else:
        style.absent(ages, "no ages")
    ages.set(xlabel="age (years)", ylabel="images")
    table = pd.crosstab(
        metadata["view_position"].replace("", "not stated"),
        metadata["sex"].replace("", "not stated"),
    )
    table = table.loc[table.sum(axis=1).sort_values(ascending=False).index]
    bottom = np.zeros(len(table))
    for place, sex in enumerate(table.columns):
        hatch, color = ("", "////", "....", "xx")[place % 4], PALETTE[place % len(PALETTE)]
        views.bar(
            table.index,
            table[sex],
            bottom=bottom,
            color=color,
            hatch=hatch,
            edgecolor="white",
            lw=0.5,
            label=sex,
            width=0.6,
        )
        bottom += table[sex].to_numpy()
    views.set(xlabel="view", ylabel="images", ylim=(0, bottom.max() * 1.25))
    views.legend(ncols=len(table.columns), loc="upper center", handlelength=1.2, columnspacing=0.8)
    views.set_title("by sex", loc="left")
    for axes in (patients, ages, views):
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return style.finish(figure, dataset_label)


@style.context()
def mean_images(images: np.ndarray, findings: Sequence[str], dataset_label: str) -> Figure:
    """Mean image of each finding, and how it differs from the mean image without a finding.

    Parameters
    ----------
    images : uint8 array, shape (N, H, W)
    findings : sequence of N str
    dataset_label : str

    Returns
    -------
    Figure
        For each finding its mean image in gray, and beside it the difference, orange where brighter
        and blue where darker. The reference is the mean of all images if none is without a finding.
    """
    _check(images, findings)
    texts = list(findings)
    names = _names(texts) or [""]
    sums: dict[str, np.ndarray] = {name: np.zeros(images.shape[1:]) for name in names}
    numbers: Counter[str] = Counter()
    total = np.zeros(images.shape[1:])
    for image, text in zip(images, texts, strict=True):
        total += image
        for name in text.split("|"):
            if name in sums:
                sums[name] += image
                numbers[name] += 1
    means = {name: sums[name] / max(numbers[name], 1) for name in names}
    reference = means.get(NO_FINDING, total / len(images))
    spread = max(
        float(np.percentile(np.abs(np.stack([mean - reference for mean in means.values()])), 99.5)),
        1.0,
    )
    columns = 5
    rows = -(-len(names) // columns)
    figure = style.new_figure(2, rows * 0.92 + 0.75)
    grid = figure.subplots(rows, 2 * columns, squeeze=False, gridspec_kw={"wspace": 0.03})
    for axes in grid.ravel():
        axes.set_axis_off()
    drawn = None
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        left, right = grid[row, 2 * column : 2 * column + 2]
        left.imshow(means[name], cmap="gray", vmin=0, vmax=255)
        left.set_title(
            f"{_shown(name) or 'not stated'} ({numbers[name]:,})", loc="left", fontsize=6.5, pad=2
        )
        if name != NO_FINDING:
            drawn = right.imshow(means[name] - reference, cmap="PuOr_r", vmin=-spread, vmax=spread)
    if drawn is not None:
        bar = figure.colorbar(
            drawn, ax=grid, orientation="horizontal", fraction=0.03, pad=0.02, aspect=50
        )
        bar.set_label(
            f"mean minus mean of {NO_FINDING if NO_FINDING in means else 'all images'} (gray levels)"
        )
        bar.outline.set_visible(False)
    return style.finish(figure, dataset_label)


@style.context()
def brightness(
    images: np.ndarray, limits: tuple[float, float, float], dataset_label: str, examples: int = 4
) -> Figure:
    """Mean and spread of the gray levels of each image, the limits of outliers, and the darkest and
    brightest images.

    Parameters
    ----------
    images : uint8 array, shape (N, H, W)
    limits : (float, float, float)
        Darkest and brightest mean and smallest standard deviation of an image that shows a chest.
    dataset_label : str
    examples : int
        Number of darkest and of brightest images shown.
    """
    dark, bright, constant = limits
    if images.ndim != 3 or not len(images):
        raise ValueError(f"images must be (N, H, W), got {images.shape}")
    mean = np.array([image.mean() for image in images])
    deviation = np.array([image.std() for image in images])
    outside = (mean < dark) | (mean > bright) | (deviation < constant)
    figure = style.new_figure(2, 2.6)
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = left.subplots()
    axes.axvspan(0, dark, color=LIGHT, lw=0)
    axes.axvspan(bright, 255, color=LIGHT, lw=0)
    axes.axhspan(0, constant, color=LIGHT, lw=0)
    size = float(np.clip(3000 / len(images), 0.5, 8))
    axes.scatter(
        mean[~outside],
        deviation[~outside],
        s=size,
        color=PALETTE[0],
        alpha=0.5,
        lw=0,
        rasterized=True,
    )
    axes.scatter(
        mean[outside],
        deviation[outside],
        s=22,
        color=PALETTE[1],
        marker="X",
        lw=0,
        label=f"outlier ({outside.sum():,})",
    )
    axes.set(
        xlabel="mean gray level of an image",
        ylabel="standard deviation",
        xlim=(0, 255),
        ylim=(0, max(deviation.max() * 1.08, 10)),
    )
    axes.set_title(f"{outside.sum():,} of {len(images):,} images are outliers", loc="left")
    if outside.any():
        axes.legend(loc="upper left")
    order = np.argsort(mean, kind="stable")
    count = min(examples, len(images))
    rows = {"darkest": order[:count], "brightest": order[::-1][:count]}
    for row, (name, chosen) in zip(
        right.subplots(2, count, squeeze=False), rows.items(), strict=True
    ):
        for panel, index in zip(row, chosen, strict=True):
            panel.imshow(images[index], cmap="gray", vmin=0, vmax=255)
            panel.set_axis_off()
            panel.set_title(f"{mean[index]:.0f}", fontsize=6.5, pad=2)
        row[0].text(
            -0.12,
            0.5,
            name,
            transform=row[0].transAxes,
            rotation=90,
            ha="right",
            va="center",
            fontsize=7,
        )
    return style.finish(figure, dataset_label, "Gray areas: limits of outliers.")


@style.context()
def texture_by_finding(table: pd.DataFrame, dataset_label: str) -> Figure:
    """Texture of each finding: the median of four statistics, and the middle half of the images.

    Parameters
    ----------
    table : DataFrame
        As `lib.data.texture.texture_by_finding` returns it.
    dataset_label : str

    Raises
    ------
    ValueError
        The table is empty.
    """
    if table.empty:
        raise ValueError(
            "the table has no rows: no image has a finding, nor is any said to have none"
        )
    names = _names(table["finding"].tolist())
    figure = style.new_figure(2, 0.75 + 0.17 * len(names))
    panels = figure.subplots(1, len(texture.MEASURES), sharey=True)
    quartiles = table.groupby("finding")[list(texture.MEASURES)].quantile([0.25, 0.5, 0.75])
    counts = table["finding"].value_counts()
    for axes, measure in zip(panels, texture.MEASURES, strict=True):
        if NO_FINDING in names:
            axes.axvline(quartiles.loc[(NO_FINDING, 0.5), measure], color=GRAY, lw=0.7, ls="--")
        for place, name in enumerate(names):
            low, middle, high = (
                quartiles.loc[(name, share), measure] for share in (0.25, 0.5, 0.75)
            )
            axes.plot([low, high], [place, place], color=LIGHT, lw=3, solid_capstyle="butt")
            axes.plot(middle, place, "o", color=PALETTE[0])
        axes.set(title=measure, ylim=(len(names) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(
        range(len(names)), [f"{_shown(name)} ({counts[name]:,})" for name in names]
    )
    dashed = " Dashed: median of No Finding." if NO_FINDING in names else ""
    return style.finish(
        figure, dataset_label, f"Dot: median; bar: middle half of the images.{dashed}"
    )


@style.context()
def sobel(images: np.ndarray, titles: Sequence[str], dataset_label: str) -> Figure:
    """Images above, their edges by Sobel's filter below, on one scale.

    Parameters
    ----------
    images : uint8 array, shape (n, H, W)
        A few, up to 8.
    titles : sequence of n str
    dataset_label : str
    """
    if images.ndim != 3 or not 1 <= len(images) <= 8 or len(images) != len(titles):
        raise ValueError(
            f"need 1 to 8 images (n, H, W) with a title each, got {images.shape} and {len(titles)} titles"
        )
    found = [texture.edges(image) for image in images]
    top = max(float(np.percentile(found, 99.5)), 1e-6)
    figure = style.new_figure(2, 2 * min(6.6 / len(images), 2.4) + 0.55)
    grid = figure.subplots(2, len(images), squeeze=False)
    for column, (image, edge, title) in enumerate(zip(images, found, titles, strict=True)):
        grid[0, column].imshow(image, cmap="gray", vmin=0, vmax=255)
        grid[0, column].set_title(_shown(title), fontsize=6.5, pad=2)
        grid[1, column].imshow(edge, cmap="gray", vmin=0, vmax=top)
    for axes in grid.ravel():
        axes.set_axis_off()
    return style.finish(
        figure,
        dataset_label,
        f"Below: Sobel's gradient magnitude; white is {top:.2f} of a step from black to white, or more.",
    )
