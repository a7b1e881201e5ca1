"""ChestMNIST-64: NIH's X-rays as MedMNIST publishes them, without patients, views, ages, sexes."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data import finished, nih, save

NAME = "chestmnist_64.npz"
BYTES = 401_604_127
MD5 = "9de6cd0b934ebb5b7426cfba5efbae16"
PAGE = "https://zenodo.org/records/10519652"
URL = f"{PAGE}/files/{NAME}?download=1"
PARTS = {"train": "train", "val": "train", "test": "test"}  # the file's three parts, and ours
UNKNOWN = ("patient_id", "view_position", "age", "sex")  # columns that stay empty
LABELS = (  # the file's columns, as in medmnist/info.py; its "pleural" is Pleural_Thickening
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
)  # fmt: skip
ATTRIBUTION = (
    "ChestMNIST: J. Yang et al., MedMNIST v2: a large-scale lightweight benchmark for 2D and 3D "
    f"biomedical image classification, Scientific Data 10, 41, 2023; {PAGE}, CC BY 4.0; made from "
    f"NIH's chest X-rays. {nih.ATTRIBUTION}"
)


def _read(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of a part, uint8 (n, 64, 64), and which of `nih.FINDINGS` they have, bool (n, 14)."""
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != (64, 64):
            raise ValueError(f"images are {images.dtype} {images.shape} and not uint8 (n, 64, 64)")
        if labels.shape != (len(images), len(LABELS)) or not np.isin(labels, (0, 1)).all():
            raise ValueError(f"{part}_labels is not ({len(images)}, {len(LABELS)}) of 0 and 1")
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is not ChestMNIST at 64x64 ({error}): see {PAGE}") from None
    return images, labels[:, np.argsort(LABELS)].astype(bool)


def check(path: Path) -> dict:
    """Check all of ChestMNIST's ``.npz`` at 64x64; ValueError if it is another file, or damaged.

    Returns labels, bool (n, 14) of `nih.FINDINGS` by part; images, their number; md5; published,
    whether this is the file of the Zenodo record."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give {NAME} from {PAGE}")
    with open(path, "rb") as handle:
        md5 = hashlib.file_digest(handle, "md5").hexdigest()
    labels = {part: _read(path, part)[1] for part in PARTS}
    count = sum(map(len, labels.values()))
    return {"labels": labels, "images": count, "md5": md5, "published": md5 == MD5}


def preprocess(path: Path, out_dir: Path) -> dict:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from the ``.npz`` at `path`,
    pixels unchanged; return the manifest. Errors are those of `check` and `lib.data.save`.

    The split is the file's own, not NIH's; ``val`` joins ``train``. MedMNIST keeps every patient on
    one side, which the file cannot show. Images are called ``train_000000`` and so on."""
    facts = check(path)
    fingerprint = f"chestmnist {facts['md5']}"
    if manifest := finished(out_dir, fingerprint):
        return manifest
    rows = [
        {"image_id": f"{part}_{k:06d}", "findings": text, "split": PARTS[part]}
        for part, labels in facts["labels"].items()
        for k, text in enumerate(nih.findings_text(labels))
    ]
    metadata = pd.DataFrame(rows).reindex(columns=list(nih.COLUMNS), fill_value="")
    method = "ChestMNIST's own, val joins train; not NIH's lists; patients are not known"
    counts = ("not_square", "enlarged", "csv_rows", "csv_rows_without_image")
    source = {"kind": "chestmnist", "csv": None, "file": path.name}
    source |= {key: facts[key] for key in ("md5", "published")}
    split = {"method": method, "seed": None} | metadata["split"].value_counts().to_dict()
    manifest = {"source": source, "split": split, "patients": None, "dropped": []}
    manifest |= dict.fromkeys((*counts, "images_without_csv_row"), 0)
    manifest |= {"attribution": ATTRIBUTION, "fingerprint": fingerprint}
    images = (image for part in PARTS for image in _read(path, part)[0])  # a part at a time
    manifest = save(out_dir / ".partial-chestmnist", manifest, metadata, images)
    if not facts["published"]:
        warnings.warn(f"{path.name} is not the published file: its MD5 is not {MD5}", stacklevel=3)
    return manifest
