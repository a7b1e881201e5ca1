"""What is known of the images: tables in any dialect, matched with the files, and the split."""

import csv
import hashlib
import io
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from lib.data import nih

Cleaned = tuple[pd.DataFrame, dict[str, int]]  # of `read_table`: the table, and counts
TEST_SHARE = 0.2
IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|dcm|dicom)$", re.IGNORECASE)


def find_metadata(folder: Path, files: Sequence[str], image_column=None, given=None) -> Path | None:
    """The table with the labels: the `given` one, in the folder or elsewhere; else one of NIH's
    names; else the only CSV of `files`, relative paths (``/``) in `folder`, that names images.

    ValueError if the given one is not there, or if several tables could be it; if none of those in
    the folder can be it, a warning says why."""
    if given:
        table = Path(given).expanduser()
        table = folder / table if (folder / table).is_file() else table
        if not table.is_file():
            raise ValueError(f"--csv {os.fspath(given)!r}: no such file here or in {folder}")
        return table
    found = [file for file in files if file.lower().endswith((".csv", ".tsv"))]
    for known in nih.METADATA_NAMES:
        named = [file for file in found if PurePosixPath(file).name.lower() == known.lower()]
        if named:
            return folder / min(named, key=lambda file: (file.count("/"), file))
    labelled, others = [], []
    sheets = [file for file in files if file.lower().endswith((".xlsx", ".xls", ".ods"))]
    unused = [f"{file} is a spreadsheet (save it as CSV)" for file in sheets]
    for file in found:
        try:
            header = _read(folder / file, image_column).columns
        except ValueError as error:
            unused.append(str(error))
            continue
        roles = _roles(header, image_column)
        if "image_id" not in roles:
            unused.append(f"{file} has no column that names images (it has {', '.join(header)})")
        elif not any("bbox" in name.lower() for name in header):  # NIH's BBox_List_2017.csv
            (labelled if "findings" in roles else others).append(file)
    candidates = labelled or others
    if len(candidates) > 1:
        names = ", ".join(map(printable, candidates))
        raise ValueError(f"{len(candidates)} tables could be meant ({names}): give one with --csv")
    if unused and not candidates:
        hint = "name it with --csv, and its columns with --image-column and --label-column"
        warnings.warn(f"no table was used: {'; '.join(unused)}; {hint}", stacklevel=4)
    return folder / candidates[0] if candidates else None


def _read(table: Path, image_column: str | None, label_column: str | None = None) -> pd.DataFrame:
    """A CSV as text: any encoding and separator; ragged rows are cut or filled with empty cells."""
    try:
        content = table.read_bytes()
        wide = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
        utf16 = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else wide
        try:
            text = content.decode(utf16 if b"\0" in content[:200] else "utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"cannot read {table.name} ({error}): save it as CSV in UTF-8") from error
    text = re.sub(r"\r\n?", "\n", text)
    blank = re.compile(r"([\s,;|]*\n)*")
    text = text[blank.match(text).end() :]
    stated = re.match(r'"?sep=(.)"?\n', text)  # a spreadsheet's own note on its separator
    text = text[blank.match(text, stated.end()).end() :] if stated else text

    def fit(separator: str) -> tuple[int, int]:  # NIH's own header has commas within names
        names = next(csv.reader([text.partition("\n")[0]], delimiter=separator), [])
        return len(_roles(names, image_column, label_column)), len(names)

    separator = stated[1] if stated else max(",;\t|", key=fit)
    try:
        header, *rows = list(csv.reader(io.StringIO(text), delimiter=separator)) or [[]]
    except csv.Error as error:
        raise ValueError(f"{table.name} is no CSV ({error}): save it again as such") from error
    cells = [(row + [""] * len(header))[: len(header)] for row in rows]
    return pd.DataFrame(cells, columns=[name.strip() for name in header], dtype=str)


def _roles(header: Sequence[str], image: str | None, label: str | None = None) -> dict[str, int]:
    """Place of the column of each role; `image` and `label` are columns that the user has named."""
    header = [name.strip() for name in header]
    letters = [re.sub("[^a-z]", "", name.lower()) for name in header]
    roles = {}
    for role, aliases in nih.ALIASES.items():
        known = [letters.index(alias) for alias in aliases.split() if alias in letters]
        roles |= {role: known[0]} if known else {}
    folded = [name.casefold() for name in header]
    for role, wanted in (("image_id", image), ("findings", label)):
        if wanted:
            roles.pop(role, None)
            if wanted.strip().casefold() in folded:
                roles[role] = folded.index(wanted.strip().casefold())
    return roles


def read_table(table: Path, image_column=None, label_column=None, extra_columns=False) -> Cleaned:
    """Read a table of images, in UTF-8, UTF-16 or Windows-1252, with any usual separator.

    `image_column` and `label_column` hold the images (names or paths) and their labels, if they are
    not named as NIH's; labels of such a column are separated by ``|``, ``;`` or ``,``.
    `extra_columns` keeps other columns with lower-case names, too: the ground truth of phantoms.

    Returns text, one row per row that names an image: path, patient_id, findings (joined by ``|``),
    view_position, age (completed years), sex, empty if unknown; and the count ages_set_missing.
    ValueError if a column is not there, or the file is no table."""
    cells = _read(table, image_column, label_column)
    return clean(cells, table.name, image_column, label_column, extra_columns)


def clean(cells, name: str, image_column=None, label_column=None, extra_columns=False) -> Cleaned:
    """`read_table` of the cells of a table of this `name`."""
    roles = _roles(cells.columns, image_column, label_column)
    needed = {"image_id": (image_column or "Image Index", "--image-column")}
    needed["findings"] = (label_column or "Finding Labels", "--label-column")
    for role, (column, option) in needed.items():
        if role not in roles:
            has = ", ".join(repr(printable(title)) for title in cells if title) or "none"
            raise ValueError(f"{name} has no column {column!r}: name one with {option} ({has})")
    if extra_columns:
        places = enumerate(cells.columns)
        roles |= {c: p for p, c in places if re.fullmatch("[a-z_]+", c) and p not in roles.values()}
    frame = pd.DataFrame("", cells.index, list(nih.COLUMNS[:-1]), dtype=str)
    for role, place in roles.items():
        frame[role] = cells.iloc[:, place].str.strip()
    frame = frame.rename(columns={"image_id": "path"})
    frame["path"] = frame["path"].str.replace(r"[/\\]+", "/", regex=True).str.removeprefix("./")
    frame = frame[frame["path"] != ""].reset_index(drop=True)
    separator = re.compile(r"[|;,]" if label_column else r"\|")
    frame["findings"] = [_labels(separator.split(text)) for text in frame["findings"]]
    frame["patient_id"] = frame["patient_id"].map(clean_patient)
    frame["view_position"] = frame["view_position"].str.upper()
    frame["sex"] = frame["sex"].str.upper().replace({"MALE": "M", "FEMALE": "F"})
    stated = frame["age"] != ""
    frame["age"] = frame["age"].map(clean_age)
    return frame, {"ages_set_missing": int((stated & (frame["age"] == "")).sum())}


def _labels(parts: Sequence[str]) -> str:
    """NIH's spelling where it is NIH's label, in the table's own order."""
    names = [name for name in map(str.strip, parts) if name]
    known = [nih.SPELLINGS.get(name.lower().replace(" ", "_"), name) for name in names]
    return "|".join(dict.fromkeys(known))


def clean_patient(text: str) -> str:
    """``1``, ``00000001`` and ``1.0`` are one patient."""
    number = re.fullmatch(r"0*(\d+)(\.0*)?", text, re.ASCII)
    return number[1] if number else text


def clean_age(text: str) -> str:
    """Completed years of ``60``, ``060Y``, ``007M``, ``010W`` or ``012D``; empty if over 120."""
    age = re.fullmatch(r"(\d{1,4})(?:\.\d*)?\s*([YMWD]?)", text.upper(), re.ASCII)
    years = int(age[1]) // {"M": 12, "W": 52, "D": 365}.get(age[2], 1) if age else 999
    return str(years) if years <= 120 else ""


def printable(text: str) -> str:
    """`text` with control characters, and bytes that no CSV can hold, written as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def match(images: dict[str, str], paths: Sequence[str]) -> tuple[dict[str, list[int]], Counter]:
    """Which rows of a table describe which image.

    `images` are relative paths (``/``) by image_id, `paths` those of the rows: names, or paths from
    anywhere. A row belongs to the image with which its path has the longest common end, and to none
    if there are several. Paths are compared as they are; then, for what has no partner, without
    extension, in any case, and without leading zeros, which spreadsheets drop.

    Returns the numbers of the rows by image_id, and how many images were found in which way."""
    zeros = re.compile(r"(^|/)0+(?=[^/]+$)|\.0+$")
    forms = {"by name": str, "without extension": lambda path: IMAGE_SUFFIX.sub("", path)}
    forms["in any case"] = lambda path: IMAGE_SUFFIX.sub("", path).casefold()
    forms["without leading zeros"] = lambda path: zeros.sub(r"\1", forms["in any case"](path))
    numbers = defaultdict(list)
    for number, path in enumerate(paths):
        numbers[path].append(number)
    found: dict[str, list[int]] = {}
    ways: Counter[str] = Counter()
    for way, form in forms.items():
        holders = defaultdict(set)  # images by each end of their paths
        for image_id in images.keys() - found.keys():
            for end in _ends(form(images[image_id])):
                holders[end].add(image_id)
        partners = defaultdict(list)  # rows by image: length of the common end, and path
        for path in numbers:
            common = [end for end in _ends(form(path)) if end in holders]
            if common and len(holders[common[-1]]) == 1:
                partners[min(holders[common[-1]])].append((len(common), path))
        for image_id, candidates in partners.items():
            best = [path for length, path in candidates if length == max(candidates)[0]]
            if len(best) == 1:
                found[image_id] = numbers.pop(best[0])
                ways[way] += 1
    return found, ways


def _ends(path: str) -> list[str]:
    """``c``, ``b/c`` and ``a/b/c`` of ``a/b/c``."""
    parts = path.strip("/").split("/")
    return ["/".join(parts[place:]) for place in reversed(range(len(parts)))]


def join(records: dict, table: pd.DataFrame | None, found: dict[str, list]) -> pd.DataFrame:
    """One row per image: what the table says, then the file's own header, then NIH's way of naming.

    `records`, by image_id, are of `decode`, `table` is of `read_table` and `found` of `match`. The
    labels of several rows of an image are joined, without "No Finding" if there is a finding; of
    other columns the first value is taken. patient_id of an unknown patient is the image_id."""
    columns = list(nih.COLUMNS[1:-1] if table is None else table.columns[1:])
    rows = [] if table is None else table[columns].to_dict("records")
    joined = []
    for image_id, record in records.items():
        named = nih.NIH_NAME.fullmatch(image_id)
        own = [rows[number] for number in found.get(image_id, [])]
        last = {"patient_id": clean_patient(named[1]) if named else image_id}
        said = [*own, record | {"age": clean_age(record.get("age", ""))}, last]
        known = {n: next(filter(None, (s.get(n) for s in said)), "") for n in columns}
        labels = {label: None for row in own for label in row["findings"].split("|") if label}
        if len(labels) > 1 and len(own) > 1:
            labels.pop(nih.NO_FINDING, None)
        joined.append({"image_id": image_id} | known | {"findings": "|".join(labels)})
    return pd.DataFrame(joined, columns=["image_id", *columns], dtype=str)


def read_lists(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """NIH's own split, image_id -> train or test; empty unless both lists are in the folder."""
    found = {PurePosixPath(file).name: folder / file for file in reversed(files)}
    if not nih.LIST_NAMES.keys() <= found.keys():
        return {}
    lists = [(found[file].read_text("utf-8", "replace"), p) for file, p in nih.LIST_NAMES.items()]
    return {name: part for text, part in lists for name in text.split()}


def split_patients(frame: pd.DataFrame, lists: dict, seed: int) -> tuple[pd.DataFrame, dict]:
    """Insert a column split, ``"train"`` or ``"test"``, whole patients only, and describe it.

    NIH's lists (of `read_lists`) decide if they leave images in both parts; patients that they do
    not name are drawn. The draw sorts patients by the SHA-256 of seed and name, which no version of
    a random generator can change, and takes as many as come nearest to `TEST_SHARE` of the images.
    If one patient is named for all images, each image becomes its own patient."""
    method = "drawn by patient"
    if len(frame) > 1 and frame["patient_id"].nunique() == 1:
        warnings.warn("one patient is named for all images: each is split by itself", stacklevel=3)
        frame = frame.assign(patient_id=frame["image_id"])
        method = "drawn by image: one patient for all"
    patients = frame["patient_id"].tolist()
    listed = [lists.get(image_id) for image_id in frame["image_id"]]
    if {"train", "test"} <= set(listed):
        method = "NIH's lists"
    else:
        listed = [None] * len(listed)
    sides, both = {}, set()
    for patient, part in zip(patients, listed, strict=True):
        if part and sides.setdefault(patient, part) != part:
            both.add(patient)
    if both:
        warnings.warn(f"{len(both)} patients are in both lists: probes look too good", stacklevel=3)
    counts = Counter(patient for patient in patients if patient not in sides)
    order = sorted(counts, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    sums = np.cumsum([0, *(counts[patient] for patient in order)])
    n_test = int(np.argmin(np.abs(sums - TEST_SHARE * sums[-1])))
    if len(order) > 1 and not sides:
        n_test = min(max(n_test, 1), len(order) - 1)  # nobody asked for an empty part
    sides |= {patient: "test" if place < n_test else "train" for place, patient in enumerate(order)}
    parts = [part or sides[patient] for part, patient in zip(listed, patients, strict=True)]
    frame.insert(nih.COLUMNS.index("split"), "split", parts)
    split = {"method": method, "seed": seed, "patients_on_both_sides": len(both)}
    return frame, split | {part: parts.count(part) for part in ("train", "test")}
