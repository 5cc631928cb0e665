"""What the head atlas is made of: a pretrained folder, a run folder of ours, or raw arrays, all as (config, params)."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from circuits_jax.circuits.weights import SHAPES, CircuitWeights, params_from_weights
from circuits_jax.models.config import Rotary, TransformerConfig
from circuits_jax.models.pretrained import checkpoint_folder, load_pretrained, load_tokenizer
from circuits_jax.models.transformer import Params
from circuits_jax.training.checkpoints import CheckpointError
from circuits_jax.training.sweep import kept_params, kept_steps

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_STATES = 12  # of a training run: what a page can hold
ROTARY = tuple(f"rotary_{field.name}" for field in dataclasses.fields(Rotary))
OPTIONS = ("n_context", "positions", "norm", "norm_epsilon", "causal", *ROTARY)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class StudiedModel:
    """A model, or one run of a sweep at several steps.

    Attributes:
        name: for people.
        kind: "pretrained", "run" or "arrays".
        config: of all states.
        states: (name, function that gives the parameters, once), the last one being the model as it ended.
        tokenizer: or None.
        bos: token that sequences begin with, where the checkpoint names one.
        notes: what a reader has to know.
    """

    name: str
    kind: str
    config: TransformerConfig
    states: Sequence[tuple[str, Callable[[], Params]]]
    tokenizer: "Tokenizer | None" = None
    bos: int | None = None
    notes: tuple[str, ...] = ()


def open_model(
    where: str, n_context: int | None = None, arm: str = "", run: int = 0, steps: Sequence[int] = ()
) -> StudiedModel:
    """Finds out what is there and opens it.

    Args:
        where: an .npz file of raw arrays, a run folder of ours, a folder of a Hugging Face checkpoint or a hub name.
        n_context: longest sequence, for checkpoints.
        arm, run, steps: of a run folder: which of its sweeps, which of its runs, at which kept steps.

    Raises:
        ValueError, FileNotFoundError: that says what is missing, broken or unsupported.
    """
    path = Path(where).expanduser()
    is_run = any((path / part).is_dir() for part in ("checkpoints", "trajectories"))
    if not is_run and (arm or run or steps):
        raise ValueError(f"--arm, --run and --steps are of run folders; {where} is none")
    if n_context is not None and (is_run or path.suffix == ".npz"):
        raise ValueError(f"--n-context is of checkpoints; {where} says itself how long its sequences are")
    if is_run:
        return _of_run(path, arm, run, steps)
    return _of_arrays(path) if path.suffix == ".npz" else _of_checkpoint(where, n_context)


def _of_checkpoint(where: str, n_context: int | None) -> StudiedModel:
    folder = checkpoint_folder(where)
    config, params = load_pretrained(folder, n_context=n_context)
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARIES)
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    notes = () if has_tokenizer else (f"No tokenizer in {folder.name}: tokens are shown by their number.",)
    bos = json.loads((folder / "config.json").read_text()).get("bos_token_id")
    bos = bos if isinstance(bos, int) and 0 <= bos < config.n_vocab and config.causal else None
    # The list hands the parameters over and keeps none: whoever has what it needs of them can let them go.
    return StudiedModel(plain_name(where), "pretrained", config, [("", [params].pop)], tokenizer, bos, notes)


def plain_name(where: str) -> str:
    """The last part of a path or of a hub name, also where the path is relative; without .npz."""
    return os.path.basename(os.path.abspath(Path(where).expanduser())).removesuffix(".npz")


def _of_run(folder: Path, arm: str, run: int, steps: Sequence[int]) -> StudiedModel:
    there = [path for path in (folder / "checkpoints").glob("*") if path.is_dir()]
    arms = [path.name for path in sorted(there, key=lambda path: (path.stat().st_mtime, path.name))]  # as trained
    if not arms:
        raise ValueError(f"{folder} holds no checkpoints yet: run its experiment to the end")
    if arm and arm not in arms:
        raise ValueError(f"--arm must be one of {', '.join(arms)}; got {arm!r}")
    arm = arm or arms[0]
    kept = kept_steps(folder / "checkpoints" / arm)
    if not kept:
        raise ValueError(f"{folder} keeps no parameters of {arm}: run its experiment to the end, or with steps to keep")
    if missing := [step for step in steps if step not in kept]:
        raise ValueError(f"--steps must be among the kept ones, {', '.join(map(str, kept))}; got {missing[0]}")
    config, seeds = _recorded(folder / "trajectories" / f"{arm}.zarr")
    if not 0 <= run < len(seeds):
        raise ValueError(f"--run must be in [0, {len(seeds)}), the runs of {arm}; got {run}")

    def at(step: int) -> Params:
        runs = kept_params(config, folder / "checkpoints" / arm, step)
        if not all(np.isfinite(x[run]).all() for x in jax.tree.leaves(runs)):
            raise CheckpointError(f"run {run} of {arm} has diverged by step {step}: look at another --run")
        return jax.tree.map(lambda x: jax.numpy.asarray(x[run]), runs)

    chosen = steps or _spread(kept, MOST_STATES)
    notes = (f"Run {run} of {arm} (seed {seeds[run]}) at {len(chosen)} of its {len(kept)} kept steps.",)
    states = [(f"step {step}", partial(at, step)) for step in chosen]
    return StudiedModel(f"{folder.name}, {arm}, seed {seeds[run]}", "run", config, states, notes=notes)


def _recorded(store: Path) -> tuple[TransformerConfig, list[int]]:
    """The model of an arm and the seeds of its runs, from the attributes of its trajectories."""
    try:
        attributes = json.loads((store / "zarr.json").read_text())["attributes"]
        fields: dict[str, Any] = json.loads(attributes["settings"])["model"]
        seeds = json.loads(attributes["runs"])["seed"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{store} does not say which model its runs have: {error}") from error
    if differ := sorted({field.name for field in dataclasses.fields(TransformerConfig)} ^ fields.keys()):
        raise ValueError(
            f"{store} is of another version of circuits_jax, whose models have other settings ({', '.join(differ)}): "
            "train it again, or use that version"
        )
    return TransformerConfig(**fields), seeds


def _spread(values: Sequence[int], n: int) -> list[int]:
    """At most n of the values, evenly spread, first and last among them."""
    places = np.unique(np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int))
    return [values[i] for i in places]


def _of_arrays(path: Path) -> StudiedModel:
    config, params = params_from_weights(weights_of_arrays(read_npz(path)))
    notes = ("Raw arrays: what these heads get from MLPs, if their model has any, is not here.",)
    return StudiedModel(plain_name(str(path)), "arrays", config, [("", [params].pop)], notes=notes)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; ValueError that names the file where it is none."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except Exception as error:  # a zip file fails in many ways
        raise ValueError(f"{path} is no .npz file that can be read: {error}") from error


def weights_of_arrays(found: dict[str, np.ndarray]) -> CircuitWeights:
    """CircuitWeights from named arrays, as in an .npz file.

    Args:
        found: W_E, W_Q, W_K, W_V, W_O, W_U and, where there are such, W_P, b_Q, b_K, b_V, b_O, b_U, q_gain, k_gain, in
            the shapes of CircuitWeights; n_context, positions, norm, norm_epsilon, causal and the fields of Rotary,
            such as rotary_base, as values.

    Raises:
        ValueError: an array is missing, unknown, not finite, or fits no model.
    """
    known = (*SHAPES, *OPTIONS)
    required = [name for name in SHAPES if name.startswith("W_") and name != "W_P"]
    if missing := [name for name in required if name not in found]:
        raise ValueError(f"arrays must hold {', '.join(required)}; {', '.join(missing)} not found")
    if unknown := sorted(found.keys() - set(known)):
        raise ValueError(f"arrays may be {', '.join(known)}; got {', '.join(unknown)}")
    if ("q_gain" in found) != ("k_gain" in found):
        raise ValueError("q_gain and k_gain come together; only one of them found")
    arrays: dict[str, Any] = {}
    for name in found.keys() & SHAPES.keys():
        if not np.issubdtype(found[name].dtype, np.floating):
            raise ValueError(f"{name} must hold floating-point numbers; got {found[name].dtype}")
        if bad := int(np.sum(~np.isfinite(found[name]))):
            raise ValueError(f"{name} must hold finite numbers; {bad} of {found[name].size} are not")
        arrays[name] = jax.numpy.asarray(found[name], jax.numpy.float32)
    options: dict[str, Any] = {name: found[name].tolist() for name in OPTIONS if name in found}
    turning = {name.removeprefix("rotary_"): options.pop(name) for name in ROTARY if name in options}
    options.setdefault("positions", "learned" if "W_P" in arrays else "none")
    return CircuitWeights(**arrays, **options, rotary=Rotary(**turning))
