"""What is every head of this model? One page to keep open: labels with their evidence, spectra, pairs, effects.

    python experiments/head_atlas.py --model gpt2                  a folder of a Hugging Face checkpoint, or a hub name
    python experiments/head_atlas.py --model runs/grow_induction_heads      a run folder: a slider through its training
    python experiments/head_atlas.py --model heads.npz             raw arrays W_E, W_Q, W_K, W_V, W_O, W_U (and more)
    python experiments/head_atlas.py --smoke                       a small planted model: does everything run?

Every head gets its taxonomy (where it looks x what it moves) with all evidence, singular values of its QK and OV
circuits against the band of random circuits, their eigenvalues between tokens, the strongest pairs of tokens, the
tokens (and positions of the text) that activate its QK directions most, its attention by offset, its partners in
composition; with text also its attention patterns and what ablating it does to the loss; with --dictionary what it
makes of known directions. Without a tokenizer, text or tokens all of it is from weights alone, and the page says so.

GPT-2-small shape takes 45 s from weights alone on two CPU cores (benchmarks/atlas.py); a run of the main job with 11
steps half a minute.

Writes runs/<name>/: report.html (one file, no network), atlas.json (the same as data), summary.json, config.json.
"""

import os

# Before jax is imported: the threads of OpenBLAS would spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from circuits_jax.circuits.weights import SHAPES, CircuitWeights
from circuits_jax.models.planted import plant
from circuits_jax.models.planted_recipes import recipes
from circuits_jax.models.transformer import check_tokens
from circuits_jax.reports import run_folder, study
from circuits_jax.reports.atlas import atlas
from circuits_jax.reports.atlas_page import atlas_json, atlas_page
from circuits_jax.reports.console import print_table
from circuits_jax.reports.material import Material
from circuits_jax.reports.run_folder import Figure
from circuits_jax.reports.studied_model import StudiedModel, open_model, plain_name, read_npz
from circuits_jax.training import devices

SAMPLES = (
    "The old lighthouse keeper wrote to the harbour master about the broken lamp. The harbour master read the "
    "letter twice, then wrote to the old lighthouse keeper that a new lamp would come by boat on the first calm day.",
    "When Anna and Peter went to the market, Peter gave a basket of apples to Anna. When Maria and Thomas went to the "
    "library, Thomas gave a book about rivers to Maria. Then Anna and Maria walked home together along the canal.",
    "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return area(width, "
    "height) * depth\n\nprint(area(3, 4))\nprint(volume(3, 4, 5))\n",
)
SHORTEST = 8
N_REPEATS = 4  # sequences, where there is no text


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to look at, and with what."""

    model: str = ""
    """A folder of a Hugging Face checkpoint or a hub name; a run folder; an .npz file."""
    text: tuple[str, ...] = ()
    """Texts to look at attention on; three of its own when left out. Needs a tokenizer."""
    tokens: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Sequences of token numbers instead: an .npy file, [T] or [B,T]."""
    length: int = 48
    """Tokens of a text that are looked at, at most."""
    weights_only: bool = False
    """No text and no forward pass: all from weights."""
    dictionary: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Directions to probe W_OV with: an .npz file of directions [N,D] and names [N]."""
    n_context: int | None = None
    """Longest sequence, for checkpoints; theirs when left out."""
    arm: str = ""
    """Of a run folder: which of its sweeps; the first when left out."""
    run: int = 0
    """Of a run folder: which run of the sweep."""
    steps: tuple[int, ...] = ()
    """Of a run folder: at which of its kept steps; all, or twelve, when left out."""
    seed: int = 0
    """Of nulls, controls and designed inputs."""
    smoke: bool = False
    """A small planted model, in a folder of its own."""
    name: str = ""
    """Of the run folder; head_atlas_ and the model's name when left out."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where run folders are."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Checked settings, the model, and what to look at it with."""

    settings: Settings
    folder: Path
    model: StudiedModel
    material: Material


def prepare(settings: Settings) -> Plan:
    """Raises ValueError for settings that make no sense, and for a model that cannot be opened."""
    devices.keep_compilations()
    devices.return_freed_memory()
    if bool(settings.model) == settings.smoke:
        raise ValueError(
            "--model must name a checkpoint folder, a hub name, a run folder or an .npz file; --smoke brings its own"
        )
    if settings.length < SHORTEST:
        raise ValueError(f"--length must be at least {SHORTEST}; got {settings.length}")
    if settings.weights_only + bool(settings.text) + (settings.tokens is not None) > 1:
        raise ValueError("--text, --tokens and --weights-only exclude each other: give one of them")
    name = settings.name or ("head_atlas_smoke" if settings.smoke else f"head_atlas_{plain_name(settings.model)}")
    run_folder.check_name(name)
    folder = settings.runs_dir / name
    source = str(_planted(folder)) if settings.smoke else settings.model
    try:
        model = open_model(source, settings.n_context, settings.arm, settings.run, settings.steps)
    except FileNotFoundError as error:
        raise ValueError(" ".join(str(error).split())) from error
    for size in ("n_context", "n_vocab"):
        if getattr(model.config, size) < SHORTEST:
            raise ValueError(
                f"heads cannot be told apart with {size} below {SHORTEST}; that of {model.name} is "
                f"{getattr(model.config, size)}"
            )
    return Plan(settings, folder, model, _material(settings, model))


def _planted(folder: Path) -> Path:
    """A model with planted circuits as raw arrays."""
    recipe = recipes("learned")["basic"]
    weights = CircuitWeights.from_params(recipe.config, plant(recipe, jax.random.key(0)).params)
    arrays: dict[str, Any] = {name: getattr(weights, name) for name in SHAPES}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "planted.npz", **{name: x for name, x in arrays.items() if x is not None})
    return folder / "planted.npz"


def _material(settings: Settings, model: StudiedModel) -> Material:
    tokens, about, first = _sequences(settings, model)
    entries, dictionary = _dictionary(settings, model)
    between = " " if model.tokenizer is None else ""
    predicted = None
    if tokens is not None:
        place = np.arange(tokens.shape[1])
        predicted = np.broadcast_to((place >= first) & (place < len(place) - 1), tokens.shape)
    return Material(_token_names(model), tokens, predicted, about, between, entries, dictionary)


def _sequences(settings: Settings, model: StudiedModel) -> tuple[np.ndarray | None, str, int]:
    """Tokens [B,T], None where all is from weights; what they are; from where on the next token can be predicted."""
    config, length = model.config, min(settings.length, model.config.n_context)
    if settings.weights_only:
        return None, "", 0
    if settings.tokens is not None:
        found = np.atleast_2d(_numbers(settings.tokens))
        check_tokens(config, found[..., :length])
        if not len(found) or found.shape[-1] < SHORTEST:
            raise ValueError(f"--tokens must hold sequences of at least {SHORTEST}; got {list(found.shape)}")
        found = found[:, :length]
        return found, f"the first {found.shape[1]} tokens of each in {settings.tokens.name}", 0
    if model.tokenizer is not None:
        encoded = [model.tokenizer.encode(text).ids for text in settings.text or SAMPLES]
        starts = [] if model.bos is None else [model.bos]
        rows = [ids if ids[: len(starts)] == starts else starts + ids for ids in encoded]
        shortest = min(length, *map(len, rows))
        if shortest < SHORTEST:
            raise ValueError(f"--text must hold at least {SHORTEST} tokens each; got {min(map(len, rows))}")
        found = np.asarray([row[:shortest] for row in rows], np.int32)
        check_tokens(config, found)
        return found, f"{len(found)} texts, the first {shortest} tokens of each", 0
    if settings.text:
        raise ValueError(f"--text needs a tokenizer, and {model.name} has none; give --tokens")
    if model.kind == "pretrained" or length < SHORTEST:
        return None, "", 0
    rng, period = np.random.default_rng(settings.seed), length // 2
    distinct = config.n_vocab >= period
    half = np.stack([rng.choice(config.n_vocab, period, replace=not distinct) for _ in range(N_REPEATS)])
    about = f"random tokens, repeated after {period}; effects are on the second half"
    return np.concatenate([half, half], axis=1).astype(np.int32), about, period


def _token_names(model: StudiedModel) -> list[str]:
    """Every token as text."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return [str(token) for token in range(model.config.n_vocab)]
    texts = tokenizer.decode_batch([[token] for token in range(model.config.n_vocab)], skip_special_tokens=False)
    # A part of a character, or nothing: then the vocabulary's own name for it.
    whole = [bool(text) and "\ufffd" not in text for text in texts]
    return [
        text if good else (tokenizer.id_to_token(token) or f"[{token}]")
        for token, (text, good) in enumerate(zip(texts, whole, strict=True))
    ]


def _dictionary(settings: Settings, model: StudiedModel) -> tuple[list[str], np.ndarray | None]:
    if settings.dictionary is None:
        return [], None
    found = read_npz(settings.dictionary)
    if not {"directions", "names"} <= found.keys():
        raise ValueError(f"--dictionary must hold the arrays directions and names; got {', '.join(found) or 'none'}")
    directions, names = found["directions"], [str(name) for name in np.atleast_1d(found["names"])]
    wanted = (len(names), model.config.d_model)
    if directions.shape != wanted or not names:
        raise ValueError(f"--dictionary must hold directions {list(wanted)}, one a name; got {list(directions.shape)}")
    if not np.issubdtype(directions.dtype, np.floating) or not np.isfinite(directions).all():
        raise ValueError(f"--dictionary must hold finite directions; got {directions.dtype} with NaN or infinity")
    return names, directions


def _numbers(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokens must be an .npy file; {path} is none: {error}") from error


def main(plan: Plan) -> None:
    """Computes the atlas, prints which heads are what, and writes the run folder."""
    console = Console()
    settings = plan.settings
    run_folder.open_run(plan.folder, study.recorded(settings))
    with console.status("opening") as status:
        found = atlas(plan.model, plan.material, jax.random.key(settings.seed), status.update)
        status.update("page")
        run_folder.write_text(plan.folder / "report.html", atlas_page(found))
        run_folder.write_text(plan.folder / "atlas.json", atlas_json(found))
    heads = found["states"][-1]["heads"]
    figures, rows = {}, []
    for side in ("qk", "ov"):
        for name in (*found["types"][side], "undetermined"):
            of_type = [
                f"{i // found['n_heads']}.{i % found['n_heads']}" for i, head in enumerate(heads)
                if name in [label["name"] for label in head[side]] or (name == "undetermined" and not head[side])
            ]  # fmt: skip
            figures[f"{side}_{name}"] = Figure(f"share of heads: {side.upper()} {name}", len(of_type) / len(heads))
            rows.append([f"{side.upper()} {name.replace('_', ' ')}", str(len(of_type)), " ".join(of_type[:16])])
    run_folder.write_summary(plan.folder, figures)
    print_table(console, found["title"], ["type", "heads", "which"], rows)
    for note in found["notes"]:
        console.print(note, soft_wrap=True)
    console.print(f"page: {plan.folder / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    run_folder.run_command(lambda: prepare(tyro.cli(Settings, description=__doc__)), main)
