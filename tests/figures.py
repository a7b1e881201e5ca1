"""Small made-up inputs for the tests of figures."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from lib import paths

LABEL = "synthetic phantom, 2,000 images"
PUBLISHED = pd.read_csv(paths.ROOT / "data" / "published" / "curves.csv")
ANGLES = np.arange(0, 360, 45)


def metrics(n_seeds=3, n_epochs=6, level=0.6):
    seed, epoch = np.divmod(np.arange(n_seeds * n_epochs), n_epochs) + np.array([[0], [1]])
    nmi = np.where(epoch == 1, np.nan, level + 0.03 * np.sin(epoch + seed))
    table = pd.DataFrame({"epoch": epoch, "seed": seed, "nmi_prev": nmi, "ami_prev": nmi - 0.1})
    return table.assign(loss=2.9 - 0.1 * epoch + 0.02 * seed)


RUNS = {"alexnet": metrics(), "p4m": metrics(level=0.5)}


def classes(n_seeds=3):
    rows = [(e, s, 0.3 + 0.05 * e + 0.01 * s) for e in range(5) for s in range(n_seeds)]
    return pd.DataFrame(rows, columns=["epoch", "seed", "ami"]).assign(nmi=lambda t: t["ami"] + 0.1)


def runs_table():
    largest = {"p4m": (0.07, 0.08), "alexnet": (0.55, 0.08, 0.64)}
    rows = [(arm, s, x) for arm, values in largest.items() for s, x in enumerate(values)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "largest_cluster"])
    return table.assign(clusters_used=[20, 20, 14, 20, 12], perplexity=19.0, n_clusters=20)


def maps(n=300, n_clusters=12):
    generator = np.random.default_rng(0)
    names = ["No Finding", "", "Effusion", "Mass", "Effusion|Mass", "Pleural_Thickening", "Edema"]
    findings = list(generator.choice([*names, "Hernia", "Nodule", "Fibrosis", "Pneumonia"], n))
    points = {arm: generator.normal(0, 10, (n, 2)) for arm in ("alexnet", "p4m")}
    return points, {arm: generator.integers(n_clusters, size=n) for arm in points}, findings


def probes():
    rows = [
        ("clusters", "alexnet", 0.93, 0.90, 0.95, 0.10, 0.564, np.nan, 3),
        ("clusters", "p4m", 0.83, 0.80, 0.86, 0.11, 0.567, np.nan, 3),
        ("label_combinations", "p4m", 0.56, 0.53, 0.59, 0.56, 0.567, 0.59, 1),
        ("findings", "p4m-untrained", np.nan, np.nan, np.nan, 0.5, np.nan, np.nan, 1),
    ]
    columns = ["target", "arm", "accuracy", "ci_low", "ci_high", "baseline", "published"]
    return pd.DataFrame(rows, columns=[*columns, "published_baseline", "n_seeds"])


def xrays(n=40):
    images = np.random.default_rng(2).integers(0, 256, (n, 64, 64), dtype=np.uint8)
    return images, [["Mass", "Mass|Nodule", "No Finding", "Effusion"][i % 4] for i in range(n)]


def effect(i, name):
    """Mass changes the upper left corner, other labels nothing."""
    change = np.zeros((64, 64))
    change[:20, :20] = 50 * (name == "Mass")
    return change


def people(n=40):
    patients, ages = [str(i // 3) for i in range(n)], np.linspace(20, 80, n)
    sexes, views = ["F", "M", "", "O"] * (n // 4), ["PA", "AP"] * (n // 2)
    table = {"patient_id": patients, "age": ages, "sex": sexes, "view_position": views}
    return pd.DataFrame(table)


def textures():
    names = ["No Finding"] * 9 + ["Mass"] * 3 + ["7"]
    table = pd.DataFrame({"finding": names, "image": range(13)})
    return table.assign(contrast=np.arange(13.0), energy=np.arange(13.0) ** 2)


def cluster(number, size=20):
    mean, enriched = np.full((64, 64), 10.0 * number), [("AP_view", 0.5, 0.1, 0.01)] * 5
    found = {"number": number, "size": size, "medoid": 0, "nearest": [1, 2, 3], "mean": mean}
    return SimpleNamespace(**found, enriched=enriched if number == 3 else [])


def arms():
    """Arms with made-up measures: that of arm i and seed s is 0.5 + i / 10 + s / 100."""
    found = {}
    for i, name in enumerate(("alexnet", "p4m", "alexnet-plain", "p4", "cnn_params")):
        by_seed = {str(seed): 0.5 + i / 10 + seed / 100 for seed in range(3)}
        measure = {"mean": 0.51 + i / 10, "by_seed": by_seed}
        names = ("auroc_macro", "auroc_micro", "auroc_macro_prevalence", "auroc_micro_prevalence")
        names += ("kept", "steady", "tells_mirrored", "tells_quarter_turn")
        measures = dict.fromkeys(names, measure)
        found[name] = {"seeds": [0, 1, 2], "measures": measures}
    return found


def result(n_seeds=3):
    """What a forest is drawn from: P4M against two arms, one measure better high, one low."""
    keys, references, seeds = ("kept", "steady"), ("alexnet", "cnn_params"), list(range(n_seeds))
    measures = [
        {"key": key, "title": f"measure {key}", "higher_is_better": better, "smallest": 0.05}
        for key, better in zip(keys, (True, False), strict=True)
    ]
    entry = {"seeds": seeds, "mean": 0.1, "low": -0.1, "high": 0.3}
    if n_seeds == 1:
        entry |= {"low": None, "high": None}
    verdicts = [{"measure": key, "verdict": "cannot tell", "n": n_seeds} for key in keys]
    compared = {"verdicts": verdicts, "measures": [entry | {"measure": key} for key in keys]}
    compared |= {"treatment": "p4m", "seeds": seeds}
    comparisons = [{"reference": name, **compared} for name in references]
    claims = [{"title": "More structured representations", "exploratory": False}]
    claims += [{"title": "Stability", "exploratory": True}]
    parts = {"claims": claims, "measures": measures, "comparisons": comparisons, "arms": arms()}
    return {**parts, "dataset_label": LABEL}


def enrichment(n_clusters=4):
    """Mass in cluster 1 only; Hernia too rare to say; AP view below the line."""
    rows = []
    for name, kind in {"Mass": "finding", "Hernia": "finding", "AP view": "no"}.items():
        for number in range(n_clusters):
            found = name == "Mass" and number == 1
            share, odds, q = (0.8, 3.0, 0.001) if found else (0.1, 0.5, 0.9)
            share = 0.04 if name == "Hernia" else share
            agreement = 0.2 if name == "Mass" else 0.0
            rows.append((name, kind, number, 25 + number, share, odds, q, agreement))
    columns = ["property", "kind", "cluster", "n", "share", "log2_odds", "q", "ami"]
    return pd.DataFrame(rows, columns=columns)
