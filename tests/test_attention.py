"""QK and OV circuits in residual, token and position space, against the dense matrices in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.circuits import attention
from circuits_jax.circuits.weights import CircuitWeights, params_from_weights
from circuits_jax.models.transformer import ROTARY_BASE, forward

V, T, L, H, D, K = 7, 6, 2, 3, 16, 4
CIRCUITS = ("qk", "ov", "token_qk", "token_ov", "position_qk", "mean_qk")


@jax.jit
def every_circuit(weights):
    with_positions = weights.W_P is not None
    return {name: getattr(attention, name)(weights) for name in CIRCUITS if with_positions or name != "position_qk"}


qk_at, token_qk_at = jax.jit(attention.qk), jax.jit(attention.token_qk)


def random_weights(positions, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.normal(size=shape) / 3).astype(np.float32)  # noqa: E731
    return CircuitWeights(
        W_E=draw(V, D), W_U=draw(D, V), W_P=draw(T, D) if positions == "learned" else None,
        W_Q=draw(L, H, D, K), W_K=draw(L, H, D, K), W_V=draw(L, H, D, K), W_O=draw(L, H, K, D),
        n_context=T, positions=positions,
    )  # fmt: skip


LEARNED, ROTARY = random_weights("learned"), random_weights("rotary")


def rotation(offset):
    """R [K,K]: the pair (a, a + K/2) turns by offset * base^(-2a/K)."""
    matrix = np.zeros((K, K))
    for a in range(K // 2):
        angle = offset * ROTARY_BASE ** (-2 * a / K)
        b = a + K // 2
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[a, b], matrix[b, a] = math.sin(angle), -math.sin(angle)
    return matrix


def dense(circuit):
    return np.asarray(circuit.left, np.float64) @ np.asarray(circuit.right, np.float64)


def assert_circuit(circuit, expected):
    """Of rank at most K, and equal to the dense matrix [L,H,...] of every head to 1e-5 of the largest entry."""
    assert circuit.shape == expected.shape
    assert circuit.left.shape[-1] == circuit.right.shape[-2] == K
    np.testing.assert_allclose(dense(circuit), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def w_qk(weights, turn=None):
    """Dense W_Q R W_K^T, [L,H,D,D]."""
    return weights.W_Q.astype(np.float64) @ (np.eye(K) if turn is None else turn) @ weights.W_K.mT


def w_ov(weights):
    """Dense W_V W_O, [L,H,D,D]."""
    return weights.W_V.astype(np.float64) @ weights.W_O


@pytest.mark.parametrize("weights", [LEARNED, ROTARY], ids=["learned", "rotary"])
def test_circuits_of_every_head(weights):
    circuits, e, u = every_circuit(weights), weights.W_E, weights.W_U
    assert_circuit(circuits["qk"], w_qk(weights))
    assert_circuit(circuits["ov"], w_ov(weights))
    assert_circuit(circuits["token_qk"], e @ w_qk(weights) @ e.T)
    assert_circuit(circuits["token_ov"], e @ w_ov(weights) @ u)


def test_position_circuit():
    p = LEARNED.W_P
    assert_circuit(every_circuit(LEARNED)["position_qk"], p @ w_qk(LEARNED) @ p.T)


def test_position_circuit_with_positions_of_each_layer():
    """Shortformer with a norm: W_P [L,T,D], because the gain was folded into W_Q and W_K."""
    p = np.random.default_rng(1).normal(size=(L, T, D)).astype(np.float32)
    weights = dataclasses.replace(LEARNED, W_P=p, positions="shortformer", norm="rms")
    expected = np.stack([p[layer] @ w_qk(weights)[layer] @ p[layer].T for layer in range(L)])
    assert_circuit(jax.jit(attention.position_qk)(weights), expected)


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_position_circuit_needs_position_vectors(positions):
    with pytest.raises(ValueError, match=f"W_P.*positions='{positions}'"):
        attention.position_qk(random_weights(positions))


@pytest.mark.parametrize("offset", [0, 1, -3, 5])
def test_rotary_circuit_turns_with_the_offset(offset):
    expected = w_qk(ROTARY, rotation(offset))
    assert_circuit(qk_at(ROTARY, offset), expected)
    assert_circuit(token_qk_at(ROTARY, offset), ROTARY.W_E @ expected @ ROTARY.W_E.T)


def test_rotary_scores_of_the_forward_pass_are_those_of_the_offset():
    """Score of query i for key j = x_i W_QK(i - j) x_j^T / sqrt(K), for every pair, also j > i before the mask."""
    config, params = params_from_weights(ROTARY)
    _, seen = forward(config, params, np.array([3, 0, 4, 4, 1, 6]))
    offsets = np.arange(1 - T, T)
    by_offset = dense(jax.jit(jax.vmap(attention.qk, in_axes=(None, 0)))(ROTARY, offsets))
    assert by_offset.shape == (len(offsets), L, H, D, D)
    for layer, head in np.ndindex(L, H):
        x = np.asarray(seen.residual[layer], np.float64)
        expected = np.zeros((T, T))
        for i in range(T):
            for j in range(T):
                expected[i, j] = x[i] @ by_offset[i - j + T - 1, layer, head] @ x[j] / math.sqrt(K)
        np.testing.assert_allclose(seen.scores[layer, head], expected, atol=1e-5 * np.abs(expected).max())


def test_offset_changes_nothing_without_rotary_positions():
    np.testing.assert_array_equal(dense(qk_at(LEARNED, 3)), dense(qk_at(LEARNED, 0)))


def test_mean_circuit_is_the_average_over_the_offsets_of_the_context():
    average = sum(w_qk(ROTARY, rotation(offset)) for offset in range(T)) / T
    assert_circuit(every_circuit(ROTARY)["mean_qk"], average)


def test_mean_circuit_without_rotary_positions_is_the_circuit():
    circuits = every_circuit(LEARNED)
    np.testing.assert_array_equal(dense(circuits["mean_qk"]), dense(circuits["qk"]))
    without_context = dataclasses.replace(LEARNED, n_context=0)
    np.testing.assert_array_equal(dense(attention.mean_qk(without_context)), dense(circuits["qk"]))


def test_mean_circuit_needs_the_length_of_the_context():
    with pytest.raises(ValueError, match="n_context must be given"):
        attention.mean_qk(dataclasses.replace(ROTARY, n_context=0))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_many_models_under_vmap(positions):
    models = [random_weights(positions, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.jit(jax.vmap(every_circuit))(stacked)
    for i, weights in enumerate(models):
        for name, circuit in every_circuit(weights).items():
            np.testing.assert_allclose(dense(together[name])[i], dense(circuit), atol=1e-5)
