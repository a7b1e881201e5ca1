"""Feature extraction keeps rows and images together; PCA-whitening agrees with scikit-learn and
tells of what it cannot do.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

from lib.features import PCAWhiten, as_rows, extract, normalise

KINDS = {"array": np.asarray, "tensor": torch.from_numpy}


def mixed(n, d, rank=None, offset=3.0, dtype=np.float32, seed=0):
    """Correlated features (n, d) of the given rank (d if None), away from the origin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, rank or d)) @ rng.normal(size=(rank or d, d)) + offset).astype(
        dtype
    )


class Corner(nn.Module):
    """Features that name their image: its first two pixels, and how the modules are set."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)

    def features(self, x):
        return self.dropout(self.frozen(x[:, 0, 0, :2]))


@pytest.fixture
def images():
    """700 images that carry their own index in the first two pixels."""
    images = np.random.default_rng(0).integers(0, 256, (700, 64, 64), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(700) // 256, np.arange(700) % 256
    return images


# ---------------------------------------------------------------- normalise, extract


def test_normalise_maps_the_ends_of_the_range_to_minus_one_and_one():
    x = normalise(torch.tensor([[[0, 255], [51, 204]]], dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert x.shape == (1, 1, 2, 2)
    torch.testing.assert_close(x[0, 0], torch.tensor([[-1.0, 1.0], [-0.6, 0.6]]))


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.uint8)]
)
def test_normalise_refuses_what_may_be_normalised_already(bad):
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, H, W\)"):
        normalise(bad)


@pytest.mark.parametrize("batch_size", [1, 256, 699, 10_000])
@pytest.mark.parametrize("source", ["array", "tensor", "memmap"])
def test_row_i_is_image_i(images, tmp_path, source, batch_size):
    if source == "memmap":
        np.save(tmp_path / "images.npy", images)
        given_images = np.load(tmp_path / "images.npy", mmap_mode="r")
    else:
        given_images = KINDS[source](images)
    rows = extract(Corner(), given_images, batch_size=batch_size)
    assert rows.dtype == np.float32
    assert rows.shape == (700, 2)
    pixels = np.rint((rows * np.sqrt(1 + 1e-5) + 1) * 127.5).astype(
        int
    )  # batch norm in evaluation divides by sqrt(1 + eps)
    np.testing.assert_array_equal(pixels @ [256, 1], np.arange(700))


def test_extract_leaves_every_module_in_its_mode_and_holds_no_gradient(images):
    model = Corner().train()
    model.frozen.eval()
    statistics = model.frozen.running_mean.clone()
    extract(model, images[:300])
    assert (model.training, model.frozen.training, model.dropout.training) == (True, False, True)
    assert torch.equal(model.frozen.running_mean, statistics)
    model.features = lambda x: x[:, :, 0, 0] / 0.0
    with pytest.raises(FloatingPointError):
        extract(model, images[:300])
    assert (model.training, model.frozen.training, model.dropout.training) == (True, False, True)


def test_extract_names_the_first_image_that_is_not_finite(images):
    model = Corner()
    model.features = lambda x: torch.where(
        x[:, 0, 0, :2] == normalise(torch.full((1, 1, 1), 44, dtype=torch.uint8)).item(),
        torch.nan,
        1.0,
    )
    with pytest.raises(FloatingPointError, match="image 44 "):
        extract(model, images, batch_size=30)


def test_extract_refuses_no_images_and_features_of_another_shape(images):
    with pytest.raises(ValueError, match="no images"):
        extract(Corner(), images[:0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract(Corner(), images, batch_size=0)
    model = Corner()
    model.features = lambda x: x
    with pytest.raises(ValueError, match=r"must give \(256, D\)"):
        extract(model, images)


def test_extract_shows_progress_only_when_asked(images, capsys):
    extract(Corner(), images)
    assert capsys.readouterr().err == ""
    extract(Corner(), images, progress=True)
    assert "features" in capsys.readouterr().err


# ---------------------------------------------------------------- PCAWhiten


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "d"), [(500, 40), (60, 200), (9000, 12)], ids=["tall", "wide", "chunks"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whitening_agrees_with_scikit_learn(kind, n, d, dtype):
    x = mixed(n, d, dtype=dtype)
    ours = PCAWhiten(10, l2=False)
    z = ours.fit_transform(KINDS[kind](x))
    theirs = PCA(10, whiten=True, svd_solver="full").fit(x.astype(np.float64))
    assert isinstance(z, np.ndarray if kind == "array" else torch.Tensor)
    assert isinstance(ours.components_, type(z))
    assert np.asarray(z).dtype == dtype
    assert ours.n_components_ == 10
    for name in ("mean_", "explained_variance_", "explained_variance_ratio_"):
        np.testing.assert_allclose(
            np.asarray(getattr(ours, name)), getattr(theirs, name), rtol=1e-7, err_msg=name
        )
    signs = np.sign((np.asarray(ours.components_) * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(
        np.asarray(ours.components_), signs[:, None] * theirs.components_, atol=1e-7
    )
    np.testing.assert_allclose(
        np.asarray(z),
        signs * theirs.transform(x.astype(np.float64)),
        atol=1e-5 if dtype == np.float32 else 1e-8,
    )
    new = mixed(50, d, dtype=dtype, seed=1)
    np.testing.assert_allclose(
        np.asarray(ours.transform(KINDS[kind](new))),
        signs * theirs.transform(new),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_read_only_memory_map_is_neither_copied_nor_written(tmp_path):
    np.save(tmp_path / "features.npy", mixed(9000, 12))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert as_rows(mapped, "features").data_ptr() == mapped.ctypes.data
    np.testing.assert_array_equal(
        PCAWhiten(5).fit_transform(mapped), PCAWhiten(5).fit_transform(mixed(9000, 12))
    )
    np.testing.assert_array_equal(mapped, mixed(9000, 12))


@pytest.mark.parametrize("dtype", [np.float16, np.int32])
def test_other_types_are_taken_as_float32(dtype):
    x = mixed(300, 6).astype(dtype)
    z = PCAWhiten(4).fit_transform(x)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, PCAWhiten(4).fit_transform(x.astype(np.float32)), atol=1e-6)


def test_whitened_components_are_uncorrelated_with_unit_variance_far_from_the_origin():
    z = PCAWhiten(8, l2=False).fit_transform(mixed(4000, 20, offset=1000.0))
    np.testing.assert_allclose(np.cov(z.T.astype(np.float64)), np.eye(8), atol=1e-3)


def test_l2_gives_rows_of_unit_length_and_leaves_a_zero_row_at_zero():
    x = mixed(300, 10, dtype=np.float64)
    pca = PCAWhiten(4).fit(x)
    np.testing.assert_allclose(np.linalg.norm(pca.transform(x), axis=1), 1.0)
    at_mean = pca.transform(pca.mean_[None])
    assert np.isfinite(at_mean).all()
    np.testing.assert_array_equal(at_mean, 0.0)


def test_the_largest_loading_of_each_axis_is_positive():
    axes = PCAWhiten(10).fit(mixed(200, 30)).components_
    assert (axes[np.arange(10), np.abs(axes).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(PCAWhiten(10).fit(-mixed(200, 30)).components_, axes, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(20, 60),
    d=st.integers(2, 80),
    rank=st.integers(1, 12),
    offset=st.sampled_from([0.0, 3.0, 1000.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_exactly_the_directions_that_vary_are_kept(n, d, rank, offset, scale, seed):
    """Float32 rounding spreads a low-rank matrix over all directions; none of those may be blown up
    to unit variance.
    """
    rank = min(rank, d)
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(d, rank)))[0].T
    x = ((rng.normal(size=(n, rank)) @ axes + offset) * scale).astype(np.float32)
    with pytest.warns(RuntimeWarning, match=f"n_components=90: {n} rows of {d} features"):
        pca = PCAWhiten(90, l2=False).fit(x)
    assert pca.n_components_ == rank
    assert np.abs(pca.transform(x)).max() <= np.sqrt(n)


def test_more_components_than_rows_allow_keeps_n_minus_one():
    with pytest.warns(
        RuntimeWarning,
        match="keeps 19 components instead of n_components=64: 20 rows of 32 features",
    ):
        pca = PCAWhiten(64).fit(mixed(20, 32))
    assert pca.n_components_ == len(pca.components_) == len(pca.explained_variance_) == 19


def test_small_but_real_components_are_kept():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1000, 5)) * [1, 1e-1, 1e-2, 1e-3, 1e-4]).astype(np.float32)
    assert PCAWhiten(5).fit(x).n_components_ == 5


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((50, 6), 0.1, dtype=np.float32), "all 50 rows of the features are equal"),
        (np.zeros((5, 60), dtype=np.float32), "all 5 rows of the features are equal"),
        (np.ones((1, 6), dtype=np.float32), "at least 2 rows, got 1"),
        (np.ones(6, dtype=np.float32), r"shape \(N, D\), got \(6,\)"),
        (np.where(np.arange(40).reshape(10, 4) == 30, np.nan, 1.0), "first in row 7"),
        (np.where(np.arange(40).reshape(10, 4) == 12, -np.inf, 1.0), "first in row 3"),
    ],
    ids=["constant", "zero", "single", "1-d", "nan", "inf"],
)
def test_features_that_cannot_be_whitened(x, message):
    with pytest.raises(ValueError, match=message):
        PCAWhiten(2).fit(x)


def test_wrong_use_of_an_estimator():
    with pytest.raises(ValueError, match="n_components must be at least 1, got 0"):
        PCAWhiten(0)
    with pytest.raises(RuntimeError, match="not fitted"):
        PCAWhiten(2).transform(mixed(5, 5))
    with pytest.raises(ValueError, match="7 columns, but PCA was fitted on 5"):
        PCAWhiten(2).fit(mixed(50, 5)).transform(mixed(50, 7))
