"""What a JSON file of results must hold, said as a nested value, and the check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

NUMBER, TEXT, WHOLE, FLAG, ANYTHING = "number", "text", "whole number", "true or false", "anything"


def problems(value: Any, schema: Any, where: str) -> Iterator[str]:
    """What does not fit, one line each; nothing if all does.

    Parameters
    ----------
    value : JSON value
        NaN counts as null, which JSON makes of it.
    schema : nested value
        One of `NUMBER`, `TEXT`, `WHOLE`, `FLAG`, `ANYTHING`; ``[x]``, a list of x; ``{"name": x}``,
        an object with these keys, each required unless its name here ends in ``?``; ``{"*": x}``,
        an object with any keys; ``(x, None)``, x or null; ``("a", "b")``, one of these texts.
    where : str
        Name of the value in the lines.
    """
    if schema == ANYTHING:
        return
    if isinstance(schema, tuple) and None in schema:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return
        schema = schema[0]
    if isinstance(schema, tuple):
        if value not in schema:
            yield f"{where} is {value!r}, not one of {', '.join(schema)}"
    elif isinstance(schema, list):
        if not isinstance(value, list | tuple):
            yield f"{where} is {type(value).__name__}, not a list"
            return
        for index, item in enumerate(value):
            yield from problems(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, dict):
        if not isinstance(value, Mapping):
            yield f"{where} is {type(value).__name__}, not an object"
        elif "*" in schema:
            for key, item in value.items():
                yield from problems(item, schema["*"], f"{where}.{key}")
        else:
            names = {key.removesuffix("?"): part for key, part in schema.items()}
            yield from (f"{where}.{key} is unknown" for key in value if key not in names)
            yield from (
                f"{where}.{key} is missing"
                for key in schema
                if not key.endswith("?") and key not in value
            )
            for key, part in names.items():
                if key in value:
                    yield from problems(value[key], part, f"{where}.{key}")
    else:
        kinds = {TEXT: str, FLAG: bool, WHOLE: int | np.integer, NUMBER: int | float | np.number}
        fits = isinstance(value, kinds[schema]) and (schema == FLAG or not isinstance(value, bool))
        if not fits or (schema == NUMBER and not math.isfinite(value)):
            yield f"{where} is {value!r}, not a {schema}"
