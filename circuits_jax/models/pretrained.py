"""Checkpoints of Hugging Face: a folder or a name on the hub -> (config, params), and its tokenizer.

Weights go from the file to their place in blocks, so that hardly more than the parameters is ever in memory.
"""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.families import Checkpoint, read_config, stored_sizes
from circuits_jax.models.transformer import Params, init_params
from circuits_jax.models.weight_names import AXES, Stored

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLOCK = 1 << 22  # numbers that are read at once
FLOATS = ("F64", "F32", "F16", "BF16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt")
HUB_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES)


class Tensor(NamedTuple):
    """A weight in a file, under the name that the file gives it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def load_pretrained(
    name_or_folder: str | Path,
    *,
    n_context: int | None = None,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
) -> tuple[TransformerConfig, Params]:
    """A Hugging Face checkpoint as (config, params): GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma, (Ro)BERT(a).

    Logits and attention patterns are those of the reference implementation, of BERT without padding and in RoBERTa
    without the padding token. What the checkpoint asks for and the transformer does not do is refused. Peak memory is
    that of the parameters and tens of megabytes on CPU.

    Args:
        name_or_folder: a folder with config.json and model.safetensors (or shards and their index), else a name on the
            hub, from which these files and those of the tokenizer are fetched once.
        n_context: longest sequence that the model is to accept; None for the checkpoint's. Where positions are learned,
            the rest of them is left out.
        dtype: of the parameters: float32, float16 or bfloat16, whatever the files hold.
        revision: branch, tag or commit on the hub; of no effect for a folder.

    Raises:
        FileNotFoundError: neither such a folder, nor can such a name be reached on the hub.
        ValueError: that names what is not supported, or what is missing, broken, unexpected or of another shape.
    """
    dtype = _dtype(dtype)
    folder = checkpoint_folder(name_or_folder, revision)
    checkpoint = read_config(_json(folder / "config.json"), n_context)
    tensors = _tensors(folder, checkpoint)
    _check(checkpoint, tensors)  # first: tracing takes longer the more layers config.json speaks of
    leaves, tree = jax.tree.flatten_with_path(jax.eval_shape(lambda: init_params(checkpoint.config, jax.random.key(0))))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sizes = stored_sizes(checkpoint)
    arrays = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if name in checkpoint.weights:
            stored = checkpoint.weights[name]
            arrays.append(_array(tensors[stored.name], stored, AXES[name.split("/")[-1]], sizes, leaf.shape, dtype))
        else:
            arrays.append(jnp.zeros(leaf.shape, dtype))
    return checkpoint.config, jax.tree.unflatten(tree, arrays)


def load_tokenizer(name_or_folder: str | Path, *, revision: str | None = None) -> "Tokenizer":
    """The tokenizer of a checkpoint, from tokenizer.json, else from vocab.json and merges.txt, or vocab.txt.

    Args:
        name_or_folder, revision: as in load_pretrained.

    Raises:
        FileNotFoundError: neither such a folder, nor can such a name be reached on the hub.
        ValueError: none of these files is there, one is broken, or the vocabulary is empty.
    """
    from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer

    folder = checkpoint_folder(name_or_folder, revision)
    whole, vocabulary, merges, words = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    )
    settings = folder / "tokenizer_config.json"
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            tokenizer = Tokenizer.from_str(ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges)).to_str())
        elif words.is_file():
            lowercase = _json(settings).get("do_lower_case", True) if settings.is_file() else True
            pieces = BertWordPieceTokenizer.from_file(str(words), lowercase=lowercase)
            tokenizer = Tokenizer.from_str(pieces.to_str())
        else:
            raise ValueError("it has neither tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt")
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error
    if not tokenizer.get_vocab_size(with_added_tokens=False):
        raise ValueError(f"{folder} holds a tokenizer without vocabulary")
    return tokenizer


def checkpoint_folder(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that into which the files of a name on the hub were fetched; errors as load_pretrained."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"name_or_folder must be a folder or a name on the hub; got the file {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_folder), revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of many kinds, those of the HTTP library among them
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"{name_or_folder} is no folder, and could not be reached on the hub{at}: {type(error).__name__}: {error}"
        ) from error


def _dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in (np.float32, np.float16, jnp.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16; got {dtype!r}")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(content).__name__}")
    return content


def _files(folder: Path, auto_class: str) -> list[Path]:
    """model.safetensors, or all shards that the index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ValueError(
            f"{folder} has no model.safetensors. Where it has pytorch_model.bin, convert it once:\n"
            f"    from transformers import {auto_class}\n"
            f"    {auto_class}.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must map weights to files in weight_map; got {weight_map!r}")
    files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {_some(missing)}, of {len(files)} files in {index.name}")
    return files


def _tensors(folder: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What is stored, by its name without prefix; without what plays no part and what is said twice."""
    tensors: dict[str, Tensor] = {}
    auto_class = "AutoModelForCausalLM" if checkpoint.config.causal else "AutoModelForMaskedLM"
    for file in _files(folder, auto_class):
        with _open(file) as content:
            for key in content.keys():  # noqa: SIM118 - it is no dict
                name = key.removeprefix(checkpoint.prefix)
                name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                if re.fullmatch(checkpoint.ignored, name):
                    continue
                if name in tensors:
                    raise ValueError(f"{folder} holds {name} twice: as {tensors[name].key} and as {key}")
                part = content.get_slice(key)
                tensors[name] = Tensor(file, key, tuple(part.get_shape()), part.get_dtype())
    for copy, original in checkpoint.repeated.items():
        if copy in tensors:
            tensor = tensors.pop(copy)
            if not _same(tensor, tensors.setdefault(original, tensor)):
                raise ValueError(
                    f"{folder} holds {copy} and {original}, which must be the same weight and are not; an unembedding "
                    "of its own needs tie_word_embeddings false in config.json"
                )
    return tensors


def _check(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for the first weight that is missing, of another shape or no float, and for all left over."""
    sizes = stored_sizes(checkpoint)
    for stored in checkpoint.weights.values():
        if stored.name not in tensors:
            raise ValueError(
                f"the weight {checkpoint.prefix}{stored.name} (with or without its prefix) is missing; a checkpoint "
                "must hold the language model with its head, in files that belong to its config.json"
            )
        tensor = tensors[stored.name]
        shape = tuple(math.prod(_dims(group, sizes)) for group in _groups(stored.layout))
        if tensor.shape != shape:
            raise ValueError(f"{tensor.key} must have shape {list(shape)}; got {list(tensor.shape)} in {tensor.file}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{tensor.key} must be of {', '.join(FLOATS)}; got {tensor.dtype} in {tensor.file}")
    left = tensors.keys() - {stored.name for stored in checkpoint.weights.values()}
    if left:
        keys = sorted(tensors[name].key for name in left)
        raise ValueError(f"the checkpoint holds weights that its config.json has no place for: {_some(keys)}")


def _array(
    tensor: Tensor, stored: Stored, axes: str, sizes: dict[str, int], shape: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    """The parameter with these axes and this shape that a stored weight makes."""
    parameter = _empty(shape, dtype)
    letters = "".join(_groups(stored.layout))
    # The parameter in the order in which it is stored: what of it a block of rows fills is one slice.
    view = parameter.transpose([axes.index(letter) for letter in letters if not letter.isdigit()])
    start, dims = stored.first, _dims(letters, sizes)
    if letters[0].isdigit():
        start, view = int(letters[0]), view[None]
    part = tuple(int(letter) if letter.isdigit() else slice(None) for letter in letters[1:])
    n_rows = math.prod(_dims(_groups(stored.layout)[0][1:], sizes))
    step = max(1, BLOCK // math.prod(dims[1:]))
    for at in range(0, len(view), step):
        n = min(step, len(view) - at)
        block = _rows(tensor, (start + at) * n_rows, (start + at + n) * n_rows).reshape(n, *dims[1:])[
            (slice(None), *part)
        ]
        if (stored.factor, stored.added) != (1.0, 0.0):
            block = stored.factor * block.astype(np.float32) + stored.added
        view[at : at + n] = block
    return jax.device_put(parameter)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As np.empty, at an address that jax on CPU takes over without a copy: a multiple of 64."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + n_bytes].view(dtype).reshape(shape)


def _rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    # Opened anew for each block: pages that were read count as memory for as long as the file is mapped.
    with _open(tensor.file) as content:
        return content.get_slice(tensor.key)[start:stop]


def _same(a: Tensor, b: Tensor) -> bool:
    if a == b or a.shape != b.shape:
        return a == b
    n, step = a.shape[0], max(1, BLOCK // math.prod(a.shape[1:]))
    ends = [(at, min(at + step, n)) for at in range(0, n, step)]
    return all(np.array_equal(_rows(a, *rows), _rows(b, *rows)) for rows in ends)


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file: half of a download, or a pointer of Git LFS? {error}"
        ) from error


def _groups(layout: str) -> list[str]:
    """The letters of each stored axis: "d(0hk)" -> ["d", "0hk"]."""
    return [group.strip("()") for group in re.findall(r"\(\w+\)|\w", layout)]


def _dims(letters: str, sizes: dict[str, int]) -> list[int]:
    return [3 if letter.isdigit() else sizes[letter] for letter in letters]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
