"""NIH ChestX-ray14 as published: its findings, its numbers, and the columns of its tables."""

import re
import warnings
from collections import Counter
from collections.abc import Collection

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
    "image_id": "imageindex imageid image imagename filename file imagepath filepath path dicomid "
    "img",
    "findings": "findinglabels findings",
    "patient_id": "patientid subjectid patient",
    "view_position": "viewposition view appa",
    "age": "patientage age",
    "sex": "patientsex patientgender sex gender",
}
SPELLINGS = {name.lower(): name for name in COUNTS} | {"infiltrate": "Infiltration"}
NIH_NAME = re.compile(r"(\d{8})_(\d{3})\.(png|jpe?g)", re.IGNORECASE)  # <patient>_<number>.png
METADATA_NAMES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
LIST_NAMES = {"train_val_list.txt": "train", "test_list.txt": "test"}


def findings_text(has: np.ndarray) -> list[str]:
    """Text of each row of `has`, bool (n, 14), as in NIH's table: ``Effusion|Mass``."""
    names = np.array(FINDINGS)
    return ["|".join(names[row]) or NO_FINDING for row in has]


def verify(kind: str, image_ids: Collection[str], table: pd.DataFrame | None) -> dict:
    """Compare images and their table (of `lib.data.tables.read_table`) with the published numbers.

    Returns a dict: checked (bool), and differences (list of str, one per number), of which a
    warning tells, or why nothing was compared: other images, or only a part of these."""
    rows = 0 if table is None else table["path"].nunique()
    if kind != "nih" or max(rows, len(image_ids)) < IMAGES:
        part = f"not the full ChestX-ray14: {len(image_ids):,} images, {rows:,} rows in the table"
        return {"checked": False, "why": part if kind == "nih" else "not a folder of NIH's files"}
    found, published = {"images read": len(image_ids)}, {"images read": IMAGES}
    if table is not None:
        found |= {"rows of the table": rows, "patients": table["patient_id"].nunique()}
        found |= Counter(name for text in table["findings"] for name in text.split("|") if name)
        published |= {"rows of the table": IMAGES, "patients": PATIENTS} | COUNTS
    lines = ["there is no table Data_Entry_2017.csv"] if table is None else []
    for name in published | found:
        here, there = found.get(name, 0), published.get(name, 0)
        if here != there:
            lines.append(f"{name}: {here:,}, published {there:,} ({here - there:+,})")
    if text := "; ".join(lines):
        warnings.warn(f"this is not ChestX-ray14 as published: {text}", stacklevel=3)
    return {"checked": True, "differences": lines}
