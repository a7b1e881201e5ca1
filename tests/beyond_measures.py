"""The measures of docs/beyond.md, of a run or of raw pixels, and the tables of that page."""

import math
import re
import textwrap

import numpy as np
import pandas as pd
from scipy.special import softmax

from lib import metrics, paths
from lib.study import clusters, curves, parts, report, scores
from lib.study.arms import ARMS
from lib.study.subjects import Material, Network, Pixels

PAGE = paths.ROOT / "docs" / "beyond.md"
LABELS = {"digits": "1,000 handwritten digits", "phantom-beyond": "1,000 phantoms of 279 patients"}
LABELS["nih-9k"] = "9,395 X-rays of NIH ChestX-ray14"
COLUMNS = {"nmi_untrained": "NMI, untrained", "nmi": "NMI, trained"}
COLUMNS |= {"hard_untrained": "AUROC, untrained", "hard": "AUROC, hard", "soft": "AUROC, soft"}
COLUMNS |= {"settled": "settled", "largest_cluster": "largest", "perplexity": "perplexity"}
COLUMNS |= {"seeds": "seeds", "ami_halves": "halves", "view": "view", "pairs": "pairs"}
COLUMNS |= {"tells_mirrored": "mirrored", "tells_effusion_side": "side"}
COMMON = ["nmi_untrained", "nmi", "hard_untrained", "hard", "settled", "perplexity"]
COMMON += ["seeds", "ami_halves"]
QUESTIONS = {  # number of a question -> its arms, the reference first, and its columns
    1: (
        ["p4m", "p4m-centroids", "p4m-sinkhorn", "p4m-committee", "p4m-vote", "p4m-refined"],
        COMMON,
    ),
    2: (["p4m", "p4m-minibatch", "p4m-hierarchical", "p4m-graph"], COMMON),
    3: (["p4m", "p4m-patients"], ["hard_untrained", "hard", "soft", "pairs", "view", "ami_halves"]),
    4: (["p4m", "p4_params", "mirror", "cnn_params"], [*COMMON, "view", *list(COLUMNS)[-2:]]),
}
QUESTIONS[1][0].append("p4m-given")


def of_clusters(labels: np.ndarray, material: Material, seed: int) -> dict[str, float]:
    """What clusters (N,) say of the classes, or of findings, view and patient."""
    patients, rows = material.patients, material.own_rows(seed)
    follows = clusters.drivers(labels, material.images, material.metadata)
    if math.isnan(follows["view_position"]):
        return {n: getattr(metrics, n)(labels, material.codes) for n in ("nmi", "ami")}
    options = {"groups": patients, "seed": seed}
    hard = scores.findings_auroc(
        np.eye(labels.max() + 1)[labels], material.targets, *rows, **options
    )
    alike = pd.DataFrame({"p": patients, "c": labels}).value_counts().to_numpy()
    same, sizes = np.bincount(patients), np.bincount(labels) / len(labels)
    pairs = (alike * (alike - 1)).sum() / (same * (same - 1)).sum() - (sizes**2).sum()
    found = {"hard": np.nanmean(hard), "view": follows["view_position"], "pairs": pairs}
    return found | {"findings": follows["findings"], "patient": follows["patient"]}


def measure(subject: Network | Pixels, material: Material, sides: bool) -> dict[str, float]:
    """All measures but the agreement of seeds; with `sides` those of laterality."""
    labels, seed, k = subject.assignments, subject.seed, subject.n_clusters
    found = of_clusters(labels, material, seed) | metrics.occupancy(labels, k)
    found |= parts.halves(subject, material)
    if isinstance(subject, Network):
        table = subject.run.metrics
        ami = table["ami_prev"].dropna().to_numpy()
        found |= {"settled": 2 + curves.settling_time(ami), "ami_prev": ami[-1]}
        found |= {"loss": table["loss"].iloc[-1] / math.log(k)}
        start = of_clusters(subject.run.assignments[0], material, seed)
        found |= {f"{name}_untrained": value for name, value in start.items()}
        with np.load(subject.run.path / "clustering.npz") as stored:
            centres = stored["centroids"]
    else:
        centres = subject.clusterer.cluster_centers_
    if "hard" in found:
        away = ((subject.embedding[:, None] - centres) ** 2).sum(2)  # (N, K)
        rows, options = material.own_rows(seed), {"groups": material.patients, "seed": seed}
        soft = scores.findings_auroc(softmax(-away / 0.1, 1), material.targets, *rows, **options)
        found["soft"] = np.nanmean(soft)
        found |= parts.laterality(subject, material) if sides else {}
        found |= parts.effusion_side(subject, material) if sides else {}
    return {name: value for name, value in found.items() if not isinstance(value, str)}


def cell(values: pd.Series, interval: bool = True) -> str:
    """Mean over seeds, and the 95 % interval if there are several. The agreements of one set of
    seeds are not independent: no interval."""
    if values.empty:
        return ""
    mean, low, high = metrics.seed_interval(values)
    return f"{mean:.3f}" + (f" ({low:.3f} to {high:.3f})" if interval and len(values) > 1 else "")


def tables(runs: pd.DataFrame, question: int) -> str:
    """The tables of a question, one per data set, as Markdown."""
    arms, wanted = QUESTIONS[question]
    text = []
    for dataset, label in LABELS.items():
        some = runs[(runs["dataset"] == dataset) & runs["arm"].isin([*arms, "pixels"])]
        shown = [c for c in wanted if c in some and some[c].notna().any()]
        if set(some["arm"]) <= {"pixels", arms[0]} or len(shown) < 2:
            continue
        body = []
        for arm in [a for a in [*arms, "pixels"] if a in set(some["arm"])]:
            rows = some.loc[some["arm"] == arm, shown]
            cells = [cell(rows[c].dropna(), c != "seeds") for c in shown]
            body.append([ARMS[arm].title, str(len(rows)), *cells])
        header = ["arm", "n", *(COLUMNS[c] for c in shown)]
        text += [f"{label}:", report.table(header, body, figures=True)]
        for name in [c for c in ("nmi", "hard", "settled", "ami_halves") if c in shown]:
            wide = some.pivot(index="seed", columns="arm", values=name)
            against = {a: (wide[a] - wide[arms[0]]).dropna() for a in arms[1:] if a in wide}
            words = [f"{ARMS[a].title} {cell(d)}" for a, d in against.items() if len(d) > 1]
            said = f"{COLUMNS[name]}, difference from P4M, seed by seed: {'; '.join(words)}."
            text += ["\n".join(textwrap.wrap(said, 100))] * bool(words)
    return "\n\n".join(text) or "Not run yet."


def again(found: pd.DataFrame) -> str:
    """The table of clusterers on the features of finished runs, as Markdown."""
    shown = ["hard", "soft", "perplexity", "ami_halves", "view", "pairs"]
    groups = found.groupby("clusterer", sort=False)
    rows = [[name, str(len(of)), *(cell(of[c]) for c in shown)] for name, of in groups]
    return report.table(["clusterer", "n", *(COLUMNS[c] for c in shown)], rows, figures=True)


def cost() -> str:
    """The table of one fit's CPU time and memory, as Markdown."""
    names = {"clusterer": "clusterer", "points": "points", "cpu_seconds": "CPU seconds"}
    names |= {"gigabytes": "GB", "nmi": "NMI with the planted clusters"}
    found = pd.read_csv(paths.ROOT / "figures" / "beyond" / "clusterers.csv")
    rows = found[list(names)].astype(object).to_numpy()
    return report.table(list(names.values()), rows, figures=True)


def write_page(runs: pd.DataFrame, found: pd.DataFrame) -> None:
    """Put the tables into docs/beyond.md, between their marks."""
    page = PAGE.read_text(encoding="utf-8")
    texts = {f"question {q}": tables(runs, q) for q in QUESTIONS} | {"again": again(found)}
    texts["cost"] = cost()
    for name, text in texts.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        body = begin + text + end
        page = re.sub(
            re.escape(begin) + ".*?" + re.escape(end), lambda _, b=body: b, page, flags=re.S
        )
    with paths.atomic_write(PAGE, "w") as handle:
        handle.write(page)
