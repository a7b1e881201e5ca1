"""The price of invariance is measured so that a code which cannot know the side stands at chance,
and one that can does not.
"""

import numpy as np
import pandas as pd
import pytest

from lib.study import measure as measures


def effusions(n=80, seed=0):
    """Films with one bright corner, left or right; more of one side than of the other, and brighter
    there.
    """
    rng = np.random.default_rng(seed)
    left = rng.random(n) < 0.7
    images = rng.integers(40, 60, (n, 64, 64), dtype=np.uint8)
    for image, side in zip(images, left, strict=True):
        image[48:, :16] += np.uint8(90 if side else 0)
        image[48:, 48:] += np.uint8(0 if side else 60)
    metadata = pd.DataFrame(
        {
            "patient_id": [str(i // 2) for i in range(n)],
            "findings": "Effusion",
            "side": np.where(left, "L", "R"),
            "split": ["test" if i >= n // 2 else "train" for i in range(n)],
        }
    )
    return images, metadata


@pytest.mark.parametrize(
    ("halves", "low", "high"), [("apart", 0.99, 1.0), ("together", 0.45, 0.55)]
)
def test_only_a_code_that_knows_left_tells_the_side_of_an_effusion(halves, low, high):
    images, metadata = effusions()

    def extract(some):
        left, right = some[:, :, :32].mean((1, 2)), some[:, :, 32:].mean((1, 2))
        return np.stack(
            [left, right] if halves == "apart" else [left + right, np.maximum(left, right)], axis=1
        ).astype(np.float32)

    features = extract(images)
    subject = measures._Subject(
        features, features, np.zeros(80, int), extract, extract, extract, extract, seed=0
    )
    values, details = {}, {}
    measures._laterality(subject, images, metadata, measures.Effort(), values, details)
    assert low <= values["tells_effusion_side"] <= high
    assert low <= values["tells_mirrored"] <= high or halves == "apart"
    assert details["effusions"] == {"train": 40, "test": 40}


def test_few_effusions_tell_nothing():
    images, metadata = effusions()
    metadata.loc[metadata.index >= 8, "findings"] = "Mass"
    features = images.reshape(80, -1)[:, :3].astype(np.float32)
    subject = measures._Subject(
        features,
        features,
        np.zeros(80, int),
        lambda some: features[: len(some)],
        None,
        None,
        None,
        seed=0,
    )
    values = {}
    measures._laterality(subject, images, metadata, measures.Effort(), values, {})
    assert "tells_effusion_side" not in values
