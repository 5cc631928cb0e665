"""QK and OV circuits in residual, token and position space, against the dense matrices in float64 and the model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import circuits_jax
from circuits_jax.circuits import attention, reading
from circuits_jax.circuits.weights import CircuitWeights, params_from_weights
from circuits_jax.models.config import Rotary, TransformerConfig
from circuits_jax.models.transformer import apply, forward, init_params

V, T, L, H, D, K = 7, 6, 2, 3, 16, 6
WHOLE = Rotary()
CIRCUITS = ("qk", "ov", "token_qk", "token_ov", "position_qk", "mean_qk")


@jax.jit
def every_circuit(weights):
    with_positions = weights.W_P is not None
    names = [name for name in CIRCUITS if with_positions or name != "position_qk"]
    circuits = {name: getattr(circuits_jax, name)(weights) for name in names}
    return {name: circuit.low_rank() if "token" in name else circuit for name, circuit in circuits.items()}


qk_at = jax.jit(attention.qk)
token_qk_at = jax.jit(lambda weights, offset: circuits_jax.token_qk(weights, offset).low_rank())


def random_weights(positions, seed=0, n_heads=H, n_groups=H, rotary=WHOLE):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.normal(size=shape) / 3).astype(np.float32)  # noqa: E731
    return CircuitWeights(
        W_E=draw(V, D), W_U=draw(D, V), W_P=draw(T, D) if positions == "learned" else None,
        W_Q=draw(L, n_heads, D, K), W_K=draw(L, n_groups, D, K), W_V=draw(L, n_groups, D, K),
        W_O=draw(L, n_heads, K, D), n_context=T, positions=positions, rotary=rotary,
    )  # fmt: skip


LEARNED, ROTARY = random_weights("learned"), random_weights("rotary")
GROUPED = random_weights("learned", n_heads=4, n_groups=2)
# Query heads that share keys, and every form of rotary positions that is not the default.
TURNED = random_weights("rotary", n_heads=4, n_groups=2, rotary=Rotary(4, "interleaved", 30.0))
INTERLEAVED = random_weights("rotary", rotary=Rotary(pairs="interleaved"))
PARTIAL = random_weights("rotary", n_heads=2, n_groups=1, rotary=Rotary(4))
ALL_ROTARY = pytest.mark.parametrize(
    "weights", [ROTARY, TURNED, INTERLEAVED, PARTIAL], ids=["half", "grouped-interleaved-part", "interleaved", "part"]
)


def rotation(offset, rotary=WHOLE, width=K):
    """R [K,K]: pair i of the first dim components turns by offset * base^(-2i/dim)."""
    matrix, dim = np.eye(width), rotary.dim or width
    for i in range(dim // 2):
        angle = offset * rotary.base ** (-2 * i / dim)
        a, b = {"half": (i, i + dim // 2), "interleaved": (2 * i, 2 * i + 1)}[rotary.pairs]
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[a, b], matrix[b, a] = math.sin(angle), -math.sin(angle)
    return matrix


def shared(weights, x):
    """[L,G,...] -> [L,H,...] in float64: head h reads what belongs to head h // (H/G)."""
    n_heads, n_groups = weights.W_Q.shape[1], x.shape[1]
    return np.stack([np.asarray(x, np.float64)[:, h // (n_heads // n_groups)] for h in range(n_heads)], 1)


def dense(circuit):
    return np.asarray(circuit.left, np.float64) @ np.asarray(circuit.right, np.float64)


def assert_circuit(circuit, expected):
    """Of rank at most K, and equal to the dense matrix [L,H,...] of every head to 1e-5 of the largest entry."""
    assert circuit.shape == expected.shape
    assert circuit.left.shape[-1] == circuit.right.shape[-2] == K
    np.testing.assert_allclose(dense(circuit), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def w_qk(weights, turn=None):
    """Dense W_Q R W_K^T, [L,H,D,D]."""
    return weights.W_Q.astype(np.float64) @ (np.eye(K) if turn is None else turn) @ shared(weights, weights.W_K).mT


def w_ov(weights):
    """Dense W_V W_O, [L,H,D,D]."""
    return shared(weights, weights.W_V) @ weights.W_O


@pytest.mark.parametrize("weights", [LEARNED, ROTARY], ids=["learned", "rotary"])
def test_circuits_of_every_head(weights):
    circuits, e, u = every_circuit(weights), weights.W_E, weights.W_U
    assert_circuit(circuits["qk"], w_qk(weights))
    assert_circuit(circuits["ov"], w_ov(weights))
    assert_circuit(circuits["token_qk"], e @ w_qk(weights) @ e.T)
    assert_circuit(circuits["token_ov"], e @ w_ov(weights) @ u)


@pytest.mark.parametrize("weights", [GROUPED, TURNED], ids=["learned", "rotary"])
def test_circuits_of_heads_that_share_keys_and_values(weights):
    circuits = jax.jit(lambda w: (attention.qk(w), attention.ov(w)))(weights)
    for circuit, expected in zip(circuits, (w_qk(weights), w_ov(weights)), strict=True):
        assert_circuit(circuit, expected)


@pytest.mark.parametrize("weights", [LEARNED, GROUPED], ids=["all", "grouped"])
def test_position_circuit(weights):
    p = weights.W_P
    assert_circuit(jax.jit(attention.position_qk)(weights), p @ w_qk(weights) @ p.T)


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


@ALL_ROTARY
@pytest.mark.parametrize("offset", [0, 1, -3, 5])
def test_rotary_circuit_turns_with_the_offset(weights, offset):
    assert_circuit(qk_at(weights, offset), w_qk(weights, rotation(offset, weights.rotary)))


def test_rotary_token_circuit_turns_with_the_offset():
    assert_circuit(token_qk_at(ROTARY, 2), ROTARY.W_E @ w_qk(ROTARY, rotation(2)) @ ROTARY.W_E.T)


@ALL_ROTARY
def test_rotary_scores_of_the_forward_pass_are_those_of_the_offset(weights):
    """Score of query i for key j = x_i W_QK(i - j) x_j^T / sqrt(K), for every pair, also j > i before the mask."""
    config, params = params_from_weights(weights)
    _, seen = forward(config, params, np.array([3, 0, 4, 4, 1, 6]))
    offsets = np.arange(1 - T, T)
    by_offset = dense(jax.jit(jax.vmap(attention.qk, in_axes=(None, 0)))(weights, offsets))
    assert by_offset.shape == (len(offsets), *weights.W_Q.shape[:3], D)
    for layer, head in np.ndindex(weights.W_Q.shape[:2]):
        x = np.asarray(seen.residual[layer], np.float64)
        expected = np.zeros((T, T))
        for i in range(T):
            for j in range(T):
                expected[i, j] = x[i] @ by_offset[i - j + T - 1, layer, head] @ x[j] / math.sqrt(K)
        np.testing.assert_allclose(seen.scores[layer, head], expected, atol=1e-5 * np.abs(expected).max())


def test_offset_changes_nothing_without_rotary_positions():
    np.testing.assert_array_equal(dense(qk_at(LEARNED, 3)), dense(qk_at(LEARNED, 0)))


@ALL_ROTARY
def test_mean_circuit_is_the_average_over_the_offsets_of_the_context(weights):
    average = sum(w_qk(weights, rotation(offset, weights.rotary)) for offset in range(T)) / T
    assert_circuit(jax.jit(attention.mean_qk)(weights), average)


def test_mean_circuit_without_rotary_positions_is_the_circuit():
    circuits = every_circuit(LEARNED)
    np.testing.assert_array_equal(dense(circuits["mean_qk"]), dense(circuits["qk"]))
    without_context = dataclasses.replace(LEARNED, n_context=0)
    np.testing.assert_array_equal(dense(attention.mean_qk(without_context)), dense(circuits["qk"]))


def test_mean_circuit_needs_the_length_of_the_context():
    with pytest.raises(ValueError, match="n_context must be given"):
        attention.mean_qk(dataclasses.replace(ROTARY, n_context=0))


@ALL_ROTARY
def test_offset_profile_is_the_norm_of_the_dense_circuit(weights):
    dense_norms = [np.linalg.norm(w_qk(weights, rotation(t, weights.rotary)), axis=(-2, -1)) for t in range(T)]
    profile = jax.jit(attention.offset_profile)(weights)
    np.testing.assert_allclose(profile, np.stack(dense_norms, -1), rtol=1e-5)
    assert (np.ptp(profile, axis=-1) > 1e-3).all()


@pytest.mark.parametrize("n_context", [0, T])
def test_offset_profile_is_constant_without_rotary_positions(n_context):
    """W_P tells the length of the context too."""
    profile = jax.jit(attention.offset_profile)(dataclasses.replace(GROUPED, n_context=n_context))
    assert profile.shape == (L, 4, T)
    norm = np.linalg.norm(w_qk(GROUPED), axis=(-2, -1))
    np.testing.assert_allclose(profile, np.broadcast_to(norm[..., None], (L, 4, T)), rtol=1e-5)


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_offset_profile_needs_the_length_of_the_context(positions):
    with pytest.raises(ValueError, match="n_context must be given"):
        attention.offset_profile(dataclasses.replace(random_weights(positions), n_context=0))


# Biases, and the model ----------------------------------------------------------------------------------------------


def with_biases(weights, **biases):
    draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape).astype(np.float32)  # noqa: E731
    n_heads, n_groups = weights.W_Q.shape[1], weights.W_K.shape[1]
    drawn = {"b_Q": draw(1, L, n_heads, K), "b_K": draw(2, L, n_groups, K), "b_V": draw(3, L, n_groups, K)}
    return dataclasses.replace(weights, **(drawn | biases))


def circuits_with_bias(weights):
    """qk_with_bias at every offset 1 - T ... T - 1, ov and ov_bias."""
    by_offset = jax.vmap(attention.qk_with_bias, (None, 0))(weights, np.arange(1 - T, T))
    return by_offset, attention.ov(weights), attention.ov_bias(weights)


def scores_of(by_offset, x):
    """[x_i, 1] M(i - j) [x_j, 1]^T / sqrt(K) of every head of the first layer, float64 [H,T,T]."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    scores = np.zeros((by_offset.shape[2], len(x), len(x)))
    for head, i, j in np.ndindex(scores.shape):
        scores[head, i, j] = x[i] @ by_offset[i - j + T - 1, 0, head] @ x[j] / math.sqrt(K)
    return scores


def random_params(config, seed=0):
    """Every leaf random, with gains and biases away from 1 and 0."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def draw(path, leaf):
        gain = path[-1].key == "scale"
        return jnp.float32(rng.uniform(0.5, 1.5, leaf.shape) if gain else rng.normal(size=leaf.shape) / 2)

    return jax.tree_util.tree_map_with_path(draw, shapes)


NORMS = ("none", "layer", "rms")
FORMS = {
    "learned": {"positions": "learned"},
    "half": {"positions": "rotary"},
    "interleaved": {"positions": "rotary", "rotary_pairs": "interleaved", "rotary_base": 200.0},
    "part": {"positions": "rotary", "rotary_dim": 4},
}


@pytest.mark.parametrize("n_kv_heads", [0, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_first_layer_is_what_its_circuits_and_biases_say(norm, form, n_kv_heads):
    """Scores before softmax, and head outputs alpha (x W_OV) + b_V W_O, from the residual normalised without gain."""
    config = TransformerConfig(
        V, T, n_layers=1, n_heads=4, d_model=D, d_head=K, norm=norm, bias=True, n_kv_heads=n_kv_heads,
        embedding_scale=1.7, **FORMS[form],
    )  # fmt: skip
    params = random_params(config)
    # Nothing is jitted: single operations are compiled once for all rows.
    _, seen = apply(config, params, np.array([3, 0, 4, 4, 1, 6]))
    circuit, ov, ov_bias = circuits_with_bias(CircuitWeights.from_params(config, params))
    assert circuit.shape == (2 * T - 1, 1, 4, D + 1, D + 1)
    x = np.asarray(seen.residual[0], np.float64)
    np.testing.assert_allclose(x[0], params["W_E"][3] * 1.7 + (params["W_P"][0] if form == "learned" else 0), atol=1e-6)
    centred = lambda y: y - y.mean(-1, keepdims=True) if norm == "layer" else y  # noqa: E731
    x = centred(x)
    if norm != "none":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    scores = scores_of(dense(circuit), x)
    np.testing.assert_allclose(seen.scores[0], scores, rtol=0, atol=1e-5 * np.abs(scores).max())
    outputs = np.asarray(seen.patterns[0], np.float64) @ x @ dense(ov)[0] + np.asarray(ov_bias)[0, :, None]
    seen_outputs = centred(np.asarray(seen.head_outputs[0], np.float64))  # a mean is what no LayerNorm reader sees
    np.testing.assert_allclose(seen_outputs, outputs, rtol=0, atol=1e-5 * np.abs(outputs).max())


@pytest.mark.parametrize("weights", [GROUPED, TURNED], ids=["learned", "rotary"])
def test_missing_biases_are_rows_of_zeros(weights):
    circuit = dense(jax.jit(attention.qk_with_bias)(weights, 3))
    np.testing.assert_array_equal(circuit[..., :D, :D], dense(qk_at(weights, 3)))
    assert (circuit[..., D, :] == 0).all()
    assert (circuit[..., :, D] == 0).all()
    assert attention.ov_bias(weights).shape == (L, 4, D)
    assert not np.asarray(attention.ov_bias(weights)).any()
    with_key_bias = with_biases(weights, b_Q=None)
    key_column = weights.W_Q @ rotation(3, weights.rotary) if weights.positions == "rotary" else weights.W_Q
    expected = np.einsum("lhdk,lhk->lhd", key_column, shared(weights, with_key_bias.b_K))
    circuit = dense(jax.jit(attention.qk_with_bias)(with_key_bias, 3))
    np.testing.assert_allclose(circuit[..., :D, D], expected, atol=1e-5)
    assert (circuit[..., D, :] == 0).all()


@pytest.mark.parametrize("weights", [GROUPED, TURNED], ids=["learned", "rotary"])
def test_key_bias_drops_out_of_softmax_unless_positions_are_rotary(weights):
    x = np.random.default_rng(4).normal(size=(T, D))

    def patterns(**biases):
        scores = scores_of(dense(circuits_with_bias(with_biases(weights, **biases))[0]), x)
        exponentials = np.tril(np.exp(scores))
        return exponentials / exponentials.sum(-1, keepdims=True)

    whole, without_key_bias, without_query_bias = patterns(), patterns(b_K=None), patterns(b_Q=None)
    change = np.abs(whole - without_key_bias).max((1, 2))
    assert (change > 0.01).all() if weights.positions == "rotary" else (change < 1e-5).all()
    assert (np.abs(whole - without_query_bias).max((1, 2)) > 0.01).all()


# Many models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_many_models_under_vmap(positions):
    models = [random_weights(positions, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.jit(jax.vmap(every_circuit))(stacked)
    for i, weights in enumerate(models):
        for name, circuit in every_circuit(weights).items():
            np.testing.assert_allclose(dense(together[name])[i], dense(circuit), atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("positions", ["none", "learned", "shortformer", "rotary"])
def test_attention_scores_are_those_of_the_forward_pass(positions, norm):
    config = TransformerConfig(
        7, 8, n_layers=3, n_heads=4, n_kv_heads=2, d_model=16, positions=positions, norm=norm, bias=True
    )
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    tokens = np.array([[3, 0, 4, 4, 1], [6, 2, 2, 5, 0]])
    _, seen = forward(config, params, tokens)
    weights = CircuitWeights.from_params(config, params)
    residual = np.moveaxis(np.asarray(seen.residual[:, :-1]), 1, 0)
    rows = reading.qk_rows(weights, residual)
    for sequence in range(2):
        scores = reading.attention_scores(weights, residual[:, sequence])
        np.testing.assert_allclose(scores, seen.scores[sequence], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(rows[:, sequence], reading.qk_rows(weights, residual[:, sequence]))
