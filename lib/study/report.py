"""Tables and text of a study, written from its numbers: no sentence here knows a result."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.metrics import seed_interval
from lib.paths import atomic_write
from lib.study import markdown

ARMS = {
    "alexnet": "AlexNet, rotation augmentation",
    "p4m": "P4M, no augmentation",
    "alexnet-untrained": "AlexNet, untrained",
    "p4m-untrained": "P4M, untrained",
    "pixels": "raw pixels",
}
TARGETS = {
    "clusters": "cluster assignments",
    "label_combinations": "label combinations",
    "findings": "14 findings, mean AUROC",
}


def dataset_label(kind: str, n_images: int) -> str:
    """How figures and tables name a dataset, e.g. ``"synthetic phantom, 2,000 images"``."""
    names = {
        "phantom": "synthetic phantom",
        "nih": "NIH ChestX-ray14",
        "chestmnist": "ChestMNIST-64",
    }
    return f"{names.get(kind, 'own images')}, {n_images:,} images"


def results_rows(results: Mapping[str, Any]) -> pd.DataFrame:
    """``results.csv``: one row an arm, seed and probe.

    Returns
    -------
    DataFrame
        ``arm, seed, target, value`` (accuracy, or mean AUROC for the findings), ``patients_low,
        patients_high`` (95 % bootstrap over test patients), ``majority`` (0.5 for AUROC), ``chance,
        n_classes, n_test``.
    """
    rows = []
    for arm, entry in results["arms"].items():
        for seed, numbers in entry["seeds"].items():
            for target in TARGETS:
                found = numbers["features"][target]
                if found is None:
                    continue
                auroc = target == "findings"
                rows.append(
                    {
                        "arm": arm,
                        "seed": int(seed),
                        "target": target,
                        "value": found["mean" if auroc else "accuracy"],
                        "patients_low": found["low"],
                        "patients_high": found["high"],
                        "majority": 0.5 if auroc else found["majority"],
                        "chance": 0.5 if auroc else found["chance"],
                        "n_classes": found["n_findings" if auroc else "n_classes"],
                        "n_test": results["n_test"],
                    }
                )
    return pd.DataFrame(rows)


def linear_probe_table(results: Mapping[str, Any], published: Mapping[str, Any]) -> pd.DataFrame:
    """Table 1: each arm's probes over its seeds, beside majority and published value.

    Returns
    -------
    DataFrame
        ``target, arm, n_seeds, accuracy`` (mean over seeds), ``seeds_low, seeds_high`` (95 %,
        Student's t; NaN for one seed), ``patients_low, patients_high`` (95 % bootstrap bounds over
        test patients, mean over seeds), ``ci_low, ci_high`` (the wider of both: neither covers the
        other's chance), ``baseline`` (majority), ``chance, n_classes, n_test, published,
        published_baseline``.
    """
    rows = []
    table = results_rows(results)
    for target in TARGETS:
        for arm in ARMS:
            part = (
                table[(table.get("target") == target) & (table.get("arm") == arm)]
                if len(table)
                else table
            )
            if part.empty:
                continue
            mean, low, high = seed_interval(part["value"])
            patients = part["patients_low"].mean(), part["patients_high"].mean()
            known = arm in published["linear_probe"] and target != "findings"
            rows.append(
                {
                    "target": target,
                    "arm": arm,
                    "n_seeds": len(part),
                    "accuracy": mean,
                    "seeds_low": max(low, 0.0),
                    "seeds_high": min(high, 1.0),
                    "patients_low": patients[0],
                    "patients_high": patients[1],
                    "ci_low": np.nanmin([max(low, 0.0), patients[0], mean]),
                    "ci_high": np.nanmax([min(high, 1.0), patients[1], mean]),
                    "baseline": part["majority"].mean(),
                    "chance": part["chance"].mean(),
                    "n_classes": part["n_classes"].mean(),
                    "n_test": part["n_test"].iloc[0],
                    "published": published["linear_probe"][arm] if known else math.nan,
                    "published_baseline": published["linear_probe"]["majority_baseline_recomputed"]
                    if known and target == "label_combinations"
                    else math.nan,
                }
            )
    return pd.DataFrame(rows)


def linear_probe_markdown(table: pd.DataFrame, label: str) -> str:
    """Table 1 as Markdown, a block a target."""
    header = [
        "features",
        "value",
        "95 % over seeds",
        "95 % over patients",
        "majority",
        "classes",
        "seeds",
        "published",
    ]
    blocks = [f"**Table 1. Linear probes on frozen features.** Dataset: {label}."]
    for target, name in TARGETS.items():
        part = table[table["target"] == target]
        if part.empty:
            continue
        rows = [
            [
                ARMS[r.arm],
                markdown.number(r.accuracy),
                markdown.span(r.seeds_low, r.seeds_high),
                markdown.span(r.patients_low, r.patients_high),
                markdown.number(r.baseline),
                f"{r.n_classes:.0f}",
                str(r.n_seeds),
                markdown.number(r.published),
            ]
            for r in part.itertuples()
        ]
        blocks.append(
            f"*{name[0].upper()}{name[1:]}*\n\n" + markdown.table(header, rows, figures=True)
        )
    blocks.append(
        "Logistic regression, patients split 80/20. Value: accuracy, mean over seeds; for the findings the mean area under the ROC curve, "
        "where 0.5 is chance. Majority: always answering the most frequent class of the training images. Cluster assignments are the "
        "clusters of the same features, so their probe says how linear the clusters are, not what they mean. Published: 0.564 and 0.567, "
        "which the project page gives for cluster assignments and the published script computes for label combinations, where the majority "
        "scored 0.590."
    )
    return "\n\n".join(blocks) + "\n"


def over_seeds(
    results: Mapping[str, Any],
    arm: str,
    pick: Callable[[Mapping[str, Any]], float | None],
    low: float = -math.inf,
    high: float = math.inf,
) -> str:
    """``mean (low to high, n = seeds)`` of one number of an arm, or a dash; a bound of the interval
    outside [low, high] is cut there.
    """
    seeds = results["arms"].get(arm, {"seeds": {}})["seeds"]
    values = []
    for numbers in seeds.values():
        try:
            value = pick(numbers)
        except (KeyError, TypeError):  # a run too short, or data without labels, has no such number
            value = None
        if value is not None and math.isfinite(value):
            values.append(value)
    if not values:
        return "–"
    mean, below, above = seed_interval(values)
    spread = f"{markdown.span(max(below, low), min(above, high))}, " if len(values) > 1 else ""
    lacking = f" of {len(seeds)}" if len(values) < len(seeds) else ""
    return f"{markdown.number(mean)} ({spread}n = {len(values)}{lacking})"


SHARE = (0.0, 1.0)  # bounds of a share, an accuracy, an NMI
POSITIVE = (0.0, math.inf)

FINDINGS = (
    (
        "Faster convergence",
        "the equivariant network stabilises early",
        (
            (
                "first epoch from which NMI stays within 0.02 of its final mean",
                lambda n: n["training"]["converged_at"],
                (2, math.inf),
            ),
            ("NMI of the last two epochs", lambda n: n["training"]["nmi_final"], SHARE),
            (
                "the same for unrelated clusterings of these sizes (chance)",
                lambda n: n["training"]["nmi_chance"],
                SHARE,
            ),
            (
                "AMI of the last two epochs (chance is 0)",
                lambda n: n["training"]["ami_final"],
                (-1.0, 1.0),
            ),
        ),
    ),
    (
        "Improved stability",
        "NMI and loss fluctuate less",
        (
            (
                "standard deviation of NMI over the second half",
                lambda n: n["training"]["nmi_sd"],
                POSITIVE,
            ),
            ("epochs at which the loss rises", lambda n: n["training"]["loss_increases"], POSITIVE),
            (
                "sum of these rises, in units of ln K",
                lambda n: n["training"]["loss_increase_size"] / n["ln_k"],
                POSITIVE,
            ),
        ),
    ),
    (
        "More structured representations",
        "clusters are more clearly apart",
        (
            (
                "silhouette of the clusters in the clustered space, -1 to 1",
                lambda n: n["features"]["structure"]["silhouette"],
                (-1.0, 1.0),
            ),
            (
                "Davies-Bouldin index, lower is better",
                lambda n: n["features"]["structure"]["davies_bouldin"],
                POSITIVE,
            ),
            (
                "AMI of clusters with label combinations (chance is 0)",
                lambda n: n["features"]["labels"]["ami"],
                (-1.0, 1.0),
            ),
        ),
    ),
    (
        "Better transferability",
        "the linear probe scores higher (0.567 against 0.564)",
        (
            (
                "probe of cluster assignments, accuracy",
                lambda n: n["features"]["clusters"]["accuracy"],
                SHARE,
            ),
            (
                "probe of label combinations, accuracy",
                lambda n: n["features"]["label_combinations"]["accuracy"],
                SHARE,
            ),
            (
                "majority of label combinations",
                lambda n: n["features"]["label_combinations"]["majority"],
                SHARE,
            ),
            (
                "probe of the 14 findings, mean AUROC (chance is 0.5)",
                lambda n: n["features"]["findings"]["mean"],
                SHARE,
            ),
        ),
    ),
    (
        "No augmentation required",
        "robustness to rotation comes from the architecture",
        (
            (
                "share of images keeping their cluster under the 7 turns and mirrors of the square",
                lambda n: n["symmetry"]["lattice"],
                SHARE,
            ),
            (
                "share keeping it under turns of 15 to 75 degrees",
                lambda n: n["symmetry"]["free"],
                SHARE,
            ),
        ),
    ),
)


def summary(
    results: Mapping[str, Any], table: pd.DataFrame, figures: Mapping[str, str], command: str
) -> str:
    """``summary.md``: the page's five key findings, each with this run's numbers, and the captions
    of the figures.

    Parameters
    ----------
    results : mapping
        Contents of results.json.
    table : DataFrame
        `linear_probe_table`.
    figures : mapping of file name to caption
    command : str
        The command that makes all of it.
    """
    label = results["dataset_label"]
    epochs = {arm: results["arms"][arm]["config"]["epochs"] for arm in ("alexnet", "p4m")}
    facts = [
        f"K = {results['n_clusters']}",
        f"seeds {', '.join(map(str, results['seeds']))}",
        f"epochs: AlexNet {epochs['alexnet']}, P4M {epochs['p4m']}",
        f"parameters: AlexNet {results['arms']['alexnet']['parameters']:,}, P4M {results['arms']['p4m']['parameters']:,}",
        f"{results['n_patients']:,} patients" if results["n_patients"] else "patients unknown",
    ]
    columns = ("alexnet", "p4m", "alexnet-untrained", "p4m-untrained")
    blocks = [
        f"# Summary: {label}",
        f"{'; '.join(facts)}. Made by `{command}`.",
        results["attribution"],
        "## The five key findings of the page, with this run's numbers",
        "Each cell is the mean over seeds, with a 95 % interval (Student's t) where there is more than one. These are measurements; a "
        "verdict needs controls and more seeds than a quick run has. NMI of consecutive epochs says that a network agrees with itself, not "
        "with anatomy or disease.",
    ]
    for number, (title, claim, measures) in enumerate(FINDINGS, 1):
        rows = [
            [name, *(over_seeds(results, arm, pick, *bounds) for arm in columns)]
            for name, pick, bounds in measures
        ]
        header = ["measure", *(ARMS[arm] for arm in columns)]
        blocks.append(
            f"### {number}. {title}: {claim}\n\n" + markdown.table(header, rows, figures=True)
        )
    blocks += ["## Linear probes", linear_probe_markdown(table, label), "## Figures"]
    blocks += [f"**{name}** {caption} Dataset: {label}." for name, caption in figures.items()]
    return "\n\n".join(blocks).rstrip() + "\n"


SECTION = re.compile(r"<!-- figures of (\S+) -->\n.*?<!-- /figures of \1 -->\n", re.DOTALL)


def save_summary(path: Path | str, text: str) -> None:
    """Write ``summary.md``, and below it the captions that other notebooks have added to the one
    that is there (`save_captions`).
    """
    path = Path(path)
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    with atomic_write(path, "w") as handle:
        handle.write(
            "\n".join(
                [
                    text.rstrip("\n") + "\n",
                    *(section.group() for section in SECTION.finditer(earlier)),
                ]
            )
        )


def save_captions(
    path: Path | str,
    notebook: str,
    figures: Mapping[str, str],
    label: str,
    seeds: Sequence[int],
    command: str,
    attribution: str,
) -> None:
    """Put the captions of a notebook's figures into ``summary.md``, in a section of their own that
    takes the place of an earlier one.

    Parameters
    ----------
    path : Path
        ``summary.md``. If 05_figures has not written it, it is made, and holds these captions under
        a title and `attribution`.
    notebook : str
        Name of the notebook, such as ``"06_claims"``.
    figures : mapping of file name to caption
    label : str
        Dataset and number of images, as `dataset_label` gives them.
    seeds : sequence of int
        Seeds of the runs that are drawn.
    command : str
        The command that makes the figures.

    Raises
    ------
    ValueError
        `notebook` is no single word, so its section could not be found again.
    """
    if not re.fullmatch(r"[\w.-]+", notebook):
        raise ValueError(
            f"{notebook!r} cannot name a section: give the notebook's name, such as '06_claims'"
        )
    path = Path(path)
    text = (
        path.read_text(encoding="utf-8")
        if path.exists()
        else f"# Figures: {label}\n\n{attribution}\n"
    )
    blocks = [
        f"## Figures of {notebook}",
        f"Seeds {', '.join(map(str, seeds))}. Made by `{command}`.",
    ]
    blocks += [f"**{name}** {caption} Dataset: {label}." for name, caption in figures.items()]
    section = (
        f"<!-- figures of {notebook} -->\n"
        + "\n\n".join(blocks)
        + f"\n<!-- /figures of {notebook} -->\n"
    )
    sections = {found[1]: found[0] for found in SECTION.finditer(text)} | {notebook: section}
    with atomic_write(path, "w") as handle:
        handle.write(
            "\n".join(
                [
                    SECTION.sub("", text).rstrip("\n") + "\n",
                    *(sections[name] for name in sorted(sections)),
                ]
            )
        )


def glance(results: Mapping[str, Any]) -> str:
    """README's result at a glance: a few measures of both arms, each beside its baseline (cells as
    in `summary`).
    """
    nothing_learnt = ("untrained", ("alexnet-untrained", "p4m-untrained"))
    measures = (
        (
            "NMI of the last two epochs",
            lambda n: n["training"]["nmi_final"],
            "chance",
            ("alexnet", "p4m"),
            lambda n: n["training"]["nmi_chance"],
        ),
        (
            "loss of the last epoch, in units of ln K",
            lambda n: n["training"]["loss_final"] / n["ln_k"],
            "chance",
            (),
            1.0,
        ),
        ("probe: cluster assignments", *_probe("clusters")),
        ("probe: label combinations", *_probe("label_combinations")),
        (
            "probe: 14 findings, mean AUROC",
            lambda n: n["features"]["findings"]["mean"],
            *nothing_learnt,
            None,
        ),
        (
            "keeps its cluster: lattice turns",
            lambda n: n["symmetry"]["lattice"],
            *nothing_learnt,
            None,
        ),
        (
            "keeps its cluster: 15 to 75 degrees",
            lambda n: n["symmetry"]["free"],
            *nothing_learnt,
            None,
        ),
    )
    rows = []
    for name, pick, kind, arms, baseline in measures:
        bounds = SHARE
        if isinstance(baseline, float):
            beside, bounds = markdown.number(baseline), POSITIVE
        else:
            beside = " / ".join(
                over_seeds(results, arm, baseline or pick).split(" (")[0] for arm in arms
            )
        rows.append(
            [
                name,
                *(over_seeds(results, arm, pick, *bounds) for arm in ("alexnet", "p4m")),
                f"{kind}: {beside}",
            ]
        )
    return markdown.table(
        [results["dataset_label"], ARMS["alexnet"], ARMS["p4m"], "baseline (AlexNet / P4M)"],
        rows,
        figures=True,
    )


def _probe(target: str) -> tuple[Any, ...]:
    """Measure and majority baseline of a probe, as `glance` lists them."""
    return (
        lambda n: n["features"][target]["accuracy"],
        "majority",
        ("alexnet", "p4m"),
        lambda n: n["features"][target]["majority"],
    )
