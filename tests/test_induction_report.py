"""The report of the main job on made-up runs whose figures are known."""

import numpy as np
import pytest
from test_verdicts import made_up

from circuits_jax.heads import verdicts
from circuits_jax.reports import induction, results, run_folder
from circuits_jax.training.train import Run

STEPS = np.array([0, 100, 300, 500])


def outcome(n_runs=8, diverged=(), learned=True, seed=0):
    evidence = made_up(n_runs, seed)
    evidence |= {name: evidence["edge_weights"].copy() for name in ("k_gap", "k_frobenius")}
    evidence["example_patterns"] = np.full((n_runs, 2, 2, 3, 3), 0.3)
    evidence["ov_eigenvalues"] = np.ones((n_runs, 2, 2, 4), complex)
    if not learned:
        for name in ("edge_weights", "edge_effect", "joint_effect", "induction_weights", "induction_attention"):
            evidence[name] = np.minimum(evidence[name], 0.1)
        evidence["type_scores"] = np.minimum(evidence["type_scores"], 0.0)
    accuracy = np.tile([0.0, 0.6, 0.99, 1.0] if learned else [0.0, 0.1, 0.2, 0.4], (n_runs, 1))
    heads = np.zeros((n_runs, 4, 2, 2)) + accuracy[..., None, None]
    measurements = {"accuracy": accuracy, "evaluation_loss": 1 - accuracy}
    measurements |= {f"{name}_{kind}": heads for name in verdicts.TYPES for kind in ("attention", "weights")}
    loss = 1 - accuracy
    for run in diverged:
        loss[run] = np.nan
        for value in evidence.values():
            value[run] = np.nan
    run = Run({"W": np.ones((n_runs, 3))}, STEPS, loss, measurements)
    return run, evidence, np.arange(10, 10 + n_runs)


def outcomes(diverged=(), n_runs=8):
    made = {
        "repeats": outcome(n_runs, diverged),
        "iid": outcome(n_runs, learned=False, seed=1),
        "one_layer": outcome(n_runs, learned=False, seed=2),
    }
    return {
        name: induction.Outcome(seeds, run, evidence, verdicts.judge(evidence))
        for name, (run, evidence, seeds) in made.items()
    }


def test_figures_of_perfect_runs():
    figures = induction.figures(outcomes())
    assert all(figure.met for figure in figures.values() if figure.aim)
    assert figures["one_layer_accuracy"].value == 0.4
    assert figures["edge_auroc"].value == figures["edge_precision"].value == figures["best_partner"].value == 1.0
    assert figures["induction_heads"].value == figures["previous_token_heads"].value == 1.0
    assert figures["accuracy_formed"].value == 100.0
    assert figures["diverged"].value == 0


def test_a_diverged_run_is_named_and_left_out():
    found = outcomes(diverged=[2])
    figures = induction.figures(found)
    assert figures["diverged"].value == 1
    assert figures["learned_by_step_300"].value == 7 / 8  # a diverged run has not learned
    assert figures["edge_recall"].value == 1.0
    assert induction.notes(found) == ["repeats: seeds 12 diverged and are left out"]
    _, rows = induction.verdict_table(found["repeats"])
    assert rows[2][:2] == ["12", "diverged"]
    assert rows[3] == ["13", "1.000", "100", "0.0@100", "1.0@100", "yes"]


def test_when_every_run_diverged_nothing_is_claimed():
    found = outcomes(diverged=range(8))
    figures = induction.figures(found)
    assert figures["learned_by_step_300"].value == 0.0
    for name in ("edge_auroc", "edge_precision", "best_partner", "induction_heads"):
        assert np.isnan(figures[name].value)
        assert not figures[name].met
    assert "diverged and are left out" in induction.notes(found)[-1]
    headings = [heading for heading, _ in induction.sections(found, figures, np.arange(3))]
    assert not any("pair" in heading for heading in headings)


def test_controls_that_all_diverged_prove_nothing():
    found = outcomes()
    run, evidence, seeds = outcome(diverged=range(8), learned=False)
    found["iid"] = induction.Outcome(seeds, run, evidence, found["iid"].verdicts)
    figure = induction.figures(found)["iid_induction_heads"]
    assert np.isnan(figure.value)
    assert not figure.met


def test_a_false_alarm_in_a_control_misses_its_aim():
    found = outcomes()
    found["iid"].verdicts.heads["induction"]["attention"][5, 1, 1] = True
    figure = induction.figures(found)["iid_induction_heads"]
    assert figure.value == 1
    assert not figure.met


def test_disagreement_is_shown():
    found = outcomes()
    found["repeats"].verdicts.heads["previous_token"]["weights"][0] = False
    _, rows = induction.verdict_table(found["repeats"])
    assert rows[0][3] == "weights none, attention 0.0@100, effect 0.0@100"
    assert rows[0][-1] == "no"
    header, table = run_folder.figure_table(induction.figures(found))
    assert len({len(header), *map(len, table)}) == 1


def test_page_and_datasets_hold_every_array(tmp_path):
    found = outcomes()
    sections = induction.sections(found, induction.figures(found), np.array([4, 5, 4]))
    assert sections[-1][0].startswith("A recovered pair: 0.0 to 1.0 of seed")
    data = induction.datasets(found, {"seeds": 8})
    results.save(tmp_path / "r.zarr", data)
    back = results.load(tmp_path / "r.zarr", "repeats")
    np.testing.assert_array_equal(back.edge_effect, found["repeats"].evidence["edge_effect"])
    assert back.induction_verdict_weights.sel(run=10).values.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("n_runs", [1, 2])
def test_few_runs(n_runs):
    found = outcomes(n_runs=n_runs)
    assert np.isfinite(induction.figures(found)["edge_recall"].value)
    assert induction.notes(found) == []


def test_every_head_of_the_recovered_run_is_named():
    found = outcomes()["repeats"]
    _, rows = induction.head_table(found, 0)
    assert rows[0] == ["0.0", "previous_token", "undetermined"]
    assert rows[2] == ["1.0", "induction", "copying"]
    found.verdicts.types["induction"]["attention"][0, 1, 0] = False
    assert induction.head_table(found, 0)[1][2][1] == "induction [weights only]"
