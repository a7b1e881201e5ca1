"""A folder of X-rays to ``images.npy``, ``metadata.csv`` and ``manifest.json``."""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from tqdm import tqdm

from lib import paths
from lib.data import chestmnist, decode, finished, nih, save, sha256, sources, tables

# Mean gray level below or above which a 64x64 image shows no chest, and standard deviation below
# which it shows nothing. The darkest of 1,617 radiographs of NIH has a mean of 49, the brightest of
# 203, and the flattest a deviation of 27.
DARK, BRIGHT, CONSTANT = 16.0, 239.0, 2.0
FORMAT = 4  # raise it when the same input would give other files
CHUNK = 256  # images between two savings of the work
Records = dict[str, dict]  # by image_id: what `decode` says of a file, and its outlier


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
) -> dict:
    """Write ``images.npy``, ``metadata.csv`` and ``manifest.json`` from a folder of X-rays.

    Every readable PNG, JPEG and DICOM becomes one row, in order of image_id. The work is saved
    every 256 images and goes on from there when called again, or is over at once if it is done.

    `source_dir` is what `lib.data.sources.fetch` filled, any folder of images, or an ``.npz`` of
    ChestMNIST; `out_dir` is usually ``paths.dataset_dir(dataset)``. `split_seed` is of the
    patient-wise split; it is not used if NIH's two lists are in the folder. `fit` is for images
    that are not square, see `lib.data.decode.decode`. `drop_outliers` leaves out images that are
    too dark, too bright or constant; else they are only listed, as are unreadable images up to a
    share of `max_broken`, 0 to 1. `csv` is the table to read instead of the one that is found, in
    the folder or elsewhere; for its columns see `lib.data.tables.read_table`.

    Returns the manifest: source, counts, sha256 of both files, what was dropped and why.
    ValueError if there are no images, too many unreadable ones, a table of other images, or a bad
    option; OSError if `out_dir` is not writable or in use, or the disk is full. No file is left
    half-written."""
    if fit not in decode.FITS or not 0 <= max_broken <= 1:
        valid = f"need fit in {decode.FITS} and 0 <= max_broken <= 1"
        raise ValueError(f"{valid}, not {fit=}, {max_broken=}")
    out_dir, note = Path(out_dir), sources.read_source(Path(source_dir))
    folder = Path(note.get("path", source_dir))
    if folder.suffix.lower() == ".npz":
        with paths.alone(out_dir):
            return chestmnist.preprocess(folder, out_dir)
    source = Source.look(folder, note, csv, image_column)
    if source.table is None and (column := image_column or label_column):
        raise ValueError(f"a column is named ({column!r}), but there is no table: give --csv")
    fingerprint = source.fingerprint(split_seed, fit, drop_outliers, image_column, label_column)
    if manifest := finished(out_dir, fingerprint):
        return manifest
    with paths.alone(out_dir):
        table, rows, counts = _rows(source, image_column, label_column)
        partial = out_dir / f".partial-{fingerprint[:16]}"
        records = _decode_all(source, partial, fit, max_broken)
        unwanted = ("outlier", "reason") if drop_outliers else ("reason",)
        kept = [n for n, record in records.items() if not any(record[key] for key in unwanted)]
        if not kept:
            raise ValueError(f"no image of {folder} shows a chest: look at them, or keep outliers")
        frame = tables.join({name: records[name] for name in kept}, table, rows)
        frame, split = tables.split_patients(frame, source.lists, split_seed)
        manifest = _manifest(source, records, kept, unwanted) | counts
        readable = [name for name, record in records.items() if not record["reason"]]
        manifest["verification"] = nih.verify(source.note["kind"], readable, table)
        manifest |= {"split": split, "fit": fit, "fingerprint": fingerprint}
        return save(partial, manifest, frame, _images(partial, records, set(kept)))


@dataclass(frozen=True)
class Source:
    """A folder of X-rays and what lies in it."""

    folder: Path
    note: dict  # kind, csv, and of what is drawn seed and orientation
    images: dict[str, str]  # relative path (``/``) of each image by image_id, sorted
    repeated: list[str]  # images left out because another one has their name
    others: list[str]  # all other files
    table: Path | None
    lists: dict[str, str]  # NIH's split: image_id -> train or test

    @classmethod
    def look(cls, folder: Path, note: dict, csv: Path | str | None, column: str | None) -> Self:
        """Find images, table and lists in a folder and below it; ValueError if there is none.

        image_id is the file name. Of NIH's names, which are identities, a repeated one is left out;
        of others (``1/front.png`` and ``2/front.png``) image_id is the relative path."""
        found, others = sources.find_images(folder)
        names = {file: PurePosixPath(file).name for file in found}
        several = Counter(names.values())
        images: dict[str, str] = {}
        for file, name in names.items():
            own = several[name] == 1 or nih.NIH_NAME.fullmatch(name)
            images.setdefault(tables.printable(name if own else file), file)
        images = dict(sorted(images.items()))
        if repeated := sorted(set(found) - set(images.values())):
            text = f"{len(repeated)} images were left out: another one has their name"
            warnings.warn(text, stacklevel=3)
        table = tables.find_metadata(folder, others, column, csv)
        kept = {key: note[key] for key in ("kind", "seed", "orientation") if key in note}
        note = {"kind": sources.kind_of(images), "csv": table and table.name} | kept
        lists = tables.read_lists(folder, others)
        return cls(folder, note, images, repeated, others, table, lists)

    def fingerprint(self, *options) -> str:
        """SHA-256 of all that decides the result: the same work is not done twice."""
        state: list = [FORMAT, CHUNK, options, self.note, self.repeated, sorted(self.lists.items())]
        state += [self.table.name, sha256(self.table)] if self.table else []
        for file in self.images.values():
            path = self.folder / file
            status = path.stat() if path.exists() else None  # a link may lead nowhere
            state.append([file, status and [status.st_size, status.st_mtime_ns]])
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _decode_all(source: Source, partial: Path, fit: str, max_broken: float) -> Records:
    """Decode all images into chunks ``<k>.npz`` in `partial`, unless they are there."""
    records: Records = {}
    names = list(source.images)
    with (
        tqdm(total=len(names), desc="preprocess", unit="image", mininterval=0.5) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        warnings.catch_warnings(action="ignore"),  # a decoder's is no error if it has pixels
    ):
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
    bad = ((n, r["reason"]) for n, r in records.items() if r["reason"] and r["image"])
    broken = [f"{source.images[name]}: {why}" for name, why in bad]
    total, seen = len(source.images) - reports, len(records) - reports
    if not total:
        return f"no images in {source.folder}, but {reports} DICOM files without one"
    if len(broken) <= max_broken * total and len(broken) < total:
        return ""
    share = math.ceil(20 * len(broken) / seen) / 20
    allow = f", or allow them with --max-broken {share:g}" if len(broken) < total else ""
    text = f"{len(broken)} of {seen} images in {source.folder} cannot be read"
    return f"{text} ({tables.printable('; '.join(broken[:3]))}): replace or remove them{allow}"


def _rows(source: Source, image_column: str | None, label_column: str | None) -> tuple:
    """The table, its rows of each image, and counts; ValueError if it describes no image."""
    table, rows, counts = None, {}, {}
    if source.table:
        drawn = source.note["kind"] in ("phantom", "digits")
        table, counts = tables.read_table(source.table, image_column, label_column, drawn)
        rows, counts["images_matched"] = tables.match(source.images, table["path"])
    total, used = 0 if table is None else len(table), set().union(*rows.values())
    counts |= {"csv_rows": total, "csv_rows_joined": len(used) - len(rows)}
    counts["csv_rows_without_image"] = total - len(used)
    counts["images_without_csv_row"] = len(source.images) - len(rows)
    if source.table and 2 * len(rows) < len(source.images):
        row = next((path for k, path in enumerate(table["path"]) if k not in used), "no other")
        image = next(path for image_id, path in source.images.items() if image_id not in rows)
        row, image = (repr(tables.printable(name)) for name in (row, image))
        part = f"{len(rows) or 'none'} of {len(source.images)} images"
        hint = "choose the table with --csv and its column with --image-column"
        text = f"{source.table.name} describes {part}: it names {row}, and the folder holds {image}"
        if not rows:
            raise ValueError(f"{text}; {hint}")
        warnings.warn(f"{text}; {hint}", stacklevel=3)
    return table, rows, counts


def _images(partial: Path, records: Records, kept: set[str]) -> Iterator[np.ndarray]:
    """The images that are kept, from one chunk after the other."""
    read = (name for name, record in records.items() if not record["reason"])
    for chunk in sorted(partial.glob("*.npz")):
        with np.load(chunk, allow_pickle=False) as saved:
            yield from (image for image in saved["pixels"] if next(read) in kept)


def _manifest(source: Source, records: Records, kept: list[str], unwanted: tuple) -> dict:
    """What the manifest says of the files."""
    images = [records[name] for name in kept]
    not_square = sum(record["width"] != record["height"] for record in images)
    if not_square:
        warnings.warn(f"{not_square} of {len(kept)} images are not square: see fit", stacklevel=3)
    dropped, reports = dict.fromkeys(source.repeated, "another image has its file name"), {}
    for name, record in records.items():
        if why := next(filter(None, (record[key] for key in unwanted)), ""):
            (dropped if record["image"] else reports)[source.images[name]] = why
    found = {"source": source.note}
    for key, files in (("dropped", dropped), ("not_images", reports)):
        found[key] = [{"file": tables.printable(f), "reason": why} for f, why in files.items()]
    outliers = {name: record["outlier"] for name, record in records.items() if record["outlier"]}
    kinds = ("too dark", "too bright", "constant")
    found |= {"other_files": len(source.others), "not_square": not_square}
    found["outliers"] = {k: sum(why.startswith(k) for why in outliers.values()) for k in kinds}
    found["outliers"]["images"] = [{"image_id": n, "reason": why} for n, why in outliers.items()]
    for key, of in (("image_modes", "mode"), ("gray_scales", "scale")):
        found[key] = dict(Counter(record[of] for record in images).most_common())
    found["enlarged"] = sum(min(r["width"], r["height"]) < decode.SIZE for r in images)
    return found | {"attribution": sources.ATTRIBUTIONS[source.note["kind"]]}
