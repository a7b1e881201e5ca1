"""Numbers and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals, or a dash for None, NaN and infinity."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def span(low: float | None, high: float | None, digits: int = 3) -> str:
    """``"0.100 to 0.200"``, or a dash where there is no interval."""
    return (
        "–"
        if low is None or not math.isfinite(low)
        else f"{number(low, digits)} to {number(high, digits)}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """A Markdown table; with `figures` all columns but the first are aligned to the right."""
    lines = [
        "| " + " | ".join(header) + " |",
        "|---|" + ("---:|" if figures else "---|") * (len(header) - 1),
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
