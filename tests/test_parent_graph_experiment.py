"""Known parent graphs: what is recovered, on made-up patterns and one model, and the experiment as a user runs it."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import init_params
from circuits_jax.reports import parent_graph as report
from circuits_jax.reports import study
from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.parent_graph import ParentGraph
from circuits_jax.training.setting import Setting
from circuits_jax.training.train import Run

SCRIPT = Path(__file__).parent.parent / "experiments" / "parent_graph.py"
PARENTS = np.array([[-1, 0, 1, 1, 0], [-1, 0, 0, 2, 3]])
STEPS = np.array([0, 10, 20, 30])


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("parent_graph_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses looks for their annotations
        spec.loader.exec_module(module)
        yield module


def looks_at(targets):
    """Patterns [...,n,n] that look at the targets with .4, at themselves with .6; from position 0, at itself."""
    targets = np.asarray(targets)
    n = targets.shape[-1]
    return 0.4 * np.eye(n)[np.maximum(targets, 0)] + 0.6 * np.eye(n)


def outcome(targets, excess, parents=PARENTS, diverged=(False, False)):
    """targets [S,E,n]: where each position looks; excess [S,E] over a best loss of .5."""
    n_runs, n_steps = np.shape(excess)
    weights = np.where(np.asarray(diverged)[:, None], np.nan, 1.0)
    measurements = {
        "evaluation_loss": 0.5 + np.asarray(excess, float), "bayes_loss": np.full((n_runs, n_steps), 0.5),
        "weights": looks_at(targets), "attention": looks_at(targets),
    }  # fmt: skip
    run = Run({"W": weights}, STEPS[:n_steps], np.zeros((n_runs, n_steps)), measurements)
    return report.Outcome(run, np.asarray(parents))


WRONG = np.array([[-1, 0, 0, 0, 1], [-1, 0, 1, 0, 0]])


def over_steps(right_from):
    """Targets [2,4,5] that are wrong throughout, then right throughout from a step on."""
    right = STEPS[None, :, None] >= np.asarray(right_from)[:, None, None]
    return np.where(right, PARENTS[:, None], WRONG[:, None])


def test_the_largest_earlier_position_is_recovered():
    rng = np.random.default_rng(0)
    patterns = rng.random((3, 4, 7, 7))
    found = report.recovered(patterns)
    for place in np.ndindex(3, 4):
        for t in range(7):
            earlier = patterns[place][t, :t].tolist()
            assert found[place][t] == (earlier.index(max(earlier)) if earlier else -1)
    # However much a position looks at itself or, in an acausal pattern, ahead.
    assert (report.recovered(patterns + 9 * np.triu(np.ones((7, 7)))) == found).all()


def test_judged_is_what_the_data_can_tell_and_chance_is_what_guessing_gives():
    # Position 3 of the second graph is a root: it has no parent to be found.
    graphs = np.array([[-1, 0, 1, 1, 0], [-1, 0, 0, -1, 3]])
    found = outcome(np.repeat(graphs[:, None], 4, 1), np.zeros((2, 4)), graphs)
    assert found.judged.tolist() == [[False, False, True, True, True], [False, False, True, False, True]]
    assert found.chance() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 2 + 1 / 4) / 5)
    assert (found.right("weights") == 1).all()
    _, rows = report.misses_table(found)
    assert [row[2] for row in rows] == ["2 of 2", "1 of 1", "2 of 2"]


def test_shares_are_over_judged_positions():
    one_right = WRONG.copy()
    one_right[:, 2] = PARENTS[:, 2]
    targets = np.stack([WRONG, one_right, PARENTS, PARENTS], 1)
    assert report.recovered(looks_at(targets)).tolist() == targets.tolist()
    found = outcome(targets, np.zeros((2, 4)))
    np.testing.assert_allclose(found.right("weights"), [[0, 1 / 3, 1, 1]] * 2)
    # A position looks at its target with .4, at itself with .6.
    np.testing.assert_allclose(found.weight_on_parents(), [[0, 0.4 / 3, 0.4, 0.4]] * 2)


def test_runs_that_diverged_are_left_out_and_pairs_with_them():
    trees = outcome(over_steps([20, 0]), np.zeros((2, 4)), diverged=(True, False))
    one_layer = outcome(over_steps([20, 0]), np.zeros((2, 4)))
    judged = report.sound({"trees": trees, "iid": one_layer, "one_layer": one_layer})
    assert {name: len(x.parents) for name, x in judged.items()} == {"trees": 1, "iid": 2, "one_layer": 1}
    assert (judged["one_layer"].parents == PARENTS[1]).all()


def test_the_loss_counts_from_what_one_layer_reaches_on_the_same_tree():
    # One layer ends at .2 on the first tree, so a fall from .6 to .2 says nothing of parents; .1 is half of the rest.
    # On the second it ends at .1, and .05 is half.
    trees = outcome(over_steps([20, 20]), [[0.6, 0.2, 0.1, 0.0], [0.6, 0.09, 0.04, 0.0]])
    one_layer = outcome(np.repeat(WRONG[:, None], 4, 1), [[0.9, 0.8, 0.7, 0.2], [0.9, 0.8, 0.7, 0.1]])
    times = report.times({"trees": trees, "one_layer": one_layer})
    del times["change point"]  # the rise is in its baseline
    assert {level: at["loss"].tolist() for level, at in times.items()} == {
        "10%": [20.0, 10.0], "50%": [20.0, 20.0], "75%": [30.0, 30.0], "90%": [30.0, 30.0]
    }  # fmt: skip
    assert {level: at["recovery"].tolist() for level, at in times.items()} == {
        "10%": [20.0, 20.0], "50%": [20.0, 20.0], "75%": [20.0, 20.0], "90%": [20.0, 20.0]
    }  # fmt: skip


def test_the_largest_score_can_come_before_and_attention_after_the_loss():
    # A share of attention that is enough to be the largest at once, and grows after the loss has fallen.
    steps, n = 10 * np.arange(12), 8
    right, wrong = (np.eye(5)[np.maximum(x[0], 0)] for x in (PARENTS, WRONG))
    patterns = np.tile(np.stack([0.02 * wrong] * 4 + [0.02 * right] * 5 + [0.9 * right] * 3), (n, 1, 1, 1))
    loss = np.array([0.4] * 6 + [0.0] * 6)

    def made(loss):
        measured = {"evaluation_loss": loss, "bayes_loss": np.zeros_like(loss), "weights": patterns}
        return report.Outcome(Run({"W": np.ones((n, 1))}, steps, loss, measured), np.tile(PARENTS[0], (n, 1)))

    outcomes = {"trees": made(np.tile(loss, (n, 1))), "one_layer": made(np.full((n, 12), 0.4))}
    came = report.times(outcomes)
    assert {event: at[0] for event, at in came["50%"].items()} == {"recovery": 40, "loss": 60, "attention": 90}
    assert {event: at[0] for event, at in came["change point"].items()} == {
        "recovery": 40, "loss": 60, "attention": 90
    }  # fmt: skip
    assert report.orders(came, "recovery")[0] == "before"
    assert report.orders(came, "attention")[0] == "after"
    header, rows = report.order_table(came)
    assert [len(row) for row in rows] == [len(header)] * 12


def test_figures_tables_and_page_of_made_up_runs():
    missed = PARENTS.copy()
    missed[1, 4] = 2  # instead of 3
    targets = np.where((STEPS == 30)[None, :, None], missed[:, None], WRONG[:, None])
    trees = outcome(targets, np.tile([0.4, 0.3, 0.1, 0.1], (2, 1)))
    chain = np.tile([-1, 0, 1, 2, 3], (2, 1))
    never = outcome(np.repeat(WRONG[:, None], 4, 1), np.full((2, 4), 0.3))
    outcomes = {
        "trees": trees, "chains": outcome(np.repeat(chain[:, None], 4, 1), np.zeros((2, 4)), chain), "iid": never,
        "one_layer": never,
    }  # fmt: skip
    figures = report.figures(outcomes, n_vocab=3)
    assert figures["recovery"].value == pytest.approx(5 / 6)
    assert figures["recovery"].met is False
    assert figures["whole_trees"].value == 0.5
    assert figures["weight_on_parents"].value == pytest.approx(0.4 * 5 / 6)
    assert figures["chains_recovery"].met
    assert figures["untrained_recovery"].value == figures["iid_recovery"].value == 0
    assert figures["learned_share"].value == pytest.approx(1 - 0.1 / (np.log(3) - 0.5))
    header, rows = report.misses_table(trees)
    assert [len(row) for row in rows] == [len(header)] * 3
    assert [row[2:] for row in rows] == [["2 of 2", ""], ["2 of 2", ""], ["1 of 2", "1: 3 → 2"]]
    page = "".join(part for _, parts in report.sections(outcomes) for part in parts)
    assert page.count("Plotly.newPlot(") == 4
    assert "Of 6 parents in 2 trees 83.3% are right" in report.notes(outcomes, figures)[0]


def test_what_is_measured_is_the_formula_and_the_count(experiment):
    config = TransformerConfig(n_vocab=3, n_context=7, n_heads=1, d_model=8, positions="shortformer")
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    task = ParentGraph(jnp.array([-1, 0, 0, 2, 1]), concentration=0.5, n_vocab=3)
    found = jax.jit(partial(experiment.measure_model, config, 50))(params, Setting(0, task))
    attention = params["layer_0"]["attention"]
    embedding, positions = (np.asarray(params[name], float) for name in ("W_E", "W_P"))
    rows = embedding.mean(0) + positions[:5]
    q, k = (rows @ np.asarray(attention[name][0], float) for name in ("W_Q", "W_K"))
    scores = np.where(np.tri(5, dtype=bool), np.exp(q @ k.T / np.sqrt(8)), 0.0)
    np.testing.assert_allclose(found["weights"], scores / scores.sum(-1, keepdims=True), atol=1e-5)
    assert found["attention"].shape == (5, 5)
    np.testing.assert_allclose(found["attention"].sum(-1), 1.0, atol=1e-5)

    draw = jax.jit(lambda: sample_batch(task, jax.random.key(study.EVALUATION_SEED), 0, 50))
    tokens = np.asarray(draw().tokens)
    surprise = []
    for sequence in tokens.tolist():
        counts = [0.5] * 3
        for child, parent in enumerate([-1, 0, 0, 2, 1]):
            if parent >= 0 and sequence[parent] == sequence[5]:
                counts[sequence[child]] += 1
        surprise.append(-np.log(counts[sequence[6]] / sum(counts)))
    np.testing.assert_allclose(found["bayes_loss"], np.mean(surprise), rtol=1e-5)


def test_every_run_has_a_tree_of_its_own_and_keeps_it(experiment, tmp_path):
    # Two runs, for as many devices as the tests have.
    plan = experiment.prepare(experiment.Settings(seeds=2, controls=1, first_seed=7, runs_dir=tmp_path))
    trees = plan.parents["trees"]
    assert (trees[0] != trees[1]).any()
    assert (plan.parents["iid"] == trees[:1]).all()
    later = experiment.prepare(experiment.Settings(seeds=2, first_seed=8, runs_dir=tmp_path))
    assert (later.parents["trees"][0] == trees[1]).all()
    assert [len(arm.settings) for arm in plan.arms] == [2, 1, 1, 2]
    assert plan.parents["chains"][0].tolist() == list(range(-1, 13))


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_smoke_leaves_everything_behind(tmp_path):
    done = run("--smoke", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    folder = tmp_path / "parent_graph_smoke"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "trajectories", "checkpoints", "summary.json", "report.html",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert {"recovery", "chains_recovery", "untrained_recovery", "excess"} <= set(summary)
    assert 0 < summary["excess"]["value"] < np.log(3)
    page = (folder / "report.html").read_text()
    for heading in ("True graph and recovered pattern", "Recovery and loss over training", "Misses by position"):
        assert f"<h2>{heading}" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--controls", "0"], "--controls must be at least 1; got 0"),
        (["--n-context", "4"], "--n-context must be at least 5, for a parent to be chosen; got 4"),
        (["--n-vocab", "1"], "n_vocab must be at least 2; got 1"),
        (["--concentration", "0"], "concentration must be above 0 and finite; got 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, refuse):
    printed = refuse("parent_graph", "--runs-dir", str(tmp_path), *arguments)
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
