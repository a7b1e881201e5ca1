"""Figures of training and of what it found; `lib.plots.style` says what their arguments are.

`runs` map an arm to a table with ``epoch``, ``seed`` and the column that is drawn; `published` has
``arm``, ``epoch`` and that column."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.ndimage import gaussian_filter
from scipy.spatial import ConvexHull
from sklearn.metrics import silhouette_score

from lib.plots import style
from lib.plots.style import CHANCE, DARK, GRAY, LIGHT, MARKERS, PALETTE, SEEDS

Table, Tables, Arrays = pd.DataFrame, Mapping[str, pd.DataFrame], Mapping[str, np.ndarray]
PUBLISHED_K = 200
PUBLISHED = {"color": DARK, "linestyle": ":", "linewidth": 0.8}
DASHED = {"linestyle": "--", "linewidth": 0.9}


def _curves(said: str, question: str, runs: Tables, column: str, published: pd.DataFrame) -> tuple:
    """The seeds of each arm and the published curve up to the arm's last epoch; and the panels that
    have a curve. The title is `said` with where one or two arms end, else `question`."""
    arms = style.arm_order(runs) or ["alexnet"]
    tables = {arm: style.by_seed(runs[arm], column) for arm in runs}
    ends = {arm: table.dropna().mean(axis=1) for arm, table in tables.items() if len(table) > 1}
    short = {arm: style.arm(arm).title.split(",")[0] for arm in arms}
    last = [f"{short[arm]} {ends[arm].iloc[-1]:.2f}" for arm in arms if len(ends.get(arm, ()))]
    title = said.format(", ".join(last)) if 0 < len(last) < 3 else question
    figure = style.new_figure(0.6 + 1.6 * -(-len(arms) // 2), title)
    drawn = {}
    for arm, axes in style.epoch_panels(figure, arms).items():
        if arm not in ends:
            one = tables[arm].mean(axis=None) if len(tables.get(arm, ())) else None
            few = "too few epochs for a curve" + (f"\none value only: {one:.2f}" if one else "")
            style.absent(axes, few if arm in runs else "no run yet")
            continue
        style.seed_lines(axes, tables[arm], **style.arm(arm).line)
        known = published[(published["arm"] == arm) & (published["epoch"] <= tables[arm].index[-1])]
        axes.plot(known["epoch"], known[column], **PUBLISHED)
        drawn[arm] = axes
    return figure, drawn


@style.context()
def nmi_curves(runs: Tables, published: Table, published_chance, dataset_label: str) -> Figure:
    """Agreement of the assignments of consecutive epochs, corrected for chance, a panel per arm.

    `runs` have ``ami_prev`` (NaN at epoch 1): AMI, 0 for chance and 1 for the same clusters at any
    K. `published` has ``nmi_prev``. Its AMI is not known, so it is corrected likewise, with the NMI
    of two random assignments, `published_chance`."""
    corrected = (published["nmi_prev"] - published_chance) / (1 - published_chance)
    titles = "Agreement ends at: {}", "Do consecutive epochs agree?"
    figure, drawn = _curves(*titles, runs, "ami_prev", published.assign(ami_prev=corrected))
    low, high = figure.axes[0].get_ylim()
    figure.axes[0].set(ylim=(min(low, 0), min(high, 1)), ylabel="AMI of consecutive epochs")
    keys = {**SEEDS, f"published, K = {PUBLISHED_K}": PUBLISHED}
    style.legend_below(figure, keys if drawn else {})
    note = f"published: (NMI - {published_chance:.2f}) / {1 - published_chance:.2f}"
    return style.finish(figure, dataset_label, f"AMI: 1 same clusters, 0 chance; {note}")


@style.context()
def loss_curves(runs: Tables, published: Table, n_clusters: int, dataset_label: str) -> Figure:
    """Mean training loss per epoch in units of ln K, a panel per arm.

    The cross-entropy of a uniform guess over K clusters is ln K. So 1 is chance for every curve,
    and losses at different K can be compared."""
    unit, published_unit = np.log(n_clusters), np.log(PUBLISHED_K)
    runs = {arm: table.assign(loss=table["loss"] / unit) for arm, table in runs.items()}
    published = published.assign(loss=published["loss"] / published_unit)
    titles = "Loss / ln K ends at: {}", "Does training beat a uniform guess?"
    figure, drawn = _curves(*titles, runs, "loss", published)
    for axes in drawn.values():
        axes.axhline(1, **CHANCE)
    figure.axes[0].set_ylabel("training loss / ln K")
    keys = {**SEEDS, "uniform guess": CHANCE, f"published, K = {PUBLISHED_K}": PUBLISHED}
    style.legend_below(figure, keys if drawn else {})
    note = f"ln K in nats: {unit:.2f} here (K = {n_clusters}), {published_unit:.2f} published"
    return style.finish(figure, dataset_label, note)


@style.context()
def known_classes(panels: Mapping[str, Tables], dataset_label: str, what: str) -> Figure:
    """AMI of the clusters with known classes against the epoch: does the loop find what is there?

    `panels` map a title to a table per arm: ``seed``, ``epoch`` (epochs of training behind the
    clusters; 0 is the untrained network), ``ami`` (1 for the classes themselves, 0 for chance) and,
    if known, ``nmi``. `what` says what the classes are, e.g. ``"digit classes"``."""
    title, panels = "Does the loop find classes that are there?", panels or {"": {}}
    figure = style.new_figure(0.6 + 1.55 * -(-len(panels) // 2), title)
    keys, marks = {}, {f"AMI, {name}" if "mean" in name else name: SEEDS[name] for name in SEEDS}
    for title, axes in style.epoch_panels(figure, list(panels)).items():
        if not panels[title]:
            style.absent(axes, "no run yet")
        for arm in style.arm_order(panels[title]):
            look, runs = style.arm(arm), panels[title][arm]
            keys[look.title] = look.line
            table = style.by_seed(runs, "ami")
            style.seed_lines(axes, table, **look.line)
            if 0 in table.index:
                start = table.loc[0].mean()
                axes.axhline(start, color=look.colour, linestyle=":", linewidth=0.8)
                hollow = {"markerfacecolor": "white", "markersize": 5, "zorder": 5}
                axes.plot(0, start, **look.line, **hollow)
                marks["untrained"] = {"marker": "o", "linestyle": ":", "markerfacecolor": "white"}
            if "nmi" in runs:
                style.mean_line(axes, style.by_seed(runs, "nmi"), color=look.colour, **DASHED)
                marks["NMI, mean"] = DASHED
    low, high = figure.axes[0].get_ylim()
    figure.axes[0].set(ylim=(min(low, -0.02), min(max(high, 0.2), 1.02)))
    figure.axes[0].set(ylabel=f"AMI with the {what}")
    style.legend_below(figure, {**keys, **marks} if keys else {})
    return style.finish(figure, dataset_label, "1: the clusters are the classes; 0: chance")


@style.context()
def occupancy(table: pd.DataFrame, dataset_label: str, collapsed: float) -> Figure:
    """Which runs put most images into one cluster: a dot per run.

    A row of `table` is a run: ``arm``, ``largest_cluster`` (share of the images, 0 to 1),
    ``clusters_used``, ``perplexity`` (of the sizes: n_clusters if all are equal), ``n_clusters``.
    A run is `collapsed` if its largest cluster holds at least this share."""
    table = table.dropna(subset=["largest_cluster"])
    arms = style.arm_order(dict.fromkeys(table["arm"]))
    height = 0.7 + 0.38 * max(len(arms), 2)
    figure = style.new_figure(height, "Do all images fall into one cluster?")
    axes = figure.subplots()
    look = {"palette": {arm: style.arm(arm).colour for arm in arms}, "size": 4.5, "alpha": 0.8}
    named = {"x": "largest_cluster", "y": "arm", "hue": "arm", "order": arms, "legend": False}
    sns.stripplot(table, **named, **look, jitter=False, ax=axes)
    fallen = table[table["largest_cluster"] >= collapsed]
    ring = {"s": 45, "facecolors": "none", "edgecolors": DARK, "linewidths": 0.8, "zorder": 4}
    axes.scatter(fallen["largest_cluster"], fallen["arm"].map(arms.index), **ring)
    axes.axvline(collapsed, **CHANCE)
    texts = []
    for arm in arms:
        rows = table[table["arm"] == arm]
        words = f"{style.arm(arm).title}\n{(fallen['arm'] == arm).sum()} of {len(rows)} collapsed"
        used, perplexity = rows[["clusters_used", "perplexity"]].min()
        used = f"{used:.0f} of {rows['n_clusters'].max()} used"
        texts.append(f"{words}\nleast: {used}, perplexity {perplexity:.0f}")
    style.rows_of(axes, texts)
    axes.set(xlim=(-0.04, 1.04), xlabel="share in the largest cluster")
    axes.grid(axis="x")
    note = f"a dot per seed; ringed: at least {collapsed:.0%} of the images in one cluster"
    return style.finish(figure, dataset_label, f"{note}; perplexity: K if all clusters are equal")


def _apart(points: np.ndarray, labels: np.ndarray) -> str:
    """How far apart labels are in a map: mean silhouette (Rousseeuw 1987), as text."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return "silhouette not defined"
    some = min(len(labels), 5000)
    value = silhouette_score(points, labels, sample_size=some, random_state=0)
    word = "mixed" if value < 0.05 else "overlapping" if value < 0.25 else "apart"
    return f"{word}, silhouette {value:.2f}"


def _outlines(axes: Axes, xy: np.ndarray, clusters: np.ndarray, **dots) -> None:
    """The dots of a map by cluster: its number, at the member next to the median, and a line around
    the half that is nearest to it. Clusters that are close differ in colour. Of more than 30, the
    largest are numbered whose numbers do not crowd."""
    names, ids = np.unique(clusters, return_inverse=True)
    number = {"fontsize": 6, "ha": "center", "va": "center"}
    number["path_effects"] = [withStroke(linewidth=1.5, foreground="white")]
    used: dict[str, list[np.ndarray]] = {colour: [] for colour in PALETTE[:-1]}
    room, numbered = 0.12 * np.ptp(xy, axis=0).max() * (len(names) > 30), []
    for place in np.argsort(-np.bincount(ids), kind="stable"):
        own = xy[ids == place]
        distance = np.linalg.norm(own - np.median(own, axis=0), axis=1)
        middle, inner = own[distance.argmin()], own[np.argsort(distance)[: len(own) // 2]]
        gap = {c: min((np.linalg.norm(m - middle) for m in used[c]), default=np.inf) for c in used}
        colour = max(gap, key=gap.__getitem__)
        used[colour].append(middle)
        axes.scatter(*own.T, **dots, color=colour, alpha=0.7)
        if any(np.linalg.norm(other - middle) < room for other in numbered):
            continue
        numbered.append(middle)
        axes.text(*middle, str(names[place]), **number)
        if len(inner) > 3:
            hull = inner[ConvexHull(inner, qhull_options="QJ").vertices]
            axes.fill(*hull.T, facecolor="none", edgecolor=colour, linewidth=0.8)


def _groups(findings: Sequence[str]) -> tuple[np.ndarray, dict[str, tuple]]:
    """Entry of the legend of each image, and colour and marker of each entry; the six most frequent
    single labels have their own."""
    names = ["several labels" if "|" in text else style.shown(text) for text in findings]
    none = {"No Finding": (LIGHT, "o"), "not stated": (LIGHT, "o")}
    looks = none | {"several labels": (GRAY, "X"), "another label": (PALETTE[-1], "P")}
    single = Counter(name for name in names if name not in looks)
    frequent = sorted(single, key=lambda name: (-single[name], name))[:6]
    looks |= dict(zip(frequent, zip(PALETTE, MARKERS, strict=True), strict=False))
    groups = np.array([name if name in looks else "another label" for name in names], dtype=object)
    return groups, {name: look for name, look in looks.items() if name in groups}


@style.context()
def tsne_maps(points: Arrays, clusters: Arrays, findings: Sequence, dataset_label: str) -> Figure:
    """t-SNE maps, a column per arm: by cluster above (see `_outlines`), by label below.

    Above a panel is the silhouette of its groups in the map: near 1 if they are apart, about 0 or
    less if they are mixed. `points` map an arm to an array (M, 2), `clusters` to M numbers. The
    unit and the direction of the axes mean nothing; maps are turned to fill their panel."""
    groups, looks = _groups(findings)
    arms, n = style.arm_order(points), len(findings)
    figure = style.new_figure(4.1, "Are the clusters apart, and do they follow labels?")
    grid = figure.subplots(2, max(len(arms), 1), squeeze=False)
    dots = {"s": float(np.clip(4000 / max(n, 1), 0.8, 6)), "rasterized": n > 5000, "linewidth": 0}
    for axes in grid.flat:
        style.frame(axes, LIGHT, 0.6)
        axes.set_box_aspect(1)
        axes.set_aspect("equal", adjustable="datalim")
    for arm, (above, below) in zip(arms, grid.T, strict=False):
        centred, number = points[arm] - points[arm].mean(axis=0), len(np.unique(clusters[arm]))
        axes = np.linalg.svd(centred, full_matrices=False)[2]  # the long side becomes a diagonal
        xy = centred @ axes.T @ (np.array([[1, 1], [-1, 1]]) / np.sqrt(2))
        _outlines(above, xy, clusters[arm], **dots)
        above.set_title(f"{style.arm(arm).heading}\n{_apart(xy, clusters[arm])}")
        above.set_xlabel(f"{number} clusters", fontsize=6)
        for name, (colour, marker) in looks.items():
            below.scatter(*xy[groups == name].T, **dots, color=colour, marker=marker)
        below.set_title(f"labels: {_apart(xy, groups.astype(str))}")
    if not arms:
        style.absent(grid[0, 0], "no run yet")
    grid[0, 0].set_ylabel("by cluster")
    grid[1, 0].set_ylabel("by label")
    keys = {
        f"{name} ({(groups == name).sum():,})": {"color": colour, "marker": marker, "ls": ""}
        for name, (colour, marker) in looks.items()
    }
    style.legend_below(figure, keys, handletextpad=0.1)
    note = (
        f"{n:,} images per map; numbers: clusters, whose colours repeat; lines: their middle half"
    )
    return style.finish(figure, dataset_label, note)


@style.context()
def samples(images, findings, dataset_label: str, examples: int = 4, effect=None) -> Figure:
    """Examples of the 24 most frequent labels, No Finding first as the reference.

    Images with that label alone come first; one that has others too is marked with a plus sign.
    `effect` gives what a label changes in an image, (H, W) in gray levels: it is outlined."""
    members = style.members(findings)
    several, gap, n_rows = ["|" in text for text in findings], 3, -(-len(members) // 3)
    height, width = images.shape[1:]
    inches = 7 / 3 / examples * height / width + 0.22
    figure = style.new_figure(n_rows * inches + 0.3, "What is in the data?", 2)
    grid = style.blank_panels(figure, n_rows, 3).ravel()
    order = np.random.default_rng(0).permutation(len(images))
    plus = {"color": "white", "fontsize": 7, "fontweight": "bold", "ha": "right", "va": "top"}
    plus["bbox"] = {"boxstyle": "square,pad=0.1", "facecolor": "black", "edgecolor": "none"}
    for axes, (name, has) in zip(grid, members.items(), strict=False):
        # a stable sort: images with this label alone come first
        chosen = sorted(order[has[order]], key=several.__getitem__)[:examples]
        for position, i in enumerate(chosen):
            left = position * (width + gap)
            extent = (left, left + width, height, 0)
            style.picture(axes, images[i], interpolation="bicubic", extent=extent)
            if effect and (change := gaussian_filter(np.abs(effect(i, name)), 1)).max() > 1:
                place = {"extent": extent, "origin": "upper", "colors": PALETTE[4]}
                axes.contour(change, [change.max() / 2], linewidths=0.5, **place)
            if several[i]:
                axes.text(left + width - 3, 3, "+", **plus)
        axes.set_title(f"{style.shown(name)} ({has.sum():,})", loc="left", fontsize=7, pad=2)
        axes.set(xlim=(0, examples * (width + gap) - gap), ylim=(height, 0))
    note = "in brackets: images with that label"
    note += "; +: has other labels too" if any(axes.texts for axes in grid) else ""
    note += "; outlined: where the label shows most" if effect else ""
    return style.finish(figure, dataset_label, note)


@style.context()
def clusters(images, embedding, assignments: np.ndarray, dataset_label: str) -> Figure:
    """The six largest clusters, a row each: the mean image, then the ten images nearest to the
    centroid of the `embedding`, shape (N, d); `assignments` are N cluster numbers."""
    numbers, sizes = np.unique(assignments, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:6]
    figure = style.new_figure(0.4 + 0.62 * len(order), "What do the largest clusters hold?", 2)
    grid = style.blank_panels(figure, len(order), 11)
    for row, place in zip(grid, order, strict=True):
        members = np.flatnonzero(assignments == numbers[place])
        distance = np.linalg.norm(embedding[members] - embedding[members].mean(axis=0), axis=1)
        nearest = members[np.argsort(distance, kind="stable")[:10]]
        mean = np.asarray(images[members]).mean(axis=0)
        for axes, image in zip(row, [mean, *images[nearest]], strict=False):
            style.picture(axes, image)
        left = {"transform": row[0].transAxes, "ha": "right", "va": "center", "fontsize": 6}
        row[0].text(-0.1, 0.5, f"{sizes[place]:,}", **left)
    grid[0, 0].set_title("mean", fontsize=6)
    grid[0, 1].set_title("nearest:", loc="left", fontsize=6)
    note = f"{len(order)} largest of {len(numbers)} clusters; at the left: images in each"
    return style.finish(figure, dataset_label, f"{note}; nearest: to the centroid")


@style.context()
def probe_bars(table: pd.DataFrame, dataset_label: str) -> Figure:
    """Scores of linear probes as dots with 95 % intervals, a panel per target.

    A row of `table` is a probe: ``target`` (what is predicted; ``"findings"`` is scored by mean
    AUROC, all else by accuracy), ``arm``, ``accuracy`` (the score), ``ci_low``, ``ci_high`` (95 %
    interval), ``baseline`` (score of a guess), ``published``, ``published_baseline`` and
    ``n_seeds``. Scores are 0 to 1, NaN if not defined."""
    targets = table.groupby("target", sort=False)
    rows = targets.size()
    figure = style.new_figure(0.4 + 0.15 * len(table) + 0.6 * len(rows), "What can a probe read?")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows + 0.6)[:, 0]
    guess = {"marker": "|", "color": DARK, "markersize": 8, "markeredgewidth": 1.4}
    diamond = {"marker": "D", "color": DARK, "markerfacecolor": "none", "markersize": 5.5}
    looks = {"baseline": ("majority class", guess)}
    looks["published_baseline"] = ("published majority", {**guess, "color": GRAY})
    looks["published"] = ("published accuracy", diamond)
    for axes, (target, group) in zip(panels, targets, strict=True):
        auroc = target == "findings"
        for y, row in enumerate(group.itertuples()):
            look = style.arm(row.arm)
            if np.isnan(row.accuracy):
                left = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 6}
                axes.text(0.02, y, "not defined", color=GRAY, **left)
            axes.plot([row.ci_low, row.ci_high], [y, y], color=look.colour)
            axes.plot(row.accuracy, y, **look.line, markersize=4)
        if auroc:  # another measure on another axis, with another guess
            axes.axvline(0.5, **CHANCE)
        for column, (_, look) in () if auroc else looks.items():
            axes.plot(group[column], range(len(group)), **{"ls": "", "zorder": 2.5, **look})
        ends = min(0.4, group["ci_low"].min()), max(0.8, group["ci_high"].max())
        axes.set(xlim=ends if auroc else (0, 1), xlabel="mean AUROC" if auroc else "accuracy")
        axes.set_title(style.shown(target), loc="left", fontweight="bold")
        style.rows_of(axes, [style.arm(arm).title for arm in group["arm"]])
        axes.grid(axis="x")
    keys = {"this run, 95 % interval": {"marker": "o"}}
    keys |= {name: {"ls": "", **look} for name, look in looks.values()}
    keys |= {"guess: AUROC 0.5": CHANCE}
    style.legend_below(figure, keys)
    return style.finish(figure, dataset_label, style.seeds_per_arm(table["n_seeds"]))
