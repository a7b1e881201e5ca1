"""Verdicts on the claims as text and tables: no sentence here knows a result."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lib.study import report
from lib.study.arms import ARMS
from lib.study.claims import (
    CLAIMS,
    LEAST_SEEDS,
    MEASURE,
    Claim,
    Results,
    collapsed,
    reason,
    rule,
    values_of,
)
from lib.study.report import SIDES, TABLES, cell, measure_table, note, number, span, table

MEANING = {"supported": "the claim holds here", "reversed": "here it is the other way round"}
MEANING |= {"no difference that matters": "the arms are alike here"}
MEANING |= {"not supported": "no advantage of a size that matters"}


def verdict_text(results: Results, comparison: Mapping, decided: Mapping) -> str:
    """``"supported"``, ``"cannot tell at n = 3; 12 seeds would"``, ``"not defined: no labels"``."""
    sides = [comparison[side] for side in SIDES]
    if not decided["n"]:
        why = [reason(results, arm, decided["measure"]) for arm in sides]
        return f"not defined: {next(filter(None, why), 'no number')}"
    text = decided["verdict"]
    if text == "cannot tell":
        needed, one = decided["needed"], decided["n"] < 2
        enough = f"at least {LEAST_SEEDS} seeds" if one else "not even 200 seeds"
        enough = f"{needed:.0f} seeds" if needed and math.isfinite(needed) else enough
        text += f" at n = {decided['n']}; {enough} would"
    return text + " †" * bool(comparison["collapsed"])


def _decided(comparison: Mapping) -> list[tuple]:
    """Claim, verdict and numbers of the measure that decides."""
    entries = {entry["measure"]: entry for entry in comparison["measures"]}
    pairs = zip(CLAIMS, comparison["verdicts"], strict=True)
    return [(claim, decided, entries[decided["measure"]]) for claim, decided in pairs]


def _kind(claim: Claim, decided: Mapping, entry: Mapping) -> str:
    clear = decided["verdict"] in ("supported", "reversed")
    small = clear and abs(entry["mean"]) < MEASURE[entry["measure"]].smallest
    words = ["exploratory"] * claim.exploratory + ["by less than what matters"] * small
    return f" ({', '.join(words)})" if words else ""


def _p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else number(value)


def verdict_table(results: Results) -> str:
    """The five claims with the verdicts of the page's own comparison, as Markdown."""
    if not results["comparisons"]:
        return "No two arms can be compared yet."
    comparison, rows = results["comparisons"][0], []
    for claim, decided, entry in _decided(comparison):
        measure = MEASURE[decided["measure"]]
        about = f"{measure.title}; smallest that matters: {measure.smallest:g}"
        numbers = [number(entry.get(key)) for key in (*SIDES, "mean")]
        numbers += [span(entry.get("low"), entry.get("high")), _p(entry.get("p_holm"))]
        text = verdict_text(results, comparison, decided)
        why = MEANING.get(decided["verdict"], "") if decided["n"] else ""
        verdict = f"**{text}**{_kind(claim, decided, entry)}" + f": {why}" * bool(why)
        rows.append([f"{claim.title}: {claim.page}", about, *numbers, str(decided["n"]), verdict])
    header = ["claim of the page", "measure, chosen beforehand"]
    header += [ARMS[comparison[side]].title for side in SIDES]
    header += ["difference, positive speaks for the claim", "95 %", "p, corrected", "seeds"]
    return note(table([*header, "verdict"], rows))


def _difference(entry: Mapping) -> str:
    return f"{number(entry.get('mean'))} ({span(entry.get('low'), entry.get('high'))})"


def regimes(results: Results) -> str:
    """Do verdicts hang on the loop? The page's pair, trained by the loop that learns and by the one
    that the page describes, as Markdown; empty if one of the two was not run."""
    found = {tuple(c[side] for side in SIDES): c for c in results["comparisons"]}
    pairs = [found.get((f"p4m{loop}", f"alexnet{loop}")) for loop in ("", "-described")]
    if None in pairs:
        return ""
    rows = []
    for (claim, _, *ours), (*_, theirs) in zip(*map(_decided, pairs), strict=True):
        both, signs = (*ours, theirs), set()
        for entry in both:
            low, high, mean = (entry.get(name, math.nan) for name in ("low", "high", "mean"))
            signs.add(math.copysign(low * high > 0, mean))
        hangs = "no: the same direction" if len(signs) == 1 else "yes: it turns round"
        hangs = "cannot tell: an interval holds 0" if 0 in signs else hangs
        within = MEASURE[theirs["measure"]].smallest
        if max(abs(theirs.get("low", math.inf)), abs(theirs.get("high", math.inf))) <= within:
            hangs += f"; as described it lies within what matters ({within:g})"
        rows.append([claim.title, *map(_difference, both), hangs])
    titles = zip(("the loop that learns", "the loop as described"), pairs, strict=True)
    header = [f"{title}, {len(of['seeds'])} seeds" for title, of in titles]
    return table(["claim", *header, "does the direction hang on the loop?"], rows)


def verdict_matrix(results: Results) -> str:
    """All comparisons, one row each, one column per claim: verdict, difference and interval."""
    rows = []
    for comparison in results["comparisons"]:
        cells = []
        for _, decided, entry in _decided(comparison):
            numbers = f": {_difference(entry)}" * bool(entry["seeds"])
            cells.append(verdict_text(results, comparison, decided) + numbers)
        about = " against ".join(ARMS[comparison[side]].title for side in SIDES)
        rows.append([f"{about}: {comparison['purpose']}", str(len(comparison["seeds"])), *cells])
    header = ["comparison", "seeds", *(claim.title for claim in CLAIMS)]
    return note(table(header, rows)) if rows else "No two arms can be compared yet."


def sensitivity_table(results: Results) -> str:
    """The page's comparison on every measure, those that decide in bold, and without the seeds in
    which a run collapsed."""
    if not results["comparisons"]:
        return "No two arms can be compared yet."
    comparison, rows = results["comparisons"][0], []
    whole = {v["measure"]: v["whole"] for v in comparison["verdicts"] if "whole" in v}
    for entry in comparison["measures"]:
        if entry["seeds"]:
            title, bold = MEASURE[entry["measure"]].title, "**" * entry["primary"]
            row = [f"{bold}{title}{bold}", *(number(entry[key]) for key in (*SIDES, "mean"))]
            row += [span(entry["low"], entry["high"]), _p(entry["p"]), _p(entry["sign_flip_p"])]
            text, apart = "–", whole.get(entry["measure"])
            if apart:
                text = f"{number(apart['mean'])} ({span(apart['low'], apart['high'])})"
            rows.append([*row, text])
    header = ["measure", *(ARMS[comparison[side]].title for side in SIDES)]
    header += ["difference", "95 %", "p, Student's", "p, sign flips", "without collapsed seeds"]
    return table(header, rows)


BESIDE = {"p4m-untrained": "P4M untrained", "pixels": "pixels"}
BESIDE |= {"metadata": "view, sex and age alone"}
TURNED = {"p4m-rotation": "P4M rotated", "cnn_params-rotation": "plain CNN rotated"}
TURNED |= {"alexnet-plain": "AlexNet not"}


def _short(arm: str) -> str:
    return ARMS[arm].title.split(",")[0]


def findings(results: Results) -> str:
    """README's first screen: a line per claim, then what the controls add, as Markdown."""
    if not results["comparisons"]:
        return "No two arms can be compared yet."
    page, *others = results["comparisons"]
    lines = []
    for claim, decided, entry in _decided(page):
        measure = MEASURE[decided["measure"]]
        text = f"- **{claim.title}: {verdict_text(results, page, decided)}**"
        text += f"{_kind(claim, decided, entry)}."
        if entry["seeds"]:
            values = [f"{_short(page[side])} {number(entry[side])}" for side in SIDES]
            values += [f"difference {_difference(entry)}"]
            text += f" {', '.join(values)}: {measure.title.split(' (')[0]}."
        lines.append(text)
    for comparison in others:
        if {comparison[side] for side in SIDES} == {"p4m", "cnn_params"}:
            found: dict[str, list] = {}
            for claim, decided, _ in _decided(comparison):
                found.setdefault(decided["verdict"], []).append(claim.title.lower())
            listed = "; ".join(f"{how}: {', '.join(titles)}" for how, titles in found.items())
            about = f"P4M against {_short('cnn_params')} of P4M's parameters"
            n = len(comparison["seeds"])
            lines.append(f"- **Is it the symmetry?** {about}: {listed} (n = {n}).")
    arms = [a for a in ("alexnet", "p4m", "cnn_params") if a in results["arms"]]
    keys = [f"follows_{name}" for name in ("findings", "view_position", "brightness", "patient")]
    told = [f"{_short(a)} {', '.join(cell(results, a, k, False) for k in keys)}" for a in arms]
    with_ = "(AMI with findings, view, brightness, patient)"
    lines.append(f"- **Clusters follow** {with_}: {'; '.join(told)}.")
    names = {arm: _short(arm) for arm in arms} | BESIDE
    told = [f"{name} {cell(results, a, 'auroc_macro', False)}" for a, name in names.items()]
    lines.append(f"- **Mean AUROC of a linear probe** of the findings: {'; '.join(told)}.")
    told = []
    for arm in (a for a in arms if f"{a}-described" in results["arms"]):
        loss, auroc = (
            "{} ({})".format(*(cell(results, a, key, False) for a in (f"{arm}-described", arm)))
            for key in ("loss_final", "auroc_macro")
        )
        told.append(f"{_short(arm)} {loss}, {auroc}")
    described = [c for c in others if c["treatment"] == "p4m-described"]
    if described and told:
        *_, entry = _decided(described[0])[0]
        about = f"**The loop as the page describes it**, {len(entry['seeds'])} seeds (in brackets: "
        about += f"that above): last loss / ln K, mean AUROC: {'; '.join(told)}"
        lines.append(f"- {about}; epochs, difference {_difference(entry)}.")
    there = {arm: name for arm, name in TURNED.items() if arm in results["arms"]}
    if there:
        n = min(len(results["arms"][arm]["seeds"]) for arm in there)
        told = []
        for arm, name in there.items():
            values = [cell(results, arm, key, False) for key in ("ami_free", "auroc_macro")]
            told.append(f"{name} {', '.join(values)}")
        about = f"**The augmentation turned round**, {n} seeds, AMI under turns and mean AUROC"
        lines.append(f"- {about}: {'; '.join(told)}.")
    runs = {arm: len(results["arms"][arm]["seeds"]) for arm in arms}
    told = [f"{_short(arm)} {len(collapsed(results, arm))} of {n}" for arm, n in runs.items()]
    lines.append(f"- **Runs that collapsed**: {', '.join(told)}.")
    k, epochs = (results["settings"][name] for name in ("n_clusters", "epochs"))
    about = f"{results['dataset']['label']}, K = {k}, {epochs} epochs (in brackets: 95 %):"
    if any("†" in line for line in lines):
        lines += ["", report.COLLAPSED]
    return report.wrapped("\n".join([about, "", *lines]))


def _beside(results: Results, claim: Claim) -> str:
    """What the measures beside a claim's caution say: both arms, raw pixels, Gaussian points."""
    told, page = [], results["comparisons"][0] if results["comparisons"] else {"measures": ()}
    for entry in page["measures"]:
        key = entry["measure"]
        if key in claim.beside and entry["seeds"]:
            values = [f"{_short(page[side])} {number(entry[side])}" for side in SIDES]
            for arm in ("pixels", "gaussian"):
                if values_of(results, arm, key):
                    values.append(f"{_short(arm)} {cell(results, arm, key, False)}")
            title = MEASURE[key].title[0].upper() + MEASURE[key].title[1:]
            told.append(f"{title}: {', '.join(values)}; difference {_difference(entry)}.")
    return " ".join(["", *told])


def claims_pages(results: Results, command: str) -> dict[str, str]:
    """``claims.md``, two pages of verdicts and figures, and ``claims_appendix.md``, the numbers
    behind them, by file name."""
    arms = []
    for a in results["arms"].values():
        about = [a["title"], a["backbone"], "yes" if a["rotation"] else "no", a["pseudo_labels"]]
        about += [f"{a['parameters']:,}", f"{a['flops'] / 1e6:,.1f}"]
        about += [f"{a['feature_dim']:,}" if a["feature_dim"] else "–"]
        arms.append([*about, ", ".join(a["seeds"])])
    header = ["arm", "backbone", "rotation", "trained on", "parameters", "MFLOPs per image"]
    label, top = results["dataset"]["label"], report.head(results, command)
    page = [
        f"# Which of the paper's claims hold: {label}",
        top,
        "**Not for clinical use.** Verdicts are about this data, these network widths and this "
        "number of seeds, not about the paper's own runs. The plan is in `docs/plan.md`. The "
        "numbers behind this page are in [claims_appendix.md](claims_appendix.md).",
        verdict_table(results),
        rule(),
        "![Differences of the deciding measures, a dot per seed](fig5_claims.png)",
        "## All comparisons",
        "![Verdicts of all comparisons on the five claims](fig14_verdicts.png)",
        *(["## Does it hang on the loop?", text] if (text := regimes(results)) else []),
        "## What clusters follow",
        "![AMI of the clusters with what is known of the images](fig15_follows.png)",
        "## What the measures cannot show",
        "\n".join(f"- **{c.title}.** {c.caution}{_beside(results, c)}" for c in CLAIMS),
    ]
    behind = [
        f"# The numbers behind the verdicts: {label}",
        top,
        "**Not for clinical use.** The verdicts are in [claims.md](claims.md).",
        "## Are the images spread over the clusters?",
        report.occupancy_table(results),
        "## All comparisons",
        "Difference of the deciding measure with its 95 % interval; positive speaks for the claim.",
        verdict_matrix(results),
        f"## {TABLES['meaning'][0]}",
        measure_table(results, TABLES["meaning"][1]),
        "## Every measure of the page's comparison",
        sensitivity_table(results),
        "## Arms",
        table([*header, "features", "seeds"], arms),
        "Parameters without the top layer; FLOPs of the features of one image, group convolutions "
        "counted as dense ones. `claims.csv` holds every comparison on every measure.",
    ]
    if results["missing"]:
        behind.append("## What is missing\n\n" + "\n".join(f"- {m}" for m in results["missing"]))
    named = {"claims.md": page, "claims_appendix.md": behind}
    return {name: report.wrapped("\n\n".join(blocks)) + "\n" for name, blocks in named.items()}
