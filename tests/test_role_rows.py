"""What roles ask of prompts, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import CircuitWeights, TransformerConfig, init_params
from circuits_jax.circuits.reading import qk_rows
from circuits_jax.heads import role_rows
from circuits_jax.heads.role_rows import Asked

L, B, T, D = 2, 6, 7, 5


def normal(seed, *shape):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def asked(query, key, over, frame=(0,) * B):
    return Asked(*(jnp.asarray(x) for x in (query, key, over, frame)))


MIXED = asked([6, 5, 4, 3, 6, 2], [2, 5, 1, 3, 0, 1], [-1, -1, 3, 0, -1, -1], [0, 1, 0, 2, 1, 0])


def oracle_others(one):
    out = np.zeros((B, T))
    for b in range(B):
        query, key, over = (int(x[b]) for x in (one.query, one.key, one.over))
        held = [over] if over >= 0 else [t for t in range(1, query + 1) if t != key]
        for t in held:
            out[b, t] = 1 / len(held)
    return out


# rows -------------------------------------------------------------------------------------------------------------


def test_at_is_one_row_of_each_prompt():
    rows = normal(0, L, B, T, D)
    got = role_rows.at(jnp.asarray(rows), MIXED.key)
    np.testing.assert_array_equal(got, np.stack([rows[:, b, int(MIXED.key[b])] for b in range(B)], 1))


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("positions", ["learned", "shortformer"])
def test_read_rows_are_what_each_layer_reads(norm, positions):
    """Shortformer positions are for queries and keys alone, those of each layer where a norm's gain is folded in."""
    config = TransformerConfig(9, T, n_layers=L, n_heads=1, d_model=D, norm=norm, positions=positions)
    params = init_params(config, jax.random.key(0))
    if norm != "none":
        for layer in range(L):
            params[f"layer_{layer}"]["attention_norm"]["scale"] = jnp.asarray(1 + 0.3 * normal(layer, D))
    weights = CircuitWeights.from_params(config, params)
    stream = normal(1, B, L, T - 1, D) + 0.5
    rows = role_rows.read_rows(weights, jnp.asarray(stream))
    for b, layer, t in np.ndindex(B, L, T - 1):
        x = np.float64(stream[b, layer, t])
        x = x - x.mean() if norm == "layer" else x
        x = x if norm == "none" else x / np.sqrt(np.mean(x**2) + config.norm_epsilon)
        place = np.zeros(D)
        if positions == "shortformer":
            place = np.float64(weights.W_P)[(layer, t) if weights.W_P.ndim == 3 else t]
        np.testing.assert_allclose(rows.v[layer, b, t], x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rows.qk[layer, b, t], x + place, rtol=1e-4, atol=1e-5)
    alone = qk_rows(weights, jnp.asarray(stream[0]))  # one prompt, as attention scores take it
    np.testing.assert_allclose(rows.qk[:, 0], alone, rtol=1e-5, atol=1e-6)


def test_words_up_to_the_query_leave_the_first_out():
    got = role_rows.words_up_to(jnp.asarray([0, 1, 3]), 5)
    np.testing.assert_array_equal(got, [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0]])


def test_others_are_all_other_words_or_the_one_position():
    got = role_rows.others(MIXED, T)
    np.testing.assert_allclose(got, oracle_others(MIXED), rtol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-6)


def test_others_are_none_where_the_key_is_the_only_word():
    assert not role_rows.others(asked([1] * B, [1] * B, [-1] * B), T).any()


def test_contrasts_are_the_key_less_the_mean_of_the_others():
    rows = normal(1, L, B, T, D)
    others = oracle_others(MIXED)
    got = role_rows.contrasts(jnp.asarray(rows), MIXED)
    for layer, b in np.ndindex(L, B):
        wanted = rows[layer, b, int(MIXED.key[b])] - np.float64(others[b]) @ rows[layer, b]
        np.testing.assert_allclose(got[layer, b], wanted, rtol=1e-4, atol=1e-5)


def test_contrast_of_a_key_with_itself_is_nothing():
    same = asked([6] * B, [2] * B, [2] * B)
    np.testing.assert_allclose(role_rows.contrasts(jnp.asarray(normal(1, L, B, T, D)), same), 0, atol=1e-6)


def test_frame_means_are_over_prompts_of_the_same_frame():
    rows, frames, of = normal(2, L, B, D), np.array([0, 1, 0, 4, 1, 0]), np.array([4, 1, 0, 3])
    got = role_rows.frame_means(*(jnp.asarray(x) for x in (rows, frames, of)))
    for i, frame in enumerate(of):
        same = [rows[:, b] for b in range(B) if frames[b] == frame]
        wanted = np.mean(same, 0, dtype=np.float64) if same else np.zeros((L, D))
        np.testing.assert_allclose(got[:, i], wanted, rtol=1e-5, atol=1e-6)
    assert not got[:, 3].any()


# classes ----------------------------------------------------------------------------------------------------------


def oracle_class_effects(changes, was, becomes, n_classes):
    changes = np.float64(changes)
    towards = [[] for _ in range(n_classes)]
    for b in range(len(was)):
        if was[b] != becomes[b]:
            towards[becomes[b]].append(changes[..., b, :])
            towards[was[b]].append(-changes[..., b, :])
    n = sum(bool(x) for x in towards)
    nothing = np.zeros((*changes.shape[:-2], changes.shape[-1]))
    return np.stack([np.mean(x, 0) * (n - 1) / n if x else nothing for x in towards], -2)


def test_class_effects_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    was, becomes = rng.integers(0, 4, (2, 20))  # some pairs change nothing
    changes = normal(3, L, 20, D)
    got = role_rows.class_effects(*(jnp.asarray(x) for x in (changes, was, becomes)), 6)
    wanted = oracle_class_effects(changes, was, becomes, 6)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert not got[:, 4:].any()


def every_pair(classes):
    return np.array([(a, b) for a in classes for b in classes if a != b]).T


@pytest.mark.parametrize("classes", [(0, 1), (1, 4), (0, 1, 2, 3, 4), (0, 2, 3)], ids=str)
def test_class_effects_that_add_up_are_found_exactly(classes):
    """Whatever else the sentences hold: what two of them share goes out. Zero for classes that never come."""
    effects = np.float64(normal(4, L, 5, D))
    was, becomes = every_pair(classes)
    got = role_rows.class_effects(
        jnp.asarray(effects[:, becomes] - effects[:, was], jnp.float32), jnp.asarray(was), jnp.asarray(becomes), 5
    )
    wanted = np.zeros_like(effects)
    wanted[:, classes] = effects[:, classes] - effects[:, classes].mean(1, keepdims=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_two_classes_are_told_exactly_from_any_number_of_pairs_each_way():
    was = np.array([0, 0, 0, 1, 0])
    signed = normal(5, 1, D) * np.where(was == 0, 1, -1)[:, None]
    got = role_rows.class_effects(jnp.asarray(signed), jnp.asarray(was), jnp.asarray(1 - was), 2)
    np.testing.assert_allclose(got, [-signed[0] / 2, signed[0] / 2], rtol=1e-5)


@pytest.mark.parametrize("n", [0, 3])
def test_class_effects_of_pairs_that_change_no_class_are_zero(n):
    same = jnp.zeros(n, int)
    got = role_rows.class_effects(jnp.asarray(normal(6, L, n, D)), same, same, 2)
    assert got.shape == (L, 2, D)
    assert not got.any()


def test_class_answers_are_mean_unembeddings_less_the_mean_of_classes():
    W_U = normal(7, D, 9)
    answers = np.array([[3, -1, 5], [-1, -1, -1], [0, 1, 2], [8, -1, -1]])
    means = {c: np.mean([np.float64(W_U[:, t]) for t in row if t >= 0], 0) for c, row in enumerate(answers) if c != 1}
    centre = np.mean(list(means.values()), 0)
    wanted = [means[c] - centre if c in means else np.zeros(D) for c in range(4)]
    got = role_rows.class_answers(jnp.asarray(W_U), jnp.asarray(answers))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert not role_rows.class_answers(jnp.asarray(W_U), -jnp.ones((3, 2), int)).any()


def test_other_classes_are_of_the_next_prompt_that_differs():
    labels = np.array([2, 2, 0, 1, 1, 2])
    wanted = [next((x for x in np.roll(labels, -b) if x != labels[b]), labels[b]) for b in range(6)]
    np.testing.assert_array_equal(role_rows.other_classes(jnp.asarray(labels)), wanted)
    np.testing.assert_array_equal(role_rows.other_classes(jnp.full(3, 4)), [4, 4, 4])
