"""The parts of the measuring: what is asked of a run or a baseline.

Each part returns what it found by name: a number, or a text that says why there is none; a table or
curve (dict); answers image by image (array), which `lib.study.measure` keeps."""

import math

import numpy as np
from scipy.special import expit
from sklearn.manifold import TSNE, trustworthiness
from sklearn.metrics import silhouette_score

from lib import images, kmeans, metrics
from lib.deepcluster import cluster
from lib.study import clusters, curves, retrieval, scores
from lib.study.claims import LEAST_PERPLEXITY
from lib.study.subjects import Material, Metadata, Network, Pixels, Random

ANGLES = tuple(range(0, 360, 15))  # degrees; those that are no quarter turn are the free turns
FREE = np.array([angle % 90 != 0 for angle in ANGLES])
MOVES = {"mirrored": (True, 0), "upside_down": (False, 2), "quarter_turn": (False, 1)}
RATES = np.linspace(0, 1, 51)  # false positive rates at which ROC curves are read
LEAST_SIDED = 10  # effusions of one side in training and in test
FEW = "fewer than 2 classes"

Found = dict
Subject = Network | Pixels | Metadata


def _unfit(labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> str:
    """Why no probe of `labels` (-1: not stated) can be fitted and tested; empty if it can."""
    if (labels < 0).all():
        return "no labels"
    if not len(train) or not len(test):
        part = "test" if len(train) else "training"
        return f"no {part} images" + " with labels" * bool((labels < 0).any())
    return FEW if len(np.unique(labels[train])) < 2 else ""


def _probe(subject: Subject, material: Material, name: str, labels: np.ndarray, *rows) -> tuple:
    """Numbers of a probe of `labels`, and the whole answer of `lib.metrics.probe`, if any."""
    if reason := _unfit(labels, *rows):
        return {f"probe_{name}": reason}, {}
    options = {"groups": material.patients, "seed": subject.seed, "n_boot": material.effort.n_boot}
    answer = metrics.probe(subject.features, labels, *rows, **options)
    numbers = ("low", "high", "majority", "chance", "n_classes")
    found = {f"probe_{name}": answer["accuracy"], name: answer["correct"]}
    return found | {f"probe_{name}_{key}": answer[key] for key in numbers}, answer


def cluster_probe(subject: Subject, material: Material) -> Found:
    """How linear the clusters are in the features: the page's probe."""
    rows = material.rows(stated=False)
    found, _ = _probe(subject, material, "clusters", subject.assignments, *rows)
    return found | {"test": rows[1], "test_patients": material.patients[rows[1]]}


def combination_probe(subject: Subject, material: Material) -> Found:
    """Each distinct set of labels as a class: the probe of the published script."""
    train, test = material.rows()
    found, answer = _probe(subject, material, "combinations", material.codes, train, test)
    if answer:
        shares = np.unique(material.codes[train], return_counts=True)[1] / len(train)
        one_of = (material.codes[test][:, None] == answer["classes"]).ravel()
        guesses = {"": answer["probabilities"], "_prevalence": np.tile(shares, (len(test), 1))}
        for ending, guess in guesses.items():
            area = scores.weighted_auroc(guess.ravel(), one_of, np.ones((1, one_of.size)))
            found[f"micro_combinations{ending}"] = float(area[0])
    return found | {"labelled_test": test, "labelled_test_patients": material.patients[test]}


def label_probe(subject: Subject, material: Material) -> Found:
    """One linear classifier per label, as the field does."""
    targets, seed, features = material.targets, subject.seed, subject.features

    def answer(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        if not len(train) or not len(test):
            return np.full((len(test), len(material.labels)), np.nan)
        options = {"groups": material.patients, "seed": seed}
        return scores.finding_scores(features, targets, train, test, **options)

    own_train, own_test = material.own_rows(seed)
    own = scores.multilabel_scores(answer(own_train, own_test), targets[own_test], micro=False)
    train, test = material.rows()
    log_odds = answer(train, test)
    found: Found = {"auroc_macro_own": float(own["auroc_macro"][0])}
    if np.isnan(log_odds).all():
        reason = _unfit(material.codes, train, test) or FEW
        return found | dict.fromkeys(("auroc_macro", "ap_macro", "auroc_micro"), reason)
    asked, probabilities = targets[test], expit(log_odds)
    # what a guess without a look at images gives: the shares in training
    guess = np.where(np.isnan(log_odds), np.nan, targets[train].mean(axis=0))
    ours, blind = (scores.multilabel_scores(some, asked) for some in (probabilities, guess))
    draws = metrics.bootstrap_weights(material.patients[test], material.effort.n_boot, seed)
    again = (scores.multilabel_scores(log_odds, asked, draw, micro=False) for draw in draws)
    low, high = metrics.percentile_interval(numbers["auroc_macro"] for numbers in again)
    found |= {"auroc_macro_low": low, "auroc_macro_high": high}
    found["auroc_macro_n_classes"] = int((~np.isnan(log_odds).any(axis=0)).sum())
    for name in ("auroc_macro", "auroc_micro", "ap_macro"):
        found |= {name: float(ours[name][0]), f"{name}_prevalence": float(blind[name][0])}
    for name, some in {"roc": probabilities, "roc_guess": guess}.items():
        found[name] = scores.roc_curves(some, asked, RATES)
    return found | {"findings": log_odds, "truth": asked}


def structure(subject: Subject, material: Material) -> Found:
    """Are images spread over the clusters, and are these apart: where they were made, in t-SNE?"""
    effort, index = material.effort, material.sample(material.effort.n_map)
    points, labels = subject.embedding[index], subject.assignments[index]
    several, maps = len(np.unique(labels)) > 1, []
    neighbours = min(effort.n_neighbors, (len(index) - 1) // 2 - 1)
    for perplexity in sorted({min(p, (len(index) - 1) // 3) for p in effort.perplexities}):
        for seed in effort.map_seeds:
            options = {"init": "random", "max_iter": 500, "random_state": seed}
            flat = TSNE(perplexity=perplexity, **options).fit_transform(points)
            # Venna and Kaski 2001; 1: no false neighbours, about 0.5: a random map
            trust = trustworthiness(points, flat, n_neighbors=neighbours)
            shared = scores.finding_neighbourhood(flat, material.targets[index], neighbours)
            maps.append([trust, shared, silhouette_score(flat, labels) if several else math.nan])
    found = dict(metrics.cluster_structure(subject.embedding, subject.assignments, seed=0))
    names = ("map_trust", "map_findings", "map_silhouette")
    found |= dict(zip(names, np.mean(maps, axis=0).tolist(), strict=True))
    found = {k: "one cluster" if math.isnan(v) and not several else v for k, v in found.items()}
    return found | metrics.occupancy(subject.assignments, subject.n_clusters)


def halves(subject: Subject, material: Material) -> Found:
    """AMI of the labels that two clusterings, each of a third of the patients, give to the images
    of the last third by their nearest centroids: a stability that can be wrong."""
    rng, patients = np.random.default_rng([subject.seed, 4]), material.patients
    third = rng.integers(3, size=patients.max() + 1)[patients]
    asked, labels, config = subject.features[third == 2], [], subject.config
    if min((third == 0).sum(), (third == 1).sum()) < config.n_clusters or not len(asked):
        return {"ami_halves": "fewer images than clusters"}
    for part in (0, 1):
        _, whiten, clusterer = cluster(subject.features[third == part], config, config.epochs + 1)
        labels.append(kmeans.nearest(whiten.transform(asked), clusterer.cluster_centers_))
    return {"ami_halves": metrics.ami(*labels)}


def invariance(subject: Subject, material: Material) -> Found:
    """Who keeps the cluster, and how far do features move, under symmetries and other turns?"""
    index = material.sample(material.effort.n_turned)
    chosen = np.array(material.images[index])
    copies = [images.moved(chosen, *symmetry) for symmetry in images.SYMMETRIES]  # first: itself
    copies += [images.turned(chosen, angle) for angle in ANGLES]
    features = subject.extract(np.concatenate(copies))
    there = subject.assign(features).reshape(len(copies), len(chosen))
    embedded = subject.embed(features).reshape(*there.shape, -1)
    curves = {"kept": metrics.kept_share(there[0], there)}
    curves["ami"] = np.array([metrics.ami(there[0], moved) for moved in there])
    curves["distance"] = scores.relative_distance(embedded[0], embedded)
    n = len(images.SYMMETRIES)
    found: Found = {"symmetries": {key: curve[:n] for key, curve in curves.items()}}
    found |= {"angles": {key: curve[n:] for key, curve in curves.items()}}
    for key, curve in curves.items():
        found[f"{key}_lattice"] = float(curve[1:n].mean())
        found[f"{key}_free"] = float(curve[n:][FREE].mean())
    if material.turned is None:
        return found | {"kept_drawn": "not phantoms"}
    drawn = subject.assign(subject.extract(np.array(material.turned[index])))
    return found | {"kept_drawn": float((drawn == there[0]).mean())}


def laterality(subject: Subject, material: Material) -> Found:
    """The price of invariance: can a linear classifier tell left from right, and up from down? An
    image and its moved copy are both in the data, so 0.5 is chance."""
    index = material.sample(material.effort.n_moved, seed=1)
    chosen, test = np.array(material.images[index]), np.isin(index, material.rows(stated=False)[1])
    if test.all() or not test.any():
        reason = f"no {'training' if test.all() else 'test'} images"
        return {f"tells_{name}": reason for name in MOVES}
    here, both, found = subject.extract(chosen), np.tile(test, 2), {}
    options = {"groups": np.tile(material.patients[index], 2), "seed": subject.seed, "n_boot": 0}
    moved = np.repeat([0, 1], len(index))
    for name, move in MOVES.items():
        features = np.concatenate([here, subject.extract(images.moved(chosen, *move))])
        found[f"tells_{name}"] = metrics.probe(features, moved, ~both, both, **options)["accuracy"]
    return found


def effusion_side(subject: Subject, material: Material) -> Found:
    """Can a linear classifier tell a left from a right effusion?

    Each image is used twice, as it is and mirrored (side swapped): otherwise left and right
    effusions are of different patients, whom a probe could tell apart without seeing the side."""
    side, (train, test) = material.metadata.get("side"), material.rows()
    if side is None or "Effusion" not in material.labels:
        return {"tells_effusion_side": "no side stated"}
    has = material.targets[:, material.labels.index("Effusion")] & side.isin(["L", "R"]).to_numpy()
    index = np.concatenate([train[has[train]], test[has[test]]])
    tested = np.tile(np.isin(index, test), 2)
    if min((~tested).sum(), tested.sum()) < 2 * LEAST_SIDED:
        return {"tells_effusion_side": f"fewer than {LEAST_SIDED} effusions"}
    mirrored = subject.extract(images.moved(np.array(material.images[index]), True, 0))
    features = np.concatenate([subject.features[index], mirrored])
    left = (side == "L").to_numpy()[index]
    left = np.concatenate([left, ~left])[:, None]
    options = {"groups": np.tile(material.patients[index], 2), "seed": subject.seed}
    area = scores.findings_auroc(features, left, ~tested, tested, **options)
    return {"tells_effusion_side": float(area[0])}


def meaning(subject: Subject, material: Material) -> Found:
    """Agreement of clusters with labels and with what should not matter."""
    values = clusters.drivers(subject.assignments, material.images, material.metadata)
    return {f"follows_{key}": FEW if math.isnan(v) else v for key, v in values.items()}


def found_again(subject: Subject, material: Material) -> Found:
    """Precision at k by label, and how often the same patient is found again."""
    rows = np.flatnonzero(material.codes >= 0)
    if not len(rows) or not material.targets.any():
        return {"retrieval_lift": FEW if len(rows) else "no labels"}
    vectors = subject.describe(material.images)[rows]
    some = material.targets[rows], material.patients[rows]
    answer = retrieval.precision_at_k(vectors, *some, material.effort.k)
    lift = float(scores.mean_known(answer["precision"] - answer["chance"]))
    same = ("same_patient", "same_patient_chance")
    return {"retrieval_lift": lift} | {f"retrieval_{key}": answer[key] for key in same}


CURVES = ("epoch", "nmi_prev", "ami_prev", "loss", "largest_cluster", "clusters_used", "perplexity")
OF_CURVES = ("settled_ami", "shortfall_ami", "spread_ami", "spread_loss", "converged_nmi", "nmi_sd")
OF_CURVES += ("nmi_final", "ami_final", "loss_final", "nmi_chance")
LEAST_LEARNT = 0.9  # last loss / ln K: above it nothing was learnt


def training(subject: Network, material: Material) -> Found:
    """Convergence and stability of a run, and its curves. A network that has not learnt counts as
    never settled: one epoch more than it was trained."""
    table, config = subject.run.metrics, subject.run.config
    found: Found = {"curves": {name: table[name].tolist() for name in CURVES if name in table}}
    if len(table) < 2:
        return found | dict.fromkeys(OF_CURVES, "too few epochs")
    loss = table["loss"].to_numpy() / math.log(config.n_clusters)
    found |= {"loss_final": float(loss[-1]), "spread_loss": curves.spread(loss)}
    found["nmi_chance"] = metrics.chance_nmi(*subject.run.assignments[-2:], seed=config.seed)
    nmi, ami = (table[f"{name}_prev"].dropna().to_numpy() for name in ("nmi", "ami"))
    found |= {"nmi_final": float(nmi[-1]), "ami_final": float(ami[-1])}
    even = float(table["perplexity"].iloc[-1]) >= LEAST_PERPLEXITY * config.n_clusters
    learnt = loss[-1] <= LEAST_LEARNT and even
    # the curves start at epoch 2
    found["settled_ami"] = 2 + curves.settling_time(ami) if learnt else len(table) + 1.0
    found |= {"shortfall_ami": curves.shortfall(ami), "spread_ami": curves.spread(ami)}
    first = 1 + curves.convergence_epoch(nmi)
    found |= {"converged_nmi": len(table) + 1.0 if math.isnan(first) else first}
    found["nmi_sd"] = curves.raw_spread(nmi)
    few = {name: "too few epochs" for name in OF_CURVES if math.isnan(found[name])}
    return found | few


def factors(material: Material) -> dict[str, np.ndarray]:
    """What is known to differ between the images: name -> class of each image, (N,) of str.

    ``classes`` if each image has exactly one label; view, sex, brightness (quarters of the mean
    gray value); else the three most frequent labels. What is equal for all images is left out."""
    texts, gray = material.metadata["findings"], clusters.brightness(material.images)
    found = {key: material.metadata.get(key) for key in ("view_position", "sex")}
    found["brightness"] = np.searchsorted(np.quantile(gray, (0.25, 0.5, 0.75)), gray)
    if (texts != "").all() and not texts.str.contains("|", regex=False).any():
        found = {"classes": texts} | found
    else:
        for place in np.argsort(-material.targets.sum(axis=0), kind="stable")[:3]:
            found[material.labels[place]] = material.targets[:, place]
    columns = {name: np.asarray(known).astype(str) for name, known in found.items()}
    return {name: known for name, known in columns.items() if len(np.unique(known)) > 1}


def known(subject: Network, material: Material) -> Found:
    """Do clusters find what is there? AMI with each of `factors` in each epoch and, last, at the
    end. The clusters of epoch 1 are those of the untrained network."""
    rows, there = [*subject.run.assignments, subject.assignments], factors(material)
    found = {name: [metrics.ami(row, of) for row in rows] for name, of in there.items()}
    ami = nmi = "no single classes"
    if "classes" in there:
        ami, nmi = found["classes"][-1], metrics.nmi(subject.assignments, there["classes"])
    return {"known": found, "ami_classes": ami, "nmi_classes": nmi}


def agreement_by_chance(subject: Random, material: Material) -> Found:
    """Two sets of random assignments."""
    pair = subject.assignments, subject.assign(subject.features)
    return {"nmi_final": metrics.nmi(*pair), "ami_final": metrics.ami(*pair)}


BLIND = (cluster_probe, structure, invariance, meaning)  # of clusters alone
PARTS = (*BLIND, halves, combination_probe, label_probe, laterality, effusion_side, found_again)
OF_IMAGES = (invariance, laterality, effusion_side)  # they move the image
OF_BASELINE = {"pixels": PARTS, "random": (*BLIND, agreement_by_chance)}
OF_BASELINE |= {"metadata": (combination_probe, label_probe), "gaussian": (structure, halves)}
OF_BASELINE["given"] = tuple(part for part in PARTS if part not in OF_IMAGES)
OF_PIXELS = ("map_trust", "map_findings", "distance_")  # what random clusters have no part in
