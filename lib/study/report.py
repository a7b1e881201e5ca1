"""Tables and text of a study, written from results.json: no sentence here knows a result."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib.metrics import seed_interval
from lib.paths import alone, atomic_write
from lib.study import claims
from lib.study.arms import ARMS
from lib.study.claims import CLAIMS, Results, collapsed, reason, values_of

COLLAPSED = (
    f"† Collapsed: the largest cluster holds over {claims.LARGEST_CLUSTER:.0%} of the images, or "
    f"the perplexity of the cluster sizes is below {claims.LEAST_PERPLEXITY:g} K. No interval is "
    "given over a mixture of collapsed and whole runs."
)
KINDS = {"phantom": "synthetic phantom", "nih": "NIH ChestX-ray14", "chestmnist": "ChestMNIST-64"}
KINDS |= {"digits": "handwritten digits", "embeddings": "given embeddings"}
SIDES = ("treatment", "reference")
MAIN = ("alexnet", "p4m", "alexnet-untrained", "p4m-untrained")
# heading, and the measures that are the columns; what a number must be read beside is next to it
# fmt: off
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "convergence": ("Curves", {
        "settled_ami": "AMI at 90 % of its plateau from epoch", "shortfall_ami": "area above",
        "ami_final": "last AMI", "nmi_final": "last NMI", "nmi_chance": "NMI by chance",
        "loss_final": "last loss / ln K"}),
    "stability": ("Steadiness", {
        "spread_ami": "spread of AMI around its trend", "spread_loss": "of the loss / ln K",
        "ami_halves": "AMI of two halves of the patients", "ami_seeds": "AMI with other seeds",
        "nmi_sd": "sd of NMI, second half"}),
    "structure": ("Structure", {
        "map_silhouette": "silhouette, t-SNE", "silhouette": "silhouette",
        "davies_bouldin": "Davies-Bouldin", "map_trust": "trustworthiness, t-SNE",
        "map_findings": "neighbours sharing a label above chance, t-SNE"}),
    "transfer": ("Linear probes", {
        "auroc_macro": "labels, mean AUROC", "auroc_macro_own": "own split",
        "ap_macro": "mean average precision", "ap_macro_prevalence": "of a guess",
        "probe_combinations": "combinations", "probe_combinations_majority": "majority",
        "probe_clusters": "clusters", "probe_clusters_majority": "majority"}),
    "averages": ("Macro and micro averages", {
        "auroc_macro": "labels, macro AUROC", "auroc_macro_prevalence": "guess",
        "auroc_micro": "labels, micro AUROC", "auroc_micro_prevalence": "guess",
        "micro_combinations": "combinations, micro AUROC",
        "micro_combinations_prevalence": "guess"}),
    "invariance": ("Clusters kept", {
        "ami_free": "AMI, turns off the lattice", "kept_free": "share kept under these",
        "distance_free": "distance moved under these",
        "kept_lattice": "share kept, turns and mirrors of the square",
        "kept_drawn": "phantom drawn turned"}),
    "price": ("The price of invariance: a linear probe tells", {
        "tells_mirrored": "a mirrored image", "tells_upside_down": "an upside-down image",
        "tells_quarter_turn": "a quarter turn",
        "tells_effusion_side": "left from right effusion (AUROC)"}),
    "meaning": ("What clusters follow (AMI, 0 is chance)", {
        f"follows_{name}": name.replace("_", " ")
        for name in ("findings", "view_position", "sex", "age", "brightness", "patient")}),
    "known": ("Known classes", {
        "ami_classes": "AMI with the classes, 0 is chance", "nmi_classes": "NMI with the classes"}),
    "retrieval": ("Retrieval", {
        "retrieval_lift": "precision at 5 of a label, above chance",
        "retrieval_same_patient": "matches of the same patient",
        "retrieval_same_patient_chance": "by chance"}),
}
# fmt: on


def number(value: float | None) -> str:
    """``"0.123"``, ``"1.23"``, ``"12.3"``, ``"123"``; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{3 - sum(abs(value) >= step for step in (1, 10, 100))}f}"


def span(low: float | None, high: float | None) -> str:
    """``"0.100 to 0.200"``; a dash if there is no interval."""
    if low is None or high is None or not math.isfinite(low + high):
        return "–"
    return f"{number(low)} to {number(high)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """A Markdown table; with `figures` all columns but the first are aligned to the right."""
    rule = "|---|" + ("---:|" if figures else "---|") * (len(header) - 1)
    lines = [header, *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, rule, *body])


def dataset_label(kind: str, n_images: int) -> str:
    """How figures and tables name a dataset, such as ``"synthetic phantom, 2,000 images"``."""
    return f"{KINDS.get(kind, 'own images')}, {n_images:,} images"


def cell(results: Results, arm: str, key: str, interval: bool = True) -> str:
    """Mean of a measure over seeds, from three on with its 95 % interval; "†" if runs collapsed."""
    values, fallen = values_of(results, arm, key), collapsed(results, arm)
    if not values:
        why = reason(results, arm, key)
        return f"not defined: {why}" if why else "–"
    mean, low, high = seed_interval(list(values.values()))
    text = number(mean) + " †" * bool(fallen)
    if 0 < len(set(fallen) & set(values)) < len(values):
        return text + f" ({len(fallen)} of {len(values)} collapsed)" * interval
    if key.startswith(("probe", "auroc", "ap_", "kept", "nmi", "tells", "retrieval_same")):
        low, high = max(low, 0.0), min(high, 1.0)
    shown = interval and len(values) >= 3 and number(low) != number(high)
    return text + f" ({span(low, high)})" * shown


def wrapped(text: str) -> str:
    """Markdown whose paragraphs and items have lines of at most 100 columns; tables stay."""
    look = {"width": 100, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(
        textwrap.fill(line, **look, subsequent_indent="  " * line.startswith("- "))
        if len(line) > 100 and not line.startswith(("|", "#"))
        else line
        for line in text.split("\n")
    )


def note(text: str) -> str:
    """A table, with what "†" means below it."""
    return f"{text}\n\n{COLLAPSED}" if "†" in text else text


def _shown(results: Results, arms: Sequence[str] | None) -> dict[str, Mapping]:
    return {arm: of for arm, of in results["arms"].items() if arms is None or arm in arms}


def measure_table(results: Results, columns: Mapping[str, str], arms=None) -> str:
    """One row per arm, one column per measure, see `cell`; arms without a number are left out."""
    rows, reasons = [], {}
    for arm, entry in _shown(results, arms).items():
        cells = [cell(results, arm, key) for key in columns]
        if any(values_of(results, arm, key) for key in columns):
            rows.append([entry["title"], *cells, str(len(entry["seeds"]))])
        reasons |= dict.fromkeys(cells)
    if not rows:
        return "; ".join(why for why in reasons if why != "–") or "No run has these numbers."
    return note(table(["arm", *columns.values(), "seeds"], rows))


def frame(results: Results) -> pd.DataFrame:
    """All numbers: one row per arm and seed, one column per measure."""
    k, rows = results["settings"]["n_clusters"], []
    for arm, entry in results["arms"].items():
        for seed, run in entry["seeds"].items():
            numbers = {key: v for key, v in run["values"].items() if not isinstance(v, str)}
            rows.append({"arm": arm, "seed": int(seed), "n_clusters": k, **numbers})
    return pd.DataFrame(rows)


def occupancy_table(results: Results, arms: Sequence[str] | None = None) -> str:
    """Are the images spread over the clusters? One row per arm: least and most over its seeds."""
    rows, k = [], results["settings"]["n_clusters"]
    for arm, entry in _shown(results, arms).items():
        cells = []
        for key, form in {
            "largest_cluster": ".1%",
            "clusters_used": ".0f",
            "perplexity": ".1f",
        }.items():
            values = values_of(results, arm, key).values()
            ends = dict.fromkeys(f"{end(values):{form}}" for end in (min, max) if values)
            cells.append(" to ".join(ends) or "–")
        fallen = ", ".join(collapsed(results, arm))
        cells.append(str(len(entry["seeds"])))
        rows.append([entry["title"], *cells, f"seed {fallen} †" if fallen else "none"])
    header = ["arm", "largest cluster, of the images", f"clusters in use, of {k}"]
    return note(table([*header, f"perplexity, at most {k}", "seeds", "collapsed"], rows))


TARGETS = {  # what a probe predicts: measure, name
    "clusters": ("probe_clusters", "cluster assignments"),
    "label_combinations": ("probe_combinations", "label combinations"),
    "findings": ("auroc_macro", "labels, mean AUROC"),
}
BESIDE = {"patients_low": "low", "patients_high": "high", "baseline": "majority"}
BESIDE |= {"chance": "chance", "n_classes": "n_classes"}


def linear_probe_table(results: Results, published: Mapping) -> pd.DataFrame:
    """Table 1: the probes of each arm over its seeds, beside majority and published value.

    Columns are ``target, arm, n_seeds, accuracy`` (or mean AUROC); ``seeds_low, seeds_high`` (95 %,
    Student's t; NaN over a mixture of collapsed and whole runs); ``patients_low, patients_high``
    (95 % bootstrap over test patients); ``ci_low, ci_high`` (the wider of both); ``baseline``
    (majority; 0.5 for AUROC), ``chance, n_classes, collapsed`` (seeds), ``published,
    published_baseline``. There is no row for what is not defined."""
    rows, known = [], published["linear_probe"]
    for target, (key, _) in TARGETS.items():
        for arm in (*MAIN, "pixels", "metadata"):
            if not (values := values_of(results, arm, key)):
                continue
            mean, *seeds = seed_interval(list(values.values()))
            fallen, row = len(collapsed(results, arm)), {"target": target, "arm": arm}
            none = 0 < fallen < len(values) or len(values) < 3
            seeds = [math.nan] * 2 if none else np.clip(seeds, 0, 1).tolist()
            row |= {"n_seeds": len(values), "accuracy": mean, "collapsed": fallen}
            row |= {"seeds_low": seeds[0], "seeds_high": seeds[1]}
            for name, ending in BESIDE.items():
                beside = list(values_of(results, arm, f"{key}_{ending}").values())
                row[name] = np.mean(beside) if beside else 0.5 if target == "findings" else math.nan
            row["ci_low"] = np.nanmin([seeds[0], row["patients_low"], mean])
            row["ci_high"] = np.nanmax([seeds[1], row["patients_high"], mean])
            row |= {"published": math.nan, "published_baseline": math.nan}
            if arm in known and target != "findings":
                row["published"] = known[arm]
                if target == "label_combinations":
                    row["published_baseline"] = known["majority_baseline_recomputed"]
            rows.append(row)
    return pd.DataFrame(rows)


def linear_probe_markdown(results: Results, frame: pd.DataFrame) -> str:
    """Table 1 (`linear_probe_table`) as Markdown, one block per target."""
    header = ["features", "value", "95 % over seeds", "95 % over patients", "majority", "classes"]
    label = results["dataset"]["label"]
    blocks = [f"**Table 1. Linear probes on frozen features.** Dataset: {label}."]
    for target, (key, name) in TARGETS.items():
        rows = []
        for r in frame[frame["target"] == target].itertuples() if len(frame) else ():
            intervals = span(r.seeds_low, r.seeds_high), span(r.patients_low, r.patients_high)
            value = number(r.accuracy) + " †" * bool(r.collapsed)
            about = number(r.baseline), f"{r.n_classes:.0f}", str(r.n_seeds), number(r.published)
            rows.append([ARMS[r.arm].title, value, *intervals, *about])
        why = next(filter(None, (reason(results, arm, key) for arm in MAIN)), "no run")
        text = table([*header, "seeds", "published"], rows, figures=True)
        text = text if rows else f"not defined: {why}."
        name = f"{len(results['dataset']['labels'])} {name}" if target == "findings" else name
        blocks.append(f"*{name[0].upper()}{name[1:]}*\n\n{text}")
    blocks.append(
        "Logistic regression. No patient is in training and test; the test images are the data "
        "set's own or, if it has none, those of a fifth of the patients. Value: accuracy, mean "
        "over seeds; for the labels the mean area under the ROC curve, where 0.5 is chance. "
        "Majority: always the most frequent class of the training images. Cluster assignments are "
        "the clusters of the same features, so their probe says how linear the clusters are, not "
        "what they mean. Published: 0.564 and 0.567, which the project page gives for cluster "
        "assignments and the published script computes for label combinations, where the majority "
        "scored 0.590."
    )
    return wrapped(note("\n\n".join(blocks))) + "\n"


# fmt: off
GLANCE = (  # name, measure, kind of baseline, its measure (empty: the same of untrained networks)
    ("NMI of the last two epochs", "nmi_final", "chance", "nmi_chance"),
    ("largest cluster, share of the images", "largest_cluster", "untrained", ""),
    ("loss of the last epoch, in units of ln K (1: a guess)", "loss_final", "", ""),
    ("probe: cluster assignments", "probe_clusters", "majority", "probe_clusters_majority"),
    ("probe: label combinations", "probe_combinations", "majority",
     "probe_combinations_majority"),
    ("probe: labels, mean AUROC", "auroc_macro", "untrained", ""),
    ("keeps its cluster: turns and mirrors of the square", "kept_lattice", "untrained", ""),
    ("AMI of clusters before and after other turns", "ami_free", "untrained", ""),
)
# fmt: on


def glance(results: Results) -> str:
    """README's results at a glance: a few measures of both arms, each beside its baseline."""
    rows = []
    for name, key, kind, beside in GLANCE:
        pairs = [(a, beside) for a in MAIN[:2]] if beside else [(a, key) for a in MAIN[2:]]
        base = " / ".join(cell(results, *pair, interval=False) for pair in pairs)
        cells = [cell(results, arm, key) for arm in MAIN[:2]]
        rows.append([name, *cells, f"{kind}: {base}" if kind else ""])
    titles = [ARMS[arm].title for arm in MAIN[:2]]
    header = [results["dataset"]["label"], *titles, "baseline (AlexNet / P4M)"]
    return note(table(header, rows, figures=True))


def head(results: Results, command: str) -> str:
    about, settings = results["dataset"], results["settings"]
    patients = f"{about['patients']:,} patients" if about["patients"] else "patients unknown"
    facts = [about["label"], patients, f"{about['n_test']:,} test images"]
    facts += [f"K = {settings['n_clusters']}", f"{settings['epochs']} epochs"]
    return f"{'; '.join(facts)}. Made by `{command}`.\n\n{about['attribution']}"


def summary(results: Results, frame: pd.DataFrame, captions: Mapping, command: str) -> str:
    """``summary.md``: the page's five key findings, each with this run's numbers, and the captions
    of the figures. `frame` is `linear_probe_table`; `captions` are by file name."""
    label = results["dataset"]["label"]
    blocks = [f"# Summary: {label}", head(results, command)]
    blocks += ["## Are the images spread over the clusters?", occupancy_table(results, MAIN)]
    blocks += ["## The five key findings of the page, with this run's numbers"]
    blocks += ["Mean over seeds, from three seeds on with a 95 % interval (Student's t)."]
    for place, claim in enumerate(CLAIMS, 1):
        text = measure_table(results, TABLES[claim.key][1], (*MAIN, "gaussian"))
        blocks.append(f"### {place}. {claim.title}: {claim.page}\n\n{text}")
    blocks += ["## Linear probes", linear_probe_markdown(results, frame).rstrip(), "## Figures"]
    blocks += [f"**{name}** {caption} Dataset: {label}." for name, caption in captions.items()]
    return "\n\n".join(blocks) + "\n"


SECTION = re.compile(r"<!-- figures of (\S+) -->\n.*?<!-- /figures of \1 -->\n", re.DOTALL)


def save_summary(path: Path | str, text: str | None, title: str = "", **added: str) -> None:
    """Write ``summary.md``, and below it the captions that notebooks have added (by notebook).
    `text` None leaves what is above them, `title` if there is no file."""
    path = Path(path)
    with alone(path.parent, path.with_suffix(".lock")):
        earlier = path.read_text(encoding="utf-8") if path.exists() else title
        sections = {found[1]: found[0] for found in SECTION.finditer(earlier)} | added
        text = SECTION.sub("", earlier) if text is None else text
        blocks = [text.rstrip("\n") + "\n", *(sections[name] for name in sorted(sections))]
        with atomic_write(path, "w") as handle:
            handle.write(wrapped("\n".join(blocks)))


def save_captions(path, notebook, figures: Mapping, label, seeds, command, attribution) -> None:
    """Put the captions of a notebook's figures (file name -> caption) into ``summary.md``, in place
    of earlier ones of `notebook`. A file that is not there begins with a title and `attribution`.
    """
    blocks = [f"## Figures of {notebook}"]
    blocks += [f"Seeds {', '.join(map(str, seeds))}. Made by `{command}`."]
    blocks += [f"**{name}** {caption} Dataset: {label}." for name, caption in figures.items()]
    begin, end = (f"<!-- {slash}figures of {notebook} -->\n" for slash in ("", "/"))
    section = {notebook: begin + "\n\n".join(blocks) + "\n" + end}
    save_summary(path, None, f"# Figures: {label}\n\n{attribution}", **section)
