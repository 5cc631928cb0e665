"""Checkpoints of a sweep; the only file that imports orbax.

A checkpoint appears under its step all at once: orbax writes it under a temporary name and renames it, so a kill at
any moment leaves the earlier ones whole.
"""

from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


def save(folder: Path, step: int, state: Any) -> None:
    """Writes a pytree of arrays as folder/step; a checkpoint already there is kept."""
    try:
        with ocp.training.Checkpointer(folder.absolute(), cleanup_tmp_directories=True) as checkpointer:
            checkpointer.save(step, state, overwrite=True)
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise CheckpointError(
            f"checkpoint {folder / str(step)} cannot be written ({_first_line(error)}): "
            "check the space and the permissions there, then run the same command to resume"
        ) from error


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, rising; empty where there is no folder."""
    if not folder.is_dir():
        return []
    with ocp.training.Checkpointer(folder.absolute()) as checkpointer:
        return sorted(checkpoint.step for checkpoint in checkpointer.checkpoints)


def load(folder: Path, step: int, like: Any) -> Any:
    """The pytree at folder/step, with the structure, shapes and dtypes of `like` (NumPy arrays or shapes)."""
    try:
        with ocp.training.Checkpointer(folder.absolute()) as checkpointer:
            return checkpointer.load(step, like)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {folder / str(step)} cannot be read ({_first_line(error)}): "
            "delete that folder, then run the same command to resume from the one before"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
