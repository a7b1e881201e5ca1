"""A folder of X-rays to ``images.npy``, ``metadata.csv`` and ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import PIL
from tqdm import tqdm

from lib import __version__, paths
from lib.data import chestmnist, count_patients, decode, nih, sha256, sources, tables

# Mean gray level below or above which a 64x64 image shows no chest, and standard deviation below
# which it shows nothing. The darkest of 1,617 radiographs of NIH has a mean of 49, the brightest of
# 203, and the flattest a deviation of 27.
DARK, BRIGHT, CONSTANT = 16.0, 239.0, 2.0
FORMAT = 4  # raise it when the same input would give other files
CHUNK = 256  # images between two savings of the work
Records = dict[str, dict[str, Any]]  # by image_id: what `decode` says of a file, and its outlier


def preprocess(
    source_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    split_seed: int = 0,
    fit: str = "pad",
    drop_outliers: bool = False,
    max_broken: float = 0.01,
    csv: str | os.PathLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from a folder of X-rays.

    Every readable PNG, JPEG and DICOM becomes one row, in order of image_id. The work is saved
    every 256 images and goes on from there when called again. If all is done for the same files and
    options, the manifest is returned at once.

    Parameters
    ----------
    source_dir : path
        What `lib.data.sources.fetch` filled, any folder of images, or an ``.npz`` of ChestMNIST.
    out_dir : path
        Usually ``paths.dataset_dir(dataset)``.
    split_seed : int
        Of the patient-wise split; not used if NIH's two lists are in the folder.
    fit : {"pad", "crop", "stretch"}
        For images that are not square, see `lib.data.decode.decode`.
    drop_outliers : bool
        Leave out images that are too dark, too bright or constant; else they are only listed.
    max_broken : float
        Largest share of unreadable images that is only listed in the manifest, 0 to 1.
    csv : path, optional
        Table to read instead of the one that is found, in the folder or elsewhere.
    image_column, label_column : str, optional
        Columns of the table, see `lib.data.tables.read_table`.

    Returns
    -------
    dict
        The manifest: source, counts, sha256 of both files, what was dropped and why, attribution.

    Raises
    ------
    ValueError
        No images, too many of them unreadable, a table of other images, a bad option.
    OSError
        `out_dir` not writable, in use, or disk full; no file is left half-written.
    """
    if fit not in decode.FITS or not 0 <= max_broken <= 1:
        valid = f"need fit in {decode.FITS} and 0 <= max_broken <= 1"
        raise ValueError(f"{valid}, not {fit=}, {max_broken=}")
    out_dir, note = Path(out_dir), sources.read_source(Path(source_dir)) or {}
    folder = Path(note.get("path", source_dir))
    if folder.suffix.lower() == ".npz":
        with paths.alone(out_dir):
            return chestmnist.preprocess(folder, out_dir)
    source = Source.look(folder, note, csv, image_column)
    if source.table is None and (column := image_column or label_column):
        raise ValueError(f"a column is named ({column!r}), but there is no table: give --csv")
    options = [split_seed, fit, bool(drop_outliers), image_column, label_column]
    fingerprint = source.fingerprint(options)
    path = out_dir / "manifest.json"
    manifest = paths.load_json(path) if path.is_file() else {}
    if manifest.get("fingerprint") == fingerprint and all(
        (out_dir / name).is_file() and (out_dir / name).stat().st_size == file["bytes"]
        for name, file in manifest["files"].items()
    ):
        return manifest
    with paths.alone(out_dir):
        table, rows, counts = _rows(source, image_column, label_column)
        partial = out_dir / f".partial-{fingerprint[:16]}"
        records = _decode_all(source, partial, fit, max_broken)
        unwanted = ("outlier", "reason") if drop_outliers else ("reason",)
        kept = [n for n, record in records.items() if not any(record[key] for key in unwanted)]
        if not kept:
            raise ValueError(f"no image of {folder} shows a chest: look at them, or keep outliers")
        frame, split = _labelled(records, kept, table, rows, source.lists, split_seed)
        _write(partial, records, frame)
        manifest = _manifest(source, records, frame, unwanted) | counts
        manifest |= {"split": split, "fit": fit, "verification": _verified(source, records, table)}
        manifest["files"] = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)}
            for name in ("images.npy", "metadata.csv")
        }
        paths.save_json(partial / path.name, manifest | {"fingerprint": fingerprint})
        # The manifest vouches for the other two: an older one goes first, the new one comes last.
        path.unlink(missing_ok=True)
        for name in (*manifest["files"], path.name):
            os.replace(partial / name, out_dir / name)
        for old in out_dir.glob(".partial-*"):
            shutil.rmtree(old, ignore_errors=True)
    return paths.load_json(path)


@dataclass(frozen=True)
class Source:
    """A folder of X-rays and what lies in it."""

    folder: Path
    kind: str  # phantom, digits, nih (known by the names of its images) or folder
    note: dict[str, Any]  # of `lib.data.sources.fetch`, or empty
    images: dict[str, str]  # relative path (``/``) of each image by image_id, sorted
    repeated: list[str]  # images left out because another one has their name
    others: list[str]  # all other files
    table: Path | None
    lists: dict[str, str]  # NIH's split: image_id -> train or test

    @classmethod
    def look(
        cls, folder: Path, note: dict[str, Any], csv: str | os.PathLike | None, column: str | None
    ) -> Source:
        """Find images, table and lists in a folder and below it; ValueError if there is none.

        image_id is the file name. Of NIH's names, which are identities, a repeated one is left out;
        of other names that occur in several folders (``patient1/frontal.png``,
        ``patient2/frontal.png``) image_id is the relative path.
        """
        if not folder.is_dir():
            what = "is a file, not a folder: unpack it" if folder.exists() else "is not there"
            raise ValueError(f"{folder} {what}; give a folder with X-rays, or --data phantom")
        files = sources.list_files(folder)
        found = [file for file in files if _may_be_image(folder / file)]
        if not found:
            kinds = _suffixes(files).most_common(4)
            held = ", ".join(f"{n} {suffix}" for suffix, n in kinds) or "no file"
            raise ValueError(f"no images in {folder}: it holds {held}; give a folder with X-rays")
        several = Counter(PurePosixPath(file).name for file in found)
        images: dict[str, str] = {}
        for file in found:
            name = PurePosixPath(file).name
            own = several[name] == 1 or nih.NIH_NAME.fullmatch(name)
            images.setdefault(tables.printable(name if own else file), file)
        images = dict(sorted(images.items()))
        repeated = sorted(set(found) - set(images.values()))
        if repeated:
            text = "images were left out, since another one has their file name"
            warnings.warn(f"{len(repeated)} {text}", stacklevel=3)
        if csv:
            inside = folder / Path(csv).expanduser()
            table = inside if inside.is_file() else Path(csv).expanduser()
            if not table.is_file():
                raise ValueError(f"--csv {os.fspath(csv)!r}: no such file here or in {folder}")
        else:
            table = tables.find_metadata(folder, files, column)
        named = sum(nih.NIH_NAME.fullmatch(image_id) is not None for image_id in images)
        kind = note.get("kind") or ("nih" if 2 * named > len(images) else "folder")
        others = sorted(set(files) - set(found))
        lists = tables.read_lists(folder, files)
        return cls(folder, kind, note, images, repeated, others, table, lists)

    def fingerprint(self, options: list) -> str:
        """SHA-256 of all that decides the result: the same work is not done twice."""
        state: list = [FORMAT, CHUNK, options, self.kind, self.repeated, sorted(self.lists.items())]
        state += [self.table.name, sha256(self.table)] if self.table else []
        for file in self.images.values():
            path = self.folder / file
            status = path.stat() if path.exists() else None  # a link may lead nowhere
            state.append([file, status and [status.st_size, status.st_mtime_ns]])
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _may_be_image(path: Path) -> bool:
    """By its extension; without one, or if a DICOM number is the name, by the first bytes."""
    plain = "." not in path.name or path.suffix[1:].isdecimal()
    dicom = plain and path.name != "DICOMDIR" and decode.is_dicom(path)
    return bool(tables.IMAGE_SUFFIX.search(path.name)) or dicom


def _suffixes(files: Iterable[str]) -> Counter[str]:
    suffixes = (PurePosixPath(file).suffix.lower() or "no extension" for file in files)
    return Counter(map(tables.printable, suffixes))


# --------------------------------------------------------------------------------------------------


def _decode_all(source: Source, partial: Path, fit: str, max_broken: float) -> Records:
    """Decode all images into chunks ``<k>.npz`` in `partial`, unless they are there."""
    records: Records = {}
    names = list(source.images)
    with (
        tqdm(total=len(names), desc="preprocess", unit="image", mininterval=0.5) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a decoder's warning is no error if the pixels are whole
        for start in range(0, len(names), CHUNK):
            part = names[start : start + CHUNK]
            chunk = partial / f"{start // CHUNK:06d}.npz"
            if not chunk.is_file():
                files = [source.folder / source.images[name] for name in part]
                results = list(pool.map(lambda file: decode.decode(file, fit=fit), files))
                pixels = np.array([image for image, _ in results if image is not None], np.uint8)
                done = [record | {"outlier": _outlier(image)} for image, record in results]
                with paths.atomic_write(chunk) as handle:
                    np.savez(handle, pixels=pixels, records=json.dumps(done))
            with np.load(chunk, allow_pickle=False) as saved:
                records |= zip(part, json.loads(str(saved["records"])), strict=True)
            bar.update(len(part))
            if fault := _too_many_broken(source, records, max_broken):
                shutil.rmtree(partial)  # what is mended next may look the same from outside
                raise ValueError(fault)
    return records


def _outlier(image: np.ndarray | None) -> str:
    """Why an image (64, 64) shows no chest, or nothing; empty if it may show one."""
    if image is None or (image.std() >= CONSTANT and DARK <= image.mean() <= BRIGHT):
        return ""
    if image.std() < CONSTANT:
        return f"constant (standard deviation {image.std():.1f} of 255)"
    return f"too {'dark' if image.mean() < DARK else 'bright'} (mean {image.mean():.1f} of 255)"


def _too_many_broken(source: Source, records: Records, max_broken: float) -> str:
    """Why the images seen so far are too many to go on; reports and the like are not counted."""
    reports = sum(not record["image"] for record in records.values())
    broken = {n: r["reason"] for n, r in records.items() if r["reason"] and r["image"]}
    total, seen = len(source.images) - reports, len(records) - reports
    if not total:
        return f"no images in {source.folder}, but {reports} DICOM files without one"
    if len(broken) <= max_broken * total and len(broken) < total:
        return ""
    first = "; ".join(f"{source.images[n]}: {why}" for n, why in list(broken.items())[:3])
    share = math.ceil(20 * len(broken) / seen) / 20
    allow = f", or allow them with --max-broken {share:g}" if len(broken) < total else ""
    text = f"{len(broken)} of {seen} images in {source.folder} cannot be read"
    return f"{text} ({tables.printable(first)}): replace or remove them{allow}"


def _rows(
    source: Source, image_column: str | None, label_column: str | None
) -> tuple[pd.DataFrame | None, dict[str, list[int]], dict[str, Any]]:
    """The table, its rows of each image, and counts for the manifest."""
    table, rows, facts = None, {}, {}
    if source.table:
        drawn = source.kind in ("phantom", "digits")
        table, facts = tables.read_table(source.table, image_column, label_column, drawn)
        rows, facts["images_matched"] = tables.match(source.images, table["path"])
        tables.check_match(source.table.name, source.images, table["path"], rows)
    total, used = 0 if table is None else len(table), sum(map(len, rows.values()))
    return (
        table,
        rows,
        facts
        | {
            "csv_rows": total,
            "csv_rows_joined": used - len(rows),
            "csv_rows_without_image": total - used,
            "images_without_csv_row": len(source.images) - len(rows),
        },
    )


def _labelled(
    records: Records,
    kept: list[str],
    table: pd.DataFrame | None,
    rows: dict[str, list[int]],
    lists: dict[str, str],
    seed: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """``metadata.csv`` of the images that are kept, and a description of its split."""
    frame = tables.join(kept, [records[name] for name in kept], table, rows)
    one_patient = len(frame) > 1 and frame["patient_id"].nunique() == 1
    if one_patient:
        warnings.warn("one patient is named for all images: each is split by itself", stacklevel=3)
        frame["patient_id"] = frame["image_id"]
    parts, split = tables.split_patients(frame, lists, seed)
    split["method"] = "drawn by image: one patient for all" if one_patient else split["method"]
    frame.insert(nih.COLUMNS.index("split"), "split", parts)
    if both := split["patients_on_both_sides"]:
        text = "patients are in both of NIH's lists: probes will look too good"
        warnings.warn(f"{both} {text}", stacklevel=3)
    return frame, split


def _write(partial: Path, records: Records, frame: pd.DataFrame) -> None:
    """``images.npy``, from one chunk after the other, and ``metadata.csv``."""
    with paths.atomic_write(partial / "metadata.csv", "w") as handle:
        frame.to_csv(handle, index=False, lineterminator="\n")
    kept, read = set(frame["image_id"]), (n for n, r in records.items() if not r["reason"])
    with paths.atomic_write(partial / "images.npy") as handle:
        shape = (len(kept), decode.SIZE, decode.SIZE)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        for chunk in sorted(partial.glob("*.npz")):
            with np.load(chunk, allow_pickle=False) as saved:
                for image in saved["pixels"]:
                    handle.write(image.tobytes() if next(read) in kept else b"")


def _verified(source: Source, records: Records, table: pd.DataFrame | None) -> dict[str, Any]:
    """The comparison with NIH's published numbers, which is warned of if it finds a difference."""
    if source.kind != "nih":
        return {"checked": False, "why": "not a folder of NIH's files"}
    result = nih.verify([n for n, record in records.items() if not record["reason"]], table)
    if differences := "; ".join(result.get("differences", [])):
        warnings.warn(f"this is not ChestX-ray14 as published: {differences}", stacklevel=3)
    return result


def _manifest(
    source: Source, records: Records, frame: pd.DataFrame, unwanted: tuple[str, ...]
) -> dict[str, Any]:
    """What the manifest says of the images."""
    kept = [records[name] for name in frame["image_id"]]
    not_square = sum(record["width"] != record["height"] for record in kept)
    if not_square:
        text = "images are not square (see the parameter fit)"
        warnings.warn(f"{not_square} of {len(kept)} {text}", stacklevel=3)
    dropped, reports = dict.fromkeys(source.repeated, "another image has its file name"), {}
    for name, record in records.items():
        if why := next(filter(None, (record[key] for key in unwanted)), ""):
            (dropped if record["image"] else reports)[source.images[name]] = why
    outliers = {name: record["outlier"] for name, record in records.items() if record["outlier"]}
    labels = Counter(name for text in frame["findings"] for name in text.split("|") if name)
    kinds = ("too dark", "too bright", "constant")
    return {
        "format": FORMAT,
        "source": {"kind": source.kind, "csv": source.table.name if source.table else None}
        | {key: source.note[key] for key in ("seed", "orientation") if key in source.note},
        "images": len(frame),
        "size": decode.SIZE,
        "patients": count_patients(frame),
        "findings": dict(labels.most_common()),
        "dropped": [{"file": tables.printable(f), "reason": why} for f, why in dropped.items()],
        "not_images": [{"file": tables.printable(f), "reason": why} for f, why in reports.items()],
        "other_files": dict(sorted(_suffixes(source.others).items())),
        "outliers": {k: sum(why.startswith(k) for why in outliers.values()) for k in kinds}
        | {"images": [{"image_id": n, "reason": why} for n, why in outliers.items()]},
        "image_modes": dict(Counter(record["mode"] for record in kept).most_common()),
        "gray_scales": dict(Counter(record["scale"] for record in kept).most_common()),
        "not_square": not_square,
        "enlarged": sum(min(r["width"], r["height"]) < decode.SIZE for r in kept),
        "attribution": sources.ATTRIBUTIONS[source.kind],
        "versions": {"python": platform.python_version(), "lib": __version__}
        | {package.__name__: package.__version__ for package in (np, pd, PIL)},
    }
