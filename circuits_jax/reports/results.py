"""Results as labelled arrays (xarray), with what made them, kept as zarr."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from circuits_jax.reports.run_folder import RunFolderError, provenance


def dataset(
    arrays: Mapping[str, np.ndarray],
    dims: Mapping[str, tuple[str, ...]],
    coords: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> xarray.Dataset:
    """Arrays with named axes.

    Args:
        arrays: by name.
        dims: the axes of every array, by its name.
        coords: the labels along an axis, such as the seeds along "run".
        settings: of the experiment; kept with versions and device as JSON in the attributes.

    Raises:
        ValueError: an array without dims, or with other than its own number of axes.
    """
    for name, array in arrays.items():
        if name not in dims or len(dims[name]) != np.ndim(array):
            raise ValueError(f"dims[{name!r}] must name {np.ndim(array)} axes; got {dims.get(name)}")
    return xarray.Dataset(
        {name: (dims[name], _plain(array)) for name, array in arrays.items()},
        coords={name: _plain(labels) for name, labels in coords.items()},
        attrs={"settings": json.dumps(dict(settings)), "provenance": json.dumps(provenance())},
    )


def _plain(array: Any) -> np.ndarray:
    """A NumPy array; text of any length, for which zarr has a specification, unlike text of a fixed one."""
    array = np.asarray(array)
    return array.astype(object) if array.dtype.kind == "U" else array


def save(path: Path, groups: Mapping[str, xarray.Dataset]) -> None:
    """Writes a zarr store with one group for each data set, beside the old one, and then takes its place."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for group, data in groups.items():
        data.to_zarr(part, group=group, mode="w", zarr_format=3, consolidated=False)
    old = path.with_name(path.name + ".old")
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def load(path: Path, group: str) -> xarray.Dataset:
    """One group of a store that save wrote.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    try:
        return xarray.open_zarr(path, group=group, consolidated=False).load()
    except Exception as error:  # zarr and xarray raise many kinds
        raise RunFolderError(f"results {path}/{group} cannot be read: {error}; run the experiment again") from error
