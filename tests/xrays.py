"""Small X-ray files of every kind, for the tests of lib.data."""

import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import paths

SAMPLE = Path(os.environ.get("CXR_SAMPLE") or paths.ROOT.parent / "shared" / "nih-sample")
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="no real sample (CXR_SAMPLE)")
needs_pydicom = pytest.mark.skipif(not find_spec("pydicom"), reason="no extra 'dicom'")
RAMP = np.add.outer(np.arange(64), np.arange(64) * 3).astype(np.uint8)
V = np.linspace(0, 4095, 4096).round().astype("u2").reshape(64, 64)  # all values of 12 bits
REPORT = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "PixelData": None, "Rows": None}
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)


def make_folder(folder, n=6, size=64):
    """`n` images of n/2 patients in Kaggle's layout, with their table."""
    rng = np.random.default_rng(0)
    (folder / "images_001" / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        name = f"{i // 2 + 1:08d}_{i % 2:03d}.png"
        image = Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8))
        image.save(folder / "images_001" / "images" / name)
        labels = "No Finding" if i % 2 else "Effusion|Mass"
        rows.append(f"{name},{labels},{i % 2},{i // 2 + 1},057Y,M,PA,64,64,0.1,0.1,\n")
    (folder / "Data_Entry_2017.csv").write_text(HEADER + "".join(rows))
    return folder


def ramps(folder, *names):
    """PNGs of a ramp under these names, in folders that are made."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RAMP).save(folder / name, format="PNG")
    return folder


def chunk(kind, body):
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values, bits, colour_type=0, extra=b""):
    """A PNG of any depth and colour type of samples (H, W * channels), which Pillow cannot write;
    `extra` bytes follow the pixels."""
    rows = np.asarray(values)
    if bits < 8:
        unpacked = (rows[..., None] >> np.arange(bits)[::-1]) & 1
        packed = [np.packbits(row.reshape(-1)).tobytes() for row in unpacked]
    else:
        packed = [row.astype(">u2" if bits == 16 else "u1").tobytes() for row in rows]
    width = rows.shape[1] // {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    head = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in packed) + extra)
    mark = b"\x89PNG\r\n\x1a\n"
    return mark + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def dicom(path, values=V, syntax=None, meta=True, implicit=False, **elements):
    """A DICOM file of gray, 12 bits stored in 16, with other elements as named (None: without it);
    without `meta` only the bare data set."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    head = FileMetaDataset()
    head.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    head.MediaStorageSOPInstanceUID = "1.2.3"
    head.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = head
    bits = {1: 8, 2: 12, 4: 32}[values.itemsize]
    known = {
        "SOPClassUID": head.MediaStorageSOPClassUID, "SOPInstanceUID": "1.2.3", "Rows": len(values),
        "PatientName": "Secret^Name", "PatientID": "ID-4711", "PatientBirthDate": "19500101",
        "Columns": values.shape[1], "PixelData": values.tobytes(), "SamplesPerPixel": 1,
        "PixelRepresentation": int(values.dtype.kind == "i"), "BitsAllocated": 8 * values.itemsize,
        "BitsStored": bits, "HighBit": elements.get("BitsStored", bits) - 1,
        "PhotometricInterpretation": "MONOCHROME2",
    }  # fmt: skip
    for name, value in (known | elements).items():
        if value is not None:
            setattr(dataset, name, value)
    if syntax is not None:
        dataset.compress(syntax)
    if meta:
        dataset.save_as(path, enforce_file_format=True)
    else:
        dataset.file_meta = FileMetaDataset()
        dataset.save_as(path, implicit_vr=implicit, little_endian=True)
    return path
