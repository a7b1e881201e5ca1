"""Handwritten digits: the positive control, whose known classes a clustering that works finds."""

import numpy as np
import pandas as pd
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

IMAGES = 1797
SIZE, SCALE = 64, 6  # pixels; ours per pixel of the original: 8 x 8 become 48 x 48
ATTRIBUTION = (
    "Handwritten digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, "
    "UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0; the "
    "1,797 of its test part, as scikit-learn holds them."
)


def make_digits(turned=False, seed=0, n: int | None = None) -> tuple[np.ndarray, pd.DataFrame]:
    """Enlarge scikit-learn's digits from 8 x 8 to 48 x 48, in the middle of 64 x 64.

    A digit becomes a quadratic B-spline with its 8 x 8 values as coefficients: smooth, without
    overshoot, and evaluated once per pixel, so that a turned digit is as sharp as an upright one.

    If `turned`, each image is turned by an angle of its own, uniform over the full circle; image i
    depends on `seed` and i alone. Returns the first `n` images, uint8 (n, 64, 64), white on black,
    and a table of n rows: image_id, patient_id (each image is its own), findings ("0" to "9") and
    angle (degrees counter-clockwise on the screen, 0.0 if upright)."""
    digits = load_digits()
    pixels, labels = digits.images[:n], digits.target[:n]  # (n, 8, 8), 0..16
    angles = np.random.default_rng(seed).uniform(0, 360, IMAGES)[: len(pixels)] * turned
    grid = (np.arange(SIZE) + 0.5 - SIZE / 2) / SCALE  # in pixels of the original, 0 in the middle
    y, x = np.meshgrid(grid, grid, indexing="ij")
    images = np.empty((len(pixels), SIZE, SIZE), np.uint8)
    for image, digit, angle in zip(images, pixels, np.deg2rad(angles), strict=True):
        spline = np.pad(digit, 4)  # (16, 16); its middle is at 7.5
        at = (np.sin(angle) * x + np.cos(angle) * y, np.cos(angle) * x - np.sin(angle) * y)
        gray = map_coordinates(spline, np.add(at, 7.5), order=2, prefilter=False) * (255 / 16)
        image[:] = np.clip(gray + 0.5, 0, 255)
    names = [f"digit_{k:04d}.png" for k in range(len(pixels))]
    table = pd.DataFrame({"image_id": names, "patient_id": np.arange(1, len(pixels) + 1)})
    return images, table.assign(findings=labels.astype(str), angle=angles)
