"""Verdicts from made-up evidence whose right answer is known."""

import numpy as np
import pytest

from circuits_jax.heads import taxonomy, verdicts


def made_up(n_runs=8, seed=0):
    """Two layers of two heads: 0.0 serves 1.0 through k in every run, 1.1 is a bystander; scores are noisy."""
    random = np.random.default_rng(seed)
    noise = lambda *shape: 0.02 * random.random((n_runs, *shape))  # noqa: E731
    evidence = {
        "edge_weights": noise(2, 2, 2, 2),
        "edge_effect": noise(3, 2, 2, 2, 2),
        "joint_effect": noise(3, 2, 2),
        "induction_weights": noise(2, 2),
        "induction_attention": 0.1 + noise(2, 2),
        "previous_token_attention": 0.2 + noise(2, 2),
        "type_scores": noise(2, len(taxonomy.TYPES), 2, 2),
        "type_z": noise(2, len(taxonomy.TYPES), 2, 2),
    }
    for name, layer, head in (("previous_token", 0, 0), ("induction", 1, 0), ("copying", 1, 0)):
        place = taxonomy.TYPES.index(name)
        evidence["type_scores"][:, :, place, layer, head] = 0.9
        evidence["type_z"][:, :, place, layer, head] = 9.0
    evidence["edge_weights"][:, 0, 0, 1, 0] += 0.6
    evidence["edge_effect"][:, 1, 0, 0, 1, 0] += 0.5
    evidence["joint_effect"][:, 1, 1, 0] += 0.5
    evidence["induction_weights"][:, 1, 0] += 0.7
    evidence["induction_attention"][:, 1, 0] += 0.8
    evidence["previous_token_attention"][:, 0, 0] += 0.7
    return evidence


def heads(verdict, head_type, kind):
    return {(int(layer), int(head)) for _, layer, head in np.argwhere(verdict.heads[head_type][kind])}


def test_all_evidence_names_the_planted_pair():
    evidence = made_up()
    verdict = verdicts.judge(evidence)
    for kind in verdicts.KINDS:
        assert heads(verdict, "previous_token", kind) == {(0, 0)}
        assert heads(verdict, "induction", kind) == {(1, 0)}
    assert verdict.agreed("induction").sum() == 8
    np.testing.assert_array_equal(verdict.edges["weights"], verdict.edges["effect"])


def test_an_induction_head_by_weights_has_to_copy():
    evidence = made_up()
    evidence["type_scores"][:, :, taxonomy.TYPES.index("copying")] = 0.1
    verdict = verdicts.judge(evidence)
    assert heads(verdict, "induction", "weights") == set()
    assert heads(verdict, "induction", "attention") == {(1, 0)}


def test_where_there_is_nothing_nothing_is_named():
    control = made_up(seed=1)
    for name in control:
        control[name] = np.minimum(control[name], 0.1)
    verdict = verdicts.judge(control)
    for head_type in verdicts.TYPES:
        assert all(heads(verdict, head_type, kind) == set() for kind in verdicts.KINDS)


def test_every_type_of_the_taxonomy_is_kept():
    verdict = verdicts.judge(made_up())
    assert verdict.types.keys() == set(taxonomy.TYPES)
    assert verdict.types["copying"]["weights"][:, 1, 0].all()
    assert verdict.types["copying"]["weights"].sum() == 8


def test_a_diverged_run_gets_no_label():
    evidence = made_up()
    for name in evidence:
        evidence[name][3] = np.nan
    assert verdicts.sound(evidence).tolist() == [True] * 3 + [False] + [True] * 4
    verdict = verdicts.judge(evidence)
    assert not any(verdict.heads[t][k][3].any() for t in verdicts.TYPES for k in verdicts.KINDS)
    assert verdict.agreed("induction")[[0, 1, 2, 4, 5, 6, 7]].sum() == 7


def test_partners():
    evidence = made_up(n_runs=4)
    evidence["edge_weights"][3, 0, 1, 1, 0] = 0.9  # weights name the wrong sender in the last run
    right = verdicts.partners_right(evidence)
    assert right[:, 1, 0].tolist() == [1, 1, 1, 0]
    assert np.isnan(right[:, 0]).all()
    assert np.isnan(right[:, 1, 1]).all()


@pytest.mark.parametrize("n_layers", [1, 3])
def test_earlier_pairs(n_layers):
    pairs = verdicts.earlier(np.zeros((5, n_layers, 2, n_layers, 2)))
    expected = [[[[a < b] * 2 for b in range(n_layers)]] * 2 for a in range(n_layers)]
    np.testing.assert_array_equal(pairs, np.array(expected))
