"""Figures of training and of what it found; `lib.plots.style` says what their arguments are.

`runs` map an arm to a table with ``epoch``, ``seed`` and the column that is drawn; `published`, a
table or None, has ``arm``, ``epoch`` and that column, and `published_n_clusters` is its K. It is a
ValueError if a column is missing or an epoch of a seed is there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from sklearn.metrics import silhouette_score

from lib.plots import style
from lib.plots.style import CHANCE, DARK, GRAY, LIGHT, MARKERS, PALETTE, SEEDS

PUBLISHED = {"color": DARK, "linestyle": ":", "linewidth": 0.8}
DASHED = {"linestyle": "--", "linewidth": 0.9}


def _curves(
    title: str, runs: Mapping[str, pd.DataFrame], column: str, published: pd.DataFrame | None
) -> tuple[Figure, dict[str, Axes]]:
    """The seeds of each arm and the published curve up to the arm's last epoch; and the panels that
    have a curve.
    """
    arms = style.arm_order(runs) or ["alexnet"]
    figure = style.new_figure(0.6 + 1.6 * -(-len(arms) // 2), title)
    drawn = {}
    for arm, axes in style.epoch_panels(figure, arms).items():
        table = style.by_seed(runs[arm], arm, column) if arm in runs else pd.DataFrame()
        if len(table) < 2:
            one = f"\none value only: {table.mean(axis=None):.2f}" if len(table) else ""
            style.absent(axes, f"too few epochs for a curve{one}" if arm in runs else "no run yet")
            continue
        style.seed_lines(axes, table, color=style.arm(arm).colour, marker=style.arm(arm).marker)
        if published is not None:
            rows = published[(published["arm"] == arm) & (published["epoch"] <= table.index[-1])]
            axes.plot(rows["epoch"], rows[column], **PUBLISHED)
        drawn[arm] = axes
    return figure, drawn


@style.context()
def nmi_curves(
    runs: Mapping[str, pd.DataFrame],
    published: pd.DataFrame | None,
    chance: Mapping[str, float],
    dataset_label: str,
    published_n_clusters: int = 200,
    published_chance: float | None = None,
) -> Figure:
    """NMI between the assignments of consecutive epochs, a panel per arm.

    Parameters
    ----------
    runs : mapping of arm to DataFrame
        With ``nmi_prev`` (NaN at epoch 1) and, if known, ``ami_prev``.
    chance : mapping of arm to float
        NMI of two random assignments of these sizes; unlike AMI, it is not 0.
    published_chance : float or None
        The same for the published curve.
    """
    figure, drawn = _curves("Does the clustering settle?", runs, "nmi_prev", published)
    for arm, axes in drawn.items():
        if "ami_prev" in runs[arm]:
            ami = style.by_seed(runs[arm], arm, "ami_prev").dropna().mean(axis=1)
            axes.plot(ami, color=style.arm(arm).colour, **DASHED)
        if arm in chance:
            axes.axhline(chance[arm], **CHANCE)
    figure.axes[0].set(ylim=(0, 1), ylabel="NMI of consecutive epochs")
    named = f"published, K = {published_n_clusters}"
    if published_chance is not None:
        named += f" (chance: {published_chance:.2f})"
    keys = {**SEEDS, "AMI, mean (chance: 0)": DASHED, "NMI by chance": CHANCE, named: PUBLISHED}
    style.legend_below(figure, keys if drawn else {})
    return style.finish(figure, dataset_label)


@style.context()
def loss_curves(
    runs: Mapping[str, pd.DataFrame],
    published: pd.DataFrame | None,
    n_clusters: int,
    dataset_label: str,
    published_n_clusters: int = 200,
) -> Figure:
    """Mean training loss per epoch in units of ln K, a panel per arm.

    The cross-entropy of a uniform guess over K clusters is ln K. So 1 is chance for every curve,
    and losses at different K, from 2, can be compared.
    """
    if min(n_clusters, published_n_clusters) < 2:
        raise ValueError(f"K must be at least 2: got {n_clusters} and {published_n_clusters}")
    unit, published_unit = np.log(n_clusters), np.log(published_n_clusters)
    runs = {arm: table.assign(loss=table["loss"] / unit) for arm, table in runs.items()}
    if published is not None:
        published = published.assign(loss=published["loss"] / published_unit)
    figure, drawn = _curves("Does training beat a uniform guess?", runs, "loss", published)
    for axes in drawn.values():
        axes.axhline(1, **CHANCE)
    figure.axes[0].set_ylabel("training loss / ln K")
    keys = {**SEEDS, "uniform guess": CHANCE, f"published, K = {published_n_clusters}": PUBLISHED}
    style.legend_below(figure, keys if drawn else {})
    note = f"ln K in nats: {unit:.2f} here (K = {n_clusters}), {published_unit:.2f} published"
    return style.finish(figure, dataset_label, note)


@style.context()
def known_classes(
    tables: Mapping[str, pd.DataFrame | Mapping[str, pd.DataFrame]],
    dataset_label: str,
    what: str = "class",
) -> Figure:
    """AMI of the clusters with known classes against the epoch: does the loop find what is there?

    Parameters
    ----------
    tables : mapping of arm to DataFrame, or mapping of panel title to such a mapping
        Columns ``seed``, ``epoch`` (epochs of training behind the clusters; 0 is the untrained
        network), ``ami`` (1 for the classes themselves, 0 for chance) and, if known, ``nmi``.
    what : str
        What a class is, e.g. ``"digit"``.
    """
    nested = any(not isinstance(table, pd.DataFrame) for table in tables.values())
    panels = tables if nested else {"": tables}
    title = "Does the loop find classes that are there?"
    figure = style.new_figure(0.6 + 1.55 * -(-len(panels) // 2), title)
    keys, marks = {}, {"AMI, mean of the seeds": {"marker": "o"}, "one seed": {"linewidth": 0.5}}
    for title, axes in style.epoch_panels(figure, list(panels)).items():
        if not panels[title]:
            style.absent(axes, "no run yet")
        for arm in style.arm_order(panels[title]):
            name, colour, marker = style.arm(arm)
            keys[name] = {"color": colour, "marker": marker}
            table = style.by_seed(panels[title][arm], arm, "ami")
            style.seed_lines(axes, table, **keys[name])
            if 0 in table.index:
                axes.axhline(table.loc[0].mean(), color=colour, linestyle=":", linewidth=0.8)
                hollow = {"markerfacecolor": "white", "markersize": 5, "zorder": 5}
                axes.plot(0, table.loc[0].mean(), **keys[name], **hollow)
                marks["untrained"] = {"marker": "o", "linestyle": ":", "markerfacecolor": "white"}
            if "nmi" in panels[title][arm]:
                nmi = style.by_seed(panels[title][arm], arm, "nmi").dropna().mean(axis=1)
                axes.plot(nmi, color=colour, **DASHED)
                marks["NMI, mean"] = DASHED
    low, high = figure.axes[0].get_ylim()
    figure.axes[0].set(ylim=(min(low, -0.02), min(max(high, 0.2), 1.02)))
    figure.axes[0].set(ylabel=f"AMI with the {what}")
    style.legend_below(figure, {**keys, **marks} if keys else {})
    return style.finish(figure, dataset_label, "1: the clusters are the classes; 0: chance")


@style.context()
def occupancy(table: pd.DataFrame, dataset_label: str, collapsed: float = 0.5) -> Figure:
    """Which runs put most images into one cluster: a dot per run.

    Parameters
    ----------
    table : DataFrame
        A row per run: ``arm``, ``seed``, ``largest_cluster`` (share of the images, 0 to 1),
        ``clusters_used``, ``perplexity`` (of the sizes: n_clusters if all are equal),
        ``n_clusters``.
    collapsed : float
        A run counts as collapsed if its largest cluster holds at least this share.
    """
    needed = {"arm", "seed", "largest_cluster", "clusters_used", "perplexity", "n_clusters"}
    if missing := needed - set(table.columns):
        raise ValueError(f"the table of occupancy has no column {', '.join(sorted(missing))}")
    table = table.dropna(subset=["largest_cluster"])
    arms = style.arm_order(dict.fromkeys(table["arm"]))
    title = "Do all images fall into one cluster?"
    figure = style.new_figure(0.7 + 0.38 * max(len(arms), 2), title)
    axes = figure.subplots()
    if not arms:
        style.absent(axes, "no run yet")
    look = {"palette": {arm: style.arm(arm).colour for arm in arms}, "size": 4.5, "alpha": 0.8}
    named = {"x": "largest_cluster", "y": "arm", "hue": "arm", "order": arms, "legend": False}
    sns.stripplot(table, **named, **look, jitter=False, ax=axes)
    fallen = table[table["largest_cluster"] >= collapsed]
    ring = {"s": 45, "facecolors": "none", "edgecolors": DARK, "linewidths": 0.8, "zorder": 4}
    axes.scatter(fallen["largest_cluster"], fallen["arm"].map(arms.index), **ring)
    axes.axvline(collapsed, **CHANCE)
    texts = []
    for arm, rows in ((arm, table[table["arm"] == arm]) for arm in arms):
        least, k = rows[["clusters_used", "perplexity"]].min(), rows["n_clusters"].max()
        words = f"{style.arm(arm).title}\n{(fallen['arm'] == arm).sum()} of {len(rows)} collapsed"
        used, perplexity = least
        texts.append(f"{words}\nleast: {used:.0f} of {k} used, perplexity {perplexity:.0f}")
    axes.set_yticks(range(len(arms)), texts)
    axes.set(xlim=(-0.04, 1.04), ylim=(max(len(arms), 1) - 0.5, -0.5), ylabel="")
    axes.set_xlabel("share in the largest cluster")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    note = f"a dot per seed; ringed: at least {collapsed:.0%} of the images in one cluster"
    return style.finish(figure, dataset_label, f"{note}; perplexity: K if all clusters are equal")


def _spread(points: np.ndarray) -> np.ndarray:
    """A map (M, 2), turned so that its long side is a diagonal: it then fills a square better."""
    centred = points - points.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    return centred @ axes.T @ (np.array([[1, 1], [-1, 1]]) / np.sqrt(2))


def _silhouette(points: np.ndarray, labels: np.ndarray) -> str:
    """Mean silhouette (Rousseeuw 1987) in a map, as text."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return "silhouette not defined"
    some = min(len(labels), 5000)
    return f"silhouette {silhouette_score(points, labels, sample_size=some, random_state=0):.2f}"


def _groups(findings: Sequence[str], n_findings: int) -> tuple[np.ndarray, dict[str, tuple]]:
    """Entry of the legend of each image, and colour and marker of each entry."""
    names = ["several labels" if "|" in text else style.shown(text) for text in findings]
    none = {"No Finding": (LIGHT, "o"), "not stated": (LIGHT, "o")}
    looks = none | {"several labels": (GRAY, "X"), "another label": (PALETTE[-1], "P")}
    single = Counter(name for name in names if name not in looks)
    frequent = sorted(single, key=lambda name: (-single[name], name))[:n_findings]
    looks |= dict(zip(frequent, zip(PALETTE, MARKERS, strict=True), strict=False))
    groups = np.array([name if name in looks else "another label" for name in names], dtype=object)
    return groups, {name: look for name, look in looks.items() if name in groups}


@style.context()
def tsne_maps(
    points: Mapping[str, np.ndarray],
    clusters: Mapping[str, np.ndarray],
    findings: Sequence[str],
    dataset_label: str,
    n_findings: int = 6,
) -> Figure:
    """t-SNE maps, a column per arm: coloured by cluster above, by label below.

    The number of a cluster is at the member next to its median. Below a panel is the silhouette of
    its colours in the map: near 1 if they are apart, about 0 or less if they are mixed.

    Parameters
    ----------
    points : mapping of arm to array, shape (M, 2)
        The unit and the direction of the axes mean nothing; maps are turned to fill their panel.
    clusters : mapping of arm to int array, shape (M,)
    n_findings : int
        How many of the most frequent single labels get a colour of their own, 0 to 6.
    """
    if not 0 <= n_findings < len(PALETTE):
        raise ValueError(f"n_findings must be 0 to {len(PALETTE) - 1}, got {n_findings}")
    groups, looks = _groups(findings, n_findings)
    arms, n = style.arm_order(points), len(findings)
    figure = style.new_figure(3.9, "Are the clusters apart, and do they follow labels?")
    grid = figure.subplots(2, max(len(arms), 1), squeeze=False)
    dots = {"s": float(np.clip(4000 / max(n, 1), 0.8, 6)), "rasterized": n > 5000, "linewidth": 0}
    number = {"fontsize": 6, "ha": "center", "va": "center"}
    number["path_effects"] = [withStroke(linewidth=1.5, foreground="white")]
    for axes in grid.flat:
        style.frame(axes, LIGHT, 0.6)
        axes.set_box_aspect(1)
        axes.set_aspect("equal", adjustable="datalim")
    for arm, (above, below) in zip(arms, grid.T, strict=False):
        if np.shape(points[arm]) != (n, 2) or np.shape(clusters[arm]) != (n,):
            shapes = np.shape(points[arm]), np.shape(clusters[arm]), n
            raise ValueError(f"{arm}: points, clusters and findings do not match: {shapes}")
        xy, (names, ids) = _spread(points[arm]), np.unique(clusters[arm], return_inverse=True)
        above.set_title(style.arm(arm).title.replace(", ", "\n", 1))
        above.scatter(*xy.T, **dots, c=np.array(PALETTE[:-1])[ids % 6], alpha=0.7)
        for place in np.argsort(-np.bincount(ids), kind="stable")[:30]:
            own = xy[ids == place]
            middle = own[((own - np.median(own, axis=0)) ** 2).sum(axis=1).argmin()]
            above.text(*middle, str(names[place]), **number)
        above.set_xlabel(f"{len(names)} clusters: {_silhouette(xy, ids)}", fontsize=6)
        for name, (colour, marker) in looks.items():
            below.scatter(*xy[groups == name].T, **dots, color=colour, marker=marker)
        below.set_xlabel(f"labels: {_silhouette(xy, groups.astype(str))}", fontsize=6)
    if not arms:
        style.absent(grid[0, 0], "no run yet")
    grid[0, 0].set_ylabel("by cluster")
    grid[1, 0].set_ylabel("by label")
    keys = {
        f"{name} ({(groups == name).sum():,})": {"color": look[0], "marker": look[1], "ls": ""}
        for name, look in looks.items()
    }
    style.legend_below(figure, keys, handletextpad=0.1)
    note = f"{n:,} images per map; numbers: clusters, the 30 largest at most"
    return style.finish(figure, dataset_label, note)


@style.context()
def samples(
    images: np.ndarray,
    findings: Sequence[str],
    dataset_label: str,
    examples_per_finding: int = 4,
    seed: int = 0,
) -> Figure:
    """Examples of the 24 most frequent labels, No Finding first as the reference.

    Images with that label alone come first; one that has others too is marked with a plus sign.
    The choice depends on `seed` and on nothing else.
    """
    if examples_per_finding < 1:
        raise ValueError(f"examples_per_finding must be at least 1, got {examples_per_finding}")
    members = style.members(images, findings)
    several, gap, n_rows = ["|" in text for text in findings], 3, -(-len(members) // 3)
    height, width = images.shape[1:]
    inches = 7 / 3 / examples_per_finding * height / width + 0.22
    figure = style.new_figure(n_rows * inches + 0.3, "What is in the data?", 2)
    grid = figure.subplots(n_rows, 3, squeeze=False).ravel()
    order = np.random.default_rng(seed).permutation(len(images))
    plus = {"color": "white", "fontsize": 7, "fontweight": "bold", "ha": "right", "va": "top"}
    plus["bbox"] = {"boxstyle": "square,pad=0.1", "facecolor": "black", "edgecolor": "none"}
    for axes in grid[len(members) :]:
        axes.set_axis_off()
    for axes, (name, has) in zip(grid, members.items(), strict=False):
        # a stable sort: images with this label alone come first
        chosen = sorted(order[has[order]], key=several.__getitem__)[:examples_per_finding]
        axes.set_axis_off()
        for position, i in enumerate(chosen):
            left = position * (width + gap)
            extent = (left, left + width, height, 0)
            style.picture(axes, images[i], interpolation="bicubic", extent=extent)
            if several[i]:
                axes.text(left + width - 3, 3, "+", **plus)
        axes.set_title(f"{style.shown(name)} ({has.sum():,})", loc="left", fontsize=7, pad=2)
        axes.set(xlim=(0, examples_per_finding * (width + gap) - gap), ylim=(height, 0))
    note = "in brackets: images with that label; +: has other labels too"
    return style.finish(figure, dataset_label, note)


@style.context()
def clusters(
    images: np.ndarray,
    embedding: np.ndarray,
    assignments: np.ndarray,
    dataset_label: str,
    n_rows: int = 6,
    per_row: int = 10,
) -> Figure:
    """The largest clusters, a row each: the mean image, then the images nearest to the centroid.

    Parameters
    ----------
    embedding : array, shape (N, d)
        What was clustered.
    assignments : int array, shape (N,)
    n_rows, per_row : int
        Clusters and images of each, at most; at least 1.
    """
    lengths = len(images), len(embedding), len(assignments)
    if len(set(lengths)) > 1:
        raise ValueError(f"images, embedding and assignments differ in length: {lengths}")
    numbers, sizes = np.unique(assignments, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:n_rows]
    figure = style.new_figure(0.4 + 0.62 * len(order), "What do the largest clusters hold?", 2)
    grid = figure.subplots(len(order), per_row + 1, squeeze=False)
    for row, place in zip(grid, order, strict=True):
        members = np.flatnonzero(assignments == numbers[place])
        distance = np.linalg.norm(embedding[members] - embedding[members].mean(axis=0), axis=1)
        nearest = members[np.argsort(distance, kind="stable")[:per_row]]
        mean = np.asarray(images[members]).mean(axis=0)
        for axes, image in zip(row, [mean, *images[nearest]], strict=False):
            style.picture(axes, image)
        for axes in row[len(nearest) + 1 :]:
            axes.set_axis_off()
        left = {"transform": row[0].transAxes, "ha": "right", "va": "center", "fontsize": 6}
        row[0].text(-0.1, 0.5, f"{sizes[place]:,}", **left)
    grid[0, 0].set_title("mean", fontsize=6)
    grid[0, min(1, per_row)].set_title("nearest:", loc="left", fontsize=6)
    note = f"{len(order)} largest of {len(numbers)} clusters; at the left: images in each"
    return style.finish(figure, dataset_label, f"{note}; nearest: to the centroid")


@style.context()
def probe_bars(table: pd.DataFrame, dataset_label: str) -> Figure:
    """Scores of linear probes as dots with 95 % intervals, a panel per target.

    Parameters
    ----------
    table : DataFrame
        A row per probe: ``target`` (what is predicted; ``"findings"`` is scored by mean AUROC, all
        else by accuracy), ``arm``, ``accuracy`` (the score), ``ci_low``, ``ci_high`` (95 %
        interval), ``baseline`` (score of a guess) and, if known, ``published``,
        ``published_baseline`` and ``n_seeds``. Scores are 0 to 1, NaN if not defined.

    """
    missing = {"target", "arm", "accuracy", "ci_low", "ci_high", "baseline"} - set(table.columns)
    if missing or table.empty:
        raise ValueError(f"the table of probes has {len(table)} rows and lacks {sorted(missing)}")
    rows = table.groupby("target", sort=False).size()
    figure = style.new_figure(0.4 + 0.15 * len(table) + 0.5 * len(rows), "What can a probe read?")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows + 0.6)[:, 0]
    guess = {"marker": "|", "color": DARK, "markersize": 8, "markeredgewidth": 1.4}
    diamond = {"marker": "D", "color": DARK, "markerfacecolor": "none", "markersize": 5.5}
    looks = {
        "baseline": ("guess: majority (accuracy), 0.5 (AUROC)", guess),
        "published_baseline": ("published majority", {"marker": "|", "color": GRAY}),
        "published": ("published score", diamond),
    }
    looks = {column: look for column, look in looks.items() if column in table}
    for axes, (target, group) in zip(panels, table.groupby("target", sort=False), strict=True):
        for y, row in enumerate(group.itertuples()):
            _, colour, marker = style.arm(row.arm)
            if np.isnan(row.accuracy):
                axes.text(0.02, y, "not defined", va="center", fontsize=6, color=GRAY)
            axes.plot([row.ci_low, row.ci_high], [y, y], color=colour)
            axes.plot(row.accuracy, y, color=colour, marker=marker, markersize=4)
        for column, (_, look) in looks.items():
            axes.plot(group[column], range(len(group)), **{"linestyle": "", "zorder": 2.5, **look})
        kind = "mean AUROC" if target == "findings" else "accuracy"
        axes.set_title(f"{style.shown(target)}: {kind}", loc="left", fontweight="bold")
        axes.set(xlim=(0, 1), ylim=(len(group) - 0.5, -0.5))
        axes.set_yticks(range(len(group)), [style.arm(arm).title for arm in group["arm"]])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    keys = {"this run, 95 % interval": {"marker": "o"}}
    keys |= {name: {**look, "linestyle": ""} for name, look in looks.values()}
    style.legend_below(figure, keys)
    counts = table["n_seeds"].dropna().astype(int) if "n_seeds" in table else pd.Series(dtype=int)
    note = " to ".join(str(n) for n in sorted({counts.min(), counts.max()})) if len(counts) else ""
    return style.finish(figure, dataset_label, f"seeds per arm: {note}" if note else "")
