"""Whatever the head atlas is given, opened: raw arrays, run folders of ours, checkpoints; and what is refused."""

import dataclasses
import io
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from circuits_jax.circuits.weights import SHAPES, CircuitWeights
from circuits_jax.models.config import Rotary, TransformerConfig
from circuits_jax.models.transformer import forward, init_params
from circuits_jax.reports import study
from circuits_jax.reports.studied_model import open_model, plain_name
from circuits_jax.reports.study import Arm, StudySettings
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.training.checkpoints import CheckpointError
from circuits_jax.training.setting import Optimization, Setting

FIXTURES = Path(__file__).parent / "fixtures" / "pretrained"
SIZES = {"n_vocab": 11, "n_context": 9, "n_layers": 2, "n_heads": 4, "d_model": 12, "d_head": 6}
TOKENS = np.random.default_rng(0).integers(11, size=(2, 9))
logits = partial(jax.jit, static_argnums=0)(lambda config, params: forward(config, params, TOKENS)[0])


# --- raw arrays


def random_model(**style):
    """A model of which every parameter, gains and biases too, is random."""
    config = TransformerConfig(**SIZES | style)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(1)
    random = [jnp.asarray(rng.normal(size=leaf.shape, scale=0.5) + 0.1, jnp.float32) for leaf in leaves]
    return config, jax.tree.unflatten(tree, random)


def arrays_of(config, params):
    """As a user would write them down: arrays under their names, options as single values."""
    weights = CircuitWeights.from_params(config, params)
    found = {name: np.asarray(getattr(weights, name)) for name in SHAPES if getattr(weights, name) is not None}
    options = {name: getattr(weights, name) for name in ("n_context", "positions", "norm", "norm_epsilon", "causal")}
    turning = {f"rotary_{name}": value for name, value in dataclasses.asdict(weights.rotary).items()}
    return found | options | turning


def saved(path, arrays):
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return str(path)


STYLES = {
    "learned": {},
    "biases": {"bias": True, "norm": "layer"},
    "none": {"positions": "none", "causal": False},
    "shortformer": {"positions": "shortformer"},
    "rotary": {"positions": "rotary", "rotary_dim": 4, "rotary_pairs": "interleaved", "rotary_base": 50.0},
    "stretched": {
        "positions": "rotary", "rotary_frequencies": (1.0, 0.3, 0.1), "rotary_scale": 1.1, "norm": "rms",
        "norm_epsilon": 0.1, "n_kv_heads": 2, "qk_norm": True, "bias": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
def test_arrays_in_a_file_are_the_model_that_they_came_from(tmp_path, style):
    config, params = random_model(**style)
    model = open_model(saved(tmp_path / "heads.npz", arrays_of(config, params)))
    assert (model.name, model.kind, model.tokenizer, model.bos) == ("heads", "arrays", None, None)
    assert "MLP" in model.notes[0]
    ((name, load),) = model.states
    assert name == ""
    for field in ("positions", "causal", "norm", "rotary", "n_groups", "qk_norm"):
        assert getattr(model.config, field) == getattr(config, field), field
    np.testing.assert_allclose(logits(model.config, load()), logits(config, params), rtol=1e-4, atol=2e-4)


def test_options_that_are_left_out_are_those_of_the_plainest_model(tmp_path):
    found = arrays_of(*random_model())
    with_positions = {name: x for name, x in found.items() if name in SHAPES}
    assert open_model(saved(tmp_path / "a.npz", with_positions)).config.positions == "learned"
    without = {name: x for name, x in with_positions.items() if name != "W_P"}
    config = open_model(saved(tmp_path / "b.npz", without | {"n_context": 5})).config
    assert (config.positions, config.n_context, config.causal, config.rotary) == ("none", 5, True, Rotary())


NAN = np.full((11, 12), np.nan, np.float32)
BAD_ARRAYS = {
    "missing": ({"W_Q": None, "W_O": None}, "arrays must hold W_E, .*; W_Q, W_O not found"),
    "unknown": ({"W_in": np.zeros(3)}, "arrays may be W_E, .*; got W_in"),
    "nan": ({"W_E": NAN}, "W_E must hold finite numbers; 132 of 132 are not"),
    "integers": ({"W_E": np.ones((11, 12), int)}, "W_E must hold floating-point numbers; got int64"),
    "shape": ({"W_U": np.zeros((11, 12))}, r"W_U does not fit .* expected \[D,V\] = \[12, 11\], got \[11, 12\]"),
    "axes": ({"W_Q": np.zeros((2, 12, 24))}, r"W_Q must have shape \[L,H,D,K\]; got \[2, 12, 24\]"),
    "no context": ({"W_P": None, "n_context": None, "positions": "none"}, "n_context must be given when"),
    "context": ({"W_P": None, "n_context": [5, 6], "positions": "none"}, r"n_context must be an integer .*; got \[5"),
    "positions": ({"positions": "alibi"}, "positions must be one of none, .*; got 'alibi'"),
    "norm": ({"norm": "batch"}, "norm must be one of none, layer, rms; got 'batch'"),
    "one gain": ({"q_gain": np.ones((2, 6))}, "q_gain and k_gain come together"),
    "odd rotary": ({"rotary_dim": 3}, "rotary_dim must be even; got 3"),
    "objects": ({"W_U": np.asarray({"a": 1})}, r"heads\.npz is no \.npz file that can be read: Object arrays"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_make_no_model_are_refused_by_name(tmp_path, changes, message):
    path = saved(tmp_path / "heads.npz", arrays_of(*random_model()) | changes)
    with pytest.raises(ValueError, match=message):
        open_model(path)


def test_files_that_are_no_npz_are_refused(tmp_path):
    path = tmp_path / "heads.npz"
    with pytest.raises(ValueError, match=r"there is no file .*heads\.npz"):
        open_model(str(path))
    saved(path, arrays_of(*random_model()))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"W_E = 1\n", whole[:2000] + b"?" * 100 + whole[2100:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"heads\.npz is no \.npz file that can be read"):
            open_model(str(path))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"heads\.npz is no \.npz file that can be read"):
        open_model(str(path))


# --- run folders

CONFIG = TransformerConfig(n_vocab=8, n_context=8, n_layers=1, n_heads=2, d_model=8, positions="shortformer")
TASK = RepeatedTokens(min_period=2, max_period=3, n_vocab=8, n_context=8)
STEPS = [0, 2, 4, 6]


def nothing_measured(params, setting):
    return {"one": jnp.ones(())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of two arms; one run of the second diverges."""
    folder = tmp_path_factory.mktemp("study") / "mine.v2"
    base = Setting(0, TASK, Optimization(batch_size=4, n_warmup=2))
    wild = dataclasses.replace(base, seed=9, optimization=Optimization(batch_size=4, n_warmup=2, learning_rate=1e30))
    arms = [
        Arm("main", CONFIG, [dataclasses.replace(base, seed=seed) for seed in (5, 7)], STEPS, nothing_measured,
            keep=[0, 4]),
        Arm("wild", CONFIG, [dataclasses.replace(base, seed=8), wild], STEPS, nothing_measured),
    ]  # fmt: skip
    runs = study.train_arms(Console(file=io.StringIO()), folder, arms, StudySettings(seeds=2, steps=6))
    return folder, runs


def assert_same(params, other):
    jax.tree.map(np.testing.assert_array_equal, params, other)


def test_a_run_is_shown_at_its_kept_steps(trained):
    folder, runs = trained
    model = open_model(f"{folder}/", run=1)
    assert (model.name, model.kind, model.config) == ("mine.v2, main, seed 7", "run", CONFIG)
    assert [name for name, _ in model.states] == ["step 0", "step 4", "step 6"]
    assert model.notes == ("Run 1 of main (seed 7) at 3 of its 3 kept steps.",)
    params = [load() for _, load in model.states]
    assert_same(params[-1], jax.tree.map(lambda x: x[1], runs["main"].params))
    assert not np.array_equal(params[0]["W_E"], params[1]["W_E"])
    chosen = open_model(str(folder), steps=(4,)).states
    assert [name for name, _ in chosen] == ["step 4"]
    assert not np.array_equal(chosen[0][1]()["W_E"], params[1]["W_E"])  # run 0


def test_an_arm_is_chosen_by_its_name(trained):
    folder, runs = trained
    model = open_model(str(folder), arm="wild")
    assert_same(model.states[-1][1](), jax.tree.map(lambda x: x[0], runs["wild"].params))
    with pytest.raises(CheckpointError, match="run 1 of wild has diverged by step 6: look at another --run"):
        open_model(str(folder), arm="wild", run=1).states[-1][1]()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arm": "tame"}, "--arm must be one of main, wild; got 'tame'"),
        ({"run": 2}, r"--run must be in \[0, 2\), the runs of main; got 2"),
        ({"run": -1}, r"--run must be in \[0, 2\), the runs of main; got -1"),
        ({"steps": (4, 5)}, "--steps must be among the kept ones, 0, 4, 6; got 5"),
        ({"n_context": 4}, "--n-context is of checkpoints"),
    ],
)
def test_what_a_run_folder_does_not_hold_is_refused(trained, options, message):
    with pytest.raises(ValueError, match=message):
        open_model(str(trained[0]), **options)


def test_unfinished_and_spoiled_run_folders_are_refused(trained, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(trained[0], folder)
    store = folder / "trajectories" / "main.zarr" / "zarr.json"
    whole = store.read_text()

    def recorded(change):
        attributes = json.loads(whole)
        settings = json.loads(attributes["attributes"]["settings"])
        change(settings["model"])
        attributes["attributes"]["settings"] = json.dumps(settings)
        store.write_text(json.dumps(attributes))

    recorded(lambda model: [model.pop(name) for name in ("gated", "qk_norm")])
    with pytest.raises(ValueError, match=r"main\.zarr is of another version .*\(gated, qk_norm\): train it again"):
        open_model(str(folder))
    recorded(lambda model: model.update(colour="red"))
    with pytest.raises(ValueError, match=r"main\.zarr is of another version .*\(colour\)"):
        open_model(str(folder))
    store.write_text("{}")
    with pytest.raises(ValueError, match=r"main\.zarr does not say which model its runs have"):
        open_model(str(folder))
    for group in (folder / "checkpoints" / "main").iterdir():
        shutil.rmtree(group / "kept")
    with pytest.raises(ValueError, match="keeps no parameters of main"):
        open_model(str(folder))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoints yet"):
        open_model(str(folder))


# --- checkpoints


def with_tokenizer(folder, vocabulary):
    shutil.copytree(FIXTURES / "gpt2", folder)
    Tokenizer(WordLevel(vocabulary, unk_token="word0")).save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_checkpoint_comes_with_its_tokenizer_and_start_token(tmp_path):
    model = open_model(with_tokenizer(tmp_path / "tiny-1.5b", {f"word{i}": i for i in range(48)}), n_context=12)
    assert (model.name, model.kind, model.bos, model.notes) == ("tiny-1.5b", "pretrained", 0, ())
    assert model.config.n_context == 12
    assert model.tokenizer.encode("word7").ids == [7]
    ((_, load),) = model.states
    assert load()["W_P"].shape == (12, 16)
    with pytest.raises(IndexError):
        load()  # nobody keeps the parameters


def test_without_tokenizer_a_note_says_so(tmp_path):
    model = open_model(str(FIXTURES / "gpt2"))
    assert model.tokenizer is None
    assert model.notes == ("No tokenizer in gpt2: tokens are shown by their number.",)
    assert open_model(str(FIXTURES / "bert")).bos is None  # an encoder continues nothing


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "holds no tokenizer that can be read"),
        ("tokenizer.json", None, "holds a tokenizer without vocabulary"),
        ("vocab.json", '{"a": 0}', "neither tokenizer.json, nor vocab.json and merges.txt"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_an_error(tmp_path, file, content, message):
    folder = Path(with_tokenizer(tmp_path / "tiny", {}))
    if content is not None:
        (folder / "tokenizer.json").unlink()
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=rf"tiny .*{message}"):
        open_model(str(folder))


@pytest.mark.parametrize("bos", [None, 48, -1, [0], "0"])
def test_a_start_token_that_is_none_is_left_out(tmp_path, bos):
    folder = Path(with_tokenizer(tmp_path / "tiny", {"a": 0}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": bos}))
    assert open_model(str(folder)).bos is None


@pytest.mark.parametrize("options", [{"arm": "main"}, {"run": 1}, {"steps": (3,)}])
def test_options_of_run_folders_are_refused_elsewhere(options):
    with pytest.raises(ValueError, match="--arm, --run and --steps are of run folders"):
        open_model(str(FIXTURES / "gpt2"), **options)


@pytest.mark.parametrize(
    ("where", "name"),
    [("models/tiny/", "tiny"), ("./tiny-1.5", "tiny-1.5"), ("a/b/..", "a"), ("openai-community/gpt2", "gpt2"),
     ("heads.v2.npz", "heads.v2"), ("/", "")],
)  # fmt: skip
def test_names_come_from_the_last_part_of_the_path(where, name):
    assert plain_name(where) == name


def test_the_name_of_a_folder_may_be_a_dot(monkeypatch):
    monkeypatch.chdir(FIXTURES / "gpt2")
    assert plain_name(".") == plain_name("./") == "gpt2"
    assert open_model(".").name == "gpt2"
