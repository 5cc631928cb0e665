"""Circuits between tokens against the dense V x V matrices in float64; planted heads; memory that knows no V x V."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits import low_rank, spectra, token_space
from circuits_jax.circuits.attention import qk_with_bias
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.token_space import TokenCircuit, key_preference, token_ov, token_qk, top_share
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.models.config import Rotary

L, H, G, D, K = 2, 4, 2, 6, 3
N_TOP = 5
FEW, AS_MANY, MANY = 4, 6, 11  # tokens, against D = 6
EPS = float(np.finfo(np.float32).eps)
property_test = settings(max_examples=10, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def random_weights(n_vocab=MANY, seed=0, n_groups=G, bias=True, positions="learned", rotary=Rotary()):  # noqa: B008
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.normal(size=shape) / 2).astype(np.float32)  # noqa: E731
    return CircuitWeights(
        W_E=draw(n_vocab, D), W_U=draw(D, n_vocab), W_P=draw(7, D) if positions == "learned" else None,
        W_Q=draw(L, H, D, K), W_K=draw(L, n_groups, D, K), W_V=draw(L, n_groups, D, K), W_O=draw(L, H, K, D),
        b_Q=draw(L, H, K) if bias else None, b_K=draw(L, n_groups, K), n_context=7, positions=positions, rotary=rotary,
    )  # fmt: skip


def report(circuit):
    """Everything that a token circuit can say."""
    return {
        "eigenvalues": circuit.eigenvalues(), "singular values": circuit.singular_values(),
        "norm": circuit.frobenius_norm(), "trace": circuit.trace(), "sum": circuit.sum(),
        "diagonal": circuit.diagonal(), "rows": circuit.rows([2, 0]), "columns": circuit.columns([1, 3, 3]),
        "block": circuit.block([3, 0], [1, 2, 0]), "gap": spectra.diagonal_gap(circuit),
        "top": circuit.top_k(N_TOP), "ranks": circuit.own_row_rank(),
    }  # fmt: skip


report_once = jax.jit(report)
circuits_of = jax.jit(lambda weights: (token_qk(weights), token_ov(weights)))
ranks_of = jax.jit(TokenCircuit.own_row_rank)


def dense(circuit):
    """[...,V,V] in float64."""
    embed, left, right = (np.asarray(x, np.float64) for x in (circuit.embed, circuit.inner.left, circuit.inner.right))
    unembed = embed.T if circuit.unembed is None else np.asarray(circuit.unembed, np.float64)
    return embed @ left @ right @ unembed


def multiset_distance(values, expected):
    """Largest distance when the nearest are paired off, one by one."""
    left, worst = list(expected), 0.0
    for value in sorted(values, key=abs, reverse=True):
        nearest = min(left, key=lambda other: abs(other - value))
        worst = max(worst, abs(nearest - value))
        left.remove(nearest)
    return worst


def assert_eigenvalues(actual, matrix, size):
    """What is missing among the values [min(V,D,K)] is zero. Bauer and Fike: rounding x condition of the vectors."""
    expected, vectors = np.linalg.eig(matrix)
    first = np.argsort(-np.abs(expected))[:K]  # only the vectors of these are determined
    condition = np.linalg.cond(vectors[:, first])
    padded = np.append(np.asarray(actual), np.zeros(len(matrix) - len(actual)))
    assert multiset_distance(padded, expected) <= 8 * EPS * condition * size


def assert_ranks(ranks, matrix, rounding):
    """How many others are at least as large; one that is as near as rounding may count or not."""
    for token, row in enumerate(matrix):
        others = np.delete(row, token)
        assert (others > row[token] + rounding).sum() <= ranks[token] <= (others >= row[token] - rounding).sum()


def assert_report(answer, circuit):
    """All of it is that of the dense matrix of each head, to the rounding of a product of four factors."""
    matrices = dense(circuit)
    n_vocab = matrices.shape[-1]
    unembed = circuit.embed.T if circuit.unembed is None else circuit.unembed
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64), axis=(-2, -1))  # noqa: E731
    sizes = norm(circuit.embed) * norm(circuit.inner.left) * norm(circuit.inner.right) * norm(unembed)
    off_diagonal = ~np.eye(n_vocab, dtype=bool)
    for head in np.ndindex(matrices.shape[:-2]):
        of_head, matrix, rounding = (
            jax.tree.map(lambda x, head=head: x[head], answer),
            matrices[head],
            EPS * sizes[head],
        )
        assert of_head["eigenvalues"].shape == of_head["singular values"].shape == (min(n_vocab, D, K),)
        assert_eigenvalues(of_head["eigenvalues"], matrix, sizes[head])
        singular = np.linalg.svd(matrix, compute_uv=False)
        for name, expected in {
            "singular values": singular[:K], "norm": np.linalg.norm(matrix), "trace": np.trace(matrix),
            "sum": matrix.sum(), "diagonal": np.diagonal(matrix), "rows": matrix[[2, 0]],
            "columns": matrix[:, [1, 3, 3]], "block": matrix[[3, 0]][:, [1, 2, 0]],
            "gap": np.diagonal(matrix).mean() - matrix[off_diagonal].mean(),
        }.items():  # fmt: skip
            many = n_vocab if name == "sum" else 1
            np.testing.assert_allclose(of_head[name], expected, rtol=0, atol=4 * many * rounding, err_msg=name)
        values, rows, columns = of_head["top"]
        np.testing.assert_allclose(values, np.sort(matrix, axis=None)[::-1][:N_TOP], rtol=0, atol=4 * rounding)
        np.testing.assert_allclose(matrix[rows, columns], values, rtol=0, atol=4 * rounding)
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == N_TOP
        assert_ranks(of_head["ranks"], matrix, 4 * rounding)


@pytest.mark.parametrize("n_vocab", [FEW, AS_MANY, MANY])
@property_test
@given(seed=SEEDS)
def test_everything_is_that_of_the_dense_matrices(n_vocab, seed):
    """W_E W_QK W_E^T and W_E W_OV W_U of heads that share keys and values; with fewer, D and more tokens."""
    weights = random_weights(n_vocab, seed)
    shared = [np.asarray(w, np.float64)[:, np.arange(H) // (H // G)] for w in (weights.W_K, weights.W_V)]
    e, u = weights.W_E.astype(np.float64), weights.W_U
    expected = e @ (weights.W_Q @ shared[0].mT) @ e.T, e @ (shared[1] @ weights.W_O) @ u
    for circuit, matrices in zip(circuits_of(weights), expected, strict=True):
        assert circuit.shape == (L, H, n_vocab, n_vocab)
        np.testing.assert_allclose(dense(circuit), matrices, rtol=0, atol=1e-6 * np.abs(matrices).max())
        assert_report(report_once(circuit), circuit)


@jax.jit
def through_both(circuit):
    """Through V-sized factors, and the eigenvalues of D-sized ones."""
    factors, unembed = circuit.low_rank(), circuit.embed.T if circuit.unembed is None else circuit.unembed
    through_factors = {
        "singular values": factors.singular_values(), "norm": factors.frobenius_norm(), "trace": factors.trace(),
        "sum": factors.sum(), "diagonal": factors.diagonal(), "rows": factors.rows([2, 0]),
        "columns": factors.columns([1, 3, 3]),
    }  # fmt: skip
    return through_factors, factors.eigenvalues(), (circuit.inner @ (unembed @ circuit.embed)).eigenvalues()


@pytest.mark.parametrize("n_vocab", [FEW, MANY])
def test_both_routes_agree(n_vocab):
    """Whichever of the two the circuit takes for its number of tokens."""
    circuit = circuits_of(random_weights(n_vocab))[1]
    size = np.abs(dense(circuit)).sum((-2, -1)).max()
    answer, (through_factors, large, small) = report_once(circuit), through_both(circuit)
    for head in np.ndindex(L, H):
        one, other = np.asarray(large[head]), np.asarray(small[head])
        assert multiset_distance(one, other) <= 1e-5 * size
        assert multiset_distance(np.asarray(answer["eigenvalues"][head]), one) <= 1e-5 * size
    for name, expected in through_factors.items():
        np.testing.assert_allclose(answer[name], expected, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("entries_at_once", [1, 3 * MANY], ids=["a row", "three rows"])
def test_blocks_change_nothing(monkeypatch, entries_at_once):
    circuits = circuits_of(random_weights())
    expected = [report_once(circuit) for circuit in circuits]
    for module in (low_rank, token_space):
        monkeypatch.setattr(module, "ENTRIES_AT_ONCE", entries_at_once)
    in_blocks = jax.jit(lambda circuit: (circuit.top_k(N_TOP), circuit.own_row_rank()))
    for circuit, whole in zip(circuits, expected, strict=True):
        top, ranks = in_blocks(circuit)
        np.testing.assert_allclose(top.values, whole["top"].values, rtol=1e-5)
        np.testing.assert_array_equal((top.rows, top.columns), whole["top"][1:])
        np.testing.assert_array_equal(ranks, whole["ranks"])


def test_tokens_that_do_not_exist_are_nan_and_heads_an_error():
    circuit = circuits_of(random_weights())[1]
    matrix = np.pad(dense(circuit), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    close = lambda actual, expected: np.testing.assert_allclose(actual, expected, atol=1e-5)  # noqa: E731
    close(circuit.rows([0, MANY]), matrix[:, :, [0, MANY], :MANY])
    close(circuit.columns([MANY, 0]), matrix[:, :, :MANY, [MANY, 0]])
    close(circuit.block([0, MANY], [2, MANY]), matrix[:, :, [0, MANY]][..., [2, MANY]])
    close(circuit.rows(3), matrix[:, :, 3:4, :MANY])
    close(circuit[1, 2].rows(3), matrix[1, 2, 3:4, :MANY])
    close(circuit[:, 0].diagonal(), np.diagonal(matrix[:, 0, :MANY, :MANY], axis1=-2, axis2=-1))
    for index in (L, (0, H), (0, 0, 0)):
        with pytest.raises(IndexError):
            circuit[index]
    with pytest.raises(ValueError, match=r"k must be between 1 and .* 121; got 122"):
        circuit.top_k(MANY * MANY + 1)


# The rank of a token in its own row -----------------------------------------------------------------------------------


def of_matrix(matrix):
    """The token circuit with this matrix [V,V], which token vectors of length 1 leave as it is."""
    n_vocab = len(matrix)
    identity = np.eye(n_vocab, dtype=np.float32)
    return TokenCircuit(identity, LowRank(identity, np.asarray(matrix, np.float32)), identity.copy())


def test_own_row_rank_of_known_heads():
    """0 for a copier, V - 1 for one that copies nothing, ties and NaN against it; else what the row says."""
    n = 8
    rising = np.arange(n * n, dtype=np.float64).reshape(n, n)  # every row rises: token i has n - 1 - i before it
    successor = np.roll(np.eye(n), 1, axis=1)
    swap = np.eye(n)[[1, 0, *range(2, n)]]  # two tokens for one another, all others for themselves
    for matrix, expected in (
        (np.eye(n), np.zeros(n)), (3 * np.eye(n) + 1, np.zeros(n)), (np.zeros((n, n)), np.full(n, n - 1)),
        (-np.eye(n), np.full(n, n - 1)), (np.ones((n, n)), np.full(n, n - 1)), (rising, n - 1 - np.arange(n)),
        (-rising, np.arange(n)), (successor, np.full(n, n - 1)), (successor - np.eye(n), np.full(n, n - 1)),
        (successor + np.eye(n) / 2, np.ones(n)), (swap, [n - 1, n - 1, 0, 0, 0, 0, 0, 0]),
        (np.full((n, n), np.nan), np.full(n, n - 1)),
    ):  # fmt: skip
        ranks = ranks_of(of_matrix(matrix))
        assert ranks.dtype == jnp.int32
        np.testing.assert_array_equal(ranks, expected)
    copier = of_matrix(np.eye(n))
    copier.unembed[:, 2] = np.nan  # one token without a logit
    np.testing.assert_array_equal(ranks_of(copier), np.where(np.arange(n) == 2, n - 1, 1))


@property_test
@given(seed=SEEDS)
def test_own_row_rank_counts_ties(seed):
    """Small integers: exact, and full of ties."""
    matrix = np.random.default_rng(seed).integers(-2, 3, (8, 8))
    expected = [sum(matrix[i, j] >= matrix[i, i] for j in range(8) if j != i) for i in range(8)]
    np.testing.assert_array_equal(ranks_of(of_matrix(matrix)), expected)


def test_share_of_tokens_among_the_first():
    ranks = jnp.array([[0, 0, 4, 5, 7], [1, 2, 3, 4, 0]])
    np.testing.assert_allclose(top_share(ranks, 1), [2 / 5, 1 / 5], rtol=1e-6)
    np.testing.assert_allclose(top_share(ranks, 5), [3 / 5, 1], rtol=1e-6)


# Likely pairs ---------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(1, 2))
def likely(circuit, k, n):
    highest, _, bound = circuit.likely_extremes(k, n)
    return highest, bound


def pairs(entries):
    """The pairs of one head as a set; all are distinct."""
    found = list(zip(np.asarray(entries.rows).tolist(), np.asarray(entries.columns).tolist(), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("n_vocab", [FEW, MANY])
@property_test
@given(seed=SEEDS)
def test_likely_pairs_among_all_tokens_are_the_strongest(n_vocab, seed):
    for circuit in circuits_of(random_weights(n_vocab, seed)):
        (values, rows, columns), bound = likely(circuit, n_vocab + 5, n_vocab)
        matrices = dense(circuit)
        sorted_values = -np.sort(-matrices.reshape(L, H, -1), axis=-1)
        assert np.isneginf(bound).all()
        for head in np.ndindex(L, H):
            size = np.linalg.norm(matrices[head])
            np.testing.assert_allclose(values[head], sorted_values[head][: n_vocab + 5], rtol=0, atol=1e-5 * size)
            np.testing.assert_allclose(
                matrices[head][rows[head], columns[head]], values[head], rtol=0, atol=1e-5 * size
            )
            pairs(low_rank.Entries(values[head], rows[head], columns[head]))


@property_test
@given(seed=SEEDS)
def test_no_pair_left_out_exceeds_the_bound(seed):
    """Few candidates: what is found is right and in order, and the rest is below the bound."""
    for circuit in circuits_of(random_weights(seed=seed)):
        (values, rows, columns), bound = likely(circuit, 6, 2)
        matrices = dense(circuit)
        for head in np.ndindex(L, H):
            matrix, size = matrices[head], np.linalg.norm(matrices[head])
            np.testing.assert_allclose(matrix[rows[head], columns[head]], values[head], rtol=0, atol=1e-5 * size)
            assert (np.diff(values[head]) <= 0).all()
            others = matrix.copy()
            others[rows[head], columns[head]] = -np.inf
            assert len(pairs(low_rank.Entries(values[head], rows[head], columns[head]))) == 6
            assert others.max() <= max(bound[head], values[head][-1]) + 1e-5 * size


def heavy_tailed(n_vocab, seed, spread):
    """Token vectors whose lengths vary by this share (standard deviation of the logarithm)."""
    rng = np.random.default_rng(seed)
    of_tokens = lambda: rng.normal(size=(n_vocab, 24)) * np.exp(spread * rng.normal(size=(n_vocab, 1)))  # noqa: E731
    inner = LowRank(*(rng.normal(size=(3, *shape)).astype(np.float32) for shape in ((24, 8), (8, 24))))
    return TokenCircuit(of_tokens().astype(np.float32), inner, of_tokens().T.astype(np.float32))


@pytest.mark.parametrize(("spread", "recall", "certain"), [(0.0, 0.5, False), (1.0, 1.0, True)])
def test_likely_pairs_against_exact_ones(spread, recall, certain):
    """8 of 600 tokens: a share of the exact pairs where no token stands out, all of them for sure where some do."""
    circuit = heavy_tailed(600, 0, spread)
    found, bound = likely(circuit, 10, 8)
    exact = jax.jit(lambda circuit: circuit.top_k(10))(circuit)
    of_head = lambda entries, head: pairs(jax.tree.map(lambda x: x[head], entries))  # noqa: E731
    shares = [len(of_head(found, head) & of_head(exact, head)) / 10 for head in range(3)]
    assert np.mean(shares) >= recall
    assert (np.asarray(bound <= found.values[:, -1]) == certain).all()


def test_planted_pairs_are_found_whatever_the_basis_of_the_head():
    """Three pairs share a direction that no other token has; a gauge that blows up another hides nothing."""
    rng = np.random.default_rng(0)
    embed, unembed = rng.normal(size=(300, 24)), rng.normal(size=(24, 300))
    embed[:, 0], unembed[0] = 0, 0
    planted = {(7, 100): 60, (8, 101): 50, (9, 7): 40}
    for (row, column), strength in planted.items():
        embed[row], unembed[:, column] = 0, 0
        embed[row, 0], unembed[0, column] = strength**0.5, strength**0.5
    left = 0.1 * rng.normal(size=(24, 4))
    left[0], left[0, 0], left[1:, 0] = 0, 1, 0
    right = left.T.copy()
    for gauge in (np.eye(4), np.diag([1e-2, 1, 30, 1]) @ np.linalg.qr(rng.normal(size=(4, 4)))[0]):
        inner = LowRank(*(x.astype(np.float32) for x in (left @ gauge, np.linalg.inv(gauge) @ right)))
        circuit = TokenCircuit(embed.astype(np.float32), inner, unembed.astype(np.float32))
        found, bound = likely(circuit, 9, 8)
        order = sorted(((a * b) ** 0.5 for a in planted.values() for b in planted.values()), reverse=True)
        np.testing.assert_allclose(found.values, order, rtol=1e-3)  # each planted row meets each planted column
        assert (found.rows[0], found.columns[0]) == (7, 100)
        assert pairs(found) == {(row, column) for row in (7, 8, 9) for column in (100, 101, 7)}
        assert bound < found.values[-1]


def test_the_lowest_pairs_are_the_highest_of_the_negative():
    circuit = heavy_tailed(60, 1, 0.5)
    negative = TokenCircuit(circuit.embed, LowRank(-circuit.inner.left, circuit.inner.right), circuit.unembed)
    _, lowest, _ = jax.jit(lambda circuit: circuit.likely_extremes(7, 5))(circuit)
    highest, _ = likely(negative, 7, 5)
    np.testing.assert_allclose(lowest.values, -highest.values, rtol=1e-4)
    np.testing.assert_array_equal(lowest.rows, highest.rows)
    np.testing.assert_array_equal(lowest.columns, highest.columns)


def test_likely_pairs_of_zero_and_broken_heads_and_bad_input():
    weights = random_weights()
    weights.W_O[1, 0], weights.W_O[1, 1] = 0, np.nan
    circuit = circuits_of(weights)[1]
    found, bound = likely(circuit, 3, 2)
    assert not np.asarray(found.values)[1, 0].any()
    assert bound[1, 0] == 0
    assert np.isnan(found.values[1, 1]).all()
    assert np.isnan(bound[1, 1])
    assert np.isfinite(found.values[0]).all()
    assert np.asarray(found.values)[1, 2:].all()
    for k, n, message in (
        (0, 2, "k must be .* 22 of 2 rows; got 0"),
        (23, 2, "got 23"),
        (3, 0, "n_candidates .* got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            circuit.likely_extremes(k, n)


# Planted heads, biases and rotary positions ---------------------------------------------------------------------------


def test_copying_and_matching_heads_score_one():
    """W_OV = W_QK = c B B^T on K directions of orthonormal token vectors: every eigenvalue is c, and D - K are zero."""
    rng = np.random.default_rng(3)
    tokens = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    plane = np.linalg.qr(rng.normal(size=(D, K)))[0]
    signs = np.array([1.0, -1.0] * (H // 2))[:, None, None]
    of_heads = lambda x: np.broadcast_to(x, (L, H, D, K)).astype(np.float32)  # noqa: E731
    weights = CircuitWeights(
        W_E=tokens, W_U=tokens.T, W_P=None, positions="none", n_context=7,
        W_Q=of_heads(signs * plane), W_K=of_heads(plane), W_V=of_heads(signs * plane), W_O=of_heads(plane).mT,
    )  # fmt: skip
    signs = np.broadcast_to(signs[:, 0, 0], (L, H))
    np.testing.assert_allclose(jax.jit(spectra.copying_score)(weights), signs, atol=1e-5)
    np.testing.assert_allclose(jax.jit(spectra.matching_score)(weights), signs, atol=1e-5)
    for circuit in circuits_of(weights):
        answer = report_once(circuit)
        np.testing.assert_allclose(answer["singular values"], np.ones((L, H, K)), atol=1e-5)
        np.testing.assert_allclose(answer["trace"], K * signs, atol=1e-5)
        gap = K / D * (1 + 1 / (D - 1)) - np.sum(dense(circuit)[0, 0]) / (D * (D - 1))
        np.testing.assert_allclose(answer["gap"], gap * signs, atol=1e-5)


@pytest.mark.parametrize("n_vocab", [FEW, MANY])
def test_scores_are_those_of_the_dense_eigenvalues(n_vocab):
    weights = random_weights(n_vocab)
    for score, circuit in zip((spectra.matching_score, spectra.copying_score), circuits_of(weights), strict=True):
        values = np.linalg.eigvals(dense(circuit))
        expected = values.real.sum(-1) / np.abs(values).sum(-1)
        np.testing.assert_allclose(jax.jit(score)(weights), expected, atol=1e-4)  # eigenvalues of condition up to 100


ROTARY = {"half": Rotary(2), "interleaved part": Rotary(2, "interleaved", 30.0)}


@pytest.mark.parametrize("offset", [0, 3, -2])
@pytest.mark.parametrize("rotary", [None, *ROTARY], ids=str)
def test_query_bias_and_rotary_offsets_in_token_space(rotary, offset):
    """token_qk and key_preference are the corners of E [W_Q; b_Q] R [W_K; b_K]^T E^T, E the tokens with a 1 behind."""
    positions = {"positions": "rotary", "rotary": ROTARY[rotary]} if rotary else {}
    weights = random_weights(**positions)
    whole = qk_with_bias(weights, offset)
    whole = np.asarray(whole.left, np.float64) @ np.asarray(whole.right, np.float64)
    e = weights.W_E.astype(np.float64)
    np.testing.assert_allclose(dense(token_qk(weights, offset)), e @ whole[..., :D, :D] @ e.T, atol=1e-5)
    preference = key_preference(weights, offset)
    assert preference.shape == (L, H, MANY)
    np.testing.assert_allclose(preference, whole[..., D, :D] @ e.T, atol=1e-5)
    # The score of any query x for a key moves by exactly this when the query bias is taken away.
    x = np.append(np.random.default_rng(1).normal(size=D), 1.0)
    without = qk_with_bias(dataclasses.replace(weights, b_Q=None, b_K=None), offset)
    without = np.asarray(without.left, np.float64) @ np.asarray(without.right, np.float64)
    keys = np.append(e, np.zeros((MANY, 1)), 1)
    np.testing.assert_allclose(preference, x @ (whole - without) @ keys.T, atol=1e-5)
    turned = np.abs(np.asarray(preference) - np.asarray(key_preference(weights))).max()
    assert turned > 1e-2 if rotary and offset else turned < 1e-6


def test_no_query_bias_is_no_preference():
    preference = key_preference(random_weights(bias=False), 2)
    assert preference.shape == (L, H, MANY)
    assert not np.asarray(preference).any()


# What must not matter -------------------------------------------------------------------------------------------------


def assert_same_report(actual, expected, circuit):
    size = np.abs(dense(circuit)).sum((-2, -1))
    for head in np.ndindex(size.shape):
        ours, theirs = (np.asarray(answer["eigenvalues"][head]) for answer in (actual, expected))
        assert multiset_distance(ours, theirs) <= 1e-4 * size[head]  # eigenvalues of condition up to 100
        assert_ranks(actual["ranks"][head], dense(circuit)[head], 1e-5 * size[head])
    for name in set(expected) - {"eigenvalues", "ranks", "top"}:
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-5 * size.max(), err_msg=name)
    np.testing.assert_allclose(actual["top"].values, expected["top"].values, rtol=0, atol=1e-5 * size.max())


@property_test
@given(seed=SEEDS)
def test_rotation_of_the_residual_basis(seed):
    """W_E O, O^T W_Q, ..., W_O O, O^T W_U: the same model, so the same circuits between tokens."""
    weights = random_weights(seed=seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    rotate = lambda w, into: (w @ turn if into else turn.T @ w).astype(np.float32)  # noqa: E731
    turned = dataclasses.replace(
        weights, **{name: rotate(getattr(weights, name), name in ("W_E", "W_O")) for name in
                    ("W_E", "W_Q", "W_K", "W_V", "W_O", "W_U")},
    )  # fmt: skip
    for before, after in zip(circuits_of(weights), circuits_of(turned), strict=True):
        assert_same_report(report_once(after), report_once(before), before)
    np.testing.assert_allclose(key_preference(turned), key_preference(weights), atol=1e-5)


@property_test
@given(seed=SEEDS)
def test_gauge(seed):
    """W_Q G, W_K G^-T and W_V G, G^-1 W_O are the same head."""
    weights, rng = random_weights(seed=seed, n_groups=H, bias=False), np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.normal(size=(2, K, K)))
    gauge = q @ (np.triu(r, 1) / 4 + np.eye(K) * rng.uniform(0.5, 2.0, (K, 1)))
    inverse = np.linalg.inv(gauge)
    changed = {
        "W_Q": weights.W_Q @ gauge[0], "W_K": weights.W_K @ inverse[0].T, "W_V": weights.W_V @ gauge[1],
        "W_O": inverse[1] @ weights.W_O,
    }  # fmt: skip
    other = dataclasses.replace(weights, **{name: w.astype(np.float32) for name, w in changed.items()})
    for before, after in zip(circuits_of(weights), circuits_of(other), strict=True):
        assert_same_report(report_once(after), report_once(before), before)


@property_test
@given(seed=SEEDS)
def test_order_of_the_heads(seed):
    weights, order = random_weights(seed=seed, n_groups=H), np.random.default_rng(seed).permutation(H)
    names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K")
    other = dataclasses.replace(weights, **{name: getattr(weights, name)[:, order] for name in names})
    for before, after in zip(circuits_of(weights), circuits_of(other), strict=True):
        pair = jax.tree.leaves(report_once(before)), jax.tree.leaves(report_once(after))
        for expected, actual in zip(*pair, strict=True):
            np.testing.assert_array_equal(actual, np.asarray(expected)[:, order])
    np.testing.assert_allclose(key_preference(other), key_preference(weights)[:, order], atol=1e-6)


def test_many_models_under_vmap():
    models = [random_weights(seed=seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
    together = jax.jit(jax.vmap(lambda weights: report(token_ov(weights))))(stacked)
    for i, weights in enumerate(models):
        circuit = circuits_of(weights)[1]
        assert_report(jax.tree.map(lambda x, i=i: x[i], together), circuit)


def test_nan_is_not_hidden():
    weights = random_weights()
    weights.W_V[1, 0] = np.nan  # of the key/value head that query heads 0 and 1 of layer 1 read
    answer = report_once(circuits_of(weights)[1])
    for name in set(answer) - {"ranks", "top"}:
        of_head = np.asarray(answer[name])
        assert np.isnan(of_head[1, :2]).all(), name
        assert np.isfinite(of_head[0]).all(), name
        assert np.isfinite(of_head[1, 2:]).all(), name
    assert np.isnan(answer["top"].values[1, :2]).all()
    assert (np.asarray(answer["ranks"])[1, :2] == MANY - 1).all()


# Memory and platforms -------------------------------------------------------------------------------------------------


def temporaries(function, *arguments):
    """Bytes beside inputs and outputs; compiled from shapes only, nothing is computed."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def shapes_only(n_vocab, d_model, d_head, heads=(2, 2)):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    inner = LowRank(array(*heads, d_model, d_head), array(*heads, d_head, d_model))
    return TokenCircuit(array(n_vocab, d_model), inner, array(d_model, n_vocab))


def test_entries_come_in_bounded_blocks(monkeypatch):
    """The factors [V,K] of one head and a few blocks, where one matrix V x V would be 64 MiB."""
    block, n_vocab, d_head = 2**16, 4096, 8
    for module in (low_rank, token_space):
        monkeypatch.setattr(module, "ENTRIES_AT_ONCE", block)
    circuit = shapes_only(n_vocab, 32, d_head)
    bound = 4 * (2 * 2 * n_vocab * d_head + 4 * block)
    assert bound < n_vocab * n_vocab * 4 / 20
    assert temporaries(TokenCircuit.own_row_rank, circuit) < bound
    assert temporaries(lambda circuit: circuit.top_k(10), circuit) < bound
    assert temporaries(TokenCircuit.diagonal, circuit) < bound
    # W_U the other way round, too.
    assert temporaries(lambda circuit: circuit.likely_extremes(10, 8), circuit) < n_vocab * n_vocab * 4 / 20


def test_spectra_need_no_factors_of_the_size_of_the_vocabulary():
    """Far less than [L,H,V,K] numbers, which is what the factors of all heads in token space would take."""
    n_vocab, d_model, d_head, heads = 2**15, 32, 16, (4, 4)
    circuit = shapes_only(n_vocab, d_model, d_head, heads)
    factors = 4 * 4 * 4 * n_vocab * d_head
    for function in (
        TokenCircuit.eigenvalues, TokenCircuit.singular_values, TokenCircuit.frobenius_norm, TokenCircuit.trace,
        TokenCircuit.sum, lambda circuit: circuit.block([1, 2], [3]),
    ):  # fmt: skip
        assert temporaries(function, circuit) < factors / 4


def test_lowers_for_every_platform():
    def without_eigenvalues(circuit):
        parts = circuit.rows([0]), circuit.columns([0]), circuit.block([0], [1]), circuit.top_k(3), circuit.diagonal()
        numbers = circuit.singular_values(), circuit.frobenius_norm(), circuit.trace(), circuit.sum()
        return parts, numbers, top_share(circuit.own_row_rank(), 5), circuit.low_rank(), circuit[0, 1]

    circuit, platforms = shapes_only(16, 8, 4), ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(without_eigenvalues), platforms=platforms)(circuit)
    assert exported.platforms == platforms
    for platform in platforms:
        exported = jax.export.export(jax.jit(TokenCircuit.eigenvalues), platforms=[platform])(circuit)
        assert exported.platforms == (platform,)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_likely_pairs_lower(platform):
    function = jax.jit(lambda circuit: circuit.likely_extremes(3, 4))
    assert jax.export.export(function, platforms=[platform])(shapes_only(40, 8, 4)).platforms == (platform,)
