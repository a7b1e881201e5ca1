"""Figures of a data set before any training; `lib.plots.style` says what their arguments are."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from skimage.filters import sobel as sobel_filter

from lib.plots import style
from lib.plots.style import GRAY, LIGHT, NO_FINDING, PALETTE

LEAST = 10  # images behind a mean or a share that is worth a colour


@style.context()
def cooccurrence(findings: Sequence[str], dataset_label: str) -> Figure:
    """Which of the 24 most frequent labels come together: of the images with the label of the row,
    how many have that of the column.

    Numbers are images, colour is their share; a row of fewer than `LEAST` images is left blank."""
    has = {k: v for k, v in style.members(findings).items() if k not in (NO_FINDING, "")}
    names, matrix = list(has), np.array([*has.values()], np.int64)  # (F, N)
    counts = matrix @ matrix.T  # (F, F)
    totals = np.diag(counts)
    left_out = np.eye(len(names), dtype=bool) | (totals < LEAST)[:, None]
    figure = style.new_figure(1.4 + 0.22 * len(names), "Which labels come together?", 2)
    axes = figure.subplots()
    rows = [f"{style.shown(name)} ({total:,})" for name, total in zip(names, totals, strict=True)]
    look = {"xticklabels": False, "yticklabels": rows, "cmap": "cividis"}
    look |= {"annot": counts, "fmt": ",", "annot_kws": {"fontsize": 6}, "vmin": 0}
    look["cbar_kws"] = {"label": "share of the row's images", "pad": 0.02}
    sns.heatmap(counts / totals[:, None], mask=left_out, ax=axes, **look)
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(len(names)) + 0.5, map(style.shown, names), **slant)
    axes.set(xlabel="also has", ylabel="images with")
    axes.tick_params(length=0)
    axes.tick_params(axis="y", rotation=0)
    note = f"numbers: images; blank: the label itself, and rows of fewer than {LEAST} images"
    return style.finish(figure, dataset_label, note)


@style.context()
def population(metadata: pd.DataFrame, dataset_label: str) -> Figure:
    """Images per patient, ages, and views by sex. `metadata` has ``patient_id, age, sex,
    view_position``; "" and NaN are not known."""
    figure = style.new_figure(2.1, "Who was imaged?", 2)
    patients, ages, views = figure.subplots(1, 3)
    bars = {"color": PALETTE[0], "edgecolor": "white", "linewidth": 0.3, "alpha": 1}
    number = metadata.loc[metadata["patient_id"] != "", "patient_id"].value_counts().to_numpy()
    known = metadata["age"].dropna().to_numpy()
    patients.set(xlabel="images of a patient (20: or more)", ylabel="patients")
    ages.set(xlabel="age (years)", ylabel="images")
    if len(number):
        sns.histplot(np.minimum(number, 20), discrete=True, ax=patients, **bars)
        patients.set_title(f"{len(number):,} patients, up to {number.max():,} images", loc="left")
    else:
        style.absent(patients, "no patients known")
    if len(known):
        sns.histplot(known, binwidth=5, binrange=(0, max(100, known.max())), ax=ages, **bars)
        unknown = len(metadata) - len(known)
        ages.set_title(f"median {np.median(known):.0f} years, {unknown:,} unknown", loc="left")
    else:
        style.absent(ages, "no ages known")
    stated = metadata[["view_position", "sex"]].replace("", "not stated")
    look = {"multiple": "stack", "shrink": 0.6, "edgecolor": "white", "alpha": 1, "ax": views}
    tints = cycle((PALETTE[0], PALETTE[5], LIGHT))  # told apart in gray, too
    sexes = dict(zip(sorted(stated["sex"].unique()), tints, strict=False))
    sns.histplot(stated, x="view_position", hue="sex", palette=sexes, **look)
    sns.move_legend(views, "lower left", bbox_to_anchor=(0, 0.98), ncols=4, title="")
    views.set(xlabel="view", ylabel="images")
    for axes in (patients, ages, views):
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return style.finish(figure, dataset_label)


@style.context()
def mean_images(images: np.ndarray, findings: Sequence[str], dataset_label: str) -> Figure:
    """Mean image of each of the 24 most frequent labels, and how it differs from the mean image
    without a finding (of all images, if none has No Finding): orange is brighter, blue darker.

    A difference is drawn for labels of at least `LEAST` images."""
    members = style.members(findings)
    means = {name: images[has].mean(axis=0) for name, has in members.items() if has.any()}
    reference = means[NO_FINDING] if NO_FINDING in means else images.mean(axis=0)
    frequent = [n for n in means if n not in (NO_FINDING, "") and members[n].sum() >= LEAST]
    differences = {name: means[name] - reference for name in frequent}
    top = max([1.0, *(float(np.percentile(np.abs(d), 99.5)) for d in differences.values())])
    n_rows = -(-len(means) // 5)
    figure = style.new_figure(n_rows * 0.9 + 0.85, "How do labels differ on average?", 2)
    grid = style.blank_panels(figure, n_rows, 10, gridspec_kw={"wspace": 0.03})
    for (name, mean), (left, right) in zip(means.items(), grid.reshape(-1, 2), strict=False):
        style.picture(left, mean, f"{style.shown(name)} ({members[name].sum():,})")
        if name in differences:
            drawn = style.picture(right, differences[name], cmap="PuOr_r", vmin=-top, vmax=top)
    if differences:
        bar = {"orientation": "horizontal", "fraction": 0.03, "pad": 0.02, "aspect": 50}
        other = NO_FINDING if NO_FINDING in means else "all images"
        figure.colorbar(drawn, ax=grid, label=f"mean minus mean of {other} (gray levels)", **bar)
    note = f"in brackets: images; no difference is drawn for fewer than {LEAST}"
    return style.finish(figure, dataset_label, note)


@style.context()
def brightness(images: np.ndarray, limits: Sequence[float], dataset_label: str) -> Figure:
    """Mean and spread of the gray levels of each image, and the four darkest and brightest.

    An image is flagged if its mean is below the first of `limits` or above the second, or its
    standard deviation is below the third."""
    dark, bright, constant = limits
    mean, deviation = np.array([(image.mean(), image.std()) for image in images]).T
    outside = (mean < dark) | (mean > bright) | (deviation < constant)
    figure = style.new_figure(2.5, "Are images too dark, too bright or constant?", 2)
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = left.subplots()
    for low, high in ((0, dark), (bright, 255)):
        axes.axvspan(low, high, color=LIGHT, lw=0)
    axes.axhspan(0, constant, color=LIGHT, lw=0)
    dots = {"s": float(np.clip(3000 / len(images), 0.5, 8)), "alpha": 0.5, "rasterized": True}
    axes.scatter(mean[~outside], deviation[~outside], color=PALETTE[0], lw=0, **dots)
    axes.scatter(mean[outside], deviation[outside], s=22, color=PALETTE[1], marker="X", lw=0)
    axes.set(xlabel="mean gray level of an image", ylabel="standard deviation")
    axes.set(xlim=(0, 255), ylim=(0, max(deviation.max() * 1.08, 10)))
    axes.set_title(f"{outside.sum():,} of {len(images):,} images are flagged (X)", loc="left")
    order = np.argsort(mean, kind="stable")
    grid = right.subplots(2, min(4, len(images)), squeeze=False)
    for row, name, chosen in zip(grid, ("darkest", "brightest"), (order, order[::-1]), strict=True):
        for panel, index in zip(row, chosen, strict=False):
            style.picture(panel, images[index], f"{mean[index]:.0f}")
        row[0].set_title(f"{name}: {mean[chosen[0]]:.0f}", loc="left", fontsize=6, pad=2)
    return style.finish(figure, dataset_label, "gray areas: flagged images")


@style.context()
def texture_by_finding(table: pd.DataFrame, dataset_label: str) -> Figure:
    """Statistics of the images of each label: the median and the middle half.

    `table` has a row per image and label: ``finding``, and a panel for each numeric column (but
    ``image``)."""
    measures = [name for name in table.select_dtypes("number") if name != "image"]
    names, counts = style.label_names(table["finding"]), table["finding"].value_counts()
    figure = style.new_figure(0.85 + 0.17 * len(names), "Does texture differ by label?", 2)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    look = {"estimator": "median", "errorbar": ("pi", 50), "err_kws": {"linewidth": 1}}
    look |= {"order": names, "linestyle": "none", "markersize": 3, "color": PALETTE[0]}
    for axes, measure in zip(panels, measures, strict=True):
        if NO_FINDING in names:
            middle = table.loc[table["finding"] == NO_FINDING, measure].median()
            axes.axvline(middle, color=GRAY, lw=0.7, ls="--")
        sns.pointplot(table, x=measure, y="finding", ax=axes, **look)
        style.rows_of(axes, [f"{style.shown(name)} ({counts[name]:,})" for name in names])
        axes.set(title=measure, xlabel="")
        axes.xaxis.set_major_locator(MaxNLocator(3))
    note = "dot: median; bar: middle half of the images; dashed: median of No Finding"
    return style.finish(figure, dataset_label, note)


@style.context()
def sobel(images: np.ndarray, titles: Sequence[str], dataset_label: str) -> Figure:
    """1 to 8 images above, their edges by Sobel's filter below, on one scale."""
    edges = [sobel_filter(image / 255) for image in images]
    top = max(float(np.percentile(edges, 99.5)), 1e-6)
    height = 2 * min(6.6 / len(images), 2.4) + 0.55
    figure = style.new_figure(height, "What does Sobel's filter leave?", 2)
    grid = figure.subplots(2, len(images), squeeze=False)
    for (above, below), image, edge, title in zip(grid.T, images, edges, titles, strict=True):
        style.picture(above, image, style.shown(title))
        style.picture(below, edge, vmax=top)
    note = f"below: size of the gradient; white: {top:.2f} of a step from black to white, or more"
    return style.finish(figure, dataset_label, note)
