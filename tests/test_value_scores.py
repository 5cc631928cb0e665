"""Scores of what heads move: exact values of hand-made heads, and dense float64 tables for everything else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax import CircuitWeights
from circuits_jax.heads import nulls
from circuits_jax.heads import value_scores as vs

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=8, deadline=None)
N, K, D = 9, 4, 12

value_scores = jax.jit(vs.value_scores)
map_sharpness = jax.jit(vs.map_sharpness)
concentration = jax.jit(vs.concentration)
token_match = jax.jit(vs.token_match)
relays = jax.jit(vs.relays)


def centre(rows):
    return rows - rows.mean(-2, keepdims=True)


def orthonormal(rng, n, r):
    """[n,r] orthonormal columns, each with mean zero, so that removing means takes nothing."""
    return np.linalg.qr(np.concatenate([np.ones((n, 1)), rng.normal(size=(n, r))], 1))[0][:, 1:]


def float32(*arrays):
    return tuple(np.asarray(x, np.float32) for x in arrays)


def random_head(rng, n=N, k=K, d=D, lead=()):
    return rng.normal(size=(*lead, n, k)), rng.normal(size=(*lead, k, d)), rng.normal(size=(d, n))


# The oracle: one head, every table written out ---------------------------------------------------------------------


def oracle_table(values, w_o, w_u):
    return centre(values) @ w_o @ (w_u - w_u.mean(1, keepdims=True))


def oracle_copying(values, w_o, w_u):
    eigenvalues = np.linalg.eigvals(oracle_table(values, w_o, w_u))
    return eigenvalues.real.sum() / np.abs(eigenvalues).sum()


def oracle_sharpness(table):
    shares = []
    for u, row in enumerate(table):
        others = [max(x, 0.0) ** 2 for w, x in enumerate(row) if w != u]
        shares.append(max(others) / np.sum(row**2) if row.any() else 0.0)
    return np.mean(shares)


def oracle_concentration(values, w_o):
    energy = np.linalg.svd(centre(values @ w_o), compute_uv=False) ** 2
    return energy.max() / energy.sum()


def oracle_matches(table, k):
    table = centre(table) - centre(table).mean(1, keepdims=True)
    norm, n = np.linalg.norm(table), len(table)
    if norm == 0:
        return 0.0, 0.0, 0.0
    cosine = np.trace(table) / norm
    return cosine / np.sqrt(min(k, n - 1)), cosine * np.sqrt(n - 1), norm


# Copying, mapping, extracting --------------------------------------------------------------------------------------


@FEW
@given(SEEDS)
def test_scores_agree_with_dense_tables(seed):
    values, w_o, w_u = random_head(np.random.default_rng(seed))
    got = value_scores(*float32(values, w_o, w_u))
    np.testing.assert_allclose(got.copying, oracle_copying(values, w_o, w_u), atol=1e-4)
    np.testing.assert_allclose(got.mapping, oracle_sharpness(oracle_table(values, w_o, w_u)), atol=1e-5)
    np.testing.assert_allclose(got.extracting, oracle_concentration(values, w_o), rtol=1e-4)
    assert 1 / K - 1e-6 <= got.extracting <= 1
    assert -1 <= got.copying <= 1


@pytest.mark.parametrize("factor", [3.0, 0.01])
@pytest.mark.parametrize("rank", [1, 3, K])
def test_a_multiple_of_a_projection_copies_or_suppresses_perfectly(factor, rank):
    """W_OV = cP in the space of the tokens: its logit table has rank-many eigenvalues c and no others."""
    basis = np.zeros((N, K))
    basis[:, :rank] = orthonormal(np.random.default_rng(rank), N, rank)
    for sign in (1, -1):
        got = value_scores(*float32(basis, sign * factor * basis.T, np.eye(N)))
        np.testing.assert_allclose(got.copying, sign, atol=1e-5)
        np.testing.assert_allclose(got.extracting, 1 / rank, rtol=1e-4)


def test_a_cyclic_shift_neither_copies_nor_suppresses():
    """Its eigenvalues are the n-th roots of unity, less the 1 that the means take with them: -1 / (n - 1)."""
    n = 12
    got = value_scores(*float32(np.eye(n), np.roll(np.eye(n), 1, axis=1), np.eye(n)))
    np.testing.assert_allclose(got.copying, -1 / (n - 1), atol=1e-4)
    np.testing.assert_allclose(got.mapping, 1 - 1 / n, rtol=1e-5)
    np.testing.assert_allclose(got.extracting, 1 / (n - 1), rtol=1e-4)


def test_what_all_tokens_share_counts_for_nothing():
    """A value that all tokens have, and a logit that all get: neither is about the token."""
    rng = np.random.default_rng(0)
    values, w_o, w_u = random_head(rng)
    plain = value_scores(*float32(values, w_o, w_u))
    more = value_scores(*float32(values + rng.normal(size=K), w_o, w_u + rng.normal(size=(D, 1))))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), plain, more)


def test_map_sharpness_of_hand_made_tables():
    n = 8
    identity = np.eye(n, dtype=np.float32)
    derangement = np.roll(identity, 3, axis=1)
    assert map_sharpness(5 * derangement) == 1
    assert map_sharpness(0 * identity) == 0
    assert map_sharpness(identity) == 0
    assert map_sharpness(identity - 1 / n) == 0  # means removed
    assert map_sharpness(1 / n - identity) <= 1 / n
    assert map_sharpness(-derangement) == 0  # lowering is no map
    np.testing.assert_allclose(map_sharpness(derangement + identity), 0.5, rtol=1e-6)
    half = derangement * (np.arange(n) < n // 2)[:, None]
    assert map_sharpness(half) == 0.5  # half of the tokens go nowhere
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, n, n))
    got = map_sharpness(table.astype(np.float32))
    np.testing.assert_allclose(got, [oracle_sharpness(x) for x in table], rtol=1e-5)


def test_map_sharpness_of_random_tables_is_about_what_the_docstring_says():
    n = 64
    random = np.random.default_rng(0).normal(size=(50, n, n)).astype(np.float32)
    np.testing.assert_allclose(map_sharpness(random).mean(), 2 * np.log(n) / n, rtol=0.35)


@pytest.mark.parametrize("r", range(1, K + 1))
def test_concentration_is_one_over_the_number_of_equal_directions(r):
    rng = np.random.default_rng(r)
    values = np.zeros((N, K))
    values[:, :r] = 7 * orthonormal(rng, N, r)
    w_o = np.linalg.qr(rng.normal(size=(D, K)))[0].T
    np.testing.assert_allclose(concentration(*float32(values + 1.5, w_o)), 1 / r, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1e2, 1e5])
def test_scores_do_not_depend_on_the_scale(scale):
    values, w_o, w_u = random_head(np.random.default_rng(0))
    plain = value_scores(*float32(values, w_o, w_u))
    scaled = value_scores(*float32(scale * values, scale * w_o, w_u))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), plain, scaled)


def test_concentration_of_equal_values_is_zero():
    values = np.broadcast_to(np.array([1.0, -2.0, 0.5, 4.0]), (8, K))  # whose mean is exact
    w_o = np.random.default_rng(0).normal(size=(K, D))
    assert concentration(*float32(values, w_o)) == 0


@pytest.mark.parametrize("n", [7, 10, 64])
def test_values_equal_up_to_rounding_score_as_equal_ones(n):
    """A head that moves only what all tokens have in common says nothing about them: it extracts nothing."""
    values = np.broadcast_to(np.array([0.1, -0.2, 0.07, 0.11]), (n, K))
    _, w_o, w_u = random_head(np.random.default_rng(0), n=n)
    got = value_scores(*float32(values, w_o, w_u))
    np.testing.assert_allclose([got.extracting, got.copying, got.mapping], 0.0, atol=1e-6)


@pytest.mark.parametrize("zero", ["values", "w_o", "w_u"])
def test_a_head_that_moves_nothing_scores_zero(zero):
    head = dict(zip(("values", "w_o", "w_u"), float32(*random_head(np.random.default_rng(0))), strict=True))
    head[zero] = 0 * head[zero]
    got = value_scores(**head)
    assert got.copying == 0
    assert got.mapping == 0
    assert (got.extracting == 0) == (zero != "w_u")  # what is written, whatever becomes of it
    assert all(x == 0 for x in jax.tree.leaves(token_match(**head)))


# Matches ---------------------------------------------------------------------------------------------------------


@FEW
@given(SEEDS)
def test_token_match_agrees_with_the_dense_table_and_its_permutation_null(seed):
    values, w_o, w_u = random_head(np.random.default_rng(seed))
    table = oracle_table(values, w_o, w_u)
    got = token_match(*float32(values, w_o, w_u))
    for value, expected in zip((got.cosine, got.z, got.norm), oracle_matches(table, K), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.z, nulls.diagonal_z(jnp.asarray(table, jnp.float32)), rtol=1e-4, atol=1e-4)
    assert abs(got.cosine) <= 1 + 1e-6


@pytest.mark.parametrize(("n", "k"), [(9, 4), (9, 8), (6, 9)])
def test_cosine_is_one_for_an_identity_on_all_the_dimensions_there_are(n, k):
    """On min(K, n - 1): of n tokens, less their mean, n - 1 are left."""
    r = min(k, n - 1)
    basis = np.zeros((n, k))
    basis[:, :r] = orthonormal(np.random.default_rng(0), n, r)
    got = token_match(*float32(basis, 2 * basis.T, np.eye(n)))
    np.testing.assert_allclose(got.cosine, 1.0, rtol=1e-5)
    np.testing.assert_allclose(got.z, np.sqrt(r * (n - 1)), rtol=1e-5)
    np.testing.assert_allclose(got.norm, 2 * np.sqrt(r), rtol=1e-5)
    np.testing.assert_allclose(token_match(*float32(basis, -basis.T, np.eye(n))).cosine, -1.0, rtol=1e-5)


def test_heads_and_models_go_in_front():
    head = float32(*random_head(np.random.default_rng(0), lead=(2, 3)))
    together = value_scores(*head), token_match(*head)
    for at in np.ndindex(2, 3):
        alone = value_scores(head[0][at], head[1][at], head[2]), token_match(head[0][at], head[1][at], head[2])
        jax.tree.map(lambda x, y, at=at: np.testing.assert_allclose(x[at], y, atol=1e-5), together, alone)


# Relays ----------------------------------------------------------------------------------------------------------


def model(seed=0, n_layers=3, n_heads=2, n_groups=2):
    """Weights with n tokens, and (token values, place values, token queries, place keys), nothing planted."""
    rng = np.random.default_rng(seed)
    places = 7
    heads, groups = (n_layers, n_heads), (n_layers, n_groups)
    shapes = {"W_E": (N, D), "W_U": (D, N), "W_P": (places, D), "W_Q": (*heads, D, K), "W_K": (*groups, D, K)}
    shapes |= {"W_V": (*groups, D, K), "W_O": (*heads, K, D)}
    weights = CircuitWeights(**{name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()})
    rows = [rng.normal(size=(*heads, n, K)) for n in (N, places, N, places)]
    return weights, float32(*rows)


def per_head(x, n_heads):
    return np.repeat(np.asarray(x, np.float64), n_heads // x.shape[1], axis=1)


def oracle_relays(weights, token_values, place_values, token_queries, place_keys):
    """{path: {(a, b): table}} for senders a in front of receivers b."""
    n_layers, n_heads = weights.W_Q.shape[:2]
    w_q, w_k, w_v, w_o = (per_head(getattr(weights, name), n_heads) for name in ("W_Q", "W_K", "W_V", "W_O"))
    w_u = np.asarray(weights.W_U, np.float64)
    rows = (np.asarray(x, np.float64) for x in (token_values, place_values, token_queries, place_keys))
    token_values, place_values, token_queries, place_keys = rows
    tables = {"q": {}, "k": {}, "v": {}}
    for a in np.ndindex(n_layers, n_heads):
        for b in np.ndindex(n_layers, n_heads):
            if a[0] >= b[0]:
                continue
            # A pointer to place j asks for the key of place j + 1; the last place has none behind it.
            tables["q"][a, b] = (place_values[a] @ w_o[a] @ w_q[b] @ place_keys[b].T)[:-1, 1:]
            tables["k"][a, b] = token_values[a] @ w_o[a] @ w_k[b] @ token_queries[b].T
            tables["v"][a, b] = token_values[a] @ w_o[a] @ w_v[b] @ w_o[b] @ w_u
    return tables


@pytest.mark.parametrize(("n_heads", "n_groups"), [(2, 2), (4, 2), (2, 1)])
def test_relays_agree_with_dense_tables_of_all_pairs(n_heads, n_groups):
    weights, rows = model(n_heads=n_heads, n_groups=n_groups)
    got = relays(weights, *rows)
    for path, tables in oracle_relays(weights, *rows).items():
        found = getattr(got, path)
        expected = np.zeros((3, *found.norm.shape))
        for (a, b), table in tables.items():
            expected[(slice(None), *a, *b)] = oracle_matches(table, K)
            z = nulls.diagonal_z(jnp.asarray(table, jnp.float32))
            np.testing.assert_allclose(found.z[(*a, *b)], z, rtol=1e-3, atol=1e-3)
        for value, reference in zip((found.cosine, found.z, found.norm), expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-4, err_msg=path)
            for layer in range(3):
                assert (np.asarray(value)[layer, :, : layer + 1] == 0).all()  # not earlier


def test_a_planted_pair_relays_on_each_path_and_nowhere_else():
    """Head 0.0 writes what it takes at coordinates of its own, where one half of 1.0 reads it and matches it."""
    d = 3 * N
    tokens, sent = slice(0, N), slice(N, 2 * N)
    identity = np.eye(N, dtype=np.float32)

    def weights(**reads):
        w = {name: np.zeros((2, 2, d, N), np.float32) for name in ("W_Q", "W_K", "W_V")}
        w["W_O"] = np.zeros((2, 2, N, d), np.float32)
        w["W_O"][0, 0, :, sent] = identity
        w["W_O"][1, 0, :, tokens] = identity
        for name, to in reads.items():
            w[name][1, 0, sent] = to
        return CircuitWeights(**w, W_E=np.eye(d, dtype=np.float32)[tokens], W_U=np.eye(d, dtype=np.float32)[:, tokens])

    all_heads = np.zeros((2, 2, N, N), np.float32)
    all_heads[:] = identity
    none = 0 * all_heads
    found = {
        "q": relays(weights(W_Q=np.roll(identity, 1, axis=1)), none, all_heads, none, all_heads),
        "k": relays(weights(W_K=identity), all_heads, none, all_heads, none),
        "v": relays(weights(W_V=identity), all_heads, none, none, none),
    }
    for path, got in found.items():
        for other in ("q", "k", "v"):
            cosine = np.array(getattr(got, other).cosine)
            # N tokens have N - 1 dimensions about their mean, N - 1 places N - 2: both all of the identity.
            expected = np.zeros_like(cosine)
            expected[0, 0, 1, 0] = other == path
            np.testing.assert_allclose(cosine, expected, atol=1e-5, err_msg=f"{path} {other}")
    # Without the shift of one position it is no pointer.
    unshifted = relays(weights(W_Q=identity), none, all_heads, none, all_heads)
    assert unshifted.q.cosine[0, 0, 1, 0] < 0


def test_relays_of_heads_that_move_nothing_are_zero():
    weights, rows = model()
    for name in ("W_O", "W_V", "W_Q", "W_K"):
        silent = dataclasses.replace(weights, **{name: 0 * getattr(weights, name)})
        moved = [0 * x for x in rows[:2]] if name == "W_V" else rows[:2]
        got = relays(silent, *moved, *rows[2:])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        for path in {"W_O": "qkv", "W_V": "qkv", "W_Q": "q", "W_K": "k"}[name]:
            assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(getattr(got, path))), (name, path)


def test_a_model_of_one_layer_relays_nothing():
    weights, rows = model(n_layers=1)
    got = relays(weights, *rows)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(got))
    assert got.k.z.shape == (1, 2, 1, 2)


@pytest.mark.parametrize("n_groups", [4, 2])
def test_nothing_depends_on_the_basis_of_a_head(n_groups):
    """W_V G, G^-1 W_O and values G; W_Q F, W_K F^-T with queries F and keys F^-T: the same head."""
    weights, (token_values, place_values, token_queries, place_keys) = model(n_heads=4, n_groups=n_groups)
    rng = np.random.default_rng(1)
    g, f = (np.eye(K) + 0.3 * rng.normal(size=(3, n_groups, K, K)) for _ in range(2))
    g_head, f_head = (np.repeat(x, 4 // n_groups, axis=1) for x in (g, f))
    back = np.linalg.inv(f).swapaxes(-1, -2)
    back_head = np.repeat(back, 4 // n_groups, axis=1)
    turned = {"W_V": weights.W_V @ g, "W_O": np.linalg.inv(g_head) @ weights.W_O}
    turned |= {"W_Q": weights.W_Q @ f_head, "W_K": weights.W_K @ back}
    same = dataclasses.replace(weights, **{name: np.float32(x) for name, x in turned.items()})
    rows = float32(token_values @ g_head, place_values @ g_head, token_queries @ f_head, place_keys @ back_head)

    def everything(weights, token_values, *others):
        head = token_values, weights.W_O, weights.W_U
        return value_scores(*head), token_match(*head), relays(weights, token_values, *others)

    before, after = everything(weights, token_values, place_values, token_queries, place_keys), everything(same, *rows)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3), before, after)
