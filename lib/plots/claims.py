"""Figures of the claims, from the numbers of all runs; `lib.plots.style` says what their arguments
are. `arms` maps the name of an arm to its ``seeds`` and ``measures``: by key, each with ``mean``
and ``by_seed``."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib.plots import style
from lib.plots.style import CHANCE, DARK, LIGHT, LINES, NO_FINDING, PALETTE
from lib.study.arms import Arm

Arms = Mapping[str, Mapping]
Curves = Mapping[str, Mapping[str, Sequence[float]]]
Tables = Mapping[str, pd.DataFrame]
PRICES = {"tells_mirrored": "mirrored\nfilm", "tells_upside_down": "upside-down\nfilm"}
PRICES |= {"tells_quarter_turn": "quarter\nturn"}
PRICES |= {"tells_effusion_side": "effusion left\nor right (AUROC)"}
LEVEL, LEAST = 0.05, 5  # of a discovery; images of a property
HEADINGS = {"macro": "macro: mean of\nthe findings"}
HEADINGS |= {"micro": "micro: all pairs\n(the report's: 0.94)"}


def _dots(axes: Axes, look: Arm, values: Sequence, mean: tuple, flat: bool) -> None:
    """Seeds as small dots, and their mean as a marker at `mean` (x, y)."""
    x, y = (values, [mean[1]] * len(values)) if flat else ([mean[0]] * len(values), values)
    axes.plot(x, y, "o", color=look.colour, markersize=2, alpha=0.6)
    edge = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 4}
    axes.plot(*mean, **look.line, **edge)


def _beside(axes: Axes, arms: Arms, names: Sequence, keys: Sequence, step: float, flat: bool):
    """Measures `keys` one after the other, and in each the `_dots` of the arms side by side."""
    for number, name in enumerate(names):
        for at, key in enumerate(keys):
            if entry := arms[name]["measures"].get(key):
                place = at + step * (number - (len(names) - 1) / 2)
                mean = (entry["mean"], place) if flat else (place, entry["mean"])
                _dots(axes, style.arm(name), list(entry["by_seed"].values()), mean, flat)


@style.context()
def forest(result: Mapping) -> Figure:
    """Paired differences of the deciding measures of at most 6 comparisons of the first one's arm,
    a panel per claim, in the measure's unit. `result` is of `lib.study.claims.overview`.

    To the right speaks for that arm. The gray band is the smallest difference that matters."""
    comparisons, claims = result["comparisons"], result["claims"]
    comparisons = [c for c in comparisons if c["treatment"] == comparisons[0]["treatment"]][:6]
    measures = {measure["key"]: measure for measure in result["measures"]}
    height = 0.3 + len(claims) * (0.72 + 0.11 * len(comparisons))
    figure = style.new_figure(height, "Which claims hold?")
    panels = figure.subplots(len(claims), 1, squeeze=False)[:, 0]
    for place, (axes, claim) in enumerate(zip(panels, claims, strict=True)):
        axes.set_title(claim["title"], loc="left", fontweight="bold")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        if not comparisons:
            style.absent(axes, "no two arms can be compared yet")
            continue
        verdict = comparisons[0]["verdicts"][place]
        measure = measures[verdict["measure"]]
        title = f"{claim['title']}: {verdict['verdict']}"
        axes.set_title(title, loc="left", fontweight="bold", pad=9)
        axes.axvspan(-measure["smallest"], measure["smallest"], color=LIGHT, alpha=0.5, lw=0)
        axes.axvline(0, color=DARK, linewidth=0.6)
        extent = [1.5 * measure["smallest"]]
        for row, comparison in enumerate(comparisons):
            look = style.arm(comparison["reference"])
            entry = next(e for e in comparison["measures"] if e["measure"] == measure["key"])
            both = (result["arms"][comparison[s]]["measures"] for s in ("treatment", "reference"))
            a, b = (of.get(measure["key"], {}).get("by_seed", {}) for of in both)
            sign = 1 if measure["higher_is_better"] else -1  # positive speaks for the claim
            if each := [sign * (a[seed] - b[seed]) for seed in map(str, entry["seeds"])]:
                if entry["low"] is not None and math.isfinite(entry["low"]):
                    axes.plot([entry["low"], entry["high"]], [row, row], color=look.colour)
                _dots(axes, look, each, (entry["mean"], row), flat=True)
                extent += np.abs(each).tolist()
        limit = 1.25 * max(extent)
        axes.set(xlim=(-limit, limit), ylim=(len(comparisons) - 0.4, -0.6))
        axes.set_xlabel("\n".join(textwrap.wrap(measure["title"], 62)), fontsize=6)
        name = style.arm(comparisons[0]["treatment"]).title.split(",")[0]
        about = f"n = {verdict['n']}" + ", exploratory" * claim["exploratory"]
        above = {"left": "the other better", "center": about, "right": f"{name} better"}
        for x, (side, text) in zip((0.0, 0.5, 1.0), above.items(), strict=True):
            look = {"ha": side, "va": "bottom", "fontsize": 6, "color": DARK}
            axes.text(x, 1.0, text, **look, transform=axes.transAxes)
    keys = {}
    for comparison in comparisons:
        treatment, reference = (style.arm(comparison[s]) for s in ("treatment", "reference"))
        keys[f"{treatment.title.split(',')[0]} against {reference.title}"] = reference.line
    style.legend_below(figure, keys, ncols=1)
    notes = ["small dots: seeds; lines: 95 % intervals, cut at the edge"]
    notes += ["gray: differences too small to matter; verdict: on the first comparison"]
    return style.finish(figure, result["dataset_label"], *notes)


# colour of a cell, from for the claim to against it
VERDICTS = {"supported": "#9AD5BF", "no difference that matters": "#D6E4F0"}
VERDICTS |= {"cannot tell": "#F2F2F2", "not supported": "#F6D9C4", "reversed": "#EFA27F"}


@style.context()
def verdict_matrix(result: Mapping) -> Figure:
    """Every comparison (rows) and claim (columns): verdict in words and colour, with the difference
    of the deciding measure. `result` as in `forest`."""
    comparisons, claims = result["comparisons"], result["claims"]
    height = 0.7 + 0.34 * max(len(comparisons), 1)
    figure = style.new_figure(height, "Which claims hold, and against what?", 2)
    axes = figure.subplots()
    axes.spines[:].set_visible(False)
    if not comparisons:
        style.absent(axes, "no two arms can be compared yet")
        return style.finish(figure, result["dataset_label"])
    for row, comparison in enumerate(comparisons):
        means = {entry["measure"]: entry.get("mean") for entry in comparison["measures"]}
        for column, found in enumerate(comparison["verdicts"]):
            mean, word = means[found["measure"]], found["verdict"]
            cell = (column - 0.48, row - 0.46)
            axes.add_patch(Rectangle(cell, 0.96, 0.92, facecolor=VERDICTS[word], linewidth=0))
            lines = ["no number"]
            if mean is not None and found["n"]:
                lines = [*textwrap.wrap(word, 17), f"{mean:+.{3 - (abs(mean) >= 1)}f}"]
            axes.text(column, row, "\n".join(lines), ha="center", va="center", fontsize=6)
    arms = [[style.arm(c[side]).title for side in ("treatment", "reference")] for c in comparisons]
    seeds = [len(comparison["seeds"]) for comparison in comparisons]
    rows = [f"{a}\nagainst {b} ({n})" for (a, b), n in zip(arms, seeds, strict=True)]
    style.rows_of(axes, rows)
    heads = [claim["title"] + " (exploratory)" * claim["exploratory"] for claim in claims]
    heads = ["\n".join(textwrap.wrap(head, 16)) for head in heads]
    axes.set_xticks(range(len(claims)), heads)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xlim(-0.5, len(claims) - 0.5)
    note = "in brackets: seeds; numbers: mean difference in its unit, + speaks for the first arm"
    return style.finish(figure, result["dataset_label"], note)


FOLLOWED = {"findings": "findings", "view_position": "view", "sex": "sex", "age": "age"}
FOLLOWED |= {"brightness": "brightness", "patient": "patient"}


@style.context()
def follows(arms: Arms, names: Sequence[str], dataset_label: str) -> Figure:
    """AMI of the final clusters with what is known of the images (``follows_<property>``), for at
    most 6 arms."""
    names = [name for name in names if name in arms][:6]
    keys = [k for k in FOLLOWED if any(f"follows_{k}" in arms[n]["measures"] for n in names)]
    figure = style.new_figure(0.5 + 0.42 * max(len(keys), 1), "What do clusters follow?")
    axes = figure.subplots()
    _beside(axes, arms, names, [f"follows_{key}" for key in keys], 0.15, flat=True)
    axes.axvline(0, **CHANCE)
    axes.grid(axis="x")
    axes.set_xlabel("AMI of clusters with it (0: chance, 1: the same)")
    style.rows_of(axes, [FOLLOWED[key] for key in keys], "nothing is known of the images")
    looks = [style.arm(name) for name in names]
    style.legend_below(figure, {look.title: {**look.line, "linestyle": ""} for look in looks}, 1)
    seeds = style.seeds_per_arm(len(arms[name]["seeds"]) for name in names)
    return style.finish(figure, dataset_label, f"small dots: seeds; {seeds}")


@style.context()
def control_curves(curves: Tables, chance: Mapping[str, float], dataset_label: str) -> Figure:
    """NMI of consecutive epochs of each backbone on its own clusters and on labels that mean
    nothing: is a steady clustering a good one?

    `curves` map an arm to a table of ``epoch``, ``seed``, ``nmi_prev``; ``<backbone>-index`` and
    ``<backbone>-shuffled`` are drawn with ``<backbone>``. `chance` maps an arm to the NMI of
    unrelated clusterings of its sizes."""
    kinds = {"": ("trained on its clusters", {"marker": "o"})}
    kinds["-index"] = ("trained on index mod K", {"linestyle": "--", "marker": "X"})
    kinds["-shuffled"] = ("trained on labels shuffled once", {"linestyle": ":", "marker": "^"})
    ends = {end for end in kinds for arm in ("alexnet", "p4m") if arm + end in curves}
    kinds = {end: look for end, look in kinds.items() if end in ends}
    figure = style.new_figure(2.1, "Is a steady clustering a good one?")
    for backbone, axes in style.epoch_panels(figure, ("alexnet", "p4m")).items():
        if not {backbone + "-index", backbone + "-shuffled"} & set(curves):
            style.absent(axes, "no control with meaningless\nlabels was trained")
            continue
        for suffix, (_, look) in kinds.items():
            if (arm := backbone + suffix) in curves:
                table = style.by_seed(curves[arm], "nmi_prev")
                style.seed_lines(axes, table, color=style.arm(arm).colour, **look)
        if backbone in chance:
            axes.axhline(chance[backbone], **CHANCE)
    figure.axes[0].set(ylim=(0, 1), ylabel="NMI of consecutive epochs")
    style.legend_below(figure, {**dict(kinds.values()), "chance": CHANCE})
    seeds = style.seeds_per_arm(table["seed"].nunique() for table in curves.values())
    return style.finish(figure, dataset_label, f"thick: mean, thin: one seed; {seeds}")


@style.context()
def roc(curves: Curves, arms: Arms, rates: Sequence, dataset_label: str, n_test: int) -> Figure:
    """ROC curves of the probe of findings, macro- and micro-averaged, at most 6 with those of a
    guess that looks at no image.

    `curves` map an arm to ``macro`` and ``micro``: true positive rates at the false positive
    `rates`. Areas are the measures ``auroc_<average>``; those of the arm ``guess`` are
    ``auroc_<average>_prevalence`` of the first arm. `n_test` images were tested."""
    names = list(curves)[:6]
    looks = {name: {"color": style.arm(name).colour} for name in names}
    lines = {n: looks[n] | {"linestyle": line} for n, line in zip(names, LINES, strict=False)}
    figure = style.new_figure(2.1, "What do probes of the findings tell?")
    for axes, average in zip(figure.subplots(1, 2, sharey=True), HEADINGS, strict=True):
        for name, line in lines.items():
            of, key = (names[0], "_prevalence") if name == "guess" else (name, "")
            area = arms[of]["measures"].get(f"auroc_{average}{key}", {"mean": None})["mean"]
            label = "–" if area is None else f"{area:.3f}"
            axes.plot(rates, curves[name][average], label=label, **line)
        axes.plot([0, 1], [0, 1], **CHANCE)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false positive rate", title=HEADINGS[average])
        axes.grid()
        if names:
            axes.legend(loc="lower right", title="area", title_fontsize=6, labelspacing=0.2)
        else:
            style.absent(axes, "no findings to test on")
    figure.axes[0].set_ylabel("true positive rate")
    keys = {style.arm(name).title: line for name, line in lines.items()}
    style.legend_below(figure, keys, ncols=1)
    seeds = style.seeds_per_arm(len(arms[name]["seeds"]) for name in names if name in arms)
    return style.finish(figure, dataset_label, f"{n_test:,} test images; means; {seeds}")


@style.context()
def by_finding(areas: Mapping, names: Sequence[str], counts: Sequence[int], label: str) -> Figure:
    """AUROC of each finding with its interval (F, 3) by arm, the most frequent finding first.
    `counts` are test images with it; a finding without a number is left out."""
    known = ~np.isnan([found[:, 0] for found in areas.values()]).all(axis=0)
    rows = [f for f in np.argsort(-np.asarray(counts), kind="stable") if known[f]]
    figure = style.new_figure(0.5 + 0.24 * max(len(rows), 2), "Which findings can be told?")
    axes = figure.subplots()
    for number, (arm, found) in enumerate(areas.items()):
        y = np.arange(len(rows)) + 0.18 * (number - (len(areas) - 1) / 2)
        mean, low, high = found[rows].T
        look = style.arm(arm).line | {"linestyle": "", "markersize": 2.5, "elinewidth": 0.7}
        axes.errorbar(mean, y, xerr=(mean - low, high - mean), label=style.arm(arm).title, **look)
    axes.axvline(0.5, **CHANCE)
    axes.grid(axis="x")
    axes.set_xlabel("AUROC of a linear probe (0.5: chance)")
    texts = [f"{style.shown(names[f])} ({counts[f]:,})" for f in rows]
    style.rows_of(axes, texts, "no findings to test on")
    looks = {style.arm(arm).title: style.arm(arm).line | {"linestyle": ""} for arm in areas}
    style.legend_below(figure, looks, ncols=1)
    notes = ["in brackets: test images with it; means over seeds"]
    return style.finish(figure, label, *notes, "lines: 95 % intervals over test patients")


@style.context()
def invariance(curves: Curves, arms: Arms, angles, dataset_label: str, n_images: int) -> Figure:
    """Agreement of clusters and distance of features against the angle of a turn (degrees); below,
    what a probe can no longer tell; for at most 5 arms.

    `curves` map an arm to ``ami`` (of the clusters before and after) and ``distance``: a value per
    angle, means over seeds, None if not defined. `n_images` were turned."""
    names = list(curves)[:5]
    looks = [style.arm(name) for name in names]
    figure, keys = style.new_figure(3.5, "What does a turn change?"), {}
    grid = figure.add_gridspec(2, 2, height_ratios=[1.15, 1])
    labels = {"ami": "AMI of clusters\nbefore and after"}
    labels |= {"distance": "distance features move\n(1: to another image)"}
    for column, (key, label) in enumerate(labels.items()):
        axes = figure.add_subplot(grid[0, column])
        for name, look, line in zip(names, looks, LINES, strict=False):
            drawn = {**look.line, "linestyle": line, "linewidth": 1, "markersize": 2.5}
            keys[look.title] = drawn
            values = np.array([*curves[name][key], curves[name][key][0]], dtype=float)
            axes.plot([*angles, 360], values, **drawn)
        axes.set(xlabel="turn, degrees", ylabel=label, xticks=range(0, 361, 90))
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if key == "ami" else 0)
        axes.grid()
    axes = figure.add_subplot(grid[1, :], title="What a probe can still tell", ylim=(0.35, 1.04))
    prices = [key for key in PRICES if any(key in arms[name]["measures"] for name in names)]
    _beside(axes, arms, names, prices, 0.15, flat=False)
    axes.axhline(0.5, **CHANCE)
    axes.set_xticks(range(len(prices)), [PRICES[key] for key in prices])
    axes.set(xlim=(-0.5, max(len(prices), 1) - 0.5), ylabel="accuracy (0.5: chance)")
    if not prices:
        style.absent(axes, "no patients to test on")
    style.legend_below(figure, keys, ncols=1)
    seeds = style.seeds_per_arm(len(arms[name]["seeds"]) for name in names)
    note = f"{n_images:,} images turned, black corners, quarter turns exact; {seeds}"
    return style.finish(figure, dataset_label, note)


@style.context()
def enrichment_maps(tables: Tables, dataset_label: str) -> Figure:
    """What is more or less frequent in which of the 20 largest clusters: findings above the line,
    below it what should not matter.

    A dot marks q at or below `LEVEL`. A property of fewer than `LEAST` images is gray: its odds
    ratios mean nothing. Bars are the AMI of the property and all clusters. `tables` map an arm to a
    row per property and cluster: ``property, kind, cluster, n, share, log2_odds, q, ami``."""
    rows = pd.concat(tables.values()) if tables else pd.DataFrame(columns=["property", "kind"])
    kinds = rows.sort_values("kind", kind="stable").drop_duplicates("property")
    kinds = kinds.set_index("property")["kind"]
    height = 0.6 + max(len(tables), 1) * (0.55 + 0.115 * max(len(kinds), 6))
    figure = style.new_figure(height, "What do clusters follow?")
    shape = {"squeeze": False, "sharey": "row", "width_ratios": (6, 1)}
    panels, margins = figure.subplots(max(len(tables), 1), 2, **shape).T
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=LIGHT)
    for axes, margin, (arm, table) in zip(panels, margins, tables.items(), strict=False):
        sizes = table.groupby("cluster")["n"].max().sort_values(ascending=False, kind="stable")
        some = sizes.index[:20]
        grids = table.pivot(index="property", columns="cluster", values=["log2_odds", "q"])
        odds, q = (grids[name].reindex(kinds.index)[some] for name in ("log2_odds", "q"))
        images = (table["share"] * table["n"]).groupby(table["property"]).sum()
        odds[images.reindex(kinds.index) < LEAST - 0.5] = np.nan
        drawn = axes.imshow(odds, cmap=colours, vmin=-4, vmax=4, aspect="auto")
        for dark, colour in ((True, "white"), (False, DARK)):
            places = np.nonzero(((q <= LEVEL) & ((odds.abs() > 2) == dark)).to_numpy())
            axes.plot(places[1], places[0], "o", color=colour, markersize=1.8)
        follows = (q <= LEVEL).any(axis=1).groupby(kinds, sort=False).agg(["sum", "size"])
        counts = ", ".join(f"{kind} {n} of {size}" for kind, (n, size) in follows.T.items())
        axes.set_title(f"{style.arm(arm).title}\nrows with a dot: {counts}")
        axes.set_xticks(range(len(some)), sizes[some].astype(str), rotation=90)
        axes.set_xlabel(f"images in each of {len(some)} of {len(sizes)} clusters")
        axes.set_yticks(range(len(kinds)), map(style.shown, kinds.index))
        axes.axhline((kinds == kinds.iloc[0]).sum() - 0.5, color=DARK, linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        agreement = table.groupby("property")["ami"].first().reindex(kinds.index)
        margin.barh(range(len(kinds)), agreement, color=style.arm(arm).colour)
        margin.set(xlim=(0, max(rows["ami"].max(), 0.01) * 1.05), xlabel="AMI")
        margin.tick_params(left=False, labelleft=False)
    if tables:
        bar = {"orientation": "horizontal", "aspect": 40, "extend": "both", "pad": 0.01}
        figure.colorbar(drawn, ax=[*panels, *margins], label="log2 of the odds ratio", **bar)
    else:
        margins[0].remove()
        style.absent(panels[0], "no clusters with known properties")
    notes = [f"first seed; dots: false-discovery rate at most {LEVEL:g} (Fisher's exact test)"]
    notes += [f"below the line: what should not matter; gray: fewer than {LEAST} images"]
    return style.finish(figure, dataset_label, *notes)


@style.context()
def retrieval_panels(images, queries, matches, findings, patients, lifts, dataset_label) -> Figure:
    """Queries and the images nearest to them, a row per query and arm.

    `queries` are Q rows of `images`; `matches` map an arm to the rows nearest to each, nearest
    first, shape (Q, k), where -1 is none; `patients` are N. `lifts` map an arm to the mean over
    findings of precision above chance."""
    k = max((found.shape[1] for found in matches.values()), default=1)
    rows = [(query, matches[arm][i], arm) for i, query in enumerate(queries) for arm in matches]
    figure = style.new_figure(0.4 + 1.3 * max(len(rows), 1), "What lies nearest?", 2)
    grid = style.blank_panels(figure, max(len(rows), 1), k + 1)
    sets = [set(text.split("|")) - {NO_FINDING, ""} for text in findings]
    for (query, found, arm), line in zip(rows, grid, strict=False):
        for axes, index in zip(line, (query, *found), strict=False):
            if index < 0:
                continue
            style.picture(axes, images[index])
            # what is shared with the query comes first
            names = sorted(sets[index], key=lambda name, own=sets[query]: (name not in own, name))
            text = ", ".join(map(style.shown, names)) or "no finding"
            if axes is line[0]:
                style.frame(axes, DARK, 1.5)
            elif patients[index] == patients[query]:
                style.frame(axes, PALETTE[1], 2.2, "--")
                text = f"same patient: {text}"
            elif sets[index] & sets[query]:
                style.frame(axes, PALETTE[2], 2.2)
            else:
                style.frame(axes, LIGHT, 0.8)
            axes.set_xlabel("\n".join(textwrap.wrap(text, 20)), fontsize=6, labelpad=1.5)
        line[0].set_ylabel(style.arm(arm).heading, fontsize=6)
    for column, axes in enumerate(grid[0] if rows else []):
        axes.set_title(f"nearest: {column}" if column else "query", fontsize=7)
    note = "first seed, R-MAC of the last maps; green: shares a finding, dashed: the same patient"
    shares = (f"{style.arm(arm).title.split(',')[0]} {lift:.3f}" for arm, lift in lifts.items())
    told = f"precision at {k} above chance, mean of the findings: {', '.join(shares)}"
    return style.finish(figure, dataset_label, note, *[told] * bool(lifts))
