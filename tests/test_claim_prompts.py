"""Prompts on which claims are judged: what is drawn apart, what differs in a pair, and what a task cannot answer."""

import json

import jax
import numpy as np
import pytest

from circuits_jax.heads import claims
from circuits_jax.reports.claim_prompts import claim_prompts, with_constructions
from circuits_jax.tasks import agreement, ioi

N, N_ESTIMATION = 12, 20
SHIPPED = {"ioi": "ioi_words", "sva": "agreement_words"}
TASKS = {
    "ioi": ioi.ioi_words(ioi.NAMES[:16])[0],
    "sva": agreement.agreement_words()[0],
}


@pytest.fixture(scope="module")
def prompts():
    return {
        name: claim_prompts(TASKS[name], claims.load_claim(SHIPPED[name]), jax.random.key(0), N, N_ESTIMATION)
        for name in TASKS
    }


def changed_claim(folder, name, **changes):
    """A shipped claim with other entries; {"roles": {role: {...}}} changes roles, and drops those not named."""
    data = json.loads(claims.shipped()[SHIPPED[name]].read_text())
    if "roles" in changes:
        changes["roles"] = {role: data["roles"].get(role, {}) | entries for role, entries in changes["roles"].items()}
        changes["heads"] = dict.fromkeys(changes["roles"], "every")
    path = folder / "claim.json"
    path.write_text(json.dumps(data | changes))
    return claims.load_claim(path)


def roles_of(name):
    claim = claims.load_claim(SHIPPED[name])
    return claim, list(claim.roles.values())


def words_of(task):
    return np.asarray(task.names if isinstance(task, ioi.IOI) else task.nouns).ravel()


def variable_tokens(task, classes, c):
    """The tokens that may say class c of a variable."""
    if isinstance(task, ioi.IOI):
        return {int(task.names[c])}
    noun = np.asarray(task.nouns)
    return set(noun[c].tolist()) if "noun" in classes else set(noun[:, c].tolist())


@pytest.mark.parametrize("name", TASKS)
def test_shapes_are_those_of_roles_and_counts(prompts, name):
    drawn, (_, roles) = prompts[name], roles_of(name)
    length = drawn.judged.tokens.shape[1]
    assert drawn.known.tokens.shape == (N_ESTIMATION, length)
    assert drawn.judged.tokens.shape == (N, length)
    questions = drawn.questions
    for asked, n in ((questions.known, N_ESTIMATION), (questions.judged, N)):
        assert {x.shape for x in jax.tree.leaves(asked)} == {(len(roles), n)}
    for pairs, n in ((questions.matched, N_ESTIMATION), (questions.moved, N_ESTIMATION), (questions.changed, N)):
        assert pairs.before.shape == pairs.after.shape == (len(roles), n, length)
        assert pairs.was.shape == pairs.becomes.shape == pairs.query.shape == pairs.key.shape == (len(roles), n)
    assert questions.matches.tolist() == [role.looks != "preference" for role in roles]
    assert questions.to_logits.tolist() == [role.to == "logits" for role in roles]
    assert questions.sign.tolist() == [role.sign for role in roles]


@pytest.mark.parametrize("name", TASKS)
def test_known_and_judged_sentences_share_no_word_of_a_variable(prompts, name):
    words = words_of(TASKS[name])
    known, judged = (
        set(np.asarray(batch.tokens).ravel().tolist()) & set(words.tolist())
        for batch in (prompts[name].known, prompts[name].judged)
    )
    assert known
    assert judged
    assert not known & judged


@pytest.mark.parametrize("name", TASKS)
def test_roles_ask_where_the_task_says(prompts, name):
    drawn, (_, roles) = prompts[name], roles_of(name)
    for r, role in enumerate(roles):
        for asked, batch in ((drawn.questions.known, drawn.known), (drawn.questions.judged, drawn.judged)):
            np.testing.assert_array_equal(asked.query[r], batch.positions[role.query])
            np.testing.assert_array_equal(asked.key[r], batch.positions[role.key])
            np.testing.assert_array_equal(asked.frame[r], batch.positions["template"])
            assert (asked.over[r] == -1).all()  # both shipped claims say "elsewhere"
            assert (asked.key[r] <= asked.query[r]).all()


def test_what_the_key_is_held_against_may_be_one_position(tmp_path):
    claim = changed_claim(tmp_path, "ioi", roles={"name mover": {"over": "s1"}, "S suppressor": {}})
    drawn = claim_prompts(TASKS["ioi"], claim, jax.random.key(0), N, N_ESTIMATION)
    np.testing.assert_array_equal(drawn.questions.judged.over[0], drawn.judged.positions["s1"])
    assert (drawn.questions.judged.over[1] == -1).all()


@pytest.mark.parametrize("name", TASKS)
def test_pairs_differ_in_one_variable_alone(prompts, name):
    """In tokens: where the variable was said, and nowhere else up to the question, another of its words is."""
    task, drawn, (claim, roles) = TASKS[name], prompts[name], roles_of(name)
    outside, inside = task.halves()
    questions, batch = drawn.questions, drawn.judged
    for r, role in enumerate(roles):
        for kind, variable in (("matched", role.matches or role.moves), ("moved", role.moves), ("changed", role.moves)):
            classes = claim.variables[variable].classes
            of = inside if kind == "changed" or classes in inside.word_classes else outside
            pairs = jax.tree.map(lambda x, r=r: np.asarray(x[r]), getattr(questions, kind))
            assert (pairs.was != pairs.becomes).all()
            for b in range(len(pairs.was)):
                before, after = pairs.before[b], pairs.after[b]
                names = set(words_of(of).tolist())
                differ = [t for t in np.flatnonzero(before != after) if before[t] in names]
                assert differ, (role, kind)
                for t in differ:
                    assert int(before[t]) in variable_tokens(of, classes, pairs.was[b])
                    assert int(after[t]) in variable_tokens(of, classes, pairs.becomes[b])
                unnamed = [t for t in np.flatnonzero(before != after) if before[t] not in names]
                verbs = set() if name == "ioi" else set(np.asarray(of.verbs).ravel().tolist())
                assert all(int(before[t]) in verbs and int(after[t]) in verbs for t in unnamed)
                if name == "sva" and classes != "noun":  # one noun, in its other number
                    assert len(differ) == 1
    np.testing.assert_array_equal(questions.changed.before, np.stack([batch.tokens] * len(roles)))


def test_every_mention_of_a_name_changes_with_it(prompts):
    drawn, (claim, roles) = prompts["ioi"], roles_of("ioi")
    for r, role in enumerate(roles):
        positions = claim.variables[role.moves].positions
        changed = np.asarray(drawn.questions.changed.before[r] != drawn.questions.changed.after[r])
        where = np.array([drawn.judged.positions[name] for name in positions]).T
        for b in range(N):
            end = int(drawn.judged.positions["end"][b])
            assert set(np.flatnonzero(changed[b, : end + 1])) == set(where[b])


def test_classes_that_are_words_are_told_by_judged_words_and_numbers_by_others(prompts):
    for name in TASKS:
        task, (claim, roles) = TASKS[name], roles_of(name)
        outside, inside = task.halves()
        for r, role in enumerate(roles):
            of = inside if claim.variables[role.moves].classes in inside.word_classes else outside
            other = outside if of is inside else inside
            tokens = set(np.asarray(prompts[name].questions.moved.before[r]).ravel().tolist())
            assert tokens & set(words_of(of).tolist())
            assert not tokens & set(words_of(other).tolist())


def test_answers_stand_for_classes_padded_to_the_same_shape(prompts):
    (claim, roles), drawn = roles_of("sva"), prompts["sva"].questions
    verbs = np.asarray(TASKS["sva"].verbs)
    n_nouns = len(TASKS["sva"].nouns) // 2
    assert drawn.answers.shape == (len(roles), n_nouns, len(verbs))
    for r, role in enumerate(roles):
        of_numbers = claim.variables[role.moves].classes != "noun"
        np.testing.assert_array_equal(drawn.answers[r, :2], verbs.T if of_numbers else np.full_like(verbs.T, -1))
        assert (drawn.answers[r, 2:] == -1).all()
    ioi_answers = np.asarray(prompts["ioi"].questions.answers)
    np.testing.assert_array_equal(ioi_answers, np.stack([TASKS["ioi"].halves()[1].names[:, None]] * len(ioi_answers)))


def test_labels_of_judged_prompts_are_the_classes_of_what_is_matched(prompts):
    (_, roles), drawn = roles_of("ioi"), prompts["ioi"]
    for r, role in enumerate(roles):
        variable = {"IO": "io_name", "S": "s_name"}[role.matches or role.moves]
        np.testing.assert_array_equal(drawn.questions.judged_matched[r], drawn.judged.positions[variable])


def test_judged_attractors_have_the_other_number_and_known_ones_any(prompts):
    judged, known = prompts["sva"].judged.positions, prompts["sva"].known.positions
    assert (judged["number"] != judged["attractor_number"]).all()
    alike = np.asarray(known["number"] == known["attractor_number"])
    assert alike.any()
    assert not alike.all()


def test_only_named_constructions_are_drawn(prompts):
    names = claims.load_claim("agreement_words").constructions
    allowed = {agreement.CONSTRUCTIONS.index(name) for name in names}
    for batch in (prompts["sva"].known, prompts["sva"].judged):
        assert set(np.asarray(batch.positions["construction"]).tolist()) == allowed
    whole = with_constructions(TASKS["sva"], ())
    np.testing.assert_array_equal(whole.templates, TASKS["sva"].templates)


def test_the_same_key_draws_the_same_prompts_and_another_others(prompts):
    claim = claims.load_claim("ioi_words")
    again, other = (claim_prompts(TASKS["ioi"], claim, jax.random.key(seed), N, N_ESTIMATION) for seed in range(2))
    jax.tree.map(np.testing.assert_array_equal, again, prompts["ioi"])
    assert (np.asarray(other.judged.tokens) != np.asarray(again.judged.tokens)).any()


NUMBER = {"classes": "number", "positions": []}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ioi", {"roles": {"name mover": {"key": "verb"}}}, "key of 'name mover' must be a position of ioi; got"),
        ("ioi", {"roles": {"name mover": {"query": "start"}}}, "query of 'name mover' must be a position"),
        ("ioi", {"roles": {"name mover": {"over": "s3"}}}, "over of 'name mover' must be a position"),
        ("ioi", {"roles": {"name mover": {"query": "s1", "key": "end"}}}, "would look ahead, from s1 to end"),
        ("ioi", {"variables": {"IO": NUMBER, "S": NUMBER}}, "classes of 'IO' must be one of io_name, s_name in ioi"),
        ("ioi", {"constructions": ["simple"]}, "constructions are of subject-verb agreement"),
        ("sva", {"constructions": ["passive"]}, "constructions must be some of .*; got passive"),
        ("sva", {"constructions": ["simple", "prepositional"]}, "some sentences have no 'attractor'"),
        ("sva", {"roles": {"noun mover": {"to": "logits"}}}, "moves 'noun' to the logits, but no answers stand"),
    ],
)  # fmt: skip
def test_what_a_task_does_not_have_is_refused(tmp_path, name, changes, message):
    claim = changed_claim(tmp_path, name, **changes)
    with pytest.raises(ValueError, match=message):
        claim_prompts(TASKS[name], claim, jax.random.key(0), N, N_ESTIMATION)
