"""Trigger bigrams as a user runs them: smoke, bad input, what is trained; and the report on curves of known order."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from circuits_jax.reports import results
from circuits_jax.reports import trigger_bigrams as report
from circuits_jax.training.train import Run

SCRIPT = Path(__file__).parent.parent / "experiments" / "trigger_bigrams.py"
STEPS = np.arange(0, 202, 2)
STARTS = np.arange(40.0, 56.0, 2)  # of eight runs


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import trigger_bigrams

    return trigger_bigrams


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280)


# As a command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smoke_leaves_everything_behind(tmp_path):
    done = run("--smoke", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stdout + done.stderr
    folder = tmp_path / "trigger_bigrams_smoke"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "trajectories", "checkpoints", "summary.json", "report.html",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(figure["aim"] is not None for figure in summary.values()) == 10
    three = results.load(folder / "trajectories" / "three.zarr")
    assert three.loss_per_position.sizes["position"] == 40
    assert bool(three.done.all())
    # Sixty steps form no circuit, but the loss falls, and the output memory is under way.
    assert (three.evaluation_loss.isel(step=-1) < three.evaluation_loss.isel(step=0) - 0.1).all()
    assert (three.output_recall.isel(step=-1) > three.output_recall.isel(step=0) + 0.2).all()
    assert summary["diverged"]["value"] == 0
    page = (folder / "report.html").read_text()
    for heading in ("Figures", "Recall through training", "When", "Order", "Sharpness and loss", "Loss by position"):
        assert f"<h2>{heading}" in page
    assert page.count("Plotly.newPlot(") == 5
    assert not re.search(r'<(script|link|img)[^>]+(src|href)=["\']?http', page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-triggers", "32"], "--n-triggers must be less than --n-vocab 32; got 32"),
        (["--n-triggers", "0"], "--n-triggers must be at least 1; got 0"),
        (["--smoke", "--measure-every", "0"], "--measure-every must be at least 1; got 0"),
        (["--concentration", "0"], "--concentration must be positive and finite; got 0.0"),
        (["--n-context", "3"], "n_context must be at least 4"),
        (["--steps", "3"], "--steps must leave more than 5 measurements; got 3"),
        (["--learning-rate-all", "-1"], "learning_rate must be positive"),
        (["--base", "text", "--n-vocab", "4000"], "--n-vocab must be at most"),
    ],
)
def test_bad_settings_are_one_line(arguments, message, tmp_path, refuse):
    printed = refuse("trigger_bigrams", *arguments, "--runs-dir", str(tmp_path))
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


# What is trained --------------------------------------------------------------------------------------------------


def test_three_trains_the_three_memories_and_controls_redraw_all_outputs(job, tmp_path):
    plan = job.prepare(job.Settings(seeds=3, runs_dir=tmp_path))
    arms = {arm.name: arm for arm in plan.arms}
    assert list(arms) == ["three", "all", "three_control", "all_control"]
    for name, arm in arms.items():
        assert [setting.seed for setting in arm.settings] == [0, 1, 2]
        assert {setting.task.noise for setting in arm.settings} == {1.0 if "control" in name else 0.0}
        if name.startswith("all"):
            assert arm.settings[0].trained is None
            continue
        trained = jax.tree.flatten_with_path(arm.settings[0].trained)[0]
        paths = {"/".join(key.key for key in path) for path, factor in trained if factor == 1}
        assert paths == {"layer_0/attention/W_K", "layer_1/attention/W_K", "layer_1/attention/W_O"}
        assert all(factor in (0, 1) for _, factor in trained)


def test_triggers_are_the_most_frequent_tokens_of_a_table_of_the_seeds_own(job):
    tasks = job.chains(job.Settings(seeds=2, first_seed=7))
    again = job.chains(job.Settings(seeds=1, first_seed=8))[0]
    for task in tasks:
        least = np.asarray(task.log_unigrams)[np.asarray(task.triggers)].min()
        assert (np.asarray(task.log_unigrams) >= least).sum() == 5
    assert not np.allclose(tasks[0].log_bigrams, tasks[1].log_bigrams)
    np.testing.assert_array_equal(tasks[1].log_bigrams, again.log_bigrams)


def test_text_is_the_same_for_all_seeds_and_its_first_trigger_is_the_space(job):
    one, other = job.chains(job.Settings(seeds=2, base="text", n_vocab=20))
    one.validate()
    assert one.log_bigrams is other.log_bigrams
    # New numbers are in the order of the bytes, so newline and space come first among frequent characters.
    assert int(one.triggers[0]) == 1


def test_measurements_are_dense_where_memories_form(job):
    measured = job.Settings(steps=400, measure_every=4, dense_until=200).measured
    assert measured[0] == 0
    assert measured[-1] == 400
    assert set(range(0, 201, 4)) <= set(measured)
    assert 3 <= sum(step > 200 for step in measured) <= 10
    assert measured[: report.BASELINE] == [0, 1, 2, 3, 4]  # early in the warm-up


# The report on made-up curves -------------------------------------------------------------------------------------


def ramp(starts, length):
    """0 up to starts [S], then straight up to 1 over so many steps: [S,E]."""
    return np.clip((STEPS - np.asarray(starts)[:, None]) / length, 0, 1)


def made_up(**recalls):
    """A run whose loss falls from 2 to 0 in a straight line."""
    shape = (len(STARTS), len(STEPS))
    loss = np.broadcast_to(2 - STEPS / 100, shape)
    flat = np.zeros(shape)
    names = ("match_recall_all", "accuracy", "previous_attention", "induction_attention")
    measurements = {
        **dict.fromkeys((*report.MEMORIES, *names), flat),
        "evaluation_loss": loss,
        "loss_per_position": np.repeat(loss[..., None], 6, -1),
        **recalls,
    }
    return Run({}, STEPS, loss, measurements)


IN_ORDER = made_up(
    output_recall=ramp(STARTS, 20), match_recall=ramp(STARTS + 30, 20), previous_recall=ramp(STARTS + 70, 40)
)


@pytest.mark.parametrize(("pair", "at_half"), [(0, 30), (1, 50), (2, 80)])
def test_a_clear_order_is_found_with_its_difference(pair, at_half):
    verdict, orders = report.pair_order(IN_ORDER, *report.PAIRS[pair])
    assert verdict == "before"
    assert list(orders) == ["R >= 0.5", "R >= 0.7", "R >= 0.9", "change point"]
    assert orders["R >= 0.5"].difference == at_half
    assert orders["R >= 0.5"].before == len(STARTS)


def test_an_order_that_flips_with_the_threshold_is_undecided():
    crossing = made_up(output_recall=ramp(STARTS, 100), match_recall=ramp(STARTS + 60, 20))
    verdict, orders = report.pair_order(crossing, "output_recall", "match_recall")
    assert orders["R >= 0.5"].verdict == "before"
    assert orders["R >= 0.9"].verdict == "after"
    assert verdict == "undecided"


def test_an_order_that_the_change_point_denies_is_undecided():
    """A long rise to .45 sounds the alarm before the other does, but reaches every threshold after it."""
    early = 0.45 * ramp(STARTS - 20, 20) + 0.55 * ramp(STARTS + 60, 10)
    verdict, orders = report.pair_order(
        made_up(output_recall=early, match_recall=ramp(STARTS + 30, 10)), "output_recall", "match_recall"
    )
    assert {orders[f"R >= {threshold}"].verdict for threshold in report.THRESHOLDS} == {"after"}
    assert orders["change point"].verdict == "before"
    assert verdict == "undecided"


def test_a_flat_memory_never_changes_and_wobbling_at_chance_is_no_change():
    wobble = 0.15 + 0.05 * np.random.default_rng(0).choice([-1, 0, 1], (len(STARTS), len(STEPS)))
    assert np.isnan(report.change_point(made_up(match_recall=wobble), "match_recall")).all()
    assert np.isnan(report.change_point(made_up(), "match_recall")).all()


def test_a_rise_is_timed_at_its_own_shares_and_a_flat_curve_has_none():
    np.testing.assert_array_equal(
        report.rise_times(IN_ORDER, "previous_recall"), [STARTS + 70 + 4, STARTS + 70 + 20, STARTS + 70 + 36]
    )
    half = made_up(match_recall=0.5 * ramp(STARTS, 20))
    np.testing.assert_array_equal(report.rise_times(half, "match_recall")[1], STARTS + 10)
    assert np.isnan(report.rise_times(made_up(), "previous_recall")).all()


def test_figures_count_the_runs_that_remember_and_the_controls_that_do():
    late = made_up(
        output_recall=ramp(STARTS, 20),
        match_recall=ramp(STARTS, 20),
        previous_recall=ramp([300.0] * 2 + [80.0] * 6, 20),
    )
    peak = np.zeros((len(STARTS), len(STEPS)))
    peak[3, 40] = 0.8  # at one step only
    runs = {"three": IN_ORDER, "all": late, "three_control": made_up(), "all_control": made_up(match_recall=peak)}
    found = report.figures(runs)
    assert found["three_previous_recall"].value == 1
    assert found["all_previous_recall"].value == 0.75
    assert [found[f"{arm}_previous_recall"].met for arm in ("three", "all")] == [True, False]
    assert found["three_output_recall_to_previous_recall"].value == 84  # at 0.7: 70 + 28 - 14
    assert [found[f"{arm}_formed"].value for arm in report.CONTROLS] == [0, 1]
    assert [found[f"{arm}_formed"].met for arm in report.CONTROLS] == [True, False]
    assert [found[f"{arm}_highest"].value for arm in report.CONTROLS] == [0, 0]  # medians
    asked, of_three, *_ = report.notes(runs)
    assert asked.startswith("Asked: ")
    assert "R(W_O2) before R(W_K2); R(W_K2) before R(W_K1)" in of_three
    headings = [heading for heading, _ in report.sections(runs)]
    assert headings[0] == "Recall through training"


def test_memories_count_together_only_where_they_are_in_the_same_run():
    """Each is learned in six of eight runs, all three in four."""
    early, late, never = ramp(STARTS, 20), ramp(STARTS, 20), ramp(STARTS, 20)
    early[:2], late[2:4] = 0, 0
    run = made_up(output_recall=early, match_recall=late, previous_recall=never)
    found = report.figures({"three": run, "all": run, "three_control": made_up(), "all_control": made_up()})
    assert [found[f"three_{memory}"].value for memory in report.MEMORIES] == [0.75, 0.75, 1]
    assert found["three_all_memories"].value == 0.5
    assert not found["three_all_memories"].met


def test_a_run_that_diverged_is_one_in_which_nothing_formed():
    """Its recalls reach 1 before, and count nowhere; medians are those of the others."""
    loss = np.array(IN_ORDER.loss)
    loss[0, -1] = np.nan
    runs = dict.fromkeys([*report.ARMS, *report.CONTROLS], dataclasses.replace(IN_ORDER, loss=loss))
    found = report.figures(runs)
    assert found["all_all_memories"].value == 7 / 8
    assert found["three_output_recall_to_match_recall"].text.endswith("median of 7")
    assert found["all_control_formed"].value == 7
    assert found["diverged"].value == 4


def test_arms_without_a_sound_run_still_make_a_page():
    lost = dataclasses.replace(IN_ORDER, loss=np.full(IN_ORDER.loss.shape, np.nan))
    runs = dict.fromkeys([*report.ARMS, *report.CONTROLS], lost)
    found = report.figures(runs)
    assert found["three_all_memories"].value == 0
    for name in ("three_accuracy", "three_control_formed", "all_control_highest"):
        assert np.isnan(found[name].value)
        assert not found[name].met
    judged = {arm: run.of(~run.diverged) for arm, run in runs.items()}
    assert len(report.sections(judged)) == 6
    assert "R(W_O2) and R(W_K2) undecided" in report.notes(judged)[1]
