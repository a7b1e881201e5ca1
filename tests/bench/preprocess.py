"""Images per second from 1024 x 1024 gray PNGs to 64 x 64: this project beside Pillow alone.

Run ``PYTHONPATH=. python tests/bench/preprocess.py``. The PNGs are drawn: phantoms enlarged, with
the grain of a detector, so that a file has about 400 kB as NIH's have; ``--folder PATH`` takes real
ones. Each peer does the same job on one thread: read the file, decode it to 8-bit gray, take the
mean over each of the 64 x 64 areas. Rounds of all are interleaved and the best round counts."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from lib.data import decode, phantom
from lib.data.preprocess import preprocess

FULL = 112_120


def draw(folder: Path, n: int) -> None:
    """`n` textured 1024 x 1024 gray PNGs of about 400 kB."""
    rng = np.random.default_rng(0)
    for number, small in enumerate(phantom.make_phantoms(n, 0)[0]):
        large = ndimage.zoom(small.astype(np.float32), 16, order=1)
        grain = ndimage.gaussian_filter(rng.normal(0, 1, large.shape).astype(np.float32), 1.6)
        image = np.clip(large + 2.0 * grain / grain.std(), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{number // 2 + 1:08d}_{number % 2:03d}.png")


def peers() -> dict[str, Callable[[Path], np.ndarray]]:
    """Pillow's ways to do the job."""

    def pillow(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            gray = image.convert("L")
            return np.asarray(gray.resize((64, 64), Image.Resampling.BOX, reducing_gap=None))

    def pillow_reduce(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            image.load()
            return np.asarray((image if image.mode == "L" else image.convert("L")).reduce(16))

    return {"Pillow, resize BOX": pillow, "Pillow, reduce": pillow_reduce}


def rate(read: Callable[[Path], np.ndarray], files: list[Path]) -> float:
    """Images per second, one after another."""
    begin = time.perf_counter()
    for file in files:
        read(file)
    return len(files) / (time.perf_counter() - begin)


def preprocess_rate(folder: Path, n: int) -> float:
    """Images per second of `preprocess` as a whole: decoding, saving, checksums, joining."""
    with tempfile.TemporaryDirectory() as out:
        begin = time.perf_counter()
        preprocess(folder, out)
        return n / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="real 1024 x 1024 PNGs instead of drawn ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if options.folder is None:
            draw(folder, options.images)
        files, wanted = sorted(folder.rglob("*.png")), (1024, 1024, "L")
        files = [p for p in files if (*(image := Image.open(p)).size, image.mode) == wanted]
        files = files[: options.images]
        size = sum(path.stat().st_size for path in files) / len(files)
        print(f"{len(files)} gray PNGs, 1024 x 1024, {size / 1000:.0f} kB on average")
        found = peers()
        readers = {"this project": lambda path: decode.decode(path)[0], **found}
        best = dict.fromkeys(readers, 0.0)
        some = files[:100]
        for file in some[:5]:  # the same job: the same picture, but for rounding
            own = readers["this project"](file)
            for name, read in readers.items():
                assert np.abs(read(file).astype(int) - own).max() <= 1, name
        for _ in range(options.rounds):
            for name, read in readers.items():
                best[name] = max(best[name], rate(read, some))
        print("\none thread, an image at a time:")
        for name, images in best.items():
            print(f"  {name:28s} {images:7.1f} images/s  {1000 / images:6.2f} ms")
        fastest = max(found, key=lambda name: best[name])
        ratio = best["this project"] / best[fastest]
        print(f"  ratio to the fastest peer ({fastest}): {ratio:.3f}")
        if options.folder is None:
            whole = max(preprocess_rate(folder, len(files)) for _ in range(options.rounds))
            minutes = FULL / whole / 60
            print(f"\npreprocess as a whole, {os.cpu_count()} cores: {whole:.1f} images/s")
            print(f"  {FULL:,} images in {minutes:.0f} min")


if __name__ == "__main__":
    main()
