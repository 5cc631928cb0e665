"""What is measured of roles: in closed form on models made by hand, by slow loops on random ones; what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import planted_claims as planted
import pytest
from effect_oracle import random_params
from planted_claims import END, LATER, LOOKS, LOWERED, MOVER, RAISED, SINKS, SUPPRESSOR, TASK, H, L

from circuits_jax import TransformerConfig
from circuits_jax.heads.role_evidence import role_behaviours, role_structures
from circuits_jax.reports.claim_prompts import claim_prompts

N, N_ESTIMATION = 24, 48
ROLES = tuple(planted.CLAIM.roles)
PLACES = np.array([MOVER, SUPPRESSOR, SINKS])
E = np.exp(LOOKS)
MOVER_LOOKS, MOVER_REST = E / (2 * E + 3), 1 / (2 * E + 3)  # at each name in places 1 and 2, at each other word
SUPPRESSOR_LOOKS, SUPPRESSOR_REST = E / (E + 4), 1 / (E + 4)


@pytest.fixture(scope="module")
def prompts():
    return claim_prompts(TASK, planted.CLAIM, jax.random.key(3), N, N_ESTIMATION)


@pytest.fixture(scope="module")
def behaviours(prompts):
    model = planted.planted(planted.MODELS["erased names"])
    return jax.tree.map(np.asarray, role_behaviours(*model, prompts, jnp.asarray(PLACES)))


@pytest.fixture(scope="module")
def structures(prompts):
    model = planted.planted(planted.MODELS["erased names"])
    return jax.tree.map(np.asarray, role_structures(*model, prompts, jax.random.key(0), 19))


def of(tree, role):
    return jax.tree.map(lambda x: x[ROLES.index(role)], tree)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, np.broadcast_to(expected, np.shape(actual)), rtol=1e-4, atol=atol)


# Models made by hand ---------------------------------------------------------------------------------------------


def test_the_answer_and_attention_of_the_planted_heads(behaviours):
    mover, suppressor = of(behaviours, "name mover"), of(behaviours, "S suppressor")
    close(mover.difference, LOWERED * SUPPRESSOR_LOOKS - RAISED * MOVER_REST)
    close(mover.uniform, 1 / (END + 1))
    for seen, place, at_key, at_others in (
        (mover, MOVER, MOVER_LOOKS, (MOVER_LOOKS + 2 * MOVER_REST) / 3),
        (mover, SINKS, 0.0, 0.0),
        (suppressor, SUPPRESSOR, SUPPRESSOR_LOOKS, SUPPRESSOR_REST),
        (mover, (1, 3), 1 / (END + 1), 1 / (END + 1)),
    ):
        close(seen.attention[:, *place], at_key)
        close(seen.over[:, *place], at_others)


def test_blocked_attention_in_closed_form(behaviours):
    """The mover then has S alone, raised at both of its places; the suppressor looks at all other words alike."""
    mover, suppressor = of(behaviours, "name mover").blocked, of(behaviours, "S suppressor").blocked
    close(mover.difference[0], RAISED * MOVER_REST - RAISED * (E + 1) / (E + 3))
    close(suppressor.difference[1], -LOWERED * SUPPRESSOR_LOOKS)
    close(mover.difference[2], 0.0)
    assert (mover.attention[0] == 0).all()
    assert (suppressor.attention[1] == 0).all()


def test_values_of_real_prompts_in_closed_form(behaviours):
    """Another IO: what raised it raises a third name. Another S: what lowered it lowers a third name."""
    mover, suppressor = of(behaviours, "name mover").by_counterfactual, of(behaviours, "S suppressor").by_counterfactual
    close(mover.difference[0], -RAISED * MOVER_LOOKS)
    close(mover.own[0], -2 * RAISED * MOVER_LOOKS)
    close(suppressor.difference[1], -LOWERED * SUPPRESSOR_LOOKS)
    close(suppressor.own[1], 2 * LOWERED * SUPPRESSOR_LOOKS)
    close(mover.attention[0], MOVER_LOOKS)
    close([mover.difference[2], mover.own[2]], 0.0)


def test_swapped_classes_in_closed_form(prompts, behaviours):
    """The name at the key less its class, plus another one, as pairs of the same words tell both."""
    raised, lowered = RAISED * MOVER_LOOKS, -LOWERED * SUPPRESSOR_LOOKS
    for role, place, key_weight in (("name mover", 0, raised), ("S suppressor", 1, lowered)):
        asked, seen = of(prompts.questions, role), of(behaviours, role).by_direction["v"]
        effects = slow_class_effects(np.eye(8), asked.moved)
        was, where = np.asarray(asked.changed.was), prompts.judged.positions
        other = slow_other_classes(was)
        change = effects[other] - effects[was]  # of the 8 judged names
        io, s = (np.asarray(where[name]) for name in ("io_name", "s_name"))
        b = np.arange(N)
        close(seen.difference[place], key_weight * (change[b, io] - change[b, s]))
        close(seen.own[place], key_weight * (change[b, was] - change[b, other]))


def test_keys_without_their_direction_in_closed_form(prompts, behaviours):
    """What sets the key apart on other names, in the embedding's parts: its place, and less so the names there."""
    for role, place in (("name mover", MOVER), ("S suppressor", SUPPRESSOR)):
        asked, seen = of(prompts.questions, role), of(behaviours, role).by_direction["k"]
        known, judged = prompts.known, prompts.judged
        known_rows = embedded(known)
        scored = np.array([LOOKS * (i in ((1, 2) if place == MOVER else (3,))) for i in range(planted.T)])
        for b in range(N):
            same = np.flatnonzero(np.asarray(asked.known.frame) == asked.judged.frame[b])
            keys = np.asarray(asked.known.key)
            others = [[p for p in range(1, END + 1) if p != keys[i]] for i in same]
            at_key = np.mean([known_rows[i, keys[i]] for i in same], 0)
            at_others = np.mean([known_rows[i, p].mean(0) for i, p in zip(same, others, strict=True)], 0)
            key, change = int(asked.judged.key[b]), at_others - at_key
            scores = np.concatenate([[0.0], scored[1 : END + 1]])
            before = np.exp(scores) / np.exp(scores).sum()
            scores[key] += change[planted.part("place")] @ scored
            after = np.exp(scores) / np.exp(scores).sum()
            io, s = (int(TASK.names[8 + int(judged.positions[name][b])]) for name in ("io_name", "s_name"))
            tokens = np.asarray(judged.tokens[b, : END + 1])
            gain = RAISED if place == MOVER else -LOWERED
            expected = gain * (after - before) @ ((tokens == io) * 1.0 - (tokens == s) * 1.0)
            close(seen.attention[place[1], b], after[key])
            close(seen.difference[place[1], b], expected)


def test_what_weights_prefer_and_move_of_the_planted_heads(prompts, structures):
    mover, suppressor = of(structures, "name mover"), of(structures, "S suppressor")
    for part in (mover.read, mover.embedded):
        close([part.preference.value[place] for place in (MOVER, SINKS, LATER)], LOOKS * 2 / 3)
        close(part.preference.value[1, 1:], 0.0)
        for place in (MOVER, SINKS):
            close(part.moves.value[place], slow_trace(of(prompts.questions, "name mover").moved))
        assert part.moves.label_p[MOVER] == pytest.approx(1 / 20)
    close(suppressor.read.preference.value[SUPPRESSOR], LOOKS)
    close(suppressor.read.moves.value[SUPPRESSOR], -slow_trace(of(prompts.questions, "S suppressor").moved))
    assert suppressor.read.moves.label_p[SUPPRESSOR] == pytest.approx(1 / 20)
    assert mover.read.moves.label_p[SUPPRESSOR] == 1


def test_what_a_head_erases_is_there_as_embedded_alone(structures):
    mover = of(structures, "name mover")
    close(mover.embedded.moves.value[LATER], mover.read.moves.value[MOVER])
    close(mover.read.moves.value[LATER], 0.0)
    assert mover.read.moves.label_p[LATER] == 1


def test_roles_without_a_variable_to_match_have_nothing_matched(structures):
    matching = of(structures, "name mover").read.matching
    assert (matching.value == 0).all()
    assert (matching.label_p == 1).all()
    assert of(structures, "duplicate token").read.matching.value.shape == (L, H)


def embedded(batch):
    return np.array([[words(token, t) for t, token in enumerate(row)] for row in np.asarray(batch.tokens)])


def words(token, place):
    """The row of the embedding."""
    row = np.zeros(planted.D)
    row[planted.STARTS["place"] + place] = 1
    names = np.asarray(TASK.names).tolist()
    if token in names:
        row[names.index(token)] = 1
    for i, word in enumerate(("to", "<bos>")):
        row[planted.STARTS["word"] + i] = token == planted.WORDING.vocabulary.index(word)
    return row


# Random models, one loop after the other ---------------------------------------------------------------------------


def slow_class_effects(of_class, pairs, changes=None):
    """Of each class the mean change towards it, shrunk as centred effects are; of one-hot classes without changes."""
    was, becomes = np.asarray(pairs.was), np.asarray(pairs.becomes)
    changes = of_class[becomes] - of_class[was] if changes is None else changes
    n_classes = len(of_class)
    out, occurring = np.zeros((n_classes, changes.shape[-1])), len(set(was) | set(becomes))
    for c in range(n_classes):
        towards = [x for x, b in zip(changes, becomes, strict=True) if b == c]
        towards += [-x for x, a in zip(changes, was, strict=True) if a == c]
        if towards:
            out[c] = np.mean(towards, 0) * (occurring - 1) / occurring
    return out


def slow_trace(pairs):
    """Of W_OV that copies: the cosine of effects of names with what stands for them, over what W_OV does to others."""
    effects, centred = slow_class_effects(np.eye(8), pairs), np.eye(8) - 1 / 8
    cosine = (effects * centred).sum() / np.linalg.norm(effects) / np.linalg.norm(centred)
    return cosine * np.sqrt(planted.D / planted.N_NAMES)


def slow_other_classes(labels):
    """That of the next prompt, around, which has another."""
    n = len(labels)
    return np.array([next(labels[(b + i) % n] for i in range(n) if labels[(b + i) % n] != labels[b]) for b in range(n)])


RANDOM = TransformerConfig(
    planted.V, planted.T, n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, norm="rms", positions="rotary",
    bias=True,
)  # fmt: skip


def test_behaviour_of_a_random_model_by_slow_loops(tmp_path):
    """Rotary positions, RMSNorm with gains, grouped heads, biases; a role of a preference and one of matching."""
    claim = planted.claim_of(
        tmp_path,
        roles={
            "name mover": {"query": "end", "key": "io", "over": "s1", "moves": "IO"},
            "duplicate token": {
                "query": "s2", "key": "s1", "looks": "matching", "matches": "S", "moves": "S", "to": "stream",
            },
        },
        heads={"name mover": "every", "duplicate token": "every"},
    )  # fmt: skip
    params = random_params(RANDOM)
    prompts = claim_prompts(TASK, claim, jax.random.key(8), 4, 8)
    places = np.array([[0, 1], [1, 0]])
    found = jax.tree.map(np.asarray, role_behaviours(RANDOM, params, prompts, jnp.asarray(places)))
    forward = lambda tokens, *how: planted.numpy_forward(RANDOM, params, np.asarray(tokens), *how)  # noqa: E731
    rows = lambda batch: np.array([planted.unit_rows(RANDOM, forward(tokens)[0][:-1]) for tokens in batch])  # noqa: E731
    known_rows, tokens = rows(prompts.known.tokens), np.asarray(prompts.judged.tokens)
    right, wrong = (np.asarray(prompts.judged.positions[name]) for name in ("right", "wrong"))
    for r, role in enumerate(claim.roles.values()):
        asked, seen = (jax.tree.map(lambda x, r=r: np.asarray(x[r]), tree) for tree in (prompts.questions, found))
        matched, moved = (rows(pairs.after) - rows(pairs.before) for pairs in (asked.matched, asked.moved))
        real = rows(asked.changed.after) - rows(asked.changed.before)
        other = {"q": slow_other_classes(asked.judged_matched), "v": slow_other_classes(asked.changed.was)}
        for b in range(len(tokens)):
            query, key, over = asked.judged.query[b], asked.judged.key[b], asked.judged.over[b]
            before, patterns, _ = forward(tokens[b])
            last = before[-1, END]
            logits = planted.frozen_logits(RANDOM, params, last, last) + np.asarray(params["b_U"])
            close(seen.difference[b], logits[right[b]] - logits[wrong[b]], 1e-4)
            close(seen.attention[b], patterns[:, :, query, key])
            rest = [p for p in range(1, query + 1) if p != key] if over < 0 else [over]
            close(seen.over[b], patterns[:, :, query, rest].mean(-1))
            close(seen.uniform[b], 1 / (query + 1))
            for i, (layer, head) in enumerate(places):
                same = np.flatnonzero(asked.known.frame == asked.judged.frame[b])
                at_key, at_over = (
                    np.mean([known_rows[j, layer, ps[j]].mean(0) for j in same], 0)
                    for ps in (asked.known.key[:, None], others_of(asked.known))
                )
                pair = np.arange(8)
                at_query = matched[pair, layer, asked.matched.query]
                at_value = moved[pair, layer, asked.moved.key]
                asks = slow_class_effects(np.eye(len(asked.answers)), asked.matched, at_query)
                says = slow_class_effects(np.eye(len(asked.answers)), asked.moved, at_value)
                was = asked.changed.was[b]
                changes = {
                    "q": asks[other["q"][b]] - asks[asked.judged_matched[b]],
                    "k": at_over - at_key,
                    "v": says[other["v"][b]] - says[was],
                    "block": 0.0,
                    "real": real[b, layer, key],
                }
                for name, change in changes.items():
                    into = "v" if name == "real" else name
                    residual, looked, _ = forward(tokens[b], (layer, head), query, key, into, change)
                    logits = planted.frozen_logits(RANDOM, params, residual[-1, END] - last, last)
                    partner = asked.changed.becomes[b] if name == "real" else other["v"][b]
                    of_class = lambda c, logits=logits, asked=asked: logits[asked.answers[c, 0]]  # noqa: E731
                    own = of_class(was) - of_class(partner)
                    expected = logits[right[b]] - logits[wrong[b]], own, looked[layer, head, query, key]
                    result = {"block": seen.blocked, "real": seen.by_counterfactual}.get(name) or seen.by_direction[
                        name
                    ]
                    actual = result.difference[i, b], result.own[i, b], result.attention[i, b]
                    np.testing.assert_allclose(
                        actual, expected, rtol=2e-3, atol=1e-4, err_msg=f"{role.moves} {name} {b}"
                    )


def others_of(asked):
    """Positions that the key is held against, one row a prompt."""
    return [
        [p for p in range(1, query + 1) if p != key] if over < 0 else [over]
        for query, key, over in zip(asked.query, asked.key, asked.over, strict=True)
    ]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_model", [{"norm": "layer", "norm_position": "post"}, {"causal": False}])
def test_models_whose_answers_are_not_what_heads_add_up_to_are_refused(prompts, of_model):
    config = TransformerConfig(planted.V, planted.T, n_layers=1, n_heads=1, d_model=4, **of_model)
    params = random_params(config)
    for measure in (
        lambda: role_structures(config, params, prompts, jax.random.key(0)),
        lambda: role_behaviours(config, params, prompts, jnp.zeros((1, 2), int)),
    ):
        with pytest.raises(ValueError, match="decoders without post-norm"):
            measure()


def test_tokens_that_a_model_has_not_are_refused(prompts):
    config, params = planted.planted(planted.SOLVING)
    batch = dataclasses.replace(prompts.judged, tokens=prompts.judged.tokens + planted.V)
    with pytest.raises(ValueError, match="tokens must be in"):
        role_behaviours(config, params, dataclasses.replace(prompts, judged=batch), jnp.zeros((1, 2), int))


@pytest.mark.parametrize("n_known", [1, 2])
def test_predicted_attention_is_that_of_the_mean_rows_of_a_frame(n_known):
    """One known prompt that is the judged one: its own attention, exactly. Two prompts: that of neither."""
    prompts = claim_prompts(TASK, planted.CLAIM, jax.random.key(8), 4, 4)
    asked = prompts.questions.judged
    frames = jnp.broadcast_to(jnp.arange(4) // n_known, asked.frame.shape)
    asked = dataclasses.replace(asked, frame=frames)
    questions = dataclasses.replace(prompts.questions, known=asked, judged=asked)
    same = dataclasses.replace(prompts, known=prompts.judged, questions=questions)
    found = role_behaviours(RANDOM, random_params(RANDOM), same, jnp.array([[0, 1], [1, 0]]))
    assert np.allclose(found.predicted, found.attention, atol=1e-5) == (n_known == 1)
