"""The head atlas as one self-contained HTML page: overview, evidence of each head, composition graph; no network.

The page is assets/: a skeleton, a style sheet and plain scripts that share one module scope. All that differs between
models is one JSON block, and scripts write its text as text, never as markup.
"""

import base64
import html
import json
import math
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

import numpy as np

SCRIPTS = (
    "elements.js",
    "charts.js",
    "overview.js",
    "attention.js",
    "evidence.js",
    "directions.js",
    "graph.js",
    "atlas.js",
)
DIGITS = 4  # significant, of every number on the page


def atlas_page(atlas: Mapping[str, Any]) -> str:
    """The page.

    Args:
        atlas: title, facts, notes, n_layers, n_heads, types, samples and states, as reports.atlas makes it. Heads are
            layer-major, arrays NumPy, NaN means unknown; patterns are uint8 [samples,T,T] with 255 for 1.

    Raises:
        ValueError: no state, a state without one entry for each head, or patterns that do not fit the samples.
    """
    parts = {
        "title": html.escape(atlas["title"]),
        "style": _asset("atlas.css"),
        "data": atlas_json(atlas).replace("<", "\\u003c"),  # "</script>" in a token would end the block
        "script": "\n".join(map(_asset, SCRIPTS)),
    }
    return Template(_asset("atlas.html")).substitute(parts)


def atlas_json(atlas: Mapping[str, Any]) -> str:
    """The atlas as JSON: numbers rounded, [re, im] for complex ones, null for NaN, patterns as base64.

    Raises:
        ValueError: as atlas_page.
    """
    _check(atlas)
    return json.dumps(_plain(atlas), separators=(",", ":"), allow_nan=False)


def _asset(name: str) -> str:
    return (resources.files("circuits_jax.reports") / "assets" / name).read_text(encoding="utf-8")


def _check(atlas: Mapping[str, Any]) -> None:
    if not atlas["states"]:
        raise ValueError("atlas['states'] must hold at least one state; got none")
    n_heads = atlas["n_layers"] * atlas["n_heads"]
    length = max(map(len, atlas["samples"]), default=0)
    for state in atlas["states"]:
        if len(state["heads"]) != n_heads:
            raise ValueError(f"state {state['name']!r} must have {n_heads} heads; got {len(state['heads'])}")
        for index, head in enumerate(state["heads"]):
            patterns = np.asarray(head["patterns"])
            if atlas["samples"] and (
                patterns.dtype != np.uint8 or patterns.shape != (len(atlas["samples"]), length, length)
            ):
                raise ValueError(
                    f"patterns of head {index} in state {state['name']!r} must be uint8 "
                    f"[{len(atlas['samples'])},{length},{length}]; got {patterns.dtype} {list(patterns.shape)}"
                )


def _plain(value: Any) -> Any:
    """What JSON knows: rounded numbers, [re, im] for complex ones, null for NaN, base64 for uint8 arrays."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return base64.b64encode(value.tobytes()).decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return [_plain(value.real), _plain(value.imag)]
    if isinstance(value, float):
        return _rounded(value)
    return value


def _rounded(value: float) -> float | str | None:
    """Scripts compare "Infinity" as the number."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.{DIGITS}g}")
