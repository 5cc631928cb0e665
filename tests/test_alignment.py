"""Statistics of alignment against D x D matrices in float64, and their nulls where there is nothing to find."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import LowRank
from circuits_jax.heads import alignment
from circuits_jax.heads.role_rows import Asked

L, H, C, D, K, B, T = 2, 3, 4, 8, 3, 12, 7

quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
of_classes = quick(alignment.of_classes, static_argnums=(3, 9))
preference = quick(alignment.preference, static_argnums=6)
gain, trace = quick(alignment.gain), quick(alignment.trace)
covariance_root = quick(alignment.covariance_root)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def circuits(seed, *shape, d=D, k=K):
    return LowRank(normal([seed, 0], *shape, d, k), normal([seed, 1], *shape, k, d))


def dense(circuit):
    return np.float64(circuit.left) @ np.float64(circuit.right)


def norm(x):
    return np.sqrt(np.sum(np.square(np.float64(x))))


def centred(x):
    return x - x.mean(-2, keepdims=True)


def slow_gain(x, w, size=None):
    return x.shape[1] * norm(np.float64(x) @ w) ** 2 / (norm(x) if size is None else size) ** 2 / norm(w) ** 2


def slow_trace(x, w, y):
    return np.trace(np.float64(x) @ w @ np.float64(y).T) * x.shape[1] ** 0.5 / norm(x) / norm(y) / norm(w)


# the statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_classes", "d", "k"), [(1, 8, 3), (12, 6, 6), (3, 3, 5)])
def test_gain_and_trace_are_those_of_the_matrix(n_classes, d, k):
    x, y, heads = normal(0, n_classes, d), normal(1, n_classes, d), circuits(2, H, d=d, k=k)
    for h, w in enumerate(dense(heads)):
        np.testing.assert_allclose(gain(x, heads)[h], slow_gain(x, w), rtol=1e-4)
        np.testing.assert_allclose(gain(x, heads, 2.0)[h], slow_gain(x, w, 2.0), rtol=1e-4)
        wanted = slow_trace(x, w, y)
        np.testing.assert_allclose(trace(x, heads, y=y)[h], wanted, rtol=1e-4, atol=1e-6)
        wanted *= norm(x) / 2
        np.testing.assert_allclose(trace(x, heads, 2.0, y=y)[h], wanted, rtol=1e-4, atol=1e-6)


def test_gain_is_one_for_random_directions_and_zero_for_those_that_are_not_read():
    heads = circuits(3, H)
    np.testing.assert_allclose(gain(normal(4, 20_000, D), heads), 1, rtol=0.05)
    np.testing.assert_allclose(gain(jnp.eye(D), heads), 1, rtol=1e-5)  # all of an orthonormal basis
    unread = jnp.asarray(np.linalg.svd(heads.left[0].T)[2][K:], jnp.float32)
    assert gain(unread, heads)[0] < 1e-9
    one = LowRank(jnp.eye(D)[None, :, :1], jnp.eye(D)[None, :1])
    np.testing.assert_allclose(gain(jnp.eye(D)[:1], one), D, rtol=1e-6)  # the most there is


def test_trace_of_two_classes_is_that_of_unit_contrasts():
    x, y, heads = normal(5, D), normal(6, D), circuits(7, H)
    got = trace(jnp.stack([x, -x]), heads, y=jnp.stack([3 * y, -3 * y]))
    for h, w in enumerate(dense(heads)):
        wanted = (np.float64(x) / norm(x)) @ w @ (np.float64(y) / norm(y)) * D**0.5 / norm(w)
        np.testing.assert_allclose(got[h], wanted, rtol=1e-4)


def test_trace_is_largest_where_classes_are_joined_and_changes_sign_where_they_are_kept_apart():
    words = jnp.eye(D)[:C]
    x = y = centred(words)
    joins = LowRank(words.T[None], words[None])
    got = trace(x, joins, y=y)
    np.testing.assert_allclose(got, D**0.5 / C**0.5, rtol=1e-5)
    np.testing.assert_allclose(trace(x, -joins, y=y), -got, rtol=1e-6)
    other = trace(x, LowRank(words.T[None], jnp.roll(words, 1, 0)[None]), y=y)
    np.testing.assert_allclose(other, -got / (C - 1), rtol=1e-5)  # always another class


def test_top_overlap_is_the_share_within_the_span():
    x, vectors = normal(8, 5, D), jnp.linalg.qr(normal(9, H, D, K))[0]
    for h in range(H):
        basis = np.linalg.qr(np.float64(vectors[h]))[0]
        inside = np.float64(x) @ basis @ basis.T
        np.testing.assert_allclose(alignment.top_overlap(x, vectors)[h], (norm(inside) / norm(x)) ** 2, rtol=1e-4)
    np.testing.assert_allclose(alignment.top_overlap(vectors[0].T, vectors)[0], 1, rtol=1e-5)


def test_of_nothing_the_statistics_are_zero():
    heads, nothing, zero = circuits(10, H), jnp.zeros((C, D)), LowRank(jnp.zeros((H, D, K)), normal(0, H, K, D))
    x = normal(11, C, D)
    for values in (
        gain(nothing, heads), gain(x, zero), trace(nothing, heads, y=x),
        trace(x, heads, y=nothing), trace(x, zero, y=x), alignment.top_overlap(nothing, heads.left),
    ):  # fmt: skip
        np.testing.assert_array_equal(values, np.zeros(H))


@pytest.mark.parametrize("n_prompts", [1, 40])
def test_covariance_root_is_of_the_words_up_to_the_query(n_prompts):
    """Of fewer words than dimensions it is not square, and yet of the same covariance."""
    rows, rng = normal(12, L, n_prompts, T, D) + 3.0, np.random.default_rng(12)
    query = rng.integers(2, T, n_prompts)
    root = np.float64(covariance_root(rows, jnp.asarray(query)))
    for layer in range(L):
        words = np.float64([rows[layer, b, t] for b in range(n_prompts) for t in range(1, query[b] + 1)])
        wanted = np.cov(words.T, bias=True)
        np.testing.assert_allclose(root[layer].T @ root[layer], wanted, atol=2e-5 * np.abs(wanted).max())


# the nulls --------------------------------------------------------------------------------------------------------


def pairs(seed, n=B, n_classes=C):
    rng = np.random.default_rng(seed)
    was = rng.integers(0, n_classes, n)
    return jnp.asarray(was), jnp.asarray((was + rng.integers(1, n_classes, n)) % n_classes)


def roots(n_layers=L, scale=1.0):
    return jnp.broadcast_to(scale * jnp.diag(1.0 + jnp.arange(D)), (n_layers, D, D))


def slow_effects(changes, was, becomes, n_classes=C):
    """All C classes occur."""
    signed = np.eye(n_classes)[becomes] - np.eye(n_classes)[was]
    return np.stack([np.float64(changes).T @ one / np.abs(one).sum() for one in np.transpose(signed)]) * (
        (n_classes - 1) / n_classes
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("joined", [True, False])
def test_label_p_and_z_are_those_of_all_permutations(sign, joined):
    """At the size of the true effects. Five pairs: 120 orders, each about as often as the others."""
    was, becomes = np.array([0, 1, 2, 0, 1]), np.array([1, 2, 0, 2, 0])
    heads, other, words = circuits(14, L, H), centred(normal(15, L, 3, D)), normal(16, L, 3, D)
    changes = words[:, becomes] - words[:, was] + normal(13, L, 5, D)
    labels = (jnp.asarray(was), jnp.asarray(becomes))
    got = of_classes(
        changes, *labels, 3, roots(), heads, other if joined else None, jnp.asarray(sign), jax.random.key(0), 4000
    )
    orders = [list(o) for o in itertools.permutations(range(5))]
    for layer, h in np.ndindex(L, H):
        w, size = dense(heads)[layer, h], norm(slow_effects(changes[layer], was, becomes, 3))
        mixed = (slow_effects(changes[layer], was[o], becomes[o], 3) for o in orders)
        draws = np.array(
            [slow_trace(x, w, other[layer]) * norm(x) / size if joined else slow_gain(x, w, size) for x in mixed]
        )
        value = draws[0]  # of the order that leaves all in place
        wanted = np.mean(sign * draws >= sign * value - 1e-6)
        np.testing.assert_allclose(got.value[layer, h], value, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got.label_p[layer, h], wanted, atol=0.035)
        np.testing.assert_allclose(got.z[layer, h], (value - draws.mean()) / draws.std(), atol=0.12)
    for layer in range(L):
        falling = np.argsort(np.argsort(-sign * np.asarray(got.value[layer])))
        np.testing.assert_array_equal(got.rank[layer], falling)


MANY, N_DRAWS = 400, 79  # independent layers of two heads; p <= 4 / 80 in one of 20


def uniform(aligned, kind):
    p = np.asarray(getattr(aligned, kind))
    for level, within in ((0.05, 0.028), (0.25, 0.06), (0.5, 0.07)):
        assert np.mean(p <= level + 1e-6) == pytest.approx(level, abs=within), (kind, level)


@pytest.mark.parametrize(("joined", "sign"), [(True, 1), (True, -1), (False, 1)])
def test_label_p_is_uniform_where_what_changes_has_nothing_to_do_with_classes(joined, sign):
    changes, heads = normal(16, MANY, B, D), circuits(17, MANY, 2)
    other = centred(normal(18, MANY, C, D)) if joined else None
    got = of_classes(changes, *pairs(19), C, roots(MANY), heads, other, sign, jax.random.key(1), N_DRAWS)
    uniform(got, "label_p")


def test_where_two_classes_are_told_well_label_p_is_least_for_half_of_random_heads():
    """And of gains for all: it says that the classes are told, not that the head's weights fit them."""
    (was, becomes), heads, other = pairs(19, 40, 2), circuits(17, MANY, 2), centred(normal(18, MANY, 2, D))
    changes = normal(16, MANY, 1, D) * (becomes - was)[:, None]
    moves, reads = (
        of_classes(changes, was, becomes, 2, roots(MANY), heads, y, 1, jax.random.key(1), N_DRAWS)
        for y in (other, None)
    )
    np.testing.assert_array_equal(moves.label_p <= 0.05, moves.value > 0)
    assert np.mean(moves.label_p <= 0.05) == pytest.approx(0.5, abs=0.07)
    assert np.max(reads.label_p) <= 0.05


@pytest.mark.parametrize("occur", [C, 2])
@pytest.mark.parametrize("joined", [True, False])
def test_covariance_p_is_uniform_where_classes_lie_anywhere_among_the_words(joined, occur):
    """Also where some of the C classes never come: they are given room for other roles."""
    words = jnp.einsum("lcd,lde->lce", normal(20, MANY, C, D), roots(MANY))
    (was, becomes), heads = pairs(21, 40, occur), circuits(22, MANY, 2)
    there = (jnp.arange(C) < occur)[:, None]
    other = normal(23, MANY, C, D)
    other = jnp.where(there, other - other[:, :occur].mean(1, keepdims=True), 0.0) if joined else None
    changes = 0.1 * (words[:, becomes] - words[:, was])  # the size does not matter
    got = of_classes(changes, was, becomes, C, roots(MANY), heads, other, 1, jax.random.key(2), N_DRAWS)
    uniform(got, "covariance_p")


@pytest.mark.parametrize("n", [2, C])
def test_rotation_p_is_uniform_over_random_heads_however_well_classes_are_told(n):
    (was, becomes), heads = pairs(26, 40, n), circuits(27, MANY, 2)
    effects, other = (centred(normal(seed, MANY, n, D)) for seed in (28, 29))
    changes = effects[:, becomes] - effects[:, was]
    got = of_classes(changes, was, becomes, n, roots(MANY), heads, other, 1, jax.random.key(3), 19)
    uniform(got, "rotation_p")
    reads = of_classes(changes, was, becomes, n, roots(MANY), heads, None, 1, jax.random.key(3), 19)
    np.testing.assert_array_equal(reads.rotation_p, 1)


def test_a_head_that_joins_names_has_the_least_p_and_its_negative_on_the_other_side():
    """W_OV = sum of name^T answer, among random heads; half of the names never come."""
    names, answers = jnp.linalg.qr(normal(24, 16, 16))[0][:8], normal(25, 8, 16)
    answers = jnp.where(jnp.arange(8)[:, None] < 4, answers - answers[:4].mean(0), 0.0)
    was, becomes = pairs(26, 24, 4)
    changes = (names[becomes] - names[was] + 0.1 * normal(27, 24, 16))[None]
    heads = circuits(28, 4, d=16, k=8)
    heads = LowRank(
        heads.left.at[0].set(names.T).at[1].set(names.T), heads.right.at[0].set(answers).at[1].set(-answers)
    )
    heads = jax.tree.map(lambda x: x[None], heads)
    root, key = jnp.eye(16)[None], jax.random.key(0)
    positive, negative = (
        of_classes(changes, was, becomes, 8, root, heads, answers[None], sign, key, 199) for sign in (1, -1)
    )
    assert positive.value[0, 0] > 1
    np.testing.assert_allclose(positive.value[0, 1], -positive.value[0, 0], rtol=1e-5)
    for found, own, opposite in ((positive, 0, 1), (negative, 1, 0)):
        for p in (found.label_p, found.covariance_p):
            np.testing.assert_allclose(p[0, own], 1 / 200, rtol=1e-5)
            np.testing.assert_allclose(p[0, opposite], 1, atol=0.01)
        assert found.rank[0, own] == 0
        assert found.rank[0, opposite] == 3
    assert positive.z[0, 0] > 3
    np.testing.assert_allclose(negative.z, positive.z, rtol=1e-5)  # of the value, whatever is claimed


def test_zero_heads_and_classes_that_change_nothing_have_p_of_one():
    heads, labels, other = circuits(29, L, H), pairs(29), centred(normal(30, L, C, D))
    silent = LowRank(heads.left.at[0, 1].set(0), heads.right.at[1, 2].set(0))
    for sign, y in ((1, other), (-1, other), (1, None)):
        got = of_classes(normal(31, L, B, D), *labels, C, roots(), silent, y, sign, jax.random.key(0), 19)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        for place in ((0, 1), (1, 2)):
            assert got.value[place] == got.z[place] == 0
            assert got.covariance_p[place] == got.label_p[place] == 1
        got = of_classes(jnp.zeros((L, B, D)), *labels, C, roots(), heads, y, sign, jax.random.key(0), 19)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        np.testing.assert_array_equal(got.label_p, np.ones((L, H)))
        np.testing.assert_array_equal(got.z, np.zeros((L, H)))
    got = of_classes(normal(31, L, B, D), *labels, C, roots(), heads, 0 * other, 1, jax.random.key(0), 19)
    np.testing.assert_array_equal([got.covariance_p, got.label_p], np.ones((2, L, H)))


def test_upper_share_counts_draws_that_reach_the_value_and_ties():
    draws = jnp.asarray([1.0, 2.0, 2.0 * (1 + 1e-7), 3.0])[None, :, None]
    for value, n in ((0.5, 4), (1.0, 4), (1.5, 3), (2.0, 3), (2.0 * (1 + 2e-7), 3), (3.0, 1), (3.5, 0), (np.nan, 4)):
        got = alignment.upper_share(jnp.asarray([[value]], jnp.float32), draws)
        np.testing.assert_allclose(got, [[(1 + n) / 5]], rtol=1e-6)


def test_rank_of_equal_heads_is_that_of_the_first_and_nothing_is_told_of_what_is_not_asked():
    draws = normal(32, 1, 9, 4)
    got = alignment.against(1, jnp.asarray([[2.0, 1.0, 2.0, 3.0]]), draws, draws)
    np.testing.assert_array_equal(got.rank, [[1, 3, 1, 0]])
    none = alignment.nothing((L, H))
    assert jax.tree.map(lambda x: x.dtype, none) == jax.tree.map(lambda x: x.dtype, got)
    np.testing.assert_array_equal([none.value, none.z, none.rank], np.zeros((3, L, H)))
    np.testing.assert_array_equal([none.covariance_p, none.label_p], np.ones((2, L, H)))


# preference -------------------------------------------------------------------------------------------------------


def asked(query, key, over):
    return Asked(*(jnp.asarray(x) for x in (query, key, over)), jnp.zeros(len(query), int))


def slow_preference(scores, query, keys, over):
    """[L,H] for one choice of keys."""
    total = 0.0
    for b, key in enumerate(keys):
        held = [over[b]] if over[b] >= 0 else [t for t in range(1, query[b] + 1) if t != key]
        total = total + np.float64(scores[:, :, b, key]) - np.mean(np.float64(scores[:, :, b])[..., held], -1)
    return total / len(keys)


@pytest.mark.parametrize("over", [[-1, -1, -1], [4, 1, 0], [2, -1, 3]], ids=str)
def test_preference_and_its_label_p_are_those_of_all_choices(over):
    query, key = [3, 4, 3], [1, 3, 2]
    scores = normal(33, L, H, 3, T)
    got = preference(scores, normal(34, L, H, 3, D), normal(35, L, 3, D), roots(), asked(query, key, over),
                     jax.random.key(0), 4000)  # fmt: skip
    choices = [range(1, query[b] + 1) if over[b] < 0 else (key[b], over[b]) for b in range(3)]
    draws = []
    for keys in itertools.product(*choices):
        against = [key[b] if over[b] >= 0 and keys[b] == over[b] else over[b] for b in range(3)]
        draws.append(slow_preference(scores, query, keys, against))
    value = slow_preference(scores, query, key, over)
    np.testing.assert_allclose(got.value, value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.label_p, np.mean(np.array(draws) >= value - 1e-6, 0), atol=0.035)
    np.testing.assert_allclose(got.z, (value - np.mean(draws, 0)) / np.std(draws, 0), atol=0.12)
    np.testing.assert_array_equal(got.rank, (value[:, None, :] > value[:, :, None]).sum(-1))


@pytest.mark.parametrize("over", [-1, 2])
def test_label_p_of_preferences_is_uniform_where_no_position_is_anything(over):
    scores, n = normal(36, MANY, 2, B, T), MANY
    one = asked([T - 1] * B, [4] * B, [over] * B)
    got = preference(scores, jnp.zeros((n, 2, B, D)), jnp.zeros((n, B, D)), roots(n), one, jax.random.key(3), N_DRAWS)
    uniform(got, "label_p")


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_covariance_p_of_preferences_is_uniform_where_the_key_is_any_word(scale):
    """One direction for all prompts, of a length that each has for itself."""
    direction = jnp.einsum("ld,lde->le", normal(37, MANY, D), roots(MANY, scale))
    length = 0.5 + jnp.abs(normal(38, B))
    contrast = length[None, :, None] * direction[:, None]
    reading = normal(39, MANY, 2, B, D) + normal(40, MANY, 2, 1, D)
    scores = jnp.zeros((MANY, 2, B, T)).at[..., 4].set(jnp.einsum("lhbd,lbd->lhb", reading, contrast))
    got = preference(
        scores, reading, contrast, roots(MANY, scale), asked([6] * B, [4] * B, [2] * B), jax.random.key(4), N_DRAWS
    )
    uniform(got, "covariance_p")


def test_a_head_that_prefers_the_key_has_the_least_p_and_a_zero_one_p_of_one():
    reading = normal(41, L, H, 1, D)
    contrast = jnp.broadcast_to(3 * reading[:, 0], (L, B, D))  # what the first head of each layer reads
    reading = jnp.broadcast_to(reading.at[:, 1].set(0), (L, H, B, D))
    own = jnp.einsum("lhbd,lbd->lhb", reading, contrast)
    scores = (0.01 * normal(42, L, H, B, T)).at[..., 3].add(own).at[:, 1].set(0)
    one = asked([6] * B, [3] * B, [-1] * B)
    got = preference(scores, reading, contrast, roots(), one, jax.random.key(0), 999)
    np.testing.assert_allclose(got.label_p[:, 0], 1e-3, rtol=1e-4)
    assert got.covariance_p[:, 0].max() < 0.05
    np.testing.assert_array_equal(got.rank[:, 0], 0)
    np.testing.assert_array_equal([got.value[:, 1], got.z[:, 1]], np.zeros((2, L)))
    np.testing.assert_array_equal([got.label_p[:, 1], got.covariance_p[:, 1]], np.ones((2, L)))
