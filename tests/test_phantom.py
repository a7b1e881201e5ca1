"""Phantoms: seeds, frequencies, signs where a radiologist looks, and exact turns."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from lib.data import nih, phantom
from lib.data.nih import FINDINGS
from lib.data.phantom import make_phantoms

# Where each sign lies on the image's left half (the patient's right), in rows and columns, whether
# it is brighter there, and whether it takes a side.
SIGNS = {
    "Atelectasis": (slice(36, 46), slice(14, 28), +1, True),
    "Cardiomegaly": (slice(34, 44), slice(22, 30), +1, False),
    "Consolidation": (slice(24, 44), slice(14, 28), +1, True),
    "Edema": (slice(26, 36), slice(20, 28), +1, False),
    "Effusion": (slice(38, 50), slice(12, 22), +1, True),
    "Emphysema": (slice(14, 40), slice(14, 26), -1, False),
    "Fibrosis": (slice(34, 46), slice(12, 22), +1, False),
    "Infiltration": (slice(22, 44), slice(14, 28), +1, True),
    "Mass": (slice(14, 40), slice(14, 28), +1, True),
    "Nodule": (slice(14, 44), slice(14, 28), +1, True),
    "Pleural_Thickening": (slice(14, 40), slice(11, 17), +1, True),
    "Pneumonia": (slice(24, 44), slice(14, 28), +1, True),
    "Pneumothorax": (slice(14, 22), slice(14, 20), -1, True),
}
LATERAL = [name for name, sign in SIGNS.items() if sign[3]]


@pytest.fixture(scope="module")
def drawn():
    return make_phantoms(1500, seed=3)


@pytest.fixture(scope="module")
def census():
    """Metadata of as many images as NIH has, none drawn."""
    return phantom.cohort(112_120, seed=0)[0]


def has(metadata, name):
    return ("|" + metadata["findings"] + "|").str.contains(f"|{name}|", regex=False).to_numpy()


def anatomies(n=32, side="both"):
    """Parameters of `n` anatomies squarely in the frame, without leads or tubes."""
    p = {k: v[:n] for k, v in phantom.cohort(n, seed=5)[1].items()}
    p |= {k: np.zeros(n) for k in ("shift_x", "shift_y", "tilt", "twist", "ramp")}
    p |= {"zoom": np.ones(n), "device": np.ones((n, 8))}
    return p | {"right": np.full(n, side != "L"), "left": np.full(n, side != "R")}


def draw(p, name=None, angle=0.0, mirrored=False):
    n = len(p["zoom"])
    severities = np.zeros((n, len(FINDINGS)))
    if name:
        severities[:, FINDINGS.index(name)] = 1.0
    return phantom.scene(p, severities, np.full(n, angle), np.full(n, mirrored))


def test_same_seed_same_bytes_and_fewer_images_are_a_prefix():
    for orientation in phantom.ORIENTATIONS:
        images, metadata = make_phantoms(100, 7, orientation)
        fewer, rows = make_phantoms(50, 7, orientation)
        assert images[:50].tobytes() == fewer.tobytes()
        pd.testing.assert_frame_equal(metadata.iloc[:50], rows)
    assert (make_phantoms(1, 8)[0] != make_phantoms(1, 7)[0]).mean() > 0.5


def test_images_are_those_of_earlier_versions():
    """A changed drawing changes every committed number; rounding of another processor does not."""
    images, _ = make_phantoms(32, 3, "any")
    means = [130.16, 161.36, 131.42, 147.1, 166.45, 124.32]
    np.testing.assert_allclose(images.mean((1, 2))[:6], means, atol=0.05)


def test_shapes_names_and_gray_scale(drawn):
    images, metadata = drawn
    assert (images.shape, images.dtype) == ((1500, 64, 64), np.uint8)
    columns = "image_id patient_id findings view_position age sex side exposure angle mirrored"
    assert list(metadata.columns) == columns.split()
    assert metadata["image_id"].is_unique
    patients = metadata["image_id"].str.extract(r"^(\d{8})_\d{3}\.png$")[0].astype(int)
    assert patients.tolist() == metadata["patient_id"].tolist()
    assert metadata["age"].between(1, 95).all()
    assert set(metadata["sex"]) == {"M", "F"}
    assert set(metadata["side"]) == {"", "L", "R", "both"}
    assert not metadata[["angle", "mirrored"]].to_numpy().any()
    for found in metadata["findings"].str.split("|"):
        assert found == ["No Finding"] or (found == sorted(found) and set(found) <= set(FINDINGS))
    one_sided = np.any([has(metadata, name) for name in LATERAL], axis=0)
    np.testing.assert_array_equal(metadata["side"] != "", one_sided)
    by_patient = metadata.groupby("patient_id")
    assert (by_patient["sex"].nunique() == 1).all()
    assert by_patient["age"].diff().dropna().between(0, 1).all()
    low, high = np.percentile(images, (1, 99), axis=(1, 2))
    assert images.std((1, 2)).min() > 15
    assert low.mean() < 20 < 190 < high.mean()
    assert (high - low).min() > 60
    plain = (metadata["findings"] == "No Finding") & (metadata["view_position"] == "PA")
    exposure = metadata["exposure"][plain]
    assert np.corrcoef(images[plain].mean((1, 2)), exposure)[0, 1] > 0.4


def test_frequencies_are_those_of_nih(census):
    for name in FINDINGS:
        count = nih.COUNTS[name]
        assert has(census, name).sum() == pytest.approx(count, rel=0.15), name
        few = has(census.iloc[:5000], name).mean()
        assert few == pytest.approx(count / 112_120, rel=0.5, abs=0.003), name
    assert (census["findings"] == "No Finding").mean() == pytest.approx(60_361 / 112_120, abs=0.03)
    assert (census["view_position"] == "AP").mean() == pytest.approx(0.40, abs=0.02)
    assert (census["sex"] == "M").mean() == pytest.approx(0.56, abs=0.02)
    sizes = census.groupby("patient_id").size()
    assert sizes.mean() == pytest.approx(3.64, abs=0.3)
    assert (sizes == 1).mean() == pytest.approx(0.57, abs=0.02)
    ages = census["age"].quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(ages, [18, 36, 49, 59, 72], atol=4)
    together = {("Atelectasis", "Effusion"): 1.8, ("Cardiomegaly", "Edema"): 1.7}
    for (a, b), lift in (together | {("Edema", "Pneumonia"): 4.0}).items():
        both = (has(census, a) & has(census, b)).mean()
        assert both > lift * has(census, a).mean() * has(census, b).mean()


@pytest.mark.parametrize("name", SIGNS)
def test_sign_lies_where_a_radiologist_looks(name):
    """And not outside the chest, and if it is one-sided, on its side only."""
    rows, columns, sign, lateral = SIGNS[name]
    p = anatomies(side="R")
    change = draw(p, name) - draw(p)
    here = sign * change[:, rows, columns].mean((1, 2))
    assert here.mean() > 1.5
    assert (here > 0).mean() > 0.9
    assert here.mean() > 2 * np.abs(change[:, :, :8]).mean()
    if lateral:
        p = anatomies(side="L")
        other = np.abs(draw(p, name) - draw(p)).mean(0)
        change = np.abs(change).mean(0)
        assert change[:, :32].sum() > 0.97 * change.sum()
        assert other[:, 32:].sum() > 0.97 * other.sum() > 0
        assert min(change.max(), other.max()) > 2


def test_quarter_turns_and_mirror_are_exact():
    p = anatomies(4)
    upright = draw(p)
    for turns, mirrored in itertools.product(range(4), (False, True)):
        expected = np.rot90(upright[:, :, ::-1] if mirrored else upright, turns, axes=(1, 2))
        got = draw(p, angle=90.0 * turns, mirrored=mirrored)
        np.testing.assert_allclose(got, expected, atol=0.5)


def test_any_orientation_is_the_upright_phantom_turned_and_not_blurred():
    upright, metadata = make_phantoms(200, 2)
    turned, moved = make_phantoms(200, 2, "any")
    same = metadata.columns.drop(["angle", "mirrored"])
    pd.testing.assert_frame_equal(metadata[same], moved[same])
    assert 0.3 < moved["mirrored"].mean() < 0.7
    assert np.bincount((moved["angle"] // 45).astype(int), minlength=8).min() > 10
    disc = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 29
    poses = zip(moved["angle"], moved["mirrored"], strict=True)
    for image, result, (angle, mirrored) in zip(upright, turned, poses, strict=True):
        source = (image[:, ::-1] if mirrored else image).astype(float)
        expected = ndimage.rotate(source, angle, reshape=False, order=1)
        assert np.abs(expected - result)[disc].mean() < 7
    edges = [ndimage.laplace(x.astype(float), axes=(1, 2)) for x in (upright, turned)]
    before, after = (np.median(np.abs(e)[:, 16:48, 16:48].mean((1, 2))) for e in edges)
    assert after == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 2.5}, {"seed": -1}, {"orientation": "left"}])
def test_bad_arguments_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        make_phantoms(**{"n": 1, "seed": 0} | wrong)


def test_effect_is_what_the_finding_adds_where_it_is():
    _, parameters, severity = phantom.cohort(64, 0)
    has = int(severity[:, FINDINGS.index("Effusion")].argmax())
    change = phantom.effect(parameters, severity, has, "Effusion")
    assert change.shape == (64, 64)
    assert np.abs(change[32:]).max() > 20 > np.abs(change[:16]).max()  # at the bases
    assert not phantom.effect(parameters, severity, has, nih.NO_FINDING).any()
