"""The digits: ten classes that can be seen, upright and turned."""

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits

from lib.data.digits import make_digits


def test_shapes_labels_and_black_corners():
    images, table = make_digits()
    assert (images.shape, images.dtype) == ((1797, 64, 64), np.uint8)
    assert table["image_id"].is_unique
    assert table["patient_id"].is_unique
    assert table["findings"].tolist() == load_digits().target.astype(str).tolist()
    assert not table["angle"].any()
    for corner in (images[:, :4, :4], images[:, -4:, -4:], make_digits(True, n=40)[0][:, :4, :4]):
        assert not corner.any()
    np.testing.assert_allclose(images.mean((1, 2)) / load_digits().images.mean((1, 2)), 9, rtol=0.1)


def test_turned_digits_are_the_upright_ones_turned_by_a_seed():
    upright, _ = make_digits(n=40)
    turned, table = make_digits(True, seed=3, n=40)
    for image, result, angle in zip(upright, turned, table["angle"], strict=True):
        image = image.astype(float)
        expected = ndimage.rotate(image, angle, reshape=False, order=1)
        wrong = ndimage.rotate(image, -angle, reshape=False, order=1)
        assert np.abs(expected - result).mean() < 2
        if abs(np.sin(np.deg2rad(angle))) > 0.3:
            assert np.abs(wrong - result).mean() > 4
    np.testing.assert_array_equal(turned[:10], make_digits(True, seed=3, n=10)[0])
    assert (make_digits(True, seed=2, n=10)[0] != turned[:10]).any()
    np.testing.assert_array_equal(make_digits(seed=2, n=10)[0], upright[:10])
