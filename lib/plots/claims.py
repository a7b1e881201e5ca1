"""Figures of the claims: numbers of claims.json and of runs in, a matplotlib `Figure` out. The look
is that of `lib.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from lib.plots.style import DARK, GRAY, LIGHT, MARKERS, PALETTE, absent, context, finish, new_figure
from lib.study import markdown

LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
PRICES = {
    "tells_mirrored": "mirrored film\n(situs inversus)",
    "tells_upside_down": "upside-down\nfilm",
    "tells_quarter_turn": "quarter turn",
    "tells_effusion_side": "left or right\neffusion (AUROC)",
}


def _seeds_text(arms: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """``"3 seeds"``, or ``"1 to 5 seeds an arm"``."""
    numbers = sorted(
        {len(arms[name]["seeds"]) for name in names if name in arms and arms[name]["seeds"]}
    )
    if not numbers:
        return "no seeds"
    return (
        _count(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} seeds an arm"
    )


def _count(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


@context()
def forest(result: Mapping[str, Any], most: int = 6) -> Figure:
    """Paired differences of the five deciding measures, a row a claim, a colour a comparison.

    Each difference and its 95 % interval stand in units of the smallest difference that would
    matter for that measure, so that claims share an axis; positive speaks for the claim. The axis
    is linear between -1 and 1, the band of differences that would not matter, and logarithmic
    outside. A single seed is a point without an interval.

    Parameters
    ----------
    result : mapping
        Contents of claims.json.
    most : int
        Comparisons drawn, in their order.
    """
    comparisons = result["comparisons"][:most]
    claims = result["claims"]
    smallest = {m["key"]: m["smallest"] for m in result["measures"]}
    figure = new_figure(
        2, 1.6 + len(claims) * (0.32 + 0.13 * max(len(comparisons), 1)) + 0.16 * len(comparisons)
    )
    axes = figure.subplots()
    if not comparisons:
        absent(axes, "no two arms can be compared yet")
    axes.axvspan(-1, 1, color=LIGHT, alpha=0.35, linewidth=0)
    axes.axvline(0, color=DARK, linewidth=0.7)
    extent = 3.0
    for number, comparison in enumerate(comparisons):
        by_key = {e["measure"]: e for e in comparison["measures"]}
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        names = [result["arms"][comparison[side]]["title"] for side in ("treatment", "reference")]
        axes.plot(
            [],
            [],
            color=color,
            marker=marker,
            label=f"{names[0]} against {names[1]} ({_count(len(comparison['seeds']))})",
        )
        for row, decided in enumerate(comparison["verdicts"]):
            entry, unit = by_key[decided["measure"]], smallest[decided["measure"]]
            if not entry["seeds"]:
                continue
            at = row + (number - (len(comparisons) - 1) / 2) * 0.8 / max(len(comparisons), 1)
            mean = entry["mean"] / unit
            bounds = [entry[name] for name in ("low", "high")]
            bounds = [mean if b is None or not math.isfinite(b) else b / unit for b in bounds]
            axes.plot(bounds, [at, at], color=color, linewidth=1.2)
            axes.plot(
                mean,
                at,
                color=color,
                marker=marker,
                markersize=4.5,
                markerfacecolor=color if number else "white",
            )
            extent = max(extent, *np.abs([mean, *bounds]))
            if number == 0:
                text = "undecided" if decided["verdict"] == "undecided" else decided["verdict"]
                axes.annotate(
                    text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=7
                )
    axes.set_xscale("symlog", linthresh=1, linscale=0.8)
    axes.set_xlim(-1.3 * extent, 1.3 * extent)
    decades = 10.0 ** np.arange(0, math.floor(math.log10(1.3 * extent)) + 1)
    axes.xaxis.set_major_locator(FixedLocator([*-decades[::-1], 0, *decades]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(range(len(claims)), [c["title"] for c in claims])
    axes.set_ylim(len(claims) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "difference, in units of the smallest that would matter; right speaks for the claim"
    )
    if comparisons:
        axes.set_title("verdict on the first comparison", loc="right", fontsize=7)
        figure.legend(
            loc="outside upper center", ncols=1, fontsize=7
        )  # below it would lie on the small print
    how = "points: means over seeds, bars: 95 % intervals of paired differences; gray band: differences that would not matter"
    return finish(figure, result["dataset_label"], how)


@context()
def control_curves(
    curves: Mapping[str, pd.DataFrame],
    chance: Mapping[str, float],
    titles: Mapping[str, str],
    dataset_label: str,
) -> Figure:
    """NMI of consecutive epochs of each backbone on its own clusters, beside controls that are
    trained on labels which mean nothing.

    Parameters
    ----------
    curves : mapping of arm to DataFrame
        Columns ``epoch``, ``seed``, ``nmi_prev``. ``<backbone>-index`` and ``<backbone>-shuffled``
        are drawn with ``<backbone>``.
    chance : mapping of arm to float
        NMI of unrelated clusterings of its sizes.
    titles : mapping of arm to str
    dataset_label : str
    """
    kinds = {
        "": "on its clusters",
        "-index": "on index mod K",
        "-shuffled": "on labels shuffled once",
    }
    figure = new_figure(2, 3.4)
    counts = []
    for axes, backbone in zip(figure.subplots(1, 2, sharey=True), ("alexnet", "p4m"), strict=True):
        axes.set_title(titles.get(backbone, backbone))
        axes.set(ylim=(0, 1), xlabel="epoch")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        drawn = False
        for (suffix, name), color, line, marker in zip(
            kinds.items(), PALETTE, LINES, MARKERS, strict=False
        ):
            arm = backbone + suffix
            if arm not in curves:
                continue
            table = (
                curves[arm]
                .pivot(index="epoch", columns="seed", values="nmi_prev")
                .dropna(how="all")
            )
            counts.append(table.shape[1])
            whole = table.dropna()
            axes.plot(
                whole.index,
                whole.mean(axis=1),
                color=color,
                linestyle=line,
                marker=marker,
                label=f"{name} (n = {table.shape[1]})",
            )
            if table.shape[1] > 1:
                axes.fill_between(
                    whole.index,
                    whole.min(axis=1),
                    whole.max(axis=1),
                    color=color,
                    alpha=0.18,
                    linewidth=0,
                )
            drawn = True
        if backbone in chance:
            axes.axhline(
                chance[backbone], color=GRAY, linewidth=0.8, linestyle=(0, (1, 2)), label="chance"
            )
        if drawn:
            axes.legend(loc="best", fontsize=7)
        else:
            absent(axes, "no run of this arm")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("NMI of consecutive epochs")
    more = "lines: means over seeds, bands: smallest to largest; a control that is missing was not trained"
    return finish(figure, dataset_label, more)


@context()
def roc(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    arms: Mapping[str, Mapping[str, Any]],
    false_positive_rates: Sequence[float],
    dataset_label: str,
    n_test: int,
    most: int = 6,
) -> Figure:
    """ROC curves of the probe of findings, macro- and micro-averaged, beside a guess that looks at
    no image.

    Parameters
    ----------
    curves : mapping of arm to mapping
        See `lib.study.claims.rocs`.
    arms : mapping of arm to mapping
        As ``arms`` in claims.json; areas are among its measures.
    false_positive_rates : sequence of float
    dataset_label : str
    n_test : int
        Images tested.
    most : int
        Curves drawn, in their order.
    """
    titles = {arm: entry["title"] for arm, entry in arms.items()} | {
        "guess": "guess: how frequent each finding is"
    }
    figure = new_figure(2, 4.3)
    names = list(curves)[:most]
    headings = {
        "macro": "macro: mean of the findings' curves",
        "micro": "micro: all image-finding pairs together",
    }
    for axes, average in zip(figure.subplots(1, 2, sharey=True), headings, strict=True):
        for arm, color, line in zip(names, PALETTE, (LINES * 2)[: len(PALETTE)], strict=False):
            of, key = (
                (names[0], f"auroc_{average}_prevalence")
                if arm == "guess"
                else (arm, f"auroc_{average}")
            )
            area = markdown.number(arms[of]["measures"][key]["mean"])
            axes.plot(
                false_positive_rates, curves[arm][average], color=color, linestyle=line, label=area
            )
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set(
            xlim=(0, 1), ylim=(0, 1.005), xlabel="false positive rate", title=headings[average]
        )
        axes.grid()
        if names:
            axes.legend(loc="lower right", fontsize=7, title="area", title_fontsize=7)
        else:
            absent(axes, "no findings to test on")
    lines = figure.axes[0].get_lines()[: len(names)]
    if names:
        figure.legend(
            lines, [titles[arm] for arm in names], loc="outside upper center", ncols=2, fontsize=7
        )
    figure.axes[0].set_ylabel("true positive rate")
    return finish(
        figure, dataset_label, f"{n_test:,} test images; means over {_seeds_text(arms, names)}"
    )


@context()
def invariance(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    arms: Mapping[str, Mapping[str, Any]],
    angles: Sequence[float],
    dataset_label: str,
    n_images: int,
    most: int = 6,
) -> Figure:
    """Share of images keeping their cluster and distance of their features against the angle of a
    turn; below, what is lost by it.

    Parameters
    ----------
    curves : mapping of arm to mapping
        ``kept`` and ``distance``, one value an angle, means over seeds.
    arms : mapping of arm to mapping
        As ``arms`` in claims.json; its measures ``tells_...`` are the price.
    angles : sequence of float
        Degrees.
    dataset_label : str
    n_images : int
        Images turned.
    most : int
        Arms drawn, in their order.
    """
    names = list(curves)[:most]
    looks = list(zip(names, PALETTE, (LINES * 2)[: len(PALETTE)], MARKERS, strict=False))
    figure = new_figure(2, 5.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    panels = (
        ("kept", "share keeping their cluster", (0, 1.04)),
        ("distance", "distance features move\n(1: as far as another image)", (0, None)),
    )
    for column, (key, label, limits) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        for arm, color, line, marker in looks:
            values = np.array([math.nan if v is None else v for v in curves[arm][key]], dtype=float)
            axes.plot(
                [*angles, 360],
                [*values, values[0]],
                color=color,
                linestyle=line,
                marker=marker,
                markersize=2.5,
                label=arms[arm]["title"],
            )
        axes.set(xlabel="turn, degrees", ylabel=label, ylim=limits, xticks=range(0, 361, 90))
        axes.grid()
    handles = figure.axes[0].get_legend_handles_labels()
    axes = figure.add_subplot(grid[1, :])
    prices = [key for key in PRICES if any(key in arms[arm]["measures"] for arm in names)]
    width = 0.8 / max(len(names), 1)
    for number, (arm, color, _, marker) in enumerate(looks):
        for at, key in enumerate(prices):
            entry = arms[arm]["measures"].get(key)
            if entry is None:
                continue
            place = at + (number - (len(names) - 1) / 2) * width
            axes.bar(place, entry["mean"], width * 0.9, color=color, alpha=0.75)
            axes.plot(
                [place] * entry["n"],
                [v for v in entry["by_seed"].values() if v is not None],
                linestyle="",
                marker=marker,
                color=DARK,
                markersize=2,
            )
    axes.axhline(0.5, color=DARK, linestyle=":", linewidth=1)
    axes.annotate(
        "chance",
        (1, 0.5),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=6.5,
    )
    axes.set_xticks(range(len(prices)), [PRICES[key] for key in prices])
    axes.set(ylim=(0, 1.04), ylabel="linear probe tells it")
    axes.set_title("The price of invariance", fontsize=8)
    if not prices:
        absent(axes, "no patients to test on")
    if names:
        figure.legend(*handles, loc="outside upper center", ncols=2, fontsize=7)
    return finish(
        figure,
        dataset_label,
        f"{n_images:,} images turned, black corners, quarter turns exact; means over {_seeds_text(arms, names)}",
    )


@context()
def enrichment_maps(
    tables: Mapping[str, pd.DataFrame],
    titles: Mapping[str, str],
    dataset_label: str,
    most: int = 20,
    level: float = 0.05,
    least: int = 5,
) -> Figure:
    """Which properties are over- and under-represented in which cluster: findings above the line,
    below it what should not matter.

    Parameters
    ----------
    tables : mapping of arm to DataFrame
        As `lib.study.enrichment.enrichment` returns them.
    titles : mapping of arm to str
    dataset_label : str
    most : int
        Clusters drawn, the largest first.
    level : float
        A dot marks q at or below it.
    least : int
        A property of fewer images is gray: the 1/2 that is added to each count would give its odds
        ratios nearly alone.
    """
    properties = list(
        dict.fromkeys(
            name
            for table in tables.values()
            for name in table.sort_values("kind", kind="stable")["property"]
        )
    )
    kinds = {row.property: row.kind for table in tables.values() for row in table.itertuples()}
    figure = new_figure(2, 1.3 + 0.17 * max(len(properties), 6))
    panels = figure.subplots(1, max(len(tables), 1), sharey=True, squeeze=False)[0]
    image = None
    norm = TwoSlopeNorm(0, -4, 4)
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad=LIGHT)
    for axes, (arm, table) in zip(panels, tables.items(), strict=False):
        size = table.groupby("cluster")["n"].max().sort_values(ascending=False, kind="stable")
        clusters = list(size.index[:most])
        odds = table.pivot(index="property", columns="cluster", values="log2_odds").reindex(
            index=properties, columns=clusters
        )
        q = table.pivot(index="property", columns="cluster", values="q").reindex(
            index=properties, columns=clusters
        )
        seen = (
            (table["share"] * table["n"])
            .groupby(table["property"])
            .sum()
            .reindex(properties)
            .to_numpy()
        )
        odds[seen < least - 0.5] = np.nan
        image = axes.imshow(odds, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
        rows, columns = np.nonzero(q.to_numpy() <= level)
        axes.plot(columns, rows, linestyle="", marker="o", color=DARK, markersize=2)
        axes.set_title(titles.get(arm, arm))
        axes.set_xticks(
            range(len(clusters)), [str(size[c]) for c in clusters], rotation=90, fontsize=5.5
        )
        axes.set_xlabel(f"{len(clusters)} of {len(size)} clusters (images in each)")
        axes.set_yticks(range(len(properties)), [name.replace("_", " ") for name in properties])
        boundary = sum(kinds[name] == kinds[properties[0]] for name in properties)
        axes.axhline(boundary - 0.5, color=DARK, linewidth=1)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    if image is None:
        absent(panels[0], "no clusters with known properties")
    else:
        figure.colorbar(
            image, ax=list(panels), label="log2 of the odds ratio", shrink=0.7, extend="both"
        )
    more = f"first seed; dots: false-discovery rate at most {level:g} (Fisher's exact test); below the line: what should not matter"
    more += f"; gray: fewer than {least} images"
    return finish(figure, dataset_label, more)


@context()
def retrieval_panels(
    images: np.ndarray,
    queries: Sequence[int],
    matches: Mapping[str, np.ndarray],
    findings: Sequence[str],
    patients: Sequence[Any],
    titles: Mapping[str, str],
    dataset_label: str,
) -> Figure:
    """Queries and their matches, a row a query and arm.

    Parameters
    ----------
    images : uint8, shape (N, 64, 64)
    queries : sequence of Q int
        Rows of `images`.
    matches : mapping of arm to int array, shape (Q, k)
        Rows of `images`, nearest first; -1 is none.
    findings : sequence of N str
        Findings joined by ``|``.
    patients : sequence of N
    titles : mapping of arm to str
    dataset_label : str
    """
    k = max((m.shape[1] for m in matches.values()), default=1)
    rows = [(query, place, arm) for place, query in enumerate(queries) for arm in matches]
    figure = new_figure(2, 0.5 + 1.12 * max(len(rows), 1))
    grid = figure.subplots(max(len(rows), 1), k + 1, squeeze=False)
    sets = [set(f.split("|")) - {"No Finding", ""} for f in findings]

    def show(axes: Any, index: int, text: str, color: str, width: float, line: str = "-") -> None:
        axes.imshow(images[index], cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=color, linewidth=width, linestyle=line)
        axes.set_xlabel(text, fontsize=5.5, labelpad=1.5)

    def short(index: int) -> str:
        names = sorted(name.replace("_", " ") for name in sets[index])
        text = ", ".join(names) or "no finding"
        return text if len(text) <= 24 else text[:22] + "..."

    for (query, place, arm), line in zip(rows, grid, strict=False):
        show(line[0], query, short(query), DARK, 1.5)
        line[0].set_ylabel(titles.get(arm, arm).split(",")[0], fontsize=6.5)
        for axes in line[1:]:
            axes.set_axis_off()
        for axes, match in zip(line[1:], matches[arm][place], strict=False):
            if match < 0:
                continue
            axes.set_axis_on()
            same, shared = patients[match] == patients[query], bool(sets[match] & sets[query])
            color, dash = (
                (PALETTE[1], "--") if same else (PALETTE[2], "-") if shared else (LIGHT, "-")
            )
            show(
                axes,
                match,
                short(match) + (" (same patient)" if same else ""),
                color,
                2.2 if same or shared else 0.8,
                dash,
            )
    if rows:
        grid[0, 0].set_title("query", fontsize=7)
        grid[0, 1].set_title("nearest", fontsize=7)
    more = "first seed, R-MAC of the last convolutional maps; green: shares a finding, dashed orange: the same patient"
    return finish(figure, dataset_label, more)
