"""Figures of the benchmarks show every row of their table."""

import pandas as pd
import pytest

from lib.plots.bench import METHOD_TITLES, kmeans_quality


def table():
    rows = [
        {
            "method": name,
            "points": n,
            "seconds": n / 1e4 * (i + 1),
            "inertia_ratio": 1 + i / 10,
            "nmi": 0.9 - i / 10,
        }
        for i, name in enumerate(METHOD_TITLES)
        for n in (10_000, 100_000)
    ]
    return pd.DataFrame(rows)


def test_each_method_has_its_marker_at_each_number_of_points():
    figure = kmeans_quality(table(), "synthetic embeddings, 2 CPU cores")
    for axis, column in zip(figure.axes, ("inertia_ratio", "nmi"), strict=True):
        points = [line for line in axis.lines if line.get_linestyle() == "None"]
        drawn = {(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in points}
        assert {(x, y) for x, y, _ in drawn} == set(
            zip(table().seconds, table()[column], strict=True)
        )
        assert len({marker for _, _, marker in drawn}) == len(METHOD_TITLES)
        assert axis.get_xscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(
        METHOD_TITLES.values()
    )
    assert "synthetic embeddings" in figure.get_supxlabel()


def test_a_table_without_a_column_or_with_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="no column 'nmi'"):
        kmeans_quality(table().drop(columns="nmi"), "synthetic")
    with pytest.raises(ValueError, match="unknown method 'dbscan'"):
        kmeans_quality(table().replace("graph", "dbscan"), "synthetic")
