"""Verdicts on heads that do a job by construction, on decoys, and on untrained models; and the logic of verdicts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import planted_claims as planted
import pytest
from planted_claims import FOURTH, LATER, MOVER, SINKS, SUPPRESSOR, H, L

from circuits_jax import init_params
from circuits_jax.heads import claim_verdicts
from circuits_jax.heads.alignment import Aligned
from circuits_jax.heads.claim_verdicts import Finding, Verdict, behaviour, judge, summed_up, truth
from circuits_jax.heads.claims import Role, load_claim
from circuits_jax.heads.outcomes import run
from circuits_jax.heads.role_effects import Seen
from circuits_jax.heads.role_evidence import Behaviour, Structures, role_behaviours, role_structures
from circuits_jax.heads.role_structure import Structure
from circuits_jax.reports.claim_prompts import claim_prompts

N, N_DRAWS = 32, 399  # the least p, 2 / 400, is below .05 / 8: that of one head alone can be found
PLACES = np.array([(layer, head) for layer in range(L) for head in range(H)])
CLAIMED = {
    "name mover": ["0.0", "0.2", "1.0"],
    "S suppressor": ["0.1", "1.0"],
    "S mover from IO": ["0.0"],
    "answer mover": ["1.0"],
    "name gatherer": ["0.3"],
}
FROM_IO = {"query": "end", "key": "io", "moves": "S"}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A function of a model: {(role, (layer, head)): Verdict}, and the same of causal truths, by other prompts."""
    shipped = {name: dataclasses.asdict(role) for name, role in planted.CLAIM.roles.items()}
    roles = {name: shipped.get(name, FROM_IO) for name in CLAIMED}
    claim = planted.claim_of(tmp_path_factory.mktemp("claim"), roles=roles, heads=CLAIMED)
    prompts, apart = (claim_prompts(planted.TASK, claim, jax.random.key(seed), N, N) for seed in range(2))

    def verdicts(config, params):
        structures = role_structures(config, params, prompts, jax.random.key(2), N_DRAWS)
        seen = role_behaviours(config, params, prompts, jnp.asarray(PLACES))
        others = jax.tree.map(np.asarray, role_behaviours(config, params, apart, jnp.asarray(PLACES)))
        found = judge(claim, *jax.tree.map(np.asarray, (structures, seen)), PLACES)
        true = {}
        for verdict in found:
            of_role = claim_verdicts.of_role(others, list(roles).index(verdict.role))
            place = verdict.layer, verdict.head
            true[verdict.role, place] = truth(claim.roles[verdict.role], of_role, place, H * place[0] + place[1])
        return {(v.role, (v.layer, v.head)): v for v in found}, true

    verdicts.prompts = prompts
    return verdicts


@pytest.fixture(scope="module")
def models(judged):
    return {name: judged(*planted.planted(heads)) for name, heads in planted.MODELS.items()}


def outcomes(verdict):
    return {name: finding.outcome for name, finding in verdict.findings.items()}


# Models made by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", planted.MODELS)
def test_heads_that_solve_the_task_together_are_both_supported(models, name):
    verdicts, true = models[name]
    for role, place in (("name mover", MOVER), ("S suppressor", SUPPRESSOR)):
        assert verdicts[role, place].outcome == "supported", outcomes(verdicts[role, place])
        assert true[role, place]


@pytest.mark.parametrize("name", planted.MODELS)
def test_nothing_else_is_supported_or_true(models, name):
    real = {("name mover", MOVER), ("S suppressor", SUPPRESSOR)}
    if name == "decoy variable":
        real.add(("S suppressor", LATER))
    verdicts, true = models[name]
    assert {which for which, verdict in verdicts.items() if verdict.outcome == "supported"} == real
    assert {which for which, does in true.items() if does} == real


@pytest.mark.parametrize("name", planted.MODELS)
def test_a_sink_with_the_weights_of_a_name_mover_is_structure_alone(models, name):
    verdict = models[name][0]["name mover", SINKS]
    assert (verdict.structural, verdict.outcome) == ("supported", "not supported")
    assert {verdict.findings[name].outcome for name in ("attends", "uses QK", "uses OV")} == {"no"}
    assert verdict.findings["QK"].value == pytest.approx(models[name][0]["name mover", MOVER].findings["QK"].value)


def test_a_decoy_that_finds_no_names_is_structure_alone(models):
    """It looks where the name mover does, at what an earlier head has erased."""
    verdict = models["erased names"][0]["name mover", LATER]
    assert (verdict.structural, verdict.outcome) == ("supported", "not supported")
    found = outcomes(verdict)
    assert (found["attends"], found["uses QK"], found["uses OV"]) == ("yes", "no", "no")


def test_a_decoy_that_finds_no_places_is_structure_alone(models):
    """It would move names, but what it looks for is erased: it looks everywhere alike."""
    verdict = models["erased places"][0]["name mover", LATER]
    assert (verdict.structural, verdict.outcome) == ("supported", "not supported")
    found = outcomes(verdict)
    assert (found["attends"], found["uses QK"]) == ("no", "no")


def test_a_variable_that_is_there_but_not_read_is_not_moved(models, judged):
    """At the second S the stream says who IO is; the head that looks there reads S alone."""
    config, params = planted.planted(planted.MODELS["decoy variable"])
    batch = judged.prompts.judged
    b = np.arange(N)
    stream = np.asarray(run(config, params, batch)[1].residual)[b, 1, batch.positions["s2"]]
    decoded = np.argmax(stream[:, planted.part("other")] - 9 * stream[:, planted.part("name")], 1)
    np.testing.assert_array_equal(np.asarray(planted.TASK.names)[decoded], batch.positions["right"])
    verdicts = models["decoy variable"][0]
    verdict = verdicts["answer mover", LATER]
    assert verdict.outcome == "not supported"
    found = outcomes(verdict)
    assert (found["QK"], found["attends"], found["uses QK"]) == ("yes", "yes", "yes")
    assert (found["OV"], found["uses OV"]) == ("no", "no")
    assert verdicts["S suppressor", LATER].outcome == "supported"


def test_what_is_moved_but_read_by_no_one_is_not_supported(models):
    verdict = models["decoy variable"][0]["name gatherer", FOURTH]
    assert (verdict.structural, verdict.outcome) == ("supported", "not supported")
    assert verdict.findings["uses OV"].outcome == "no"


@pytest.mark.parametrize("name", planted.MODELS)
def test_a_variable_that_is_not_at_the_key_is_not_moved(models, name):
    verdict = models[name][0]["S mover from IO", MOVER]
    assert verdict.outcome == "not supported"
    assert (verdict.findings["OV"].outcome, verdict.findings["uses OV"].outcome) == ("no", "no")


@pytest.mark.slow
def test_nothing_is_supported_in_untrained_models(judged):
    """Nor would it be if they did the task; and in structure few are."""
    config, _ = planted.planted(planted.SOLVING)
    structural = []
    for seed in range(20):
        verdicts, true = judged(config, init_params(config, jax.random.key(seed)))
        assert not any(true.values())
        for verdict in verdicts.values():
            rest = {name: finding for name, finding in verdict.findings.items() if name != "task"}
            assert verdict.outcome != "supported"
            assert summed_up(rest) != "supported"
            structural.append(verdict.structural == "supported")
    assert np.mean(structural) <= 0.05


# The logic, on made-up evidence -------------------------------------------------------------------------------------

B = 40
ROLE = Role(query="end", key="io", moves="IO")
AGAINST = dataclasses.replace(ROLE, sign=-1, effect=-1)
TO_STREAM = dataclasses.replace(ROLE, to="stream")
MATCHING = dataclasses.replace(ROLE, looks="matching", matches="IO")
WHOLE = 2.0


def noisy(mean, noise=0.0):
    """[B] with this mean."""
    return mean + noise * np.where(np.arange(B) % 2, 1.0, -1.0)


def seen(difference=0.0, own=0.0, attention=0.8, noise=0.0):
    return Seen(*(noisy(x, noise)[None] for x in (difference, own, attention)))


def behaved(difference=WHOLE, attention=0.8, over=0.1, uniform=0.25, noise=0.0, **changes):
    """Of a head that does its job, unless told otherwise."""
    looks_away = seen(-1.0, -1.0, 0.0)
    by_direction = {"q": looks_away, "k": looks_away, "v": seen(-1.0, -1.0)} | changes.pop("by_direction", {})
    others = {"blocked": seen(-1.0, -1.0, 0.0), "by_counterfactual": seen(-1.0, -1.0)} | changes
    others |= {"predicted": noisy(attention)[:, None, None]}
    return Behaviour(
        noisy(difference, noise), noisy(attention, noise)[:, None, None], noisy(over)[:, None, None], noisy(uniform),
        by_direction=by_direction, **others,
    )  # fmt: skip


def findings(role=ROLE, **changes):
    found = behaviour(role, behaved(**changes), (0, 0), 0)
    return {name: finding.outcome for name, finding in found.items()}


ALL = {"task": "yes", "attends": "yes", "uses QK": "yes", "uses OV": "yes"}


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (("yes", "yes"), "supported"),
        (("yes", "no"), "not supported"),
        (("undetermined", "no"), "not supported"),
        (("yes", "undetermined"), "undetermined"),
        (("undetermined",), "undetermined"),
    ],
)
def test_predicates_are_summed_up(outcomes, expected):
    assert summed_up({str(i): Finding(outcome, 0.0) for i, outcome in enumerate(outcomes)}) == expected


def test_structure_has_no_say_in_activations_and_they_none_in_structure():
    found = {name: Finding("yes", 1.0) for name in claim_verdicts.PREDICATES}
    realised = Verdict("x", 0, 0, found | {"uses OV": Finding("no", 0.0)})
    assert (realised.structural, realised.outcome) == ("supported", "not supported")
    half = Verdict("x", 0, 0, found | {"QK": Finding("undetermined", 0.0)})
    assert (half.structural, half.outcome) == ("undetermined", "undetermined")


def test_a_head_that_does_its_job_passes():
    assert findings() == ALL
    assert truth(ROLE, behaved(), (0, 0), 0)


@pytest.mark.parametrize(
    ("changes", "name", "outcome"),
    [
        ({"attention": 0.25}, "attends", "no"),  # as much as chance
        ({"over": 0.9}, "attends", "no"),
        ({"attention": 0.3, "noise": 0.2}, "attends", "undetermined"),
        ({"by_direction": {"k": seen(-1.0, 0.0, 0.8)}}, "uses QK", "no"),  # attention stays
        ({"by_direction": {"k": seen(0.0, 0.0, 0.3)}}, "uses QK", "no"),  # the answer stays
        ({"by_direction": {"k": seen(-0.05, 0.0, 0.3, 0.2)}}, "uses QK", "undetermined"),
        ({"by_direction": {"q": seen()}}, "uses QK", "yes"),  # a preference is not asked about the query
        ({"by_direction": {"v": seen(-1.0, -0.1)}}, "uses OV", "no"),  # the class's own logit decides, 5 % of it
        ({"by_direction": {"v": seen(0.0, -0.2, noise=0.3)}}, "uses OV", "undetermined"),
        ({"by_direction": {"v": seen(1.0, 1.0)}}, "uses OV", "no"),  # the wrong way
    ],
)
def test_each_predicate_fails_alone(changes, name, outcome):
    assert findings(**changes) == ALL | {name: outcome}


def test_matching_is_asked_about_the_query():
    assert findings(MATCHING, by_direction={"k": seen()}) == ALL
    assert findings(MATCHING, by_direction={"q": seen()}) == ALL | {"uses QK": "no"}


def test_what_is_moved_to_others_is_judged_by_the_answer():
    changes = {"by_direction": {"v": seen(-1.0, 0.0)}}
    assert findings(TO_STREAM, **changes) == ALL
    assert findings(ROLE, **changes) == ALL | {"uses OV": "no"}


def test_a_head_that_works_against_the_answer_is_judged_by_rises():
    rises = {"q": seen(1.0, 1.0, 0.3), "k": seen(1.0, 1.0, 0.3), "v": seen(1.0, 1.0)}
    rising = {"by_direction": rises, "blocked": seen(1.0, 1.0, 0.0), "by_counterfactual": seen(1.0, 1.0)}
    assert findings(AGAINST, **rising) == ALL
    assert truth(AGAINST, behaved(**rising), (0, 0), 0)
    assert findings(ROLE, **rising) == ALL | {"uses QK": "no", "uses OV": "no"}
    assert not truth(ROLE, behaved(**rising), (0, 0), 0)
    assert findings(AGAINST) == ALL | {"uses QK": "no", "uses OV": "no"}
    assert not truth(AGAINST, behaved(), (0, 0), 0)


def test_a_model_that_fails_the_task_has_no_heads_that_do_it():
    for difference in (-WHOLE, 0.0):
        assert findings(difference=difference) == {
            "task": "no",
            "attends": "yes",
            "uses QK": "undetermined",
            "uses OV": "undetermined",
        }
        assert not truth(ROLE, behaved(difference=difference), (0, 0), 0)
    half_right = behaved(difference=0.5, noise=1.0)  # half of the prompts, and right on average
    assert behaviour(ROLE, half_right, (0, 0), 0)["task"].outcome == "no"
    assert not truth(ROLE, half_right, (0, 0), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": 0.2},
        {"over": 0.9},
        {"blocked": seen(-0.04 * WHOLE)},
        {"by_counterfactual": seen(-1.0, -0.09 * WHOLE)},
    ],
)
def test_truth_needs_attention_that_matters_and_a_value_that_moves(changes):
    assert not truth(ROLE, behaved(**changes), (0, 0), 0)


def test_intervals_are_those_of_means_over_prompts():
    values = np.random.default_rng(0).normal(size=50)
    low, high = claim_verdicts.interval(values)
    error = np.sqrt(((values - values.mean()) ** 2).sum() / 49 / 50)
    np.testing.assert_allclose((low, high), (values.mean() - 1.96 * error, values.mean() + 1.96 * error))
    assert claim_verdicts.interval(np.full(9, 0.5)) == (0.5, 0.5)


def made_structures(p, value=4.0, embedded_p=0.5, embedded_value=4.0):
    """Of the shipped claim: every QK p [heads] in its first role, 1 elsewhere; OV is found everywhere."""
    n_roles, n_heads = len(planted.CLAIM.roles), len(p)

    def part(p, value):
        ones = np.ones((n_roles, 1, n_heads))
        of_p = ones.copy()
        of_p[0, 0] = p
        aligned = Aligned(value * ones, of_p, of_p, ones, ones, of_p)
        sure = Aligned(ones, 1e-6 * ones, 1e-6 * ones, ones, ones, 1e-6 * ones)
        return Structure(aligned, aligned, sure, ones, ones, ones)

    return Structures(part(np.asarray(p), value), part(np.broadcast_to(embedded_p, n_heads), embedded_value))


def structural(structures, claim):
    """Outcomes of the QK half of the first role."""
    n_heads = structures.read.gain.shape[-1]
    one, roles = behaved(), len(claim.roles)
    heads = lambda x: np.repeat(x, n_heads, -1)  # noqa: E731
    each = jax.tree.map(lambda x: np.repeat(x, n_heads, 0), (one.by_direction, one.blocked, one.by_counterfactual))
    seen = Behaviour(one.difference, heads(one.attention), heads(one.over), one.uniform, *each, heads(one.predicted))
    seen = jax.tree.map(lambda x: np.stack([x] * roles), seen)
    verdicts = judge(claim, structures, seen, np.array([(0, head) for head in range(n_heads)]))
    assert [v.role for v in verdicts] == [role for role in claim.roles for _ in range(n_heads)]
    return [v.findings["QK"].outcome for v in verdicts[:n_heads]]


def oracle_found(p, n_tests):
    """Benjamini-Hochberg: the k smallest for the largest k whose p is at most .05 k / n."""
    order = np.sort(p)
    passing = [k for k in range(1, len(p) + 1) if order[k - 1] <= 0.05 * k / n_tests]
    return np.asarray(p) <= (order[passing[-1] - 1] if passing else -1)


def test_structure_is_judged_at_a_false_discovery_rate_over_all_heads_and_roles():
    claim = load_claim("ioi_words")
    p = np.array([0.0001, 0.0004, 0.0009, 0.003, 0.02, 0.4])
    found = structural(made_structures(p), claim)
    expected = oracle_found(2 * p, n_tests=len(p) * len(claim.roles))
    assert expected.tolist() == [True, True, True, False, False, False]
    assert found == ["yes" if x else "undetermined" for x in expected]


def test_the_clearer_of_read_and_embedded_decides_if_it_is_large_enough():
    claim = load_claim("ioi_words")
    clear, open_ = [1e-4] * 3, [0.5] * 3
    assert structural(made_structures(open_), claim) == ["undetermined"] * 3
    assert structural(made_structures(open_, embedded_p=1e-4), claim) == ["yes"] * 3
    assert structural(made_structures(clear, value=0.4), claim) == ["undetermined"] * 3
    # What was erased leaves rounding, as clear as it is small.
    erased = made_structures(clear, value=1e-9, embedded_p=1e-4)
    assert structural(erased, claim) == ["yes"] * 3


def test_the_other_side_is_told_from_an_open_question():
    claim = load_claim("ioi_words")
    assert structural(made_structures([0.9999, 0.5, 0.9999], embedded_p=0.5), claim)[::2] == ["no"] * 2
