"""NIH ChestX-ray14 as published: its findings, its numbers, and the columns of its tables."""

import re
import warnings
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

NO_FINDING = "No Finding"
# The full data set: Wang et al. (CVPR 2017) and the README of the release.
IMAGES, PATIENTS = 112_120, 30_805
COUNTS = {  # images with each finding, in alphabetical order; an image with two counts for both
    "Atelectasis": 11_559, "Cardiomegaly": 2_776, "Consolidation": 4_667, "Edema": 2_303,
    "Effusion": 13_317, "Emphysema": 2_516, "Fibrosis": 1_686, "Hernia": 227,
    "Infiltration": 19_894, "Mass": 5_782, "Nodule": 6_331, "Pleural_Thickening": 3_385,
    "Pneumonia": 1_431, "Pneumothorax": 5_302, NO_FINDING: 60_361,
}  # fmt: skip
FINDINGS = tuple(COUNTS)[:-1]
ATTRIBUTION = (
    "Chest X-rays: NIH Clinical Center, the data provider. X. Wang et al., ChestX-ray8: "
    "Hospital-scale Chest X-ray Database and Benchmarks on Weakly-Supervised Classification and "
    "Localization of Common Thorax Diseases, CVPR 2017, pp. 3462-3471. "
    "Download: https://nihcc.app.box.com/v/ChestXray-NIHCC. Not for clinical use."
)

COLUMNS = ("image_id", "patient_id", "findings", "view_position", "age", "sex", "split")
# Headers of tables, as their letters in lower case: "Patient Sex" and "patient_sex" are one name.
ALIASES = {
    "image_id": (
        *("imageindex", "imageid", "image", "imagename", "filename", "file"),
        *("imagepath", "filepath", "path", "dicomid", "img"),
    ),
    "findings": ("findinglabels", "findings"),
    "patient_id": ("patientid", "subjectid", "patient"),
    "view_position": ("viewposition", "view", "appa"),
    "age": ("patientage", "age"),
    "sex": ("patientsex", "patientgender", "sex", "gender"),
}
SPELLINGS = {name.lower(): name for name in COUNTS} | {"infiltrate": "Infiltration"}
NIH_NAME = re.compile(r"(\d{8})_(\d{3})\.(png|jpe?g)", re.IGNORECASE)  # <patient>_<number>.png
METADATA_NAMES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
LIST_NAMES = {"train_val_list.txt": "train", "test_list.txt": "test"}


def findings_text(has: np.ndarray) -> list[str]:
    """Text of each row of `has`, bool (n, 14), as in NIH's table: ``Effusion|Mass``."""
    names = np.array(FINDINGS)
    return ["|".join(names[row]) or NO_FINDING for row in has]


def differences(table: pd.DataFrame) -> list[str]:
    """Differences of a table (patient_id and findings, one row per image) from the full set as
    published, one sentence per number; empty if all agree.
    """
    counts = Counter(name for text in table["findings"] for name in text.split("|") if name)
    found = {"images": len(table), "patients": table["patient_id"].nunique()}
    found |= {name: counts.pop(name, 0) for name in COUNTS}
    published = {"images": IMAGES, "patients": PATIENTS} | COUNTS
    lines = [
        f"{name}: {found[name]:,}, published {n:,} ({found[name] - n:+,})"
        for name, n in published.items()
        if found[name] != n
    ]
    lines += [f"{name}: {n:,} images, not a published finding" for name, n in counts.items()]
    texts = map(set, table["findings"].str.split("|"))
    both = sum(NO_FINDING in names and len(names) > 1 for names in texts)
    return lines + ([f"{both:,} images have {NO_FINDING} beside a finding"] if both else [])


def verify(kind: str, image_ids: Collection[str], table: pd.DataFrame | None) -> dict[str, Any]:
    """Compare images and their table (of `lib.data.tables.read_table`) with the published numbers.

    Returns a dict: checked (bool), and differences (list of str), of which a warning tells, or why
    nothing was compared: another kind of data set, or only a part of this one.
    """
    rows = 0 if table is None else table["path"].nunique()
    if kind != "nih" or max(rows, len(image_ids)) < IMAGES:
        part = f"not the full ChestX-ray14: {len(image_ids):,} images, {rows:,} rows in the table"
        return {"checked": False, "why": part if kind == "nih" else "not a folder of NIH's files"}
    lines = ["there is no table Data_Entry_2017.csv"] if table is None else differences(table)
    if len(image_ids) != IMAGES:
        lines.append(f"{len(image_ids):,} images were read, published {IMAGES:,}")
    if lines:
        text = f"this is not ChestX-ray14 as published: {'; '.join(lines)}"
        warnings.warn(text, stacklevel=3)
    return {"checked": True, "differences": lines}
