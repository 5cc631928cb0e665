"""In-context Markov chains: the analysis on curves whose answer is known, targets against loops, and the smoke run."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.models.interventions import Interventions
from circuits_jax.models.transformer import apply_batch, init_params
from circuits_jax.reports import markov_phases as report
from circuits_jax.tasks.markov_chains import MarkovChains

SCRIPT = Path(__file__).parent.parent / "experiments" / "markov_phases.py"
STEPS = np.arange(0, 90, 10)


@pytest.fixture(scope="module")
def job():
    spec = importlib.util.spec_from_file_location("markov_phases_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def outcome(phases: list[str], **others) -> report.Outcome:
    """Runs whose nearest predictor is given by its first letter, u for uniform, s for single tokens, b for bigram."""
    letters = np.array([list(row) for row in phases])
    far = {name: (letters != letter) * 1.0 for name, letter in zip(report.REFERENCES, "usb", strict=False)}
    n = len(phases)
    rise = np.linspace(0, 1, letters.shape[1])
    heads = np.broadcast_to(rise[:, None, None], (n, *rise.shape, 2, 1)).copy()
    heads[:, :, 1] = np.roll(heads[:, :, 1], 2, axis=1) * (rise > 0.3)[:, None]
    fields = {
        "seeds": range(40, 40 + n),
        "diverged": np.zeros(n, bool),
        "steps": STEPS,
        "found": {
            **{f"kl_{name}": values for name, values in far.items()},
            "back_1": heads,
            "induction_1": heads,
            "evaluation_loss": np.tile(1.0 - rise, (n, 1)),
        },
        "losses": {"uniform": 0.7, "unigram": 0.6, "bigram": 0.5, "bayes": 0.5},
        "final": {
            "excess": np.full((n, 4), 0.004),
            "induction": np.full((n, 1), 0.9),
            "cut_loss": np.full((n, 1), 0.1),
        },
    }
    return report.Outcome(**(fields | others))


def test_a_phase_starts_where_it_lasts():
    here = np.array([list(map(int, row)) for row in ("110111000", "011011011", "000000111", "111111111")], bool)
    np.testing.assert_array_equal(report.phase_start(STEPS, here), [30, np.nan, 60, 0])
    assert np.isnan(report.phase_start(STEPS[:2], here[:, :2])).all()


def test_three_measurements_of_the_first_updates_are_no_phase():
    steps = np.array([0, 1, 2, 3, 5, 9, 10, 12, 20])
    here = np.array([list(map(int, row)) for row in ("111111000", "111111100", "011111100", "011111110", "000000111")])
    np.testing.assert_array_equal(report.phase_start(steps, here.astype(bool)), [np.nan, 0, np.nan, 1, 10])


def test_runs_go_through_the_phases_in_order_or_do_not():
    found = outcome(["uuusssbbb", "uuubbbsss", "uuussubbb", "uuusssubb", "sssuuubbb", "uuusssbbu"])
    np.testing.assert_array_equal(found.in_order(), [True, False, False, False, False, False])
    np.testing.assert_array_equal(found.starts["bigram"], [60, 30, 60, np.nan, 60, np.nan])


def test_a_head_needs_attention_and_an_effect():
    final = {
        "excess": np.zeros((3, 2)),
        "induction": np.array([[0.9], [0.1], [0.9]]),
        "cut_loss": np.array([[0.1], [0.1], [0.001]]),
    }
    found = outcome(["uuusssbbb"] * 3, final=final)
    np.testing.assert_array_equal(found.has_head, [True, False, False])


def test_attention_is_timed_in_its_own_layer():
    found = outcome(["uuusssbbb"])
    assert found.times("back_1") == 40  # half of a straight rise over 80 steps
    assert found.times("induction_1") == 50  # the last layer follows two measurements later, to 3/4
    assert found.times("unigram") == 30


def arms() -> dict[str, report.Outcome]:
    good = outcome(["uuusssbbb"] * 8)
    none = {"excess": np.full((8, 4), 0.02), "induction": np.zeros((8, 1)), "cut_loss": np.zeros((8, 1))}
    return {
        "order_1": good,
        "order_2": good,
        "doubly_stochastic": outcome(["uuubbbbbb"] * 8),
        "unigram": outcome(["uuussssss"] * 8, final=none),
        "one_layer": outcome(["uuussssss"] * 8, final=none),
    }


def test_figures_meet_their_aims_where_they_should():
    figures = report.figures(arms())
    assert all(figure.met is not False for figure in figures.values())
    assert figures["order_1_phases"].value == 1
    assert figures["order_1_excess"].value == pytest.approx(0.004)
    assert figures["plateau"].value == 30
    assert figures["back_1_to_induction_1"].value == 10
    assert report.notes(figures)[0].startswith("Asked: ")


def test_figures_miss_their_aims_where_a_control_fails():
    broken = arms() | {
        "doubly_stochastic": outcome(["uuusssbbb"] * 8),
        "unigram": outcome(["uuussssss"] * 8),
        "one_layer": outcome(["uuusssbbb"] * 8),
        "order_1": outcome(["uuubbbbbb"] * 8, final=arms()["unigram"].final),
    }
    missed = {name for name, figure in report.figures(broken).items() if figure.met is False}
    assert missed == {
        "order_1_phases", "order_1_excess", "order_1_good", "order_1_heads",
        "doubly_stochastic_unigram", "unigram_heads", "one_layer_bigram",
    }  # fmt: skip


def diverged(found: report.Outcome, runs: list[int]) -> report.Outcome:
    """The same, but some runs diverged."""
    lost = np.isin(np.arange(len(found.seeds)), runs)
    followed, final = (report.hide(lost, values) for values in (found.found, found.final))
    return dataclasses.replace(found, diverged=lost, found=followed, final=final)


def test_runs_that_diverged_reached_nothing_and_are_in_no_mean():
    there = arms()
    excess = there["order_1"].final["excess"].copy()
    excess[0] = 100.0
    first = dataclasses.replace(there["order_1"], final=there["order_1"].final | {"excess": excess})
    broken = there | {"order_1": diverged(first, [0]), "one_layer": diverged(there["order_1"], [0, 1])}
    figures = report.figures(broken)
    for name in ("phases", "good", "heads"):
        assert figures[f"order_1_{name}"].value == 7 / 8
    assert figures["order_1_excess"].value == pytest.approx(0.004)
    assert figures["plateau"].text.endswith("median of 7")
    assert figures["fall_while"].text.endswith("mean of 7")
    assert figures["one_layer_bigram"].value == 6
    runs = report.sections(broken)[-1][1][0]
    assert "<td>40</td><td>diverged</td><td>0.0040 ± 0.0000</td>" in runs
    assert "<td>41</td><td>0.0040 ± 0.0000</td>" in runs


def test_controls_without_a_sound_run_are_unknown_and_meet_nothing():
    lost = {arm: diverged(found, list(range(8))) for arm, found in arms().items()}
    figures = report.figures(lost)
    for name in ("doubly_stochastic_unigram", "unigram_heads", "one_layer_bigram", "order_1_excess"):
        assert np.isnan(figures[name].value)
        assert not figures[name].met
    assert figures["order_2_good"].value == 0
    assert len(report.sections(lost)) == 5


def test_the_plateau_is_of_runs_with_a_unigram_phase_first():
    """From start to start: 30 in three runs, never in four, and two runs have none."""
    mixed = outcome(["uuusssbbb"] * 3 + ["uuussssss"] * 4 + ["uuubbbbbb", "uuubbbsss"])
    figure = report.figures(arms() | {"order_1": mixed})["plateau"]
    assert figure.value == np.inf
    assert figure.text.endswith("median of 7")


def test_heads_are_timed_by_an_online_change_point_too():
    steps = np.arange(0, 400, 10)
    late = np.broadcast_to(steps[:, None, None] >= 200, (8, 40, 2, 1)) * 0.5
    curves = {"back_1": late, "induction_1": np.roll(late, 6, axis=1) * (steps >= 260)[:, None, None]}
    nearest = {f"kl_{name}": np.full((8, 40), far) for name, far in zip(report.REFERENCES, (1.0, 1, 0), strict=False)}
    found = outcome(["uuusssbbb"] * 8, steps=steps, found=curves | nearest)
    np.testing.assert_array_equal(found.change_points("back_1"), [200] * 8)
    np.testing.assert_array_equal(found.change_points("bigram"), [0] * 8)
    verdict, orders = report.orders(found, "back_1", "induction_1")
    assert verdict == "before"
    assert {name: order.difference for name, order in orders.items()} == {
        "10% of its rise": 60, "25% of its rise": 60, "50% of its rise": 60, "change point": 60,
    }  # fmt: skip


def test_targets_agree_with_loops(job):
    tokens = np.array([2, 0, 1, 1, 0, 1, 1, 1, 0])
    for m in (1, 2):
        wanted = np.zeros((9, 9), bool)
        for t in range(9):
            for j in range(m, t + 1):
                wanted[t, j] = t + 1 >= m and list(tokens[j - m : j]) == list(tokens[t - m + 1 : t + 1])
        np.testing.assert_array_equal(job.after_same(jnp.asarray(tokens), m), wanted)
        back = np.array([[j == t - m and j > 0 for j in range(9)] for t in range(9)])
        np.testing.assert_array_equal(job.tokens_back(jnp.asarray(tokens), m), back)


def test_attention_is_0_where_uniform_and_1_on_the_targets(job):
    tokens = jnp.array([[2, 0, 1, 1, 0, 1], [2, 1, 1, 1, 0, 0]])
    targets = jax.vmap(lambda x: job.after_same(x, 1))(tokens)
    mask = jnp.array([[False, True, True, True, True, False]] * 2)
    flat = jnp.broadcast_to(job.uniform(6), targets.shape)
    sharp = targets / jnp.maximum(targets.sum(-1, keepdims=True), 1)
    patterns = jnp.stack([flat, sharp, 0 * flat], axis=1)[:, None]  # [B,L,H,T,T]
    first, second, third = job.attention_to(patterns, targets, mask)[0]
    np.testing.assert_allclose([first, second], [0, 1], atol=1e-6)
    assert third < 0


def test_divergence_is_zero_from_itself_and_counts_masked_positions_alone(job):
    p = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]]))
    q = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]]]))
    assert job.divergence(p, p, jnp.array([[True, True]])) == 0
    wanted = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(job.divergence(p, q, jnp.array([[True, False]])), wanted, rtol=1e-6)


def test_references_are_distributions_over_states_and_cutting_is_what_an_ablation_does(job):
    """With one head in each layer, all that the first one writes into keys is cut: as if k had never read it."""
    task = MarkovChains(n_states=2, n_context=10)
    evaluation = job.evaluate_references(task, 0, 4)
    for log_p in evaluation.log_p.values():
        np.testing.assert_allclose(np.exp(log_p[:, 1:]).sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(np.exp(log_p[:, 1:, 2]), 0)
    assert not evaluation.batch.mask[:, [0, -1]].any()
    config = job.TransformerConfig(n_vocab=3, n_context=11, n_heads=1, d_model=8, positions="shortformer")
    params = init_params(config, jax.random.key(0))
    judged = jax.jit(job.judge, static_argnums=0)(config, params, evaluation)
    logits, seen = apply_batch(config, params, evaluation.batch.tokens, Interventions())
    added = -seen.head_outputs[:, 0, 0][:, None, None]  # [B,1,1,T,D]
    without = Interventions(k_added=jnp.concatenate([jnp.zeros_like(added), added], axis=1))
    cut, _ = apply_batch(config, params, evaluation.batch.tokens, without)
    rise = job.next_token_loss(cut, evaluation.batch) - job.next_token_loss(logits, evaluation.batch)
    np.testing.assert_allclose(judged["cut_loss"], [rise], atol=1e-5)
    chosen = [
        evaluation.log_p["bayes"][b, t, evaluation.batch.tokens[b, t + 1]] for b in range(4) for t in range(1, 10)
    ]
    excess = job.next_token_loss(logits, evaluation.batch) + np.mean(chosen)
    np.testing.assert_allclose(judged["excess"].mean(), excess, rtol=1e-4)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_smoke_leaves_everything_behind(tmp_path):
    done = run("--smoke", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    folder = tmp_path / "markov_phases_smoke"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["order_1_excess"]["aim"] == "<= 0.01"
    assert summary["one_layer_bigram"]["met"]
    assert "In-context Markov chains" in (folder / "report.html").read_text()
    assert len(list((folder / "trajectories").iterdir())) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-evaluation", "0", "--smoke"], "--n-evaluation must be at least 1"),
        (["--steps", "3"], "--steps and --steps-order-2 must leave more than 5 measurements; got 3 and 2000"),
        (["--n-states", "4"], "n_states must be at least 2, and at most 3"),
        (["--n-context", "1"], "n_context must be at least 2"),
        (["--learning-rate", "0"], "learning_rate must be positive"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, tmp_path, refuse):
    printed = refuse("markov_phases", *arguments, "--runs-dir", str(tmp_path / "runs"))
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()
