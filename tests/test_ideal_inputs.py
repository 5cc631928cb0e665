"""Rows that hold one thing alone, and scores between them: slow float64 formulas, the model's own norm, invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax import CircuitWeights
from circuits_jax.circuits import reading
from circuits_jax.heads import ideal_inputs as ideal
from circuits_jax.models.config import Rotary
from circuits_jax.models.position_wise import Normalize
from circuits_jax.models.transformer import attend

L, H, D, K, N, T = 3, 4, 10, 4, 5, 7
POSITIONS = ("learned", "shortformer", "shortformer-layers", "rotary", "none")
NORMS = ("none", "rms", "layer")
SHARES = np.random.default_rng(5).random((2, L, H)).astype(np.float32)

position_inputs = jax.jit(ideal.position_inputs, static_argnums=1)
position_scores = jax.jit(reading.position_scores)
token_scores = jax.jit(reading.token_scores)
written = jax.jit(ideal.written)
ideal_inputs = jax.jit(ideal.ideal_inputs, static_argnums=1)


def centre(x):
    return x - x.mean(-1, keepdims=True)


def random_weights(positions, norm="none", n_groups=2, biases=True, rotary=Rotary(), seed=0):  # noqa: B008
    """Nothing planted; W_P of "shortformer-layers" is one for each layer, as gains leave it."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: np.float32(0.6 * rng.normal(size=shape))  # noqa: E731
    w_p = {"learned": (T, D), "shortformer": (T, D), "shortformer-layers": (L, T, D)}.get(positions)
    what = centre if norm == "layer" else lambda x: x
    added = {"b_Q": normal(L, H, K), "b_K": normal(L, n_groups, K)} if biases else {}
    return CircuitWeights(
        W_E=what(normal(N, D)), W_U=normal(D, N), W_P=None if w_p is None else what(normal(*w_p)),
        W_Q=normal(L, H, D, K), W_K=normal(L, n_groups, D, K), W_V=normal(L, n_groups, D, K),
        W_O=what(normal(L, H, K, D)), **added, n_context=T, positions=positions.split("-")[0], norm=norm, rotary=rotary,
    )  # fmt: skip


def array(weights, name):
    """In float64, for every query head h that of key head h // (H/G); zeros for a bias that is not there."""
    x = getattr(weights, name)
    if x is None:
        return np.zeros((L, H, K))
    x = np.asarray(x, np.float64)
    if name in ("W_K", "W_V", "b_K"):
        x = np.stack([x[:, h // (H // x.shape[1])] for h in range(H)], 1)
    return x


# The oracle -------------------------------------------------------------------------------------------------------


def oracle_size(weights, length):
    if weights.norm == "none":
        return np.ones(length)
    tokens = array(weights, "W_E")
    sizes = []
    for t in range(length):
        square = np.mean([x @ x for x in tokens])
        if weights.positions == "learned":
            place = array(weights, "W_P")[t]
            square += place @ place
        sizes.append(np.sqrt(square / D + 1e-5))
    return np.array(sizes)


def oracle_positions(weights, length, start):
    rows, size = np.zeros((L, length, D)), oracle_size(weights, length)
    for layer in range(L):
        for t in range(length):
            token = array(weights, "W_E").mean(0) if start is None or t else np.asarray(start, np.float64)
            if weights.positions == "learned":
                rows[layer, t] = (token + array(weights, "W_P")[t]) / size[t]
            elif weights.positions == "shortformer":
                places = array(weights, "W_P")
                rows[layer, t] = token / size[t] + (places[layer, t] if places.ndim == 3 else places[t])
            else:
                rows[layer, t] = token / size[t]
    return rows


def rotation(offset, rotary):
    """R with q R k^T the score of a query that far behind its key."""
    matrix, dim = np.eye(K), rotary.dim or K
    for i in range(dim // 2):
        angle = offset * rotary.base ** (-2 * i / dim)
        a, b = {"half": (i, i + dim // 2), "interleaved": (2 * i, 2 * i + 1)}[rotary.pairs]
        matrix[a, a] = matrix[b, b] = np.cos(angle)
        matrix[a, b], matrix[b, a] = np.sin(angle), -np.sin(angle)
    return matrix


def oracle_scores(weights, from_rows, to_rows, turn):
    """(x_i W_Q + b_Q) R_ij (y_j W_K + b_K)^T / sqrt(K) with R_ij = turn(i, j); rows [n,D] or [L,n,D]."""
    scores = np.zeros((L, H, from_rows.shape[-2], to_rows.shape[-2]))
    for layer, head, i, j in np.ndindex(scores.shape):
        x = from_rows[layer, i] if from_rows.ndim == 3 else from_rows[i]
        y = to_rows[layer, j] if to_rows.ndim == 3 else to_rows[j]
        q = x @ array(weights, "W_Q")[layer, head] + array(weights, "b_Q")[layer, head]
        k = y @ array(weights, "W_K")[layer, head] + array(weights, "b_K")[layer, head]
        scores[layer, head, i, j] = q @ turn(i, j) @ k / np.sqrt(K)
    return scores


def oracle_written(weights, rows, share):
    sent = np.zeros((L, *rows.shape))
    for layer in range(L):
        for a in range(layer):
            for head in range(H):
                w_ov = array(weights, "W_V")[a, head] @ array(weights, "W_O")[a, head]
                sent[layer] += share[a, head] * rows @ w_ov
    return sent


# Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_position_inputs_hold_the_mean_token_and_the_position(positions, norm):
    weights = random_weights(positions, norm)
    np.testing.assert_allclose(ideal.residual_size(weights, 6), oracle_size(weights, 6), rtol=1e-6)
    tokens = array(weights, "W_E") / oracle_size(weights, 6).mean()
    np.testing.assert_allclose(ideal.token_inputs(weights, 6), tokens, rtol=1e-5, atol=1e-6)
    for start in (None, np.linspace(-1, 2, D, dtype=np.float32)):
        got = position_inputs(weights, 6, start)
        assert got.shape == (L, 6, D)
        np.testing.assert_allclose(got, oracle_positions(weights, 6, start), rtol=1e-5, atol=1e-6)
        if norm == "none" and start is not None:
            rest = position_inputs(weights, 6)
            np.testing.assert_allclose(got[:, 1:], rest[:, 1:], atol=1e-6)
            np.testing.assert_allclose(got[:, 0] - rest[:, 0], [start - weights.W_E.mean(0)] * L, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_where_tokens_are_alike_the_rows_are_what_heads_really_read(norm):
    """Then nothing is an average; position and token are at right angles, as their sizes are added."""
    weights = random_weights("learned", norm)
    token, place = np.array(weights.W_E), np.array(weights.W_P)
    token[:] = token[0]
    token[:, 5:], place[:, :5] = 0.0, 0.0
    token[:, :5], place[:, 5:] = centre(token[:, :5]), centre(place[:, 5:])
    weights = dataclasses.replace(weights, W_E=token, W_P=place)
    real = reading.normalized(weights, token[0] + place)
    np.testing.assert_allclose(position_inputs(weights, T)[0], real, rtol=1e-4, atol=1e-5)


def test_positions_and_w_p_must_not_contradict_each_other():
    for positions, other in (("learned", "rotary"), ("none", "learned")):
        wrong = dataclasses.replace(random_weights(positions), positions=other)
        with pytest.raises(ValueError, match="W_P must be given"):
            ideal.position_inputs(wrong, T)


@pytest.mark.parametrize("norm", NORMS)
def test_normalized_is_the_model_s_norm_without_gain(norm):
    weights = random_weights("none", norm)
    residual = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)) * 4 + 1, jnp.float32)
    residual = residual.at[0, 0].set(0.0)  # where only epsilon keeps it finite
    module = Normalize(norm, 1e-5)
    expected = module.apply(module.init(jax.random.key(0), residual), residual)
    np.testing.assert_allclose(reading.normalized(weights, residual), expected, rtol=1e-5, atol=1e-6)
    if norm != "none":
        size = np.square(reading.normalized(weights, residual)).mean(-1)
        np.testing.assert_allclose(size.ravel()[1:], 1.0, rtol=1e-4)
        assert size[0, 0] == 0


# Scores ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "learned": random_weights("learned", n_groups=4),
    "no biases": random_weights("learned", biases=False),
    "grouped": random_weights("none", n_groups=1),
    "rotary": random_weights("rotary", n_groups=4),
    "rotary grouped": random_weights("rotary", rotary=Rotary(pairs="interleaved", base=50.0)),
    "rotary partial": random_weights("rotary", rotary=Rotary(dim=2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_scores_agree_with_dense_formulas(name):
    weights = SHAPES[name]
    rng = np.random.default_rng(1)
    turns = weights.positions == "rotary"
    turn = lambda i, j: rotation(i - j, weights.rotary) if turns else np.eye(K)  # noqa: E731
    of_layers, shared = np.float32(rng.normal(size=(L, 5, D))), np.float32(rng.normal(size=(5, D)))
    for x, y in ((of_layers, shared), (shared, of_layers)):
        expected = oracle_scores(weights, x, y, turn)
        np.testing.assert_allclose(position_scores(weights, x, y), expected, rtol=1e-4, atol=1e-5)
    for offsets in (np.arange(6), np.array([2])):
        mean = np.mean([turn(offset, 0) for offset in offsets], axis=0)
        x, y = shared[:3], of_layers
        expected = oracle_scores(weights, x, y, lambda i, j, mean=mean: mean)
        np.testing.assert_allclose(token_scores(weights, x, y, offsets), expected, rtol=1e-4, atol=1e-5)


def test_with_rotary_positions_equal_rows_score_by_their_offset_alone():
    weights = SHAPES["rotary"]
    row = np.broadcast_to(np.linspace(-1, 1, D, dtype=np.float32), (T, D))
    scores = np.asarray(position_scores(weights, row, row))
    for offset in range(-T + 1, T):
        same = np.diagonal(scores, offset, axis1=-2, axis2=-1)
        np.testing.assert_allclose(same, np.broadcast_to(same[..., :1], same.shape), atol=1e-4)
        at = token_scores(weights, row[:1], row[:1], np.array([-offset]))[..., 0, 0]  # key at i + offset
        np.testing.assert_allclose(same[..., 0], at, atol=1e-4)


def test_causal_pattern_is_a_softmax_over_what_can_be_seen():
    scores = np.float32(3 * np.random.default_rng(0).normal(size=(2, T, T)))
    got = np.asarray(attend(scores, True))
    for head in range(2):
        for t in range(T):
            seen = np.exp(scores[head, t, : t + 1].astype(np.float64))
            np.testing.assert_allclose(got[head, t, : t + 1], seen / seen.sum(), rtol=1e-5)
            assert (got[head, t, t + 1 :] == 0).all()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_written_is_the_sum_over_earlier_heads(seed, n_groups):
    weights = random_weights("none", n_groups=n_groups, seed=seed)
    rng = np.random.default_rng(seed)
    rows, share = np.float32(rng.normal(size=(N, D))), np.float32(rng.random((L, H)))
    got = written(weights, rows, share)
    np.testing.assert_allclose(got, oracle_written(weights, rows, share), rtol=1e-4, atol=1e-4)
    assert (got[0] == 0).all()  # nothing is in front of layer 0
    assert (written(weights, rows, 0 * share) == 0).all()


def test_values_leave_out_their_bias():
    weights = dataclasses.replace(random_weights("none"), b_V=jnp.ones((L, 2, K)))
    rows = np.float32(np.random.default_rng(0).normal(size=(N, D)))
    got = reading.values(weights, rows)
    for layer, head in np.ndindex(L, H):
        np.testing.assert_allclose(got[layer, head], rows @ array(weights, "W_V")[layer, head], rtol=1e-4, atol=1e-5)


# Everything ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[f"{p} {n}" for p in POSITIONS for n in NORMS])
def asked(request):
    """Weights, and what their heads are asked about."""
    weights = random_weights(*request.param.split())
    start = np.float32(np.random.default_rng(3).normal(size=D)) if request.param.endswith("rms") else None
    return weights, ideal_inputs(weights, T, *SHARES, start, jax.random.key(0)), start


def test_ideal_inputs_hold_what_they_say(asked):
    weights, inputs, start = asked
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(inputs))
    size = oracle_size(weights, T)
    np.testing.assert_allclose(inputs.embedded_size, size.mean(), rtol=1e-5)
    np.testing.assert_allclose(inputs.tokens, array(weights, "W_E") / size.mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inputs.positions, oracle_positions(weights, T, start), rtol=1e-5, atol=1e-6)
    learned = weights.positions == "learned"
    places = array(weights, "W_P") / size[:, None] if learned else np.zeros((T, D))
    np.testing.assert_allclose(inputs.places, places, rtol=1e-5, atol=1e-6)


def test_what_earlier_heads_sent_is_counted_by_how_much_they_look_back_or_for_copies(asked):
    weights, inputs, _ = asked
    size, tokens, places = oracle_size(weights, T).mean(), *(np.float64(x) for x in (inputs.tokens, inputs.places))
    sent = oracle_written(weights, tokens, SHARES[0]) / size
    pointers = oracle_written(weights, places, SHARES[1]) / size
    np.testing.assert_allclose(inputs.sent, sent, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(inputs.pointers, pointers, rtol=1e-3, atol=1e-4)
    assert (inputs.sent[0] == 0).all()
    assert (inputs.pointers[0] == 0).all()
    assert (inputs.pointers != 0).any() == (weights.positions == "learned")


def test_mixed_rows_are_read_through_the_norm(asked):
    weights, inputs, start = asked
    if weights.norm != "none":
        np.testing.assert_allclose(np.square(inputs.mixed_values).mean(-1), 1.0, rtol=1e-2)
    else:
        size = np.sqrt(np.square(inputs.mixed_values).sum(-1).mean(-1))
        np.testing.assert_allclose(inputs.raw_size, size, rtol=1e-4)
    places = np.zeros((L, T, D))
    if weights.positions == "shortformer":
        places = places + array(weights, "W_P")
    np.testing.assert_allclose(inputs.mixed - inputs.mixed_values, places, atol=1e-5)
    # In front of layer 0: a token and its position, tokens as often as each other.
    alone = [array(weights, "W_E")] * T
    if start is not None:
        alone[0] = start[None]
    if weights.positions == "learned":
        scale = (oracle_size(weights, T) / oracle_size(weights, T).mean())[:, None, None]
        alone = [x * s + place for x, s, place in zip(alone, scale, array(weights, "W_P"), strict=True)]
    which = []
    for t in range(T):
        candidates = np.asarray(reading.normalized(weights, jnp.asarray(alone[t], jnp.float32)))
        distance = np.abs(candidates - inputs.mixed_values[0, t]).max(-1)
        assert distance.min() < 1e-4
        which.append(int(distance.argmin()))
    assert set(which[start is not None :]) | {which[0]} <= set(range(N))
    if start is None:
        assert set(np.bincount(which, minlength=N)) <= {T // N, T // N + 1}


def test_mixed_rows_hold_what_each_earlier_head_moves_from_one_row_to_each():
    """One head a layer: what is added in front of the next is its values, moved along by one number for all."""
    weights = random_weights("learned", biases=False)
    one = {name: getattr(weights, name)[:, :1] for name in ("W_Q", "W_K", "W_V", "W_O")}
    weights = dataclasses.replace(weights, **one)
    share = SHARES[:, :, :1]
    inputs = ideal_inputs(weights, T, *share, None, jax.random.key(3))
    first = np.asarray(inputs.mixed[0])
    for layer in range(L - 1):
        moved = first @ np.asarray(weights.W_V[layer, 0]) @ np.asarray(weights.W_O[layer, 0])
        added = np.asarray(inputs.mixed[layer + 1] - inputs.mixed[layer])
        assert min(np.abs(np.roll(moved, by, axis=0) - added).max() for by in range(T)) < 1e-4


@pytest.mark.parametrize("positions", ["learned", "shortformer-layers", "rotary"])
def test_rows_and_scores_do_not_depend_on_the_basis_of_a_head(positions):
    """W_V G, G^-1 W_O and W_Q F, W_K F^-T with biases b_Q F, b_K F^-T; under rotary positions F may only scale."""
    weights = random_weights(positions, "rms")
    rng = np.random.default_rng(1)
    g = np.eye(K) + 0.3 * rng.normal(size=(L, 2, K, K))
    f = np.eye(K) + 0.3 * rng.normal(size=(L, 2, K, K))
    if positions == "rotary":
        f = np.exp(rng.normal(size=(L, 2, 1, 1))) * np.eye(K)
    back = np.linalg.inv(f).swapaxes(-1, -2)
    f_head, g_head = np.repeat(f, 2, axis=1), np.repeat(g, 2, axis=1)
    turned = {"W_V": weights.W_V @ g, "W_O": np.linalg.inv(g_head) @ weights.W_O}
    turned |= {"W_Q": weights.W_Q @ f_head, "b_Q": (weights.b_Q[:, :, None] @ f_head)[:, :, 0]}
    turned |= {"W_K": weights.W_K @ back, "b_K": (weights.b_K[:, :, None] @ back)[:, :, 0]}
    same = dataclasses.replace(weights, **{name: np.float32(x) for name, x in turned.items()})

    def everything(weights):
        inputs = ideal_inputs(weights, T, *SHARES, None, jax.random.key(0))
        by_token = [token_scores(weights, inputs.tokens, x, np.arange(T)) for x in (inputs.tokens, inputs.sent)]
        by_pointer = token_scores(weights, inputs.pointers, inputs.places, np.arange(T))
        by_place = [position_scores(weights, x, x) for x in (inputs.positions, inputs.mixed)]
        return inputs, by_token, by_pointer, by_place

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3), everything(weights), everything(same)
    )


def test_a_model_of_one_layer_is_sent_nothing():
    weights = random_weights("learned", "layer")
    names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K")
    weights = dataclasses.replace(weights, **{name: getattr(weights, name)[:1] for name in names})
    inputs = ideal_inputs(weights, T, *SHARES[:, :1], None, jax.random.key(0))
    assert (inputs.sent == 0).all()
    assert (inputs.pointers == 0).all()
    assert inputs.mixed.shape == (1, T, D)
