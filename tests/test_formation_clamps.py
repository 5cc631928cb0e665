"""Clamps as a user runs them: smoke, bad input; the clamps, what is measured, and the analysis on made-up runs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Interventions, with_inputs
from circuits_jax.models.transformer import apply_batch, init_params
from circuits_jax.reports import formation_clamps as report
from circuits_jax.reports import heads_alone, results, study
from circuits_jax.tasks.batch import accuracy, sample_batch
from circuits_jax.tasks.gaussian_exemplars import GaussianExemplars, random_means
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.training.setting import Setting
from circuits_jax.training.train import Run

SCRIPT = Path(__file__).parent.parent / "experiments" / "formation_clamps.py"
ARMS = ("none", "previous", "sink", "two_back", "self", "second_layer", "frozen", "frozen_previous", "no_repeats")


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280)


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import formation_clamps

    return formation_clamps


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = run("--smoke", "--runs-dir", str(runs))
    assert done.returncode == 0, done.stderr
    return done, runs / "formation_clamps_smoke"


@pytest.mark.slow
def test_smoke_leaves_everything_behind(smoke):
    done, folder = smoke
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "trajectories", "checkpoints", "summary.json", "report.html",
    }  # fmt: skip
    assert "Warning" not in done.stderr + done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["formed_without_repeats"] == {"value": 0, "interval": None, "aim": "<= 0", "met": True}
    assert summary["speed_up_ways"]["aim"] == summary["against_placebos_ways"]["aim"] == ">= 5"
    assert summary["only_accuracy_pooled"]["aim"] == ">= 0.93"
    assert summary["only_accuracy_rises"]["aim"] == ">= 1"
    assert {f"{name}_through_{to}" for name in report.OPENED for to in "qkv"} < summary.keys()
    page = (folder / "report.html").read_text()
    assert page.count("Plotly.newPlot(") == 5


@pytest.mark.slow
def test_arms_share_seeds_and_start_alike(smoke):
    _, folder = smoke
    arms = {name: results.load(folder / "trajectories" / f"{name}.zarr") for name in ARMS}
    for name, arm in arms.items():
        np.testing.assert_array_equal(arm.seed, arms["none"].seed, err_msg=name)
        # Without the clamp all arms are the same model before the first update.
        np.testing.assert_allclose(
            arm.free_induction_attention[:, 0], arms["none"].free_induction_attention[:, 0], atol=1e-6
        )
    assert abs(arms["none"].accuracy - arms["none"].free_accuracy).max() == 0
    assert abs(arms["previous"].accuracy - arms["previous"].free_accuracy).max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--strength", "0"], "--strength must be positive and finite; got 0.0"),
        (["--n-evaluation", "0", "--smoke"], "--n-evaluation must be at least 1; got 0"),
        (["--measure-every", "0", "--smoke"], "--measure-every must be at least 1; got 0"),
        (["--steps", "4"], "--steps must leave more than 8 to measure; got 4"),
        (["--exemplar-every", "0"], "--exemplar-every must be at least 1; got 0"),
        (["--n-classes", "2"], "means must be finite, [C, D] with C above the 2 classes of a context"),
        (["--exemplar-rate", "0"], "learning_rate must be positive and finite; got 0.0"),
        (["--exemplar-heads", "0"], "n_heads must be an integer of at least 1; got 0"),
    ],
)
def test_bad_settings_are_named(job, arguments, message, tmp_path):
    import tyro

    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        job.prepare(tyro.cli(job.Settings, args=[*arguments, "--runs-dir", str(tmp_path)]))


def test_bad_settings_are_one_line(tmp_path):
    refused = run("--strength", "0", "--runs-dir", str(tmp_path))
    assert (refused.returncode, refused.stderr) == (2, "error: --strength must be positive and finite; got 0.0\n")
    assert not list(tmp_path.iterdir())


def test_a_clamped_head_looks_at_its_target(job):
    config = TransformerConfig(n_vocab=8, n_context=6, n_heads=2, d_model=8)
    t = np.arange(6)
    clamps = job.looking_at(config, 1, t - 1, 50.0)
    params = init_params(config, jax.random.key(0))
    tokens = jnp.zeros((1, 6), int)
    seen = apply_batch(config, params, tokens, clamps)[1].patterns[0]
    free = apply_batch(config, params, tokens, Interventions())[1].patterns[0]
    np.testing.assert_allclose(seen[1, 0, t[1:], t[:-1]], 1.0, atol=1e-6)
    np.testing.assert_array_equal(seen[0], free[0])
    np.testing.assert_array_equal(seen[1, 1], free[1, 1])
    np.testing.assert_array_equal(job.looking_at(config, 0, 0 * t, 2.0).scores_added[0, 0], [[2, 0, 0, 0, 0, 0]] * 6)


def test_all_but_freezes_these_alone(job):
    config = TransformerConfig(n_vocab=8, n_context=6, n_heads=2, d_model=8)
    factors = job.all_but(config, ["layer_0/attention/W_Q"])
    assert factors["layer_0"]["attention"]["W_Q"] == 0
    assert sum(float(leaf) for leaf in jax.tree.leaves(factors)) == len(jax.tree.leaves(factors)) - 1
    with pytest.raises(ValueError, match="layer_0/attention/W_X is not a parameter of this model"):
        job.all_but(config, ["layer_0/attention/W_X"])


def test_exemplars_are_measured_head_by_head(job):
    """Against loops over sequences and heads in NumPy, from patterns and logits of runs with heads ablated."""
    task = GaussianExemplars(2 * random_means(jax.random.key(0), 8, 16), n_labels=3, n_pairs=2)
    config = TransformerConfig(n_vocab=task.n_vocab, n_context=task.n_context, n_heads=2, d_model=16)
    params = init_params(config, jax.random.key(1))
    found = job.measure_exemplars(config, 40, params, Setting(0, task))
    batch = sample_batch(task, jax.random.key(study.EVALUATION_SEED), 0, 40)
    tokens, patterns = np.asarray(batch.tokens), None

    def right(kept):
        nonlocal patterns
        changes = with_inputs(config, Interventions(head_scale=jnp.array([[1.0, 1.0], kept])), batch.inputs)
        logits, seen = apply_batch(config, params, batch.tokens, changes)
        patterns, of_labels, choices = np.asarray(seen.patterns), [], []
        for b, row in enumerate(np.asarray(logits[:, 4])):
            of_labels.append(row.argmax() == tokens[b, 5])
            choices.append(max((tokens[b, 1], tokens[b, 3]), key=lambda label, row=row: row[label]) == tokens[b, 5])
        return np.mean(of_labels), np.mean(choices)

    assert found["none_accuracy"] == pytest.approx(right([0.0, 0.0])[0])
    only = [right([1.0, 0.0]), right([0.0, 1.0])]
    np.testing.assert_allclose(found["only_accuracy"], [accuracy for accuracy, _ in only], atol=1e-6)
    np.testing.assert_allclose(found["only_choice"], [choice for _, choice in only], atol=1e-6)
    np.testing.assert_allclose(found["without_accuracy"], [only[1][0], only[0][0]], atol=1e-6)
    assert found["accuracy"] == pytest.approx(right([1.0, 1.0])[0])
    strength = np.zeros(2)
    for b in range(40):
        source, other = (1, 3) if tokens[b, 1] == tokens[b, 5] else (3, 1)
        strength += (patterns[b, 1, :, 4, source] - patterns[b, 1, :, 4, other]) / 40
    np.testing.assert_allclose(found["strength"], strength, atol=1e-5)


def test_what_a_head_is_used_for_is_cut_input_by_input(job):
    """A run whose k-edges of head 0.0 are cut by hand, every receiver in turn, is the same model."""
    task = RepeatedTokens(min_period=2, max_period=3, n_vocab=4, n_context=8)
    config = TransformerConfig(n_vocab=4, n_context=8, n_heads=2, d_model=8)
    params = jax.vmap(lambda key: init_params(config, key))(jax.random.split(jax.random.key(3), 2))
    params = jax.tree.map(lambda x: 3 * x, params)  # so that cuts matter
    batch = sample_batch(task, jax.random.key(0), 0, 32)
    clamps = job.looking_at(config, 0, np.arange(8) - 1, 3.0)
    lost = job.lost_through(config, batch, clamps, params)

    @jax.jit
    def share_right(params, edges):
        return accuracy(apply_batch(config, params, batch.tokens, dataclasses.replace(clamps, edges=edges))[0], batch)

    for number in range(2):
        of_run = jax.tree.map(lambda x, number=number: x[number], params)
        whole = share_right(of_run, graph.full(config, 1.0))
        for place, to in enumerate("qkv"):
            cut = share_right(of_run, graph.cut(config, [f"0.0->1.0.{to}", f"0.0->1.1.{to}"]))
            assert lost[number, place] == pytest.approx(float(whole - cut), abs=1e-6)
    assert np.abs(lost).max() > 0


STEPS = np.arange(0, 300, 5)


def forming(at, lifted=None):
    """Runs [S] in which accuracy and the attention of one second-layer head jump at steps `at`; NaN for never.

    With the clamp lifted they do so at steps `lifted`, never when left out.
    """

    def level(at):
        return np.where(np.nan_to_num(np.asarray(at, float), nan=1e9)[:, None] <= STEPS, 0.95, 0.05)

    measurements = {}
    for prefix, values in (("", level(at)), ("free_", level([np.nan] * len(at) if lifted is None else lifted))):
        attention = np.full((*values.shape, 2, 4), 0.05)
        attention[:, :, 1, 2] = values
        measurements |= {f"{prefix}accuracy": values, f"{prefix}induction_attention": attention}
    return Run({}, STEPS, np.ones((len(at), len(STEPS))), measurements)


def made_up(**changed):
    late = np.linspace(100, 200, 8)
    fast = {"previous": late / 2, "frozen_previous": late / 2}
    arms = dict.fromkeys(ARMS, late) | fast | {"no_repeats": np.full(8, np.nan)}
    return {name: forming(at, at if name in ("none", "frozen") else None) for name, at in (arms | changed).items()}


def exemplars(accuracy=(1.0, 1.0, 1.0, 1.0)):
    """Runs whose second measurement is ranked alike in strength and alone, and whose first is ranked the other way."""
    strength = np.linspace(-0.1, 0.9, len(accuracy) * 4).reshape(-1, 4)
    both = np.stack([-strength, strength], 1)
    ends = np.stack([np.zeros(len(accuracy)), accuracy], 1)
    measurements = {
        "strength": both, "only_accuracy": np.abs(both) * strength[:, None], "only_choice": both**3,
        "without_accuracy": 1 - both, "accuracy": ends, "none_accuracy": 0 * ends,
    }  # fmt: skip
    return Run({}, np.array([0, 10]), np.ones_like(ends), measurements)


def test_formation_is_timed_under_the_clamp_and_free_of_it():
    found = report.times(forming([100, np.nan, 100], [120, 60, np.nan]))
    assert found.keys() == report.TEXTS.keys()
    for way, values in found.items():
        wanted = [120, 60, np.nan] if way.startswith("free_") else [100, np.nan, 100]
        np.testing.assert_array_equal(values, wanted, err_msg=way)
    run = forming([100, np.nan, np.nan], [np.nan, np.nan, 60])
    np.testing.assert_array_equal(report.ever_formed(run), [True, False, True])


def test_a_clamp_twice_as_fast_meets_the_aims():
    found = report.figures(made_up())
    assert all(figure.met is not False for figure in found.values())
    assert found["speed_up_accuracy_50"].value == pytest.approx(2.0, abs=0.1)
    assert found["sink_speed_up"].value == 1.0
    assert found["against_self"].value == pytest.approx(2.0, abs=0.1)
    assert found["clamp_lifted"].value == 0.0
    assert found["speed_up_accuracy_10"].value == pytest.approx(2.0, abs=0.1)
    assert found["speed_up_free_50"].value == 0.0  # never, with the clamp lifted


def with_attention(run, at):
    """The run, its attention of another time than its accuracy."""
    attention = forming(at).measurements["induction_attention"]
    return dataclasses.replace(run, measurements=run.measurements | {"induction_attention": attention})


def test_a_way_counts_where_every_placebo_is_later():
    """One placebo is as soon in accuracy and another in attention: each beaten by some ways, none by both."""
    runs, late = made_up(), np.linspace(100, 200, 8)
    runs["sink"] = with_attention(forming(late / 2), late)
    runs["self"] = with_attention(forming(late), late / 2)
    found = report.figures(runs)
    assert found["speed_up_ways"].value == 5
    assert found["against_placebos_ways"].value == 0


def test_what_no_run_tells_is_unknown():
    runs, run = made_up(), exemplars()
    for one in (runs["sink"], run):
        one.loss[:] = np.nan
    kept = report.paired(runs)
    lost = report.lost_figures({name: np.zeros((0, 3)) for name in report.OPENED})
    found = report.figures(kept) | lost | heads_alone.figures(run)
    for name in ("formed", "formed_without_repeats", "clamp_lifted", "self_through_k", "only_accuracy_rises"):
        assert np.isnan(found[name].value), name
    assert not any(figure.met for figure in found.values())
    assert len(report.sections(kept, found) + heads_alone.sections(run, found)) == 4
    assert "an unknown number" in report.notes(runs, kept, found, 5.0)[0]


@pytest.mark.parametrize(
    ("arm", "at", "missed"),
    [
        ("previous", np.linspace(100, 200, 8), {"speed_up_ways", "against_placebos_ways"}),
        ("two_back", np.linspace(50, 100, 8), {"against_placebos_ways"}),
        ("no_repeats", [np.nan] * 7 + [250], {"formed_without_repeats"}),
    ],
)
def test_each_aim_can_be_missed(arm, at, missed):
    found = report.figures(made_up(**{arm: at}))
    assert {name for name, figure in found.items() if figure.met is False} == missed


def test_correlations_are_of_ranks_pooled_and_within_runs():
    x = np.array([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    y = np.array([[5.0, 6.0, 9.0], [1.0, 2.0, 3.0]])
    assert heads_alone.within_runs(x, y) == 1.0
    assert heads_alone.spearman(x, y) == pytest.approx(1 - 6 * 54 / (6 * 35))  # ranks 456 123 against 123 456
    assert np.isnan(heads_alone.spearman(x, np.ones_like(x)))
    assert np.isnan(heads_alone.within_runs(x[:0], y[:0]))


def test_heads_are_judged_in_all_runs_that_did_not_diverge():
    run = exemplars((1.0, 0.5, 0.95, 1.0))
    run.loss[3, 1] = np.inf
    np.testing.assert_array_equal(heads_alone.judged(run)["accuracy"], [1.0, 0.5, 0.95])
    np.testing.assert_array_equal(heads_alone.judged(run, 0)["accuracy"], [0.0, 0.0, 0.0])
    found = heads_alone.figures(run)
    assert found["learned"].value == pytest.approx(2 / 3)
    left_out = heads_alone.notes(run, found)[-1]
    assert "1 of 4 runs" in left_out
    assert "0.67" in left_out
    found = heads_alone.figures(exemplars())
    assert found["only_choice_pooled"].value == found["only_choice_within"].value == pytest.approx(1.0)
    assert found["only_accuracy_pooled"].met
    assert found["only_accuracy_rises"].met
    assert found["only_accuracy_untrained"].value < 0
    assert found["only_accuracy_gain"].value > found["only_accuracy_pooled"].value
    assert found["heads_that_attend"].value == 3.0
    assert found["strongest_alone"].value == pytest.approx(np.median(np.linspace(-0.1, 0.9, 16)[3::4] ** 2))
    assert found["without_strongest"].value == pytest.approx(1 - np.median(np.linspace(-0.1, 0.9, 16)[3::4]))


def test_heads_that_were_as_good_untrained_miss_the_aim():
    run = exemplars()
    for values in run.measurements.values():
        values[:, 0] = values[:, 1]
    found = heads_alone.figures(run)
    assert found["only_accuracy_gain"].value == 0.0
    assert found["only_accuracy_pooled"].met
    assert not found["only_accuracy_rises"].met


def test_an_input_costs_most_where_intervals_say_so():
    values = np.tile([0.1, 0.8, 0.0], (8, 1))
    close = values + np.where(np.arange(8) % 2, 0.5, -0.5)[:, None]
    found = report.lost_figures({"previous": values, "self": close, "sink": -values})
    assert [report.costs_most(found, name) for name in ("previous", "self", "sink")] == ["k", "undecided", "undecided"]


def test_no_speed_up_is_dropped_from_the_plot():
    values = [(2.0, 1.5, np.inf), (0.0, 0.0, 0.0), (np.inf, 1.2, np.inf), (np.nan, 0.0, np.inf)]
    drawn = report.speed_up_figure({str(row): dict.fromkeys(report.TEXTS, ends) for row, ends in enumerate(values)})
    points = [trace for trace in drawn.data if trace.showlegend is None]
    assert len(points) == len(report.TEXTS)
    edges = [0.8, 2.5]
    np.testing.assert_allclose(points[0].x, [2.0, edges[0], edges[1], 1.0])
    assert list(points[0].marker.symbol) == ["circle", "triangle-left", "triangle-right", "x"]
    np.testing.assert_allclose(points[0].error_x.array, [0.5, 0.0, 0.0, 1.5])
    np.testing.assert_allclose(points[0].error_x.arrayminus, [0.5, 0.0, 1.3, 0.2])
    left, right = drawn.data[1:3]
    np.testing.assert_allclose(left.y, np.array(points[0].y)[[1, 3]])
    np.testing.assert_allclose(right.y, np.array(points[0].y)[[0, 2, 3]])


def test_diverged_runs_are_left_out_of_every_arm():
    runs = made_up()
    runs["sink"].loss[3, -1] = np.nan
    kept = report.paired(runs)
    assert {len(run.loss) for run in kept.values()} == {7}
    found = report.figures(kept) | report.lost_figures({name: np.zeros((7, 3)) for name in report.OPENED})
    assert "clamps: 1 seeds" in report.notes(runs, kept, found, 5.0)[-1]


def test_page_stands_with_nothing_formed_and_nothing_learned():
    never = {"previous": [np.nan] * 8, "self": [np.nan] * 8}
    runs, run = made_up(**never), exemplars([0.5] * 4)
    lost = report.lost_figures({name: np.tile([0.1, 0.8, 0.0], (8, 1)) for name in report.OPENED})
    assert lost["self_through_k"].value == 0.8
    found = report.figures(runs) | lost | heads_alone.figures(run)
    assert found["speed_up_ways"].met is False
    assert found["learned"].value == 0.0
    assert len(report.sections(runs, found)) == 3
    assert len(heads_alone.sections(run, found)) == 1
    asked = report.notes(runs, runs, found, 5.0)[0]
    assert "0.00 (0.00 to 0.00) times as soon" in asked
    assert "by 0 of 5 ways" in asked
