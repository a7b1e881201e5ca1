"""The digits: ten classes that can be seen, upright and turned."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from lib.data.digits import make_digits


def test_shapes_labels_and_black_corners():
    images, table = make_digits()
    assert images.shape == (1797, 64, 64)
    assert images.dtype == np.uint8
    assert table["image_id"].is_unique
    assert table["patient_id"].is_unique
    assert table["findings"].tolist() == load_digits().target.astype(str).tolist()
    assert not table["angle"].any()
    for corner in (images[:, :4, :4], images[:, -4:, -4:]):
        assert not corner.any()
    assert images.max() > 250
    np.testing.assert_allclose(images.mean((1, 2)) / load_digits().images.mean((1, 2)), 9, rtol=0.1)


def test_turned_digits_are_the_upright_ones_turned():
    upright, _ = make_digits(n=40)
    turned, table = make_digits(True, seed=3, n=40)
    assert table["angle"].between(0, 360).all()
    for image, result, angle in zip(upright, turned, table["angle"], strict=True):
        expected = ndimage.rotate(image.astype(float), angle, reshape=False, order=1)
        wrong = ndimage.rotate(image.astype(float), -angle, reshape=False, order=1)
        assert np.abs(expected - result).mean() < 2
        if abs(np.sin(np.deg2rad(angle))) > 0.3:
            assert np.abs(wrong - result).mean() > 4
    assert not turned[:, :4, :4].any()


def test_an_image_depends_on_the_seed_and_its_number_alone():
    images, table = make_digits(True, seed=1, n=30)
    fewer, rows = make_digits(True, seed=1, n=10)
    np.testing.assert_array_equal(images[:10], fewer)
    assert table["angle"][:10].tolist() == rows["angle"].tolist()
    assert (make_digits(True, seed=2, n=10)[0] != fewer).any()
    np.testing.assert_array_equal(make_digits(seed=2, n=10)[0], make_digits(seed=1, n=10)[0])


@pytest.mark.parametrize(("turned", "low", "high"), [(False, 0.9, 1), (True, 0.1, 0.7)])
def test_a_linear_probe_reads_upright_digits_and_not_turned_ones(turned, low, high):
    images, table = make_digits(turned)
    pixels = images[:, 8:56:4, 8:56:4].reshape(len(images), -1) / 255
    model = LogisticRegression(max_iter=200).fit(pixels[:1200], table["findings"][:1200])
    assert low < model.score(pixels[1200:], table["findings"][1200:]) < high
