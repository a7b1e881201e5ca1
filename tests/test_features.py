"""Features keep rows and images together, batch-norm statistics follow the weights, and
PCA-whitening agrees with scikit-learn."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

from lib.features import PCAWhiten, estimate_statistics, extract
from lib.images import normalise
from lib.models import build

KINDS = {"array": np.asarray, "tensor": torch.from_numpy}


def mixed(n, d, offset=3.0, dtype=np.float32, seed=0):
    """Correlated features (n, d), away from the origin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset).astype(dtype)


class Corner(nn.Module):
    """Features that name their image: its first two pixels."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)

    def features(self, x):
        return self.dropout(self.norm(x[:, 0, 0, :2]))


@pytest.fixture
def images():
    """700 images that carry their own index in the first two pixels."""
    images = np.random.default_rng(0).integers(0, 256, (700, 64, 64), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(700) // 256, np.arange(700) % 256
    return images


def test_extract_changes_nothing_in_the_network(images):
    model = Corner().train()
    model.norm.eval()
    in_parts = extract(model, torch.from_numpy(images[:300]), 7)
    np.testing.assert_allclose(extract(model, images[:300]), in_parts, atol=1e-6)
    with pytest.raises(ValueError, match="no images"):
        extract(model, images[:0])
    model.features = lambda x: x[:, :, 0, 0] / 0.0
    with pytest.raises(FloatingPointError, match="image 0"):
        extract(model, images[:300])
    assert (model.training, model.norm.training, model.dropout.training) == (True, False, True)
    assert not model.norm.running_mean.any()


# ---------------------------------------------------------------- batch-norm statistics


@pytest.mark.parametrize("backbone", ["p4m", "alexnet"])
def test_running_statistics_lag_behind_the_weights_and_fresh_ones_do_not(backbone):
    """Features in evaluation mode against train mode of the batch norms, on one large batch."""
    width = {"p4m": (2, 4, 8), "alexnet": (8, 16, 24, 24, 16, 64)}[backbone]
    model = build(backbone, 10, width)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (384, 8, 8), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(12):
        x = normalise(torch.from_numpy(pictures[step * 32 : (step + 1) * 32]))
        nn.functional.cross_entropy(model(x), torch.arange(32) % 10).backward()
        optimizer.step()
        optimizer.zero_grad()

    def gap():
        evaluated, other = extract(model, pictures), copy.deepcopy(model).eval()
        for module in other.modules():
            module.train(isinstance(module, nn.modules.batchnorm._BatchNorm))
        with torch.no_grad():
            trained = other.features(normalise(torch.from_numpy(pictures))).numpy()
        return np.linalg.norm(evaluated - trained) / np.linalg.norm(trained)

    assert gap() > 0.1
    estimate_statistics(model, pictures, np.arange(len(pictures)))
    assert gap() < 0.05


def test_fresh_statistics_are_those_of_the_chosen_images(images):
    model = Corner().train()
    rows = np.arange(0, 700, 2)
    estimate_statistics(model, images, rows)
    pixels = images[rows][:, 0, :2] / 127.5 - 1
    np.testing.assert_allclose(model.norm.running_mean, pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.norm.running_var, pixels.var(0, ddof=1), rtol=1e-2)
    assert model.norm.momentum == 0.1
    assert model.dropout.training


# ---------------------------------------------------------------- PCAWhiten


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(500, 40), (60, 200), (9000, 12)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whitening_agrees_with_scikit_learn(kind, n, d, dtype):
    x = mixed(n, d, dtype=dtype)
    ours = PCAWhiten(10, l2=False)
    z = ours.fit_transform(KINDS[kind](x))
    theirs = PCA(10, whiten=True, svd_solver="full").fit(x.astype(np.float64))
    assert isinstance(z, np.ndarray if kind == "array" else torch.Tensor)
    assert isinstance(ours.components_, type(z))
    assert np.asarray(z).dtype == dtype
    for name in ("mean_", "explained_variance_"):
        found, expected = np.asarray(getattr(ours, name)), getattr(theirs, name)
        np.testing.assert_allclose(found, expected, rtol=1e-7, err_msg=name)
    axes = np.asarray(ours.components_)
    signs = np.sign((axes * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(axes, signs[:, None] * theirs.components_, atol=1e-7)
    expected = signs * theirs.transform(x.astype(np.float64))
    np.testing.assert_allclose(np.asarray(z), expected, atol=1e-5 if dtype == np.float32 else 1e-8)


def test_whitened_components_have_unit_variance_far_from_the_origin():
    z = PCAWhiten(8, l2=False).fit_transform(mixed(4000, 20, offset=1000.0))
    np.testing.assert_allclose(np.cov(z.T.astype(np.float64)), np.eye(8), atol=1e-3)


def test_rows_have_unit_length_and_a_zero_row_stays_zero():
    x = mixed(300, 10, dtype=np.float64)
    pca = PCAWhiten(4).fit(x)
    np.testing.assert_allclose(np.linalg.norm(pca.transform(x), axis=1), 1.0)
    np.testing.assert_array_equal(pca.transform(pca.mean_[None]), 0.0)


def test_the_largest_loading_of_each_axis_is_positive():
    axes = PCAWhiten(10).fit(mixed(200, 30)).components_
    assert (axes[np.arange(10), np.abs(axes).argmax(axis=1)] > 0).all()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(20, 60),
    d=st.integers(2, 80),
    rank=st.integers(1, 12),
    offset=st.sampled_from([0.0, 3.0, 1000.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore:PCA keeps")
def test_exactly_the_directions_that_vary_are_kept(n, d, rank, offset, scale, seed):
    """Float32 rounding spreads a low-rank matrix over all directions; none of those may be blown up
    to unit variance."""
    rank = min(rank, d)
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(d, rank)))[0].T
    x = ((rng.normal(size=(n, rank)) @ axes + offset) * scale).astype(np.float32)
    pca = PCAWhiten(90, l2=False).fit(x)
    assert pca.n_components_ == rank
    assert np.abs(pca.transform(x)).max() <= np.sqrt(n)


def test_fewer_components_than_asked_are_said_and_small_but_real_ones_are_kept():
    with pytest.warns(RuntimeWarning, match="19 components instead of 20"):
        assert len(PCAWhiten(20).fit(mixed(20, 32)).components_) == 19
    x = np.random.default_rng(0).normal(size=(1000, 5)) * [1, 1e-1, 1e-2, 1e-3, 1e-4]
    assert PCAWhiten(5).fit(x.astype(np.float32)).n_components_ == 5


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((50, 6), 0.1, dtype=np.float32), "all 50 rows"),
        (np.zeros((5, 60), dtype=np.float32), "all 5 rows"),
        (np.where(np.arange(40).reshape(10, 4) == 30, np.nan, 1.0), "row 7"),
    ],
    ids=["constant", "zero", "nan"],
)
def test_features_that_cannot_be_whitened(x, message):
    with pytest.raises(ValueError, match=message):
        PCAWhiten(2).fit(x)
