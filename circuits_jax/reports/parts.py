"""What was measured on one part of an experiment, in a file of its own, so that a run that was stopped can go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dictionaries of arrays as one, names joined by "/"."""
    out: dict[str, np.ndarray] = {}
    for name, value in found.items():
        out |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: np.asarray(value)}
    return out


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    part.replace(path)


def load(path: Path) -> dict[str, np.ndarray]:
    """What save wrote."""
    with np.load(path) as file:
        return dict(file)
