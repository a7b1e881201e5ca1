"""Synthetic frontal chest radiographs at 64x64 with known findings: the default data set.

A phantom is a sum of attenuations (soft tissue, minus lung air, plus bone, heart, vessels, devices)
at every pixel, passed through a saturating film curve. Nothing is resampled: a turned phantom is
the same scene seen by a turned detector, and no blur betrays its angle. Shapes and gray levels were
fitted to NIH ChestX-ray14 at this size: mean PA and AP image, percentiles, radial power spectrum.

Scene coordinates: x to the image's right (the patient's left), y downwards, the frame is [-1, 1] in
both; 1 is about 19 cm."""

import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.stats import norm

from lib.data.nih import COUNTS, FINDINGS, IMAGES, findings_text

ATTRIBUTION = "Synthetic radiographs drawn by lib.data.phantom of this project; they show no "
ATTRIBUTION += "patient. Not for clinical use."
ORIENTATIONS = ("upright", "any")
SIZE = 64
# Images and patients are drawn in whole blocks, so that image i never depends on n. A block of 32
# images takes half a MB per array and stays in the cache.
_CHUNK, _PATIENTS = 32, 256
_TREES, _ATLAS = 8, 256
_INNER = 0.10  # where the lungs begin beside the midline

# Anatomy and acquisition: mean, standard deviation between patients, between images of a patient,
# then the shift of an AP (portable) view, of a woman, and of ten years over the mean age of 49.
_PARAMETERS = {
    # framing
    "zoom": (1.02, 0.06, 0.05, 0.02, -0.01, 0), "shift_x": (0, 0, 0.055, 0, 0, 0),
    "shift_y": (0, 0.03, 0.075, 0.02, 0, 0), "tilt": (0, 0, 2.3, 0, 0, 0),
    "twist": (0, 0.01, 0.025, 0, 0, 0),
    # body outline
    "body": (0.93, 0.07, 0.04, 0.07, -0.05, 0.01), "neck": (0.205, 0.022, 0.012, 0.02, -0.025, 0),
    "shoulder": (-0.83, 0.07, 0.06, 0.02, 0.02, 0), "slope": (0.18, 0.08, 0.06, -0.02, 0.02, 0),
    "flare": (0.42, 0.1, 0.05, 0.05, -0.05, 0), "arm": (1, 0.06, 0.08, 0.04, -0.02, 0),
    "fat": (0.98, 0.08, 0.03, 0.03, 0.02, 0.01), "breast": (0.02, 0.03, 0.01, 0, 0.22, 0),
    # lungs
    "apex": (-0.74, 0.03, 0.02, 0.04, 0, 0), "width": (0.655, 0.035, 0.02, -0.04, -0.03, 0),
    "dome": (0.38, 0.06, 0.05, -0.1, 0, 0), "dome_left": (0.055, 0.025, 0.01, 0, 0, 0),
    "curve": (1.25, 0.3, 0.08, 0, 0, 0), "air": (1.17, 0.09, 0.07, -0.19, -0.03, 0.01),
    "haze": (0.03, 0.03, 0.03, 0.09, 0.01, 0.01), "edge": (0.07, 0.01, 0.01, 0.045, 0, 0),
    "vessel": (0.22, 0.04, 0.03, -0.03, 0, 0.008),
    # mediastinum
    "heart": (0.265, 0.024, 0.01, 0.03, -0.004, 0.005),
    "knob": (0.068, 0.012, 0.004, -0.01, -0.005, 0.01),
    "mediastinum": (0.112, 0.013, 0.008, 0.02, -0.006, 0.003),
    # bones
    "ribs": (0.11, 0.03, 0.015, -0.045, -0.01, -0.004),
    "spacing": (0.155, 0.01, 0.002, -0.008, 0, 0), "phase": (0, 0.4, 0.05, 0, 0, 0),
    "clavicle": (-0.56, 0.04, 0.05, -0.03, 0, 0), "spine": (0.19, 0.05, 0.04, -0.07, 0, -0.01),
    "scoliosis": (0, 0.02, 0.003, 0, 0, 0), "bubble": (0.1, 0.03, 0.03, -0.02, 0, 0),
    # film
    "gain": (1.14, 0.04, 0.15, -0.1, 0, 0), "gamma": (1.15, 0.04, 0.2, -0.05, 0, 0),
    "white": (242, 2, 8, -12, 0, 0), "black": (3, 1, 3, 3, 0, 0),
    "ramp": (0, 0, 0.05, 0, 0, 0), "noise": (0.7, 0, 0.3, 0.1, 0, 0),
    # where focal findings sit: fraction of the lung's width and of its height
    "mass_x": (0.55, 0.15, 0.01, 0, 0, 0), "mass_y": (0.48, 0.18, 0.01, 0, 0, 0),
    "nodule_x": (0.58, 0.17, 0.01, 0, 0, 0), "nodule_y": (0.52, 0.2, 0.01, 0, 0, 0),
    "focus_x": (0.52, 0.14, 0.05, 0, 0, 0), "focus_y": (0.66, 0.14, 0.05, 0, 0, 0),
}  # fmt: skip
_NAMES = tuple(_PARAMETERS)
_TABLE = np.array(list(_PARAMETERS.values()), dtype=np.float64)


def _step(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Smooth step from 0 to 1 as `distance` runs from -width/2 to width/2; a pixel is 1/32."""
    t = np.clip(distance * (1 / width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def _bump(u: np.ndarray) -> np.ndarray:
    """exp(-u^2)."""
    return np.exp(-np.square(u))


def _disc(s: SimpleNamespace, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Round opacity at lung fractions (x, y), projected thickness of a ball."""
    y = y + np.where(s.x > 0, 0.12, -0.04) * s.left * s.right  # on both sides, no mirror image
    dx, dy = s.X - _INNER - x * (s.width - _INNER), s.y - s.apex - y * (s.floor - s.apex)
    return s.on * s.lung * np.clip(1.3 - (dx**2 + dy**2) / radius**2, 0, 1)


def _focus(s: SimpleNamespace, radius: float) -> np.ndarray:
    """Ill-defined region around the patient's airspace focus, on the affected side."""
    dx = s.X - _INNER - s.focus_x * (s.width - _INNER)
    dy = s.y - s.apex - s.focus_y * (s.floor - s.apex)
    return s.on * s.lung * _bump(np.sqrt(dx**2 + (0.8 * dy) ** 2) / radius)


def _sign(finding: str, s: SimpleNamespace) -> np.ndarray:
    """What a finding of severity `s.a` adds to the density of the scene."""
    match finding:
        case "Atelectasis":  # a plate over a raised diaphragm (see _SHAPES), crowded base
            plate = s.y - s.floor + 0.17 + 0.25 * (s.X - 0.35) * (s.pick - 0.3)
            base = 0.30 * _bump((s.y - s.floor) / 0.16)
            plate = 0.42 * _bump(plate / 0.032) * _step(s.X - 0.18, 0.1)
            return s.on * s.lung * s.a * (plate + base)
        case "Consolidation":  # dense airspace filling, bronchi standing out dark in it
            return 0.60 * s.a * _focus(s, 0.26) * (1 + 0.3 * s.cloud) * (1 - 1.5 * s.vessels)
        case "Edema":  # bat wings at the hila, fuller vessels, Kerley lines at the lateral bases
            wing = _bump((s.X - 0.26) / 0.19) * _bump((s.y + 0.02) / 0.30)
            wing = 0.36 * wing * (1 + 0.4 * s.cloud)
            lateral, basal = (s.lateral - 0.06) / 0.06, (s.y - s.floor + 0.15) / 0.15
            kerley = np.sin(s.y * 75) * _bump(lateral) * _bump(basal)
            return s.a * s.lung * (wing + 0.10 * kerley + 0.6 * s.vessels)
        case "Effusion":  # fluid in the costophrenic angle, a meniscus climbing the lateral wall
            level = s.floor + 0.10 - s.a * (0.23 + 0.27 * (s.X / s.width) ** 4)
            return s.on * s.aired * 0.95 * _step(s.y - level, 0.09)
        case "Emphysema":  # bright air, few vessels; flat diaphragms and a narrow heart
            return -s.a * (0.13 * s.aired + 0.5 * s.vessels * s.lung)
        case "Fibrosis":  # reticular lines, basal and peripheral, both lungs
            basal, peripheral = _step(s.t - 0.60, 0.6), 0.5 + _bump(s.lateral / 0.18)
            return 0.34 * s.a * s.lung * (0.6 + 0.8 * s.net) * basal * peripheral
        case "Hernia":  # round retrocardiac shadow: gas above a straight fluid level
            r = np.sqrt((s.x - 0.07) ** 2 + (s.y - s.floor + 0.16) ** 2) / (0.10 + 0.05 * s.a)
            content = np.where(s.y > s.floor - 0.15, 0.35, -0.45)
            return _step(1 - r, 0.3) * content + 0.25 * _bump((r - 1) / 0.15)
        case "Infiltration":  # patchy, ill-defined haze
            return 0.44 * s.a * _focus(s, 0.42) * np.clip(0.6 + s.cloud, 0, 2)
        case "Mass":  # opacity over 3 cm with a lobulated edge
            return 0.75 * _disc(s, s.mass_x, s.mass_y, (0.09 + 0.06 * s.a) * (1 + 0.25 * s.cloud))
        case "Nodule":  # one or two round opacities under 3 cm
            radius = 0.035 + 0.03 * s.a
            second = _disc(s, 1.1 - s.nodule_x, s.nodule_y + 0.25, radius * 0.9) * (s.pick > 0.5)
            return 0.48 * np.maximum(_disc(s, s.nodule_x, s.nodule_y, radius), second)
        case "Pleural_Thickening":  # dense band inside the lateral wall and over the apex
            band = _bump(np.minimum(s.lateral, s.y - s.apex) / (0.06 + 0.05 * s.a))
            return s.on * s.lung * 0.60 * s.a * band * (0.8 + 0.4 * s.cloud)
        case "Pneumonia":  # one focal, soft-edged airspace opacity
            return 0.65 * s.a * _focus(s, 0.24) * np.clip(1 + 0.4 * s.cloud, 0.3, 2)
        case "Pneumothorax":  # air outside a thin pleural line, no vessels; a denser lung inside
            rim = np.minimum(s.lateral, 0.8 * (s.y - s.apex)) - s.a * 0.16 * (1.2 - 0.7 * s.t)
            out = _step(-rim, 0.03)
            line = 0.16 * _bump(rim / 0.018)
            return s.on * s.lung * (out * (-0.22 - s.vessels) + line + 0.10 * s.a * (1 - out))
        case _:  # Cardiomegaly is in the shapes alone
            return np.zeros(1, np.float32)


_SHAPES = {  # what a finding of severity 1 adds to the parameters
    "Atelectasis": {"lift": -0.11},
    "Cardiomegaly": {"heart": 0.13},
    "Edema": {"heart": 0.015},
    "Emphysema": {"dome": 0.09, "curve": -0.7, "heart": -0.04, "width": 0.02},
    "Fibrosis": {"dome": -0.09},
}
_LATERAL = {  # findings that take a side
    "Atelectasis", "Consolidation", "Effusion", "Infiltration", "Mass", "Nodule",
    "Pleural_Thickening", "Pneumonia", "Pneumothorax",
}  # fmt: skip
_AP_RATIO = {  # AP : PA ratio of the frequencies: the first 39,999 rows of Data_Entry_2017
    "Atelectasis": 1.7, "Cardiomegaly": 1.1, "Consolidation": 3.1, "Edema": 8.5, "Effusion": 1.45,
    "Emphysema": 1.1, "Fibrosis": 0.3, "Hernia": 0.25, "Infiltration": 2.0, "Mass": 1.0,
    "Nodule": 0.85, "Pleural_Thickening": 0.5, "Pneumonia": 1.4, "Pneumothorax": 0.9,
}  # fmt: skip
_AP_SHARE = 0.398
# Gaussian copula of the findings: a common part (the sick have more of everything), the pairs that
# NIH shows together, and the share of a finding's liability that belongs to the patient.
_COMMON, _PERSIST = 0.14, 0.35
_PAIRS = {
    ("Edema", "Pneumonia"): 0.45, ("Emphysema", "Pneumothorax"): 0.45,
    ("Cardiomegaly", "Effusion"): 0.36, ("Atelectasis", "Effusion"): 0.36,
    ("Consolidation", "Effusion"): 0.32, ("Atelectasis", "Consolidation"): 0.32,
    ("Mass", "Nodule"): 0.32, ("Fibrosis", "Pleural_Thickening"): 0.33,
    ("Consolidation", "Mass"): 0.28, ("Edema", "Infiltration"): 0.30,
    ("Infiltration", "Pneumonia"): 0.30, ("Cardiomegaly", "Edema"): 0.30,
    ("Effusion", "Infiltration"): 0.26, ("Effusion", "Pleural_Thickening"): 0.25,
    ("Edema", "Effusion"): 0.25,
}  # fmt: skip


def _patients(n: int, seed: int) -> dict[str, np.ndarray]:
    """Patients with at least `n` images in all: arrays with one row per patient."""
    blocks, total = [], 0
    while total < n:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, len(blocks))))
        # P(c >= k) = k^-1.2 up to 100 images: 57 % have one, 3.6 on average, as in NIH.
        count = np.minimum(rng.random(_PATIENTS) ** (-1 / 1.2), 100).astype(int)
        quantile = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
        ages = (1, 10, 18, 36, 49, 59, 72, 81, 95)  # NIH's
        block = {
            "count": count,
            "age": np.interp(rng.random(_PATIENTS), quantile, ages),
            "female": rng.random(_PATIENTS) < 0.435,
            "portable": rng.standard_normal(_PATIENTS),
            "tree": rng.integers(_TREES, size=_PATIENTS),
            "place": rng.random((_PATIENTS, 4)),
            "side": rng.choice(3, size=_PATIENTS, p=(0.45, 0.38, 0.17)),  # right, left, both
            "liability": rng.standard_normal((_PATIENTS, len(FINDINGS))),
            "anatomy": rng.standard_normal((_PATIENTS, len(_NAMES))),
        }
        blocks.append(block)
        total += count.sum()
    return {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}


def cohort(n: int, seed: int) -> tuple[pd.DataFrame, dict[str, np.ndarray], np.ndarray]:
    """What the first images of a seed show, before they are drawn; n is rounded up to whole blocks.

    Returns the metadata, as of `make_phantoms` with orientation ``"any"``; the parameters of the
    scene by name, each (n,), or (n, k) of places and devices; and the severity of each of
    `nih.FINDINGS`, (n, 14): 0, or 0.55 to 1.45."""
    n = -(-n // _CHUNK) * _CHUNK
    patients = _patients(n, seed)
    who = np.repeat(np.arange(len(patients["count"])), patients["count"])[:n]
    number = np.arange(n) - np.searchsorted(who, who)
    blocks = []
    for chunk in range(n // _CHUNK):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, chunk)))
        block = {"portable": rng.standard_normal(_CHUNK)}
        block["liability"] = rng.standard_normal((_CHUNK, len(FINDINGS)))
        block["anatomy"] = rng.standard_normal((_CHUNK, len(_NAMES)))
        block["severity"] = rng.random((_CHUNK, len(FINDINGS)))
        block |= {"device": rng.random((_CHUNK, 8)), "pick": rng.random(_CHUNK)}
        block |= {"turn": rng.random(_CHUNK), "mirror": rng.random(_CHUNK) < 0.5}
        blocks.append(block)
    images = {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
    mine = {k: v[who] for k, v in patients.items()}

    ap = 0.8 * mine["portable"] + 0.6 * images["portable"] < norm.ppf(_AP_SHARE)
    age = np.minimum(mine["age"] + number // 8, 95).astype(int)
    mean, between, within, of_ap, of_woman, of_age = _TABLE.T
    value = mean + between * np.clip(mine["anatomy"], -2.2, 2.2)
    value = value + within * np.clip(images["anatomy"], -2.5, 2.5)
    shift = np.outer(ap, of_ap) + np.outer(mine["female"], of_woman)
    value += shift + np.outer((age - 49) / 10, of_age)
    parameters = dict(zip(_NAMES, value.T, strict=True))
    parameters |= {"ap": ap} | {name: mine[name] for name in ("tree", "place")}
    parameters |= {name: images[name] for name in ("device", "pick")}

    correlation = np.full((len(FINDINGS),) * 2, _COMMON)
    np.fill_diagonal(correlation, 1.0)
    for pair, rho in _PAIRS.items():
        i, j = map(FINDINGS.index, pair)
        correlation[i, j] = correlation[j, i] = rho
    own, new = np.sqrt(_PERSIST) * mine["liability"], np.sqrt(1 - _PERSIST) * images["liability"]
    z = (own + new) @ np.linalg.cholesky(correlation).T
    count = np.array([float(COUNTS[name]) for name in FINDINGS])
    ratio = np.array([_AP_RATIO[name] for name in FINDINGS])
    frequency = count / IMAGES / (1 - _AP_SHARE + _AP_SHARE * ratio)
    present = z > norm.isf(frequency * np.where(ap[:, None], ratio, 1.0))
    severity = present * (0.55 + 0.9 * images["severity"])

    one_sided = present[:, [name in _LATERAL for name in FINDINGS]].any(1)
    parameters["right"], parameters["left"] = mine["side"] != 1, mine["side"] != 0
    columns = {
        "image_id": [f"{p:08d}_{k:03d}.png" for p, k in zip(who + 1, number, strict=True)],
        "patient_id": who + 1,
        "findings": findings_text(present),
        "view_position": np.where(ap, "AP", "PA"),
        "age": age,
        "sex": np.where(mine["female"], "F", "M"),
        "side": np.where(one_sided, np.array(["R", "L", "both"])[mine["side"]], ""),
        "exposure": parameters["gain"],
        "angle": images["turn"] * 360.0,
        "mirrored": images["mirror"],
    }
    return pd.DataFrame(columns), parameters, severity


@functools.cache
def _atlas() -> dict[str, np.ndarray]:
    """Textures of the scene: vessel trees, soft clouds and a net, each (k, 256, 256) float32."""
    rng = np.random.default_rng(14)
    trees = np.zeros((_TREES, _ATLAS, _ATLAS))
    for tree in trees:  # hilum at (x, y) = (0, 128); all tips of a generation walk together
        angle = np.linspace(-1.8, 1.8, 13) + rng.normal(0, 0.10, 13)
        at = np.stack([rng.normal(6, 3, 13), 128 + 22 * np.sin(angle)], 1)
        weight = np.full(13, 5.0)
        for _ in range(5):
            for _ in range(26):
                angle = angle + rng.normal(0, 0.035, len(angle))
                at = at + 1.3 * np.stack([np.cos(angle), np.sin(angle)], 1)
                x, y = np.clip(at.astype(int), 0, _ATLAS - 1).T
                np.add.at(tree, (y, x), weight)
            fork = rng.uniform(0.25, 0.55, len(angle))
            angle = np.r_[angle - fork, angle + fork]
            at, weight = np.r_[at, at], np.r_[weight, weight] * 0.66
        tree[:] = gaussian_filter(tree, 2.6) + 0.5 * gaussian_filter(tree, 5.0)
    trees /= np.percentile(trees, 97)
    noise = rng.standard_normal((2, _ATLAS, _ATLAS))
    cloud = gaussian_filter(noise[:1], (0, 9, 9), mode="wrap")
    net = gaussian_filter(noise[1:], (0, 3.2, 3.2), mode="wrap")
    # The zero crossings of a smooth noise are a net.
    net = np.exp(-np.square(net / net.std() / 0.45)) - 0.4
    textures = {"tree": np.minimum(trees, 1.6), "cloud": cloud / cloud.std(), "net": net}
    return {name: texture.astype(np.float32) for name, texture in textures.items()}


def _look(texture: np.ndarray, which: np.ndarray | int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Nearest texel of a texture that repeats itself; it is smooth over several texels."""
    return texture[which, y.astype(np.int32) & 255, x.astype(np.int32) & 255]


def scene(p: dict, severity: np.ndarray, angle: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Draw `b` images without noise: gray levels (b, 64, 64), float32.

    `p` and `severity`, (b, 14), are as of `cohort`; `angle`, (b,), is in degrees; `mirrored` (b,).
    """
    atlas, p = _atlas(), dict(p)
    p["lift"] = np.zeros(len(severity))
    for finding, shapes in _SHAPES.items():
        for name, change in shapes.items():
            p[name] = p[name] + change * severity[:, FINDINGS.index(finding)]
    s = {k: np.asarray(v, np.float32)[:, None, None] for k, v in p.items() if np.ndim(v) == 1}
    s = SimpleNamespace(**s)
    place, device = (np.asarray(p[k], np.float32).T[:, :, None, None] for k in ("place", "device"))
    fx, fy = _pose(s, angle, mirrored)
    x, y, X = s.x, s.y, s.X
    density = _soft_tissue(s)
    _lungs(s)
    rim = 0.16 * _bump((s.lateral + 0.02) / 0.035)  # ribs seen end-on
    density += rim * _step(y - s.apex - 0.1, 0.3) * s.inside

    u, v = 256 * (1 + place[2]), 256 * (1 + place[3])
    s.cloud = _look(atlas["cloud"], 0, x * 110 + u, y * 110 + v)
    s.net = _look(atlas["net"], 0, x * 110 + v, y * 110 + u)

    # Mediastinum between two borders: right atrium; aortic knob, then ventricle down to the apex.
    hx = x - s.twist
    swell = _step(y - s.floor + 0.26, 0.62)
    left = s.mediastinum - 0.02 + s.knob * _bump((y + 0.32) / 0.08) + 1.12 * s.heart * swell
    right = s.mediastinum - 0.03 + 0.36 * s.heart * _step(y - s.floor + 0.34, 0.4)
    border = np.where(x > 0, left, right) - np.abs(hx) + 0.012 * s.cloud
    s.middle = _step(border, 1.6 * s.edge) * _step(y - s.apex + 0.15, 0.5)
    middle = s.middle * (0.02 + 0.30 * _step(y - 0.25, 0.9))
    density += np.maximum(0.42 * s.abdomen, middle) * s.inside
    s.lung, s.aired = s.lung * (1 - 0.7 * s.middle), s.aired * (1 - 0.9 * s.middle)
    density -= s.aired
    density -= 0.20 * _step(0.055 - np.abs(hx), 0.06) * _step(-0.20 - y, 0.3)  # trachea

    # Vessels branch from the hila, drawn per lung from the patient's trees.
    hilum = y + 0.04 + 0.06 * (x > 0).astype(np.float32)
    stretch = 190 * (0.85 + 0.3 * place[0])
    across = np.clip((X - 0.11) * stretch, 0, 255)
    along = np.clip(128 + np.sign(place[1] - 0.5) * hilum * stretch, 0, 255)
    which = (p["tree"][:, None, None] + 3 * (x > 0)) % _TREES
    s.vessels = s.vessel * _look(atlas["tree"], which, across, along)
    haze = np.maximum(s.haze, 0) * (0.4 + _step(y, 0.9))
    marks = haze + s.vessels + 0.025 * s.cloud + 0.01 * s.net
    density += s.lung * marks + 0.03 * s.cloud * s.inside
    density += s.vessel * _bump((X - 0.16) / 0.08) * _bump(hilum / 0.14) * (1 + 0.4 * s.cloud)

    _add_bones(s, density)

    # Breasts, stomach gas under the left dome.
    drop = np.square((X - 0.42) / 0.30) + np.square((y - 0.26) / 0.27)
    breast = np.maximum(s.breast, 0) * _step(1 - drop, 0.35)
    density += breast * np.clip(0.6 + y, 0, 1) * (1 - s.abdomen)
    gas = np.hypot((x - 0.36) / 1.7, y - s.dome_edge - 1.1 * s.bubble) / np.maximum(s.bubble, 0.02)
    density -= (0.2 + 0.45 * place[3]) * _step(1 - gas + 0.3 * s.cloud, 0.4) * (place[2] > 0.45)

    for k, finding in enumerate(FINDINGS):
        if len(some := np.flatnonzero(severity[:, k])):
            part = SimpleNamespace(**{name: value[some] for name, value in vars(s).items()})
            part.a = severity[some, k].astype(np.float32)[:, None, None]
            density[some] += _sign(finding, part)

    density += _devices(s, device)
    density += s.ramp * (fx + fy)
    # Softly positive: scatter fills the darkest lung.
    density = (density + np.sqrt(np.square(density) + 0.06 * s.inside)) / 2
    gray = s.black + (s.white - s.black) * (1 - np.exp(-s.gain * density)) ** s.gamma
    return _frame(gray, fx, fy, device)


def effect(p: dict[str, np.ndarray], severity: np.ndarray, image: int, finding: str) -> np.ndarray:
    """What a finding changes in one upright image of a `cohort`: gray levels (64, 64), without
    noise; 0 everywhere if the image does not have it."""
    one = {name: values[image : image + 1] for name, values in p.items()}
    own = severity[image : image + 1] * (np.array(FINDINGS) == finding)  # (1, 14)
    having, lacking = (scene(one, s, np.zeros(1), np.zeros(1, bool)) for s in (own, 0 * own))
    return (having - lacking)[0]


def _pose(s: SimpleNamespace, angle: np.ndarray, mirrored: np.ndarray) -> tuple:
    """Set the scene's coordinates: undo turn, mirror and position; return those of the detector."""
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / (SIZE / 2) - 1
    turn = np.deg2rad(angle).astype(np.float32)[:, None, None]
    fx = np.cos(turn) * grid - np.sin(turn) * grid[:, None]
    fy = np.sin(turn) * grid + np.cos(turn) * grid[:, None]
    fx = np.where(mirrored[:, None, None], -fx, fx)
    tilt = np.deg2rad(s.tilt)
    s.x = (fx * np.cos(tilt) - fy * np.sin(tilt) - s.shift_x) / s.zoom
    s.y = (fx * np.sin(tilt) + fy * np.cos(tilt) - s.shift_y) / s.zoom
    s.X = np.abs(s.x)
    s.on = np.where(s.x > 0, s.left, s.right)  # whether a one-sided finding is on this side
    return fx, fy


def _soft_tissue(s: SimpleNamespace) -> np.ndarray:
    """Density of neck, arms, and a torso that widens into the shoulders and thickens downwards."""
    x, y, X = s.x, s.y, s.X
    torso = s.body * (1 - 0.05 * _step(y - 0.3, 1.2)) + 0.30 * _step(-0.22 - y, 0.7)
    flare = s.flare * np.clip(1.7 - 0.7 * X / s.neck, 0, 1.2) ** 3
    top = s.shoulder + s.slope * np.square(X) - flare
    s.skin = _step(y - top, 0.14)
    s.inside = np.sqrt(np.clip(1 - np.square(x / torso), 0, 1)) * s.skin
    s.along = np.clip((y + 0.45) / 1.6, 0, 1)  # the arm
    arm = np.sqrt(np.clip(1 - np.square((X - s.arm - 0.20 * s.along) / 0.20), 0, 1)) * s.skin
    width = s.neck + 0.5 * np.clip(-1.12 - y, 0, 0.5)
    neck = np.sqrt(np.clip(1 - np.square(x / width), 0, 1)) * (1 - s.skin)
    body = (1.12 + 0.58 * _step(y, 1.8)) * s.inside
    return s.fat * (body + 0.75 * arm * (1 - 0.7 * s.inside) + 0.75 * neck)


def _lungs(s: SimpleNamespace) -> None:
    """Rounded apex, lateral wall, domes with the right one higher, costophrenic angles."""
    y, X = s.y, s.X
    s.floor = s.dome + s.dome_left * (s.x > 0) + s.lift * s.on
    steep = np.where(X > 0.30, np.float32(1.4), np.float32(0.7))
    s.dome_edge = s.floor + s.curve * np.square(X - 0.30) * steep
    s.t = np.clip((y - s.apex) / (0.62 - s.apex), 0, 1.2)
    round_ = np.sqrt(1 - (1 - np.minimum(s.t, 1)) ** 3)
    s.lateral = 0.25 + (s.width - 0.25) * round_ - X
    medial = X - 0.25 + 0.19 * np.minimum(3.5 * s.t, 1)
    s.lung = _step(s.lateral, 1.3 * s.edge) * _step(medial, s.edge)
    s.lung = s.lung * _step(s.dome_edge - y, s.edge) * (y > s.apex)
    s.aired = s.lung * s.air * (0.52 + 0.40 * _step(s.lateral - 0.12, 0.28))
    s.aired = s.aired * (1.06 - 0.22 * _step(y - 0.05, 1.0))
    s.abdomen = _step(y - s.dome_edge, s.edge) * _step(s.lateral + 0.10, 0.3)


def _add_bones(s: SimpleNamespace, density: np.ndarray) -> None:
    """Ribs, falling laterally behind and medially in front; clavicles, scapulae, arms, spine."""
    x, y, X = s.x, s.y, s.X
    cage = _step(s.lateral + 0.05, 0.10) * _step(y - s.apex + 0.05, 0.12)
    cage = cage * (1 - 0.8 * s.abdomen) * (1 - 0.7 * s.middle)
    rear = np.cos((y - 0.55 * np.square(X - 0.12)) * (2 * np.pi / s.spacing) + s.phase)
    front = np.cos((y + 0.75 * X - 0.2 * X * X) * (2 * np.pi / (1.15 * s.spacing)) + 2 * s.phase)
    front = 0.7 * _step(front - 0.4, 1.0) * _step(X - 0.32, 0.2)
    density += s.ribs * cage * (1.3 * _step(rear - 0.3, 1.0) + front)
    collar = y - s.clavicle + 0.24 * (X - 0.1) - 0.05 * np.sin(8 * (X - 0.1))
    density += 0.27 * _bump(collar / 0.034) * _step(X - 0.09, 0.05) * _step(0.74 - X, 0.1) * s.skin
    blade = (X - 0.72 + 0.20 * (y + 0.3)) / 0.04
    scapula = (0.07 * _bump(blade) + 0.05 * _step(blade, 1.0)) * _step(-0.02 - y, 0.25)
    density += scapula * _step(y + 0.66, 0.1) * s.skin
    humerus = np.hypot(X - s.arm + 0.06, y - s.shoulder - s.slope - 0.10)
    shaft = _step(0.06 - np.abs(X - s.arm - 0.20 * s.along), 0.04) * _step(s.along - 0.1, 0.1)
    density += (0.15 * _step(0.13 - humerus, 0.08) + 0.15 * shaft) * s.skin
    spine = np.abs(x - 0.2 * s.twist - s.scoliosis * np.sin(3 * y))
    density += s.spine * _step(0.10 - spine, 0.06) * (0.82 + 0.18 * np.cos(y * 46)) * s.inside


def _devices(s: SimpleNamespace, u: np.ndarray) -> np.ndarray:
    """Leads, electrodes, tube and central line (mostly portable views)."""
    portable = np.where(s.ap > 0, 0.55, 0.06)
    wave = 0.14 * np.sin(3 * s.y + 6 * u[3])
    lead = 0.22 * _bump((s.x + 0.6 - 1.2 * u[1] - 0.9 * (u[2] - 0.5) * s.y - wave) / 0.017)
    r = np.hypot(s.x + 0.75 - 1.5 * u[3], s.y + 0.45 - 0.6 * u[2])
    ring = 0.45 * _bump((r - 0.05) / 0.02) - 0.1 * (r < 0.04)
    line = 0.32 * _bump((s.x + 0.10 + 0.25 * np.square(np.clip(-0.3 - s.y, 0, 1))) / 0.018)
    line = line * _step(0.15 - s.y, 0.05)
    tube = 0.28 * _bump((s.x - s.twist - 0.012) / 0.02) * _step(-0.30 - s.y, 0.05)
    lead, ring = lead * (u[0] < 0.7 * portable), ring * (u[4] < 0.7 * portable)
    return lead + ring + line * (u[5] < 0.6 * portable) + tube * (u[6] < 0.3 * portable)


def _frame(gray: np.ndarray, fx: np.ndarray, fy: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Side marker, collimation and film edge, fixed to the detector's frame."""
    near = np.where(u[3] < 0.3, -1, 1).astype(np.float32)  # R on the image's left, or L
    mx, my = (fx - near * (0.86 - 0.12 * u[4])) * 1.4, (fy + 0.91 - 0.16 * u[5]) * 1.4
    stem = _step(0.022 - np.abs(mx + 0.03), 0.04) * _step(0.06 - np.abs(my), 0.04)
    foot = _step(0.018 - np.abs(my - 0.05), 0.04) * _step(0.04 - np.abs(mx), 0.04)
    bowl = _step(0.02 - np.abs(np.hypot(mx + 0.005, my + 0.025) - 0.03), 0.04)
    leg = _step(0.018 - np.abs(mx - my + 0.02), 0.04) * _step(0.03 - np.abs(my - 0.035), 0.03)
    bowl = np.maximum(bowl, leg)
    mark = np.maximum(stem, np.where(near > 0, foot, bowl)) * (0.35 + 0.6 * u[6]) * (u[7] < 0.8)
    gray = gray + (245 - gray) * mark
    # Collimation: some films have a black margin at the sides or on top, a few a white strip at the
    # bottom. Else the anatomy goes on beyond the frame and fills the corners of a turned phantom.
    sides = _step(np.abs(fx) - 1.04 + 0.10 * u[2], 0.04) * (u[2] > 0.6)
    top = _step(-fy - 1.05 + 0.10 * u[4], 0.04) * (u[4] > 0.6)
    strip = _step(fy - 1.0 + 0.10 * u[1], 0.04) * (u[0] > 0.88)
    gray = gray + (235 - gray) * strip
    return gray + (4 - gray) * np.maximum(sides, top)


def make_phantoms(n: int, seed: int, orientation="upright") -> tuple[np.ndarray, pd.DataFrame]:
    """Draw `n` synthetic frontal chest radiographs with known findings.

    Frequencies of findings, views, ages, sexes and images per patient follow NIH ChestX-ray14 (Wang
    et al., CVPR 2017). Image i depends on `seed`, which is not negative, and i alone: fewer images
    are a prefix of more. `orientation` is ``"upright"``, as a radiographer would hang them, tilted
    by a few degrees at most; or ``"any"``: the same, each mirrored with probability 1/2, then
    turned by a uniform angle.

    Returns images, uint8 (n, 64, 64): white is dense, the patient's right is on the image's left,
    as hung. And a DataFrame of n rows: image_id, patient_id (int), findings (NIH's names joined by
    ``|``, or No Finding), view_position (PA, AP), age (years), sex (M, F), side of the patient on
    which the one-sided findings lie (R, L, both, or empty if there is none), exposure (gain of the
    film curve, about 0.6 to 1.6; more is brighter), angle (degrees counter-clockwise on the screen;
    0.0 if upright) and mirrored (before turning). ValueError for another `n`, `seed` or word."""
    if n < 1 or n != int(n) or seed < 0 or orientation not in ORIENTATIONS:
        valid = f"need a whole n >= 1, seed >= 0, and orientation in {ORIENTATIONS}"
        raise ValueError(f"{valid}, not {n=}, {seed=}, {orientation=}")
    frame, parameters, severity = cohort(n, seed)
    if orientation == "upright":
        frame[["angle", "mirrored"]] = 0.0, False
    images = np.empty((len(frame), SIZE, SIZE), np.uint8)
    for start in range(0, len(frame), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, start)))
        p = {k: v[chunk] for k, v in parameters.items()}
        angle, mirrored = (frame[name].to_numpy()[chunk] for name in ("angle", "mirrored"))
        gray = scene(p, severity[chunk], angle, mirrored)
        noise = rng.standard_normal(gray.shape, dtype=np.float32)
        gray += noise * p["noise"].astype(np.float32)[:, None, None]
        images[chunk] = np.clip(gray + 0.5, 0, 255)
    return images[:n], frame.iloc[:n].copy()
