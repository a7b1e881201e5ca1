"""R-MAC against its definition, the same for turned maps, and precision that finds what was
planted."""

import numpy as np
import pytest
import torch
from sklearn.preprocessing import normalize as unit

from lib.models import build
from lib.study import retrieval
from lib.study.retrieval import nearest, precision_at_k, regions, rmac


def test_regions_follow_the_paper():
    assert regions(8, 1) == [(0, 0, 8)]
    level2 = [r for r in regions(8, 2) if r[2] == 5]
    assert level2 == [(0, 0, 5), (0, 3, 5), (3, 0, 5), (3, 3, 5)]
    assert sum(r[2] == 4 for r in regions(8, 3)) == 9
    assert regions(1) == [(0, 0, 1)]


def test_rmac_is_its_definition_and_the_same_for_turned_maps():
    maps = torch.rand(3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(3, 5)
    for top, left, side in regions(8):
        vector = maps[:, :, top : top + side, left : left + side].reshape(3, 5, -1).max(2).values
        expected += vector / vector.norm(dim=1, keepdim=True)
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rmac(maps), expected)
    for some in (maps, maps[..., :7, :7], maps[..., :3, :3]):
        torch.testing.assert_close(rmac(torch.rot90(some.flip(3), 1, (2, 3))), rmac(some))
    assert rmac(torch.zeros(1, 5, 8, 8)).eq(0).all()


def test_p4m_finds_a_mirrored_copy_first():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    both = np.concatenate([images, images[:, :, ::-1]])
    vectors = retrieval.describe(build("p4m", 4, (2, 4, 8)).eval(), both)
    assert (nearest(vectors, np.arange(12), 1)[:, 0] == np.arange(12) + 12).all()
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_nearest_leaves_out_the_query_and_its_patient():
    vectors = unit(np.array([[1, 0], [1, 0.1], [0, 1], [1, 0.2]]))
    assert nearest(vectors, np.array([0]), 2).tolist() == [[1, 3]]
    found = nearest(vectors, np.array([0]), 3, patients=np.array([0, 0, 1, 2]))
    assert found.tolist() == [[3, 2, -1]]


def test_precision_finds_planted_findings_and_counts_patients_apart():
    rng = np.random.default_rng(1)
    n = 400
    targets, patients = rng.random((n, 2)) < [0.3, 0.1], np.arange(n) // 4
    noise = rng.normal(size=(n, 8))
    blind = precision_at_k(unit(noise), targets, patients)
    assert blind["precision"] == pytest.approx(blind["chance"], abs=0.05)
    assert blind["chance"] == pytest.approx(targets.mean(axis=0), abs=0.03)
    assert blind["same_patient"] == pytest.approx(blind["same_patient_chance"], abs=0.01)
    planted = unit(0.1 * noise + 5 * np.pad(targets, ((0, 0), (0, 6))))
    assert precision_at_k(planted, targets, patients)["precision"].min() > 0.9
    # a code that knows the patient alone: it finds the patient again, and no finding of others
    of_patient = rng.normal(size=(n // 4, 8))[patients]
    known = precision_at_k(unit(of_patient + 0.01 * noise), targets, patients)
    assert known["same_patient"] == pytest.approx(3 / 5, abs=0.02)
    assert known["precision"] == pytest.approx(known["chance"], abs=0.1)
    single = precision_at_k(unit(noise), targets, np.arange(n))
    assert np.isnan([single["same_patient"], single["same_patient_chance"]]).all()
    never = precision_at_k(unit(noise), np.zeros((n, 1), bool), patients)
    assert np.isnan(never["precision"]).all()
