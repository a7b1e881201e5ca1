"""What is known of the images: CSV files in every dialect of NIH and of users, their cleaning, the
split, and the published counts.
"""

from __future__ import annotations

import csv
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from lib.data import phantom

FINDINGS = phantom.FINDINGS  # NIH's 14, in alphabetical order
COLUMNS = ("image_id", "patient_id", "findings", "view_position", "age", "sex", "split")
EXTRA_COLUMNS = ("side", "angle", "mirrored")  # ground truth that only phantoms have
METADATA_NAMES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv", "sample_labels.csv")
LIST_NAMES = {"train_val_list.txt": "train", "test_list.txt": "test"}
IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|dcm|dicom)$", re.IGNORECASE)
RASTER_SUFFIX = re.compile(r"\.(png|jpe?g)$", re.IGNORECASE)
NIH_NAME = re.compile(r"(\d{8})_(\d{3})\.(png|jpe?g)", re.IGNORECASE)
# The full data set as its providers state it: Wang et al. (CVPR 2017) and the README of the
# release, images with each finding.
FULL_IMAGES, FULL_PATIENTS = 112_120, 30_805
FULL_COUNTS = {
    "No Finding": 60_361,
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

# Headers as lower-case letters only: "Patient Sex", "patient_sex" and "PatientSex" are one name.
_HEADERS = {
    "image_id": (
        "imageindex",
        "imageid",
        "image",
        "imagename",
        "filename",
        "file",
        "imagepath",
        "path",
    ),
    "findings": ("findinglabels", "findings"),
    "patient_id": ("patientid",),
    "view_position": ("viewposition",),
    "age": ("patientage", "age"),
    "sex": ("patientsex", "patientgender", "sex", "gender"),
    **{name: (name,) for name in EXTRA_COLUMNS},
}
_KNOWN = {name.lower(): name for name in (*FINDINGS, "No Finding")} | {"infiltrate": "Infiltration"}


# --------------------------------------------------------------------------------------------------


def find_metadata(folder: Path, files: Sequence[str]) -> Path | None:
    """The CSV with the findings: one of NIH's names, else the only CSV that has an image column.

    Parameters
    ----------
    folder : Path
    files : sequence of str
        Relative paths (``/``) of the files in it.

    Raises
    ------
    ValueError
        Several could be it.
    """
    tables = [file for file in files if file.lower().endswith(".csv")]
    for known in METADATA_NAMES:
        named = [file for file in tables if PurePosixPath(file).name.lower() == known.lower()]
        if named:
            return folder / min(named, key=lambda file: (file.count("/"), file))
    candidates = {}
    for file in tables:
        try:
            header = (_rows(folder / file) or [[]])[0]
        except ValueError:
            continue
        boxes = any("bbox" in name.lower() for name in header)  # BBox_List_2017.csv
        if not boxes and "image_id" in (roles := _roles(header)):
            candidates[file] = "findings" in roles
    if len(candidates) > 1:  # a table of sizes or boxes beside the one with the findings
        candidates = {file: True for file, labelled in candidates.items() if labelled} or candidates
    if len(candidates) > 1:
        names = ", ".join(map(printable, candidates))
        raise ValueError(
            f"{len(candidates)} CSV files could describe the images ({names}): "
            f"leave one, name it {METADATA_NAMES[0]}, or choose it with --csv"
        )
    return folder / next(iter(candidates)) if candidates else None


def _rows(table: Path) -> list[list[str]]:
    """Rows of a CSV. The csv module and not pandas: rows may be longer or shorter than the header,
    and no text is turned into NaN.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as handle:
            header = handle.readline(100_000)
            handle.seek(0)
            # Spreadsheets of half of Europe write semicolons; a header that has no comma tells.
            delimiter = next((mark for mark in ";\t" if "," not in header and mark in header), ",")
            return list(csv.reader(handle, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{table.name} is not CSV text in UTF-8 ({error}): save it again as such"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read {table.name}: {error.strerror}") from error


def _roles(header: list[str]) -> dict[str, int]:
    """Where each of our columns stands in `header`."""
    letters = [re.sub("[^a-z]", "", name.lower()) for name in header]
    found = {
        role: [letters.index(alias) for alias in aliases if alias in letters]
        for role, aliases in _HEADERS.items()
    }
    return {role: places[0] for role, places in found.items() if places}


def _place(table: Path, header: list[str], name: str, option: str) -> int:
    """Where the column stands that the user has named."""
    stripped = [column.strip() for column in header]
    for candidates in (stripped, [column.casefold() for column in stripped]):
        if (
            wanted := name.strip() if candidates is stripped else name.strip().casefold()
        ) in candidates:
            return candidates.index(wanted)
    columns = ", ".join(map(repr, map(printable, filter(None, stripped)))) or "none"
    raise ValueError(f"{option} {name!r}: {table.name} has no such column; it has {columns}")


def read_table(
    table: Path, image_column: str | None = None, label_column: str | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a table of images.

    Parameters
    ----------
    table : Path
        CSV in UTF-8, separated by commas, or by semicolons or tabs if its header has no comma.
    image_column, label_column : str, optional
        Columns with the images (file names, or paths below the folder) and with their labels, for
        tables that are not NIH's. Labels of such a column are separated by ``|``, ``;`` or ``,``.

    Returns
    -------
    frame : DataFrame, of text
        One row an image, as `read_metadata` of `lib.data` describes it. image_id is the file name;
        where a file name stands for several paths, the path.
    odd : dict
        csv_rows_without_name, csv_rows_repeated, ages_set_missing, unknown_findings.

    Raises
    ------
    ValueError
        A column is not there, or the file is no CSV text.
    """
    header, *rows = _rows(table) or [[]]
    roles = _roles(header)
    for role, name, option in (
        ("image_id", image_column, "--image-column"),
        ("findings", label_column, "--label-column"),
    ):
        if name:
            roles[role] = _place(table, header, name, option)
    for role, name, option in (
        ("image_id", "Image Index", "--image-column"),
        ("findings", "Finding Labels", "--label-column"),
    ):
        if role not in roles:
            columns = ", ".join(filter(None, header)) or "none"
            raise ValueError(
                f"{table.name} has no column '{name}' (it has: {columns}): rename the one that holds it, name it with {option}, "
                "or remove the file"
            )
    unknown: Counter[str] = Counter()
    odd = dict.fromkeys(("csv_rows_without_name", "csv_rows_repeated", "ages_set_missing"), 0)
    columns = [*COLUMNS[:-1], *(name for name in EXTRA_COLUMNS if name in roles)]
    separators = re.compile(r"[|;,]" if label_column else r"\|")
    cells = [
        dict.fromkeys(columns, "")
        | {role: row[at].strip() for role, at in roles.items() if at < len(row)}
        for row in rows
    ]
    found = [re.sub(r"[/\\]+", "/", cell["image_id"]).removeprefix("./") for cell in cells]
    several = Counter(path.rpartition("/")[2] for path in set(found))
    records: dict[str, dict[str, str]] = {}
    for row, cell, path in zip(rows, cells, found, strict=True):
        name = path.rpartition("/")[2]
        image_id = printable(path if several[name] > 1 else name)
        if not name or image_id in records:
            odd["csv_rows_repeated" if name else "csv_rows_without_name"] += any(row)
            continue
        age, sex = cell["age"], cell["sex"].upper()
        records[image_id] = cell | {
            "image_id": image_id,
            "patient_id": clean_patient(cell["patient_id"]) or patient_of(image_id),
            "findings": _clean_findings(separators.split(cell["findings"]), unknown),
            "view_position": cell["view_position"].upper(),
            "age": clean_age(age),
            "sex": {"MALE": "M", "FEMALE": "F"}.get(sex, sex),
        }
        odd["ages_set_missing"] += bool(age) and not records[image_id]["age"]
    return pd.DataFrame(list(records.values()), columns=columns, dtype=str), odd | {
        "unknown_findings": dict(unknown)
    }


def read_boxes(table: Path | str) -> pd.DataFrame:
    """Read NIH's ``BBox_List_2017.csv``: where radiologists saw a finding.

    Parameters
    ----------
    table : path
        Its header is ``Image Index, Finding Label, Bbox [x, y, w, h]``, with or without empty
        columns behind.

    Returns
    -------
    DataFrame
        image_id, finding (NIH's spelling; its ``Infiltrate`` is Infiltration), and x, y, w, h:
        left, top, width and height in pixels of the 1024 x 1024 image, float64.

    Raises
    ------
    ValueError
        A column is missing, or a row has no four finite numbers with positive width and height; the
        row is named.
    """
    table = Path(table)
    header, *rows = _rows(table) or [[]]
    letters = [re.sub("[^a-z]", "", name.lower()) for name in header]
    try:
        image, finding = letters.index("imageindex"), letters.index("findinglabel")
        first = next(place for place, name in enumerate(letters) if name in ("bboxx", "x"))
    except (ValueError, StopIteration):
        columns = ", ".join(filter(None, header)) or "none"
        raise ValueError(
            f"{table.name} is no list of boxes: it needs Image Index, Finding Label and Bbox [x,y,w,h], and has {columns}"
        ) from None
    boxes = []
    for number, row in enumerate(rows, 2):
        if not any(row):
            continue
        try:
            numbers = [float(text) for text in row[first : first + 4]]
            if len(numbers) < 4 or not np.isfinite(numbers).all() or min(numbers[2:]) <= 0:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{table.name}, row {number}: {', '.join(row[first : first + 4])!r} is no box x, y, w, h"
            ) from None
        name = row[finding].strip()
        boxes.append([printable(row[image].strip()), _KNOWN.get(name.lower(), name), *numbers])
    return pd.DataFrame(boxes, columns=["image_id", "finding", "x", "y", "w", "h"])


def _clean_findings(parts: Sequence[str], unknown: Counter[str]) -> str:
    """NIH's spelling and the table's own order; names that are not NIH's are kept and counted."""
    names = []
    for name in filter(None, map(str.strip, parts)):
        known = _KNOWN.get(name.lower()) or _KNOWN.get(name.lower().replace(" ", "_"))
        if not known:
            unknown[name] += 1
        names.append(known or name)
    return "|".join(dict.fromkeys(names))


def clean_patient(text: str) -> str:
    """``1``, ``00000001`` and ``1.0`` are one patient."""
    number = re.fullmatch(r"0*(\d+)(\.0*)?", text, re.ASCII)
    return number[1] if number else text


def patient_of(image_id: str) -> str:
    """Patient by NIH's naming ``<patient>_<number>.png``; any other image is taken to be its own
    patient.
    """
    nih = NIH_NAME.fullmatch(image_id)
    return clean_patient(nih[1]) if nih else image_id


def clean_age(text: str) -> str:
    """Completed years; ``060Y``, ``007M``, ``010W``, ``012D`` is how DICOM writes ages. Empty if
    unreadable or over 120 (NIH has 414).
    """
    age = re.fullmatch(r"(\d{1,4})(?:\.\d*)?\s*([YMWD]?)", text.upper(), re.ASCII)
    if not age:
        return ""
    years = int(age[1]) // {"M": 12, "W": 52, "D": 365}.get(age[2], 1)
    return str(years) if years <= 120 else ""


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers; everything else stays text, never NaN."""
    frame = frame.copy()
    for name in ("age", "angle"):
        if name in frame:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    if "mirrored" in frame:
        frame["mirrored"] = frame["mirrored"].str.lower().isin(["true", "1"])
    return frame


# --------------------------------------------------------------------------------------------------


def join(
    images: dict[str, str], metadata: pd.DataFrame | None, headers: Sequence[dict[str, Any]]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """One row an image.

    Parameters
    ----------
    images : dict
        Relative path (``/``) of each image by image_id, in order.
    metadata : DataFrame, optional
        As `read_table` gives it.
    headers : sequence of dict
        What each file itself tells of patient_id, view_position, age and sex (DICOM).

    Returns
    -------
    frame : DataFrame, of text
        The row of the table by path or file name, else by the same without extension; what that
        leaves empty, by the file's own header; the patient last of all by NIH's way of naming.
    counts : dict
        csv_rows, csv_rows_without_image, images_without_csv_row.
    """
    columns = list(COLUMNS[:-1]) if metadata is None else list(metadata.columns)
    rows = {} if metadata is None else {row["image_id"]: row for row in metadata.to_dict("records")}
    stems: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        stems.setdefault(IMAGE_SUFFIX.sub("", name), row)
    joined, used, unmatched = [], set(), 0
    for (image_id, path), header in zip(images.items(), headers, strict=True):
        keys = (image_id, printable(path))
        row = next((rows[key] for key in keys if key in rows), None)
        row = row or next(
            (stems[stem] for key in keys if (stem := IMAGE_SUFFIX.sub("", key)) in stems), None
        )
        unmatched += row is None
        used |= {row["image_id"]} if row else set()
        known = {name: str(header.get(name) or "") for name in columns}
        known["age"] = clean_age(known["age"])
        known |= {name: value for name, value in (row or {}).items() if value}
        if known["patient_id"] in ("", known["image_id"]) or (
            row and known["patient_id"] == row["image_id"]
        ):
            known["patient_id"] = str(header.get("patient_id") or "") or patient_of(image_id)
        joined.append(known | {"image_id": image_id})
    counts = {
        "csv_rows": len(rows),
        "csv_rows_without_image": len(rows) - len(used),
        "images_without_csv_row": unmatched,
    }
    return pd.DataFrame(joined, columns=columns, dtype=str), counts


def read_lists(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """NIH's own split, image_id -> train or test; empty unless both lists are there."""
    found = {
        PurePosixPath(file).name: folder / file
        for file in reversed(files)
        if PurePosixPath(file).name in LIST_NAMES
    }
    if len(found) < len(LIST_NAMES):
        return {}
    return {
        name: part
        for file, part in LIST_NAMES.items()
        for name in found[file].read_text("utf-8", "replace").split()
    }


def split_patients(
    frame: pd.DataFrame, lists: dict[str, str], seed: int, test_share: float
) -> tuple[list[str], dict[str, Any]]:
    """``train`` or ``test`` of each image, patient by patient, and a description.

    NIH's lists decide if they leave images on both sides; patients they do not name are drawn. The
    draw sorts patients by the SHA-256 of seed and name, which no version of a random generator can
    change, and takes as many as come nearest to `test_share` of the images."""
    ids, patients = frame["image_id"].tolist(), frame["patient_id"].tolist()
    listed = [lists.get(image_id) for image_id in ids]
    method = "NIH's lists"
    if set(listed) - {None} != {"train", "test"}:
        listed, method = [None] * len(ids), "drawn by patient"
    sides = {patient: part for patient, part in zip(patients, listed, strict=True) if part}
    both = {
        patient
        for patient, part in zip(patients, listed, strict=True)
        if part and part != sides[patient]
    }
    if both:
        warnings.warn(
            f"{len(both)} patients are on both sides of the lists ({min(both)}): probes will look too good",
            stacklevel=3,
        )

    counts = Counter(patient for patient in patients if patient not in sides)
    order = sorted(
        counts, key=lambda patient: hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    )
    sums = np.cumsum([0, *(counts[patient] for patient in order)])
    n_test = int(np.argmin(np.abs(sums - test_share * sums[-1])))
    if test_share > 0 and len(order) > 1 and not sides:
        n_test = min(max(n_test, 1), len(order) - 1)  # nobody asked for an empty side
    sides |= {patient: "test" if place < n_test else "train" for place, patient in enumerate(order)}
    parts = [part or sides[patient] for part, patient in zip(listed, patients, strict=True)]
    n_listed = sum(part is not None for part in listed)
    return parts, {
        "method": method,
        "seed": seed,
        "test_share": test_share,
        "train": parts.count("train"),
        "test": parts.count("test"),
        "images_in_lists": n_listed,
        "patients_on_both_sides": len(both),
    }


def compare_with_published(metadata: pd.DataFrame) -> list[str]:
    """Differences between a table and the full ChestX-ray14 as published.

    Parameters
    ----------
    metadata : DataFrame
        image_id, patient_id, findings (joined by ``|``), a row an image.

    Returns
    -------
    list of str
        A sentence for each number that differs: images, patients, images with each of the 14
        findings or with none. Empty if none does. Every image counts for each of its findings, so
        the numbers add up to more than the images.
    """
    counts = Counter(name for text in metadata["findings"] for name in text.split("|") if name)
    found = {"images": len(metadata), "patients": metadata["patient_id"].nunique()} | {
        name: counts.pop(name, 0) for name in FULL_COUNTS
    }
    published = {"images": FULL_IMAGES, "patients": FULL_PATIENTS} | FULL_COUNTS
    differences = [
        f"{name}: {found[name]:,}, published {n:,} ({found[name] - n:+,})"
        for name, n in published.items()
        if found[name] != n
    ]
    differences += [
        f"{name}: {n:,} images, and no such finding is published"
        for name, n in sorted(counts.items())
    ]
    both = sum(
        "No Finding" in (parts := text.split("|")) and len(parts) > 1
        for text in metadata["findings"]
    )
    return differences + ([f"{both:,} images have No Finding beside a finding"] if both else [])


def verify_full_set(
    kind: str, files: Sequence[str], images: Sequence[str], metadata: pd.DataFrame | None
) -> dict[str, Any]:
    """Hold a folder that is the full ChestX-ray14, or claims to be, against the published numbers.

    It claims to be if its table or its images are at least 112,120, or if all twelve folders
    ``images_001`` to ``images_012`` are there.

    Parameters
    ----------
    kind : str
        ``"nih"``, or nothing is checked.
    files : sequence of str
        Relative paths (``/``) of all files.
    images : sequence of str
        image_id of each image that was read.
    metadata : DataFrame, optional
        As `read_table` gives it.

    Returns
    -------
    dict
        checked (bool), and differences (list of str) or why it was not checked.
    """
    rows = 0 if metadata is None else len(metadata)
    parts = {
        part
        for file in files
        for part in file.split("/")[:-1]
        if re.fullmatch(r"images_0(0[1-9]|1[0-2])", part)
    }
    if kind != "nih" or (max(rows, len(images)) < FULL_IMAGES and len(parts) < 12):
        return {
            "checked": False,
            "why": f"not the full ChestX-ray14: {len(images):,} images, {rows:,} rows in the table",
        }
    differences = (
        ["there is no table Data_Entry_2017.csv"]
        if metadata is None
        else compare_with_published(metadata)
    )
    here = set(images)
    if metadata is not None and (gone := rows - len(here.intersection(metadata["image_id"]))):
        differences.append(
            f"{gone:,} of the {rows:,} images of the table are not here or cannot be read"
        )
    if len(here) != FULL_IMAGES:
        differences.append(
            f"{len(here):,} images were read, published {FULL_IMAGES:,} ({len(here) - FULL_IMAGES:+,})"
        )
    return {"checked": True, "differences": differences}


def printable(text: str) -> str:
    """`text` with control characters and bytes that were no UTF-8 (lone surrogates to Python, which
    no CSV can hold) written as escapes.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
