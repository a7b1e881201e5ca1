"""NIH ChestX-ray14 as published: its findings, its numbers, and the columns of its tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import pandas as pd

FINDINGS = (  # in alphabetical order
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis"),
    *("Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia"),
    "Pneumothorax",
)
NO_FINDING = "No Finding"
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
SPELLINGS = {name.lower(): name for name in (*FINDINGS, NO_FINDING)} | {
    "infiltrate": "Infiltration"
}
NIH_NAME = re.compile(r"(\d{8})_(\d{3})\.(png|jpe?g)", re.IGNORECASE)  # <patient>_<number>.png
METADATA_NAMES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
LIST_NAMES = {"train_val_list.txt": "train", "test_list.txt": "test"}

# The full data set: Wang et al. (CVPR 2017) and the README of the release.
IMAGES, PATIENTS = 112_120, 30_805
COUNTS = {  # images with each finding; an image with two counts for both
    NO_FINDING: 60_361,
    "Infiltration": 19_894,
    "Effusion": 13_317,
    "Atelectasis": 11_559,
    "Nodule": 6_331,
    "Mass": 5_782,
    "Pneumothorax": 5_302,
    "Consolidation": 4_667,
    "Pleural_Thickening": 3_385,
    "Cardiomegaly": 2_776,
    "Emphysema": 2_516,
    "Edema": 2_303,
    "Fibrosis": 1_686,
    "Pneumonia": 1_431,
    "Hernia": 227,
}


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


def verify(image_ids: Collection[str], table: pd.DataFrame | None) -> dict[str, Any]:
    """Compare the images that were read, and what `lib.data.tables.read_table` says of them, with
    the published numbers, if they are as many as the full set.

    Returns a dict: checked (bool), and differences (list of str), or why nothing was compared.
    """
    rows = 0 if table is None else table["path"].nunique()
    if max(rows, len(image_ids)) < IMAGES:
        why = f"{len(image_ids):,} images, {rows:,} rows in the table"
        return {"checked": False, "why": f"not the full ChestX-ray14: {why}"}
    lines = ["there is no table Data_Entry_2017.csv"] if table is None else differences(table)
    names = set() if table is None else {path.rpartition("/")[2] for path in table["path"]}
    if gone := len(names - set(image_ids)):
        lines.append(f"{gone:,} of the {rows:,} images of the table are not here or not readable")
    if len(image_ids) != IMAGES:
        lines.append(f"{len(image_ids):,} images were read, published {IMAGES:,}")
    return {"checked": True, "differences": lines}
