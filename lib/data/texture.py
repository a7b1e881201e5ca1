"""Texture of small gray images: gray-level co-occurrence and edges, from scikit-image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from skimage.feature import graycomatrix, graycoprops
from skimage.filters import sobel

MEASURES = ("contrast", "homogeneity", "energy", "correlation")


def texture(images: np.ndarray, levels: int = 32) -> pd.DataFrame:
    """Statistics of the gray-level co-occurrence matrix of each image (Haralick et al. 1973,
    *Textural Features for Image Classification*).

    Neighbours are one pixel apart in the four directions 0, 45, 90 and 135 degrees, counted both
    ways; each statistic is the mean of the four. So a mirrored image, or one turned by a quarter,
    has the same texture.

    Parameters
    ----------
    images : uint8 array, shape (N, H, W), 0..255
    levels : int
        Gray levels that are told apart, 2 to 256: the 256 are grouped evenly.

    Returns
    -------
    DataFrame, N rows
        contrast, mean squared difference of neighbours in levels; homogeneity, 0 to 1, near 1 where
        neighbours are alike; energy, 0 to 1, the root of the sum of squared shares; correlation, -1
        to 1, of neighbours, 1 for a constant image.

    Raises
    ------
    ValueError
        `images` is no uint8 array (N, H, W), or `levels` is out of range.
    """
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (N, H, W), not {images.dtype} {images.shape}")
    if not 2 <= levels <= 256:
        raise ValueError(f"levels must be 2 to 256, not {levels}")
    angles = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
    rows = []
    for image in images:
        grouped = (image.astype(np.uint16) * levels // 256).astype(np.uint8)
        matrix = graycomatrix(grouped, [1], angles, levels=levels, symmetric=True, normed=True)
        rows.append([graycoprops(matrix, name).mean() for name in MEASURES])
    return pd.DataFrame(rows, columns=list(MEASURES), dtype=np.float64)


def texture_by_finding(
    images: np.ndarray, findings: Sequence[str], most: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Texture of at most `most` images with each finding.

    Parameters
    ----------
    images : uint8 array, shape (N, H, W)
    findings : sequence of N str
        Joined by ``|``; an image counts for each of its findings, and for none if the text is
        empty.
    most : int
        The full data set would take minutes; so many are drawn at random from each finding.
    seed : int
        Of the draw.

    Returns
    -------
    DataFrame
        finding, image (row of `images`) and the four `MEASURES`; a row an image and finding.
    """
    rows = pd.DataFrame(
        {"finding": [text.split("|") for text in findings], "image": np.arange(len(images))}
    ).explode("finding")
    rows = (
        rows[rows["finding"] != ""]
        .sample(frac=1, random_state=seed)
        .groupby("finding")
        .head(most)
        .sort_values(["finding", "image"])
    )
    unique = np.unique(rows["image"].to_numpy(dtype=np.int64))
    values = texture(np.asarray(images[unique]))
    values.insert(0, "image", unique)
    return rows.merge(values, on="image", how="left").reset_index(drop=True)


def edges(image: np.ndarray) -> np.ndarray:
    """Sobel's gradient magnitude.

    Parameters
    ----------
    image : uint8 array, shape (H, W), 0..255

    Returns
    -------
    ndarray, shape (H, W), float64, 0..1
        1 would be a step from black to white.
    """
    return sobel(image.astype(np.float64) / 255)
