"""Which mechanism: the classes on made-up numbers and on planted models, and the experiment as a user runs it."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from test_mechanism import LAYERS, PERIOD, planted, repeats

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import forward, init_params
from circuits_jax.reports import mechanism_choice as report
from circuits_jax.reports import results
from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.training.sweep import sweep
from circuits_jax.training.train import Run

SCRIPT = Path(__file__).parent.parent / "experiments" / "mechanism_choice.py"


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("mechanism_choice_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses looks for their annotations
        spec.loader.exec_module(module)
        yield module


def outcome(accuracy, random_offset_accuracy, cut_accuracy, weights, measured=None):
    accuracy = np.asarray(accuracy, float)
    measured = np.stack([np.zeros_like(accuracy), accuracy], -1) if measured is None else np.asarray(measured, float)
    n = len(accuracy)
    run = Run(
        {"W": np.where(np.isnan(accuracy), np.nan, 1.0)[:, None]}, np.array([0, 10]), np.zeros((n, 2)),
        {"accuracy": measured, "random_offset_accuracy": measured},
    )  # fmt: skip
    found = {
        "accuracy": accuracy, "random_offset_accuracy": np.asarray(random_offset_accuracy, float),
        "cut_accuracy": np.asarray(cut_accuracy, float), "weights": np.asarray(weights, float),
    }  # fmt: skip
    return report.Outcome(run, found)


MIXTURE = outcome(
    accuracy=[1.0, 1.0, 0.95, 1.0, 1.0, 1.0, 1.0, 0.5, np.nan],
    random_offset_accuracy=[1.0, 1.0, 1.0, 0.1, 0.9, 1.0, 0.1, 0.5, np.nan],
    #              q    k    v    all
    cut_accuracy=[
        [1.0, 0.1, 0.9, 0.1], [0.2, 0.9, 1.0, 0.2], [0.9, 0.9, 0.3, 0.1], [0.4, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.9],
        [0.3, 0.5, 1.0, 0.2], [0.9, 0.9, 1.0, 0.1], [0.5, 0.0, 0.5, 0.0], [np.nan] * 4,
    ],
    #          Q    K    V    positions
    weights=[
        [0.0, 0.9, 0.0, 0.1], [0.8, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 0.0, 0.9], [0.0, 0.0, 0.0, 0.0],
        [0.9, 0.9, 0.0, 0.0], [0.9, 0.9, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [np.nan] * 4,
    ],
)  # fmt: skip


def test_classes_by_cuts():
    # The cut of k in the mixed run leaves .5: it takes .5 of the .8 that all cuts together take. In the last run that
    # learned q and k stand in for each other, and it fails at random offsets: this is not positions.
    assert MIXTURE.classes[:, 0].tolist() == ["K", "Q", "V", "positions", "other", "Q+K", "redundant"]
    assert MIXTURE.learned.tolist() == [True] * 7 + [False, False]


def test_classes_by_weights():
    assert MIXTURE.classes[:, 1].tolist() == ["K", "Q", "none", "positions", "none", "Q+K", "Q+K"]


def test_agreement_is_the_same_mechanisms_and_never_none():
    assert MIXTURE.agrees.tolist() == [True, True, False, True, False, True, False]
    header, rows = report.agreement_table({"a": MIXTURE})
    counts = {(row[0], column): int(n) for row in rows for column, n in zip(header[1:], row[1:], strict=True)}
    assert {pair: n for pair, n in counts.items() if n} == {
        ("K", "K"): 1, ("Q", "Q"): 1, ("V", "none"): 1, ("positions", "positions"): 1, ("other", "none"): 1,
        ("Q+K", "Q+K"): 1, ("redundant", "Q+K"): 1,
    }  # fmt: skip


def test_the_commonest_class_is_a_mechanism():
    others = [[0.9, 0.8, 0.7, 0.9]] * 3
    runs = outcome([1.0] * 6, [1.0] * 6, [*others, *[[0.1, 1.0, 1.0, 0.1]] * 2, [1.0, 0.1, 1.0, 0.1]], np.zeros((6, 4)))
    assert report.commonest(runs).tolist() == [False, False, False, True, True, False]


def test_figures_and_tables_of_made_up_runs():
    nothing = np.zeros((3, 2, 4))
    found = nothing.copy()
    found[1, 1, 2] = found[1, 0, 3] = found[2, 0, 0] = 0.9  # two of three models, one of them at both offsets
    figures = report.figures({"a": MIXTURE}, {"iid": found, "untrained": nothing}, [MIXTURE.run])
    assert figures["agreement"].value == figures["a_agreement"].value == pytest.approx(4 / 7)
    assert figures["agreement"].met is False
    assert figures["trivial_agreement"].value == pytest.approx(1 / 7)
    assert (figures["iid"].value, figures["iid"].met) == (2, False)
    assert (figures["untrained"].value, figures["untrained"].met) == (0, True)
    assert "of 3" in figures["iid"].text
    assert figures["a_learned"].value == 7 / 9
    assert figures["a_V"].value == pytest.approx(1 / 7)
    assert figures["diverged"].value == 1
    header, (row,) = report.setting_table({"a": MIXTURE})
    assert dict(zip(header, row, strict=True)) | {"ever learned": ""} == {
        "setting": "a", "runs": "9", "ever learned": "", "K": "1", "Q": "1", "V": "1", "positions": "1", "Q+K": "1",
        "redundant": "1", "other": "1", "not learned": "2", "agree": "4", "commonest": "1",
    }  # fmt: skip


def test_formation_is_timed_by_thresholds_and_change_point_and_paired():
    def rising(at, n=8):
        curve = np.array([0.0, 0.0, 0.0, 0.0, 0.2, 0.6, 1.0, 1.0, 1.0, 1.0])
        measured = np.tile(np.interp(np.arange(10) - at, np.arange(10), curve), (n, 1))
        run = Run({"W": np.ones((n, 1))}, 10 * np.arange(10), np.zeros((n, 10)), {"accuracy": measured})
        return report.Outcome(run, {})

    found = {way: at[0] for way, at in report.times(rising(0).run).items()}
    assert found == {"10 % of the rise": 40, "accuracy 50%": 50, "accuracy 90%": 60, "change point": 50}
    header, (row,) = report.order_table({"early": rising(0), "late": rising(2)})
    assert row == ["early", "late", *["+20 [20, 20] 8/0/0"] * 4, "before"]
    assert len(header) == len(row)
    # Too few measurements for a change point: it is never, and nothing else is lost.
    short = Run({"W": np.ones((1, 1))}, np.array([0, 10]), np.zeros((1, 2)), {"accuracy": np.array([[0.0, 1.0]])})
    assert np.isnan(report.times(short)["change point"]).all()
    assert report.times(short)["accuracy 90%"].tolist() == [10]


def test_nothing_learned_is_no_number_and_no_crash():
    none = outcome([0.1], [0.1], [[0.1, 0.0, 0.1, 0.0]], [[0.0, 0.0, 0.0, 0.0]])
    controls = {"iid": np.zeros((1, 2, 4)), "untrained": np.zeros((1, 2, 4))}
    figures = report.figures({"a": none}, controls, [none.run])
    assert np.isnan(figures["agreement"].value)
    assert not any(name in ("a_K", "a_other") for name in figures)
    assert report.sections({"a": none})


@pytest.mark.parametrize("name", LAYERS)
def test_planted_mechanisms_are_told_by_cuts(experiment, name):
    config, params = planted(name)
    own, elsewhere = repeats(PERIOD), repeats(6)
    seen = jax.jit(
        lambda params: {
            "accuracy": experiment.accuracy_under(config, params, own),
            "random_offset_accuracy": experiment.accuracy_under(config, params, elsewhere),
            "cut_accuracy": experiment.cut_accuracies(config, params, own),
        }
    )(params)
    found = {key: np.asarray(value)[None] for key, value in seen.items()}
    assert found["accuracy"] > 0.95
    one = report.Outcome(Run({}, np.array([0]), np.zeros((1, 1)), {}), found)
    # Two heads that do the same: cutting one changes nothing, so cuts do not say which.
    assert report.class_by_cuts(one).tolist() == ["redundant" if name == "Q+K" else name]


def test_a_cut_is_a_forward_pass_in_which_the_second_layer_reads_the_embedding_alone(experiment):
    config = TransformerConfig(n_vocab=6, n_context=6, n_heads=1, d_model=8)
    params = jax.jit(lambda: jax.tree.map(lambda x: 3.0 * x, init_params(config, jax.random.key(0))))()
    batch = jax.jit(lambda: sample_batch(RepeatedTokens(2, 4, n_vocab=6, n_context=6), jax.random.key(1), 0, 40))()
    _, seen = jax.jit(partial(forward, config))(params, batch.tokens)
    before, after = (np.asarray(seen.residual[:, layer], np.float64) for layer in range(2))
    second = {name: np.asarray(x[0], np.float64) for name, x in params["layer_1"]["attention"].items()}
    mask = np.asarray(batch.mask)[:, :-1]
    expected = []
    for cut in ("q", "k", "v", "qkv"):
        read = {name: before if name in cut else after for name in "qkv"}
        q, k, v = (read[name] @ second[f"W_{name.upper()}"] for name in "qkv")
        scores = np.where(np.tri(6, dtype=bool), q @ k.transpose(0, 2, 1) / np.sqrt(config.d_head), -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        logits = (after + pattern @ v @ second["W_O"]) @ np.asarray(params["W_U"], np.float64)
        expected.append((logits.argmax(-1)[:, :-1] == np.asarray(batch.tokens)[:, 1:])[mask].mean())
    np.testing.assert_allclose(jax.jit(partial(experiment.cut_accuracies, config))(params, batch), expected, atol=1e-6)


def test_untrained_models_are_those_that_training_starts_from(experiment):
    plan = experiment.prepare(experiment.Settings(seeds=2, n_evaluation=4, n_context=14, first_seed=3))
    arm = plan.controls[1]
    assert plan.offsets == {arm.name: arm.name.partition("_")[0] for arm in plan.arms}
    assert [arm.name for arm in plan.controls] == ["iid_fan_in", "iid_std_0.02"]
    first = experiment.untrained(arm.settings[0], arm.config, plan.settings.seed_range)
    trained = sweep(arm.config, arm.settings, [0], lambda params, setting: {})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), first, trained.params)


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_smoke_leaves_everything_behind(tmp_path):
    done = run("--smoke", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    folder = tmp_path / "mechanism_choice_smoke"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "trajectories", "checkpoints", "results.zarr", "summary.json", "report.html",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert {"agreement", "untrained", "random_std_0.02_learned"} <= set(summary)
    assert summary["untrained"]["value"] == summary["iid"]["value"] == 0
    assert results.load(folder / "results.zarr", "fixed_fan_in").cut_accuracy.shape == (1, 4)
    page = (folder / "report.html").read_text()
    for heading in ("Setting and mechanism", "Cuts and predictions, run by run", "Formation"):
        assert f"<h2>{heading}" in page
    assert page.count("Plotly.newPlot(") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke", "--n-evaluation", "0"], "--n-evaluation must be at least 1; got 0"),
        (["--period", "23"], "max_period must be at most n_context - 2"),
        (["--min-period", "13"], "periods must satisfy 1 <= min_period <= max_period; got 13 and 12"),
        (["--embedding-scale", "0"], "embedding_scale must be a positive finite number; got 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, refuse):
    printed = refuse("mechanism_choice", "--runs-dir", str(tmp_path), *arguments)
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
