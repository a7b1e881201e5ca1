import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from lib.data import nih, phantom
from lib.data.nih import FINDINGS
from lib.data.phantom import make_phantoms

LATERAL = ("Atelectasis", "Consolidation", "Effusion", "Infiltration", "Mass", "Nodule")
LATERAL += ("Pleural_Thickening", "Pneumonia", "Pneumothorax")


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
    """Parameters of `n` anatomies squarely in the frame, focal findings in mid-lung, no leads or
    tubes.
    """
    p = {k: v[:n] for k, v in phantom.cohort(n, seed=5)[1].items()}
    p |= {k: np.zeros(n) for k in ("shift_x", "shift_y", "tilt", "twist", "ramp")} | {
        "zoom": np.ones(n),
        "device": np.ones((n, 8)),
    }
    p["right"], p["left"] = np.full(n, side != "L"), np.full(n, side != "R")
    return p


def draw(p, name=None, angle=0.0, mirrored=False, severity=1.0):
    n = len(p["zoom"])
    severities = np.zeros((n, len(FINDINGS)))
    if name:
        severities[:, FINDINGS.index(name)] = severity
    return phantom.scene(p, severities, np.full(n, angle), np.full(n, mirrored))


def test_same_seed_same_bytes_and_fewer_images_are_a_prefix():
    for orientation in phantom.ORIENTATIONS:
        images, metadata = make_phantoms(100, 7, orientation)
        again, same = make_phantoms(100, 7, orientation)
        assert images.tobytes() == again.tobytes()
        pd.testing.assert_frame_equal(metadata, same)
        fewer, rows = make_phantoms(50, 7, orientation)
        np.testing.assert_array_equal(images[:50], fewer)
        pd.testing.assert_frame_equal(metadata.iloc[:50], rows)
    assert (make_phantoms(1, 8)[0] != make_phantoms(1, 7)[0]).mean() > 0.5


def test_shapes_types_and_names(drawn):
    images, metadata = drawn
    assert images.shape == (1500, 64, 64)
    assert images.dtype == np.uint8
    columns = "image_id patient_id findings view_position age sex side exposure angle mirrored"
    assert list(metadata.columns) == columns.split()
    assert metadata["image_id"].is_unique
    expected = [f"{p:08d}" for p in metadata["patient_id"]]
    assert metadata["image_id"].str[:8].tolist() == expected
    assert metadata["image_id"].str.fullmatch(r"\d{8}_\d{3}\.png").all()
    assert metadata["age"].between(1, 95).all()
    assert set(metadata["sex"]) == {"M", "F"}
    assert set(metadata["side"]) == {"", "L", "R", "both"}
    assert (metadata["angle"] == 0.0).all()
    assert metadata["mirrored"].dtype == bool
    assert not metadata["mirrored"].any()
    for found in metadata["findings"].str.split("|"):
        assert found == ["No Finding"] or (found == sorted(found) and set(found) <= set(FINDINGS))
    one_sided = np.any([has(metadata, name) for name in LATERAL], axis=0)
    np.testing.assert_array_equal(metadata["side"] != "", one_sided)
    patients = metadata.groupby("patient_id")
    assert (patients["sex"].nunique() == 1).all()
    assert patients["age"].diff().dropna().between(0, 1).all()


def test_every_image_uses_the_gray_scale(drawn):
    images = drawn[0].reshape(1500, -1)
    assert images.std(1).min() > 15
    low, high = np.percentile(images, (1, 99), axis=1)
    assert low.mean() < 20
    assert high.mean() > 190
    assert (high - low).min() > 60


def test_frequencies_are_those_of_nih(census):
    counts = {name: nih.COUNTS[name] for name in FINDINGS}
    for name, count in counts.items():
        assert has(census, name).sum() == pytest.approx(count, rel=0.15), name
    assert (census["findings"] == "No Finding").mean() == pytest.approx(60_361 / 112_120, abs=0.03)
    assert (census["view_position"] == "AP").mean() == pytest.approx(0.40, abs=0.02)
    assert (census["sex"] == "M").mean() == pytest.approx(0.56, abs=0.02)
    sizes = census.groupby("patient_id").size()
    assert sizes.mean() == pytest.approx(3.64, abs=0.3)
    assert (sizes == 1).mean() == pytest.approx(0.57, abs=0.02)
    np.testing.assert_allclose(
        census["age"].quantile([0.05, 0.25, 0.5, 0.75, 0.95]), [18, 36, 49, 59, 72], atol=4
    )
    few = census.iloc[:5000]
    for name, count in counts.items():
        assert has(few, name).mean() == pytest.approx(count / 112_120, rel=0.5, abs=0.003), name


@pytest.mark.parametrize(
    ("a", "b", "lift"),
    [("Atelectasis", "Effusion", 1.8), ("Cardiomegaly", "Edema", 1.7), ("Edema", "Pneumonia", 4.0)],
)
def test_findings_that_go_together(census, a, b, lift):
    both = (has(census, a) & has(census, b)).mean()
    assert both > lift * has(census, a).mean() * has(census, b).mean()


# Where each sign lies on the image's left half (the patient's right), in pixels, and whether it is
# brighter there.
SIGNS = {
    "Atelectasis": (slice(36, 46), slice(14, 28), +1),
    "Consolidation": (slice(24, 44), slice(14, 28), +1),
    "Edema": (slice(26, 36), slice(20, 28), +1),
    "Effusion": (slice(38, 50), slice(12, 22), +1),
    "Emphysema": (slice(14, 40), slice(14, 26), -1),
    "Fibrosis": (slice(34, 46), slice(12, 22), +1),
    "Infiltration": (slice(22, 44), slice(14, 28), +1),
    "Mass": (slice(14, 40), slice(14, 28), +1),
    "Nodule": (slice(14, 44), slice(14, 28), +1),
    "Pleural_Thickening": (slice(14, 40), slice(11, 17), +1),
    "Pneumonia": (slice(24, 44), slice(14, 28), +1),
    "Pneumothorax": (slice(14, 22), slice(14, 20), -1),
}


@pytest.mark.parametrize("name", SIGNS)
def test_sign_lies_where_a_radiologist_looks(name):
    rows, columns, sign = SIGNS[name]
    p = anatomies(side="R")
    change = sign * (draw(p, name) - draw(p))
    here = change[:, rows, columns].mean((1, 2))
    assert here.mean() > 1.5
    assert (here > 0).mean() > 0.9
    assert here.mean() > 2 * np.abs(change[:, :, :8]).mean()  # and not outside the chest


@pytest.mark.parametrize("name", LATERAL)
@pytest.mark.parametrize("side", ["R", "L"])
def test_one_sided_findings_keep_to_their_side(name, side):
    """The patient's right is on the image's left."""
    p = anatomies(side=side)
    change = np.abs(draw(p, name) - draw(p)).mean(0)
    half = {"R": change[:, :32], "L": change[:, 32:]}
    assert half[side].sum() > 0.97 * change.sum()
    assert change.max() > 2


def test_cardiomegaly_widens_the_heart_on_both_sides():
    p = anatomies()
    change = (draw(p, "Cardiomegaly") - draw(p)).mean(0)
    assert change[34:44, 42:52].mean() > 4
    assert change[34:44, 22:30].mean() > 1
    assert np.abs(change[:14]).max() < 1


def test_quarter_turns_and_mirror_are_exact():
    p = anatomies(4)
    upright = draw(p)
    for turns in range(4):
        for mirrored in (False, True):
            expected = np.rot90(upright[:, :, ::-1] if mirrored else upright, turns, axes=(1, 2))
            np.testing.assert_allclose(
                draw(p, angle=90.0 * turns, mirrored=mirrored), expected, atol=0.5
            )


def test_any_orientation_is_the_upright_phantom_turned():
    upright, metadata = make_phantoms(48, 2)
    turned, moved = make_phantoms(48, 2, "any")
    pd.testing.assert_frame_equal(
        metadata.drop(columns=["angle", "mirrored"]), moved.drop(columns=["angle", "mirrored"])
    )
    assert 0.2 < moved["mirrored"].mean() < 0.8
    assert moved["angle"].between(0, 360).all()
    assert moved["angle"].std() > 60
    disc = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 29
    for image, result, angle, mirrored in zip(
        upright, turned, moved["angle"], moved["mirrored"], strict=True
    ):
        source = (image[:, ::-1] if mirrored else image).astype(float)
        expected = ndimage.rotate(source, angle, reshape=False, order=1)
        wrong = ndimage.rotate(source, -angle, reshape=False, order=1)
        assert np.abs(expected - result)[disc].mean() < 6
        if abs(np.sin(np.deg2rad(angle))) > 0.3:
            assert np.abs(wrong - result)[disc].mean() > 12


def test_full_turns_are_uniform_and_do_not_blur():
    images, metadata = make_phantoms(400, 1, "any")
    upright = make_phantoms(400, 1)[0]
    octants = np.bincount((metadata["angle"] // 45).astype(int), minlength=8)
    assert octants.min() > 25

    def detail(x):
        return np.median(
            np.abs(ndimage.laplace(x.astype(float), axes=(1, 2)))[:, 16:48, 16:48].mean((1, 2))
        )

    assert detail(images) == pytest.approx(detail(upright), rel=0.1)


def test_findings_are_neither_trivial_nor_hidden(drawn):
    """Logistic regression on 50 principal components of the pixels, patients kept apart."""
    images, metadata = drawn
    z = PCA(50, svd_solver="randomized", random_state=0).fit_transform(
        images.reshape(len(images), -1) / 255.0
    )
    z /= z.std(0)
    scores = []
    for name in ("Consolidation", "Effusion", "Infiltration"):
        y = has(metadata, name)
        folds = GroupKFold(5).split(z, y, metadata["patient_id"])
        score = cross_val_predict(
            LogisticRegression(C=0.03, max_iter=500),
            z,
            y,
            cv=list(folds),
            method="decision_function",
        )
        scores.append(roc_auc_score(y, score))
    assert 0.6 < np.mean(scores) < 0.9


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 2.5}, {"seed": -1}, {"orientation": "left"}])
def test_bad_arguments_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        make_phantoms(**{"n": 1, "seed": 0} | wrong)


def test_the_drawn_exposure_is_seen(drawn):
    images, metadata = drawn
    plain = (metadata["findings"] == "No Finding") & (metadata["view_position"] == "PA")
    brightness = images[plain].mean((1, 2))
    assert np.corrcoef(brightness, metadata["exposure"][plain])[0, 1] > 0.4


def test_images_are_those_of_earlier_versions():
    """A changed drawing changes every committed number; rounding of another processor does not."""
    images, _ = make_phantoms(32, 3, "any")
    means = [130.16, 161.36, 131.42, 147.1, 166.45, 124.32]
    np.testing.assert_allclose(images.mean((1, 2))[:6], means, atol=0.05)
