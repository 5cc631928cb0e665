"""Weight scores on circuits built by hand, against dense float64 formulas, and against what cutting the edges does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax import CircuitWeights, TransformerConfig, cut_edges, forward, init_params, params_from_weights
from circuits_jax.heads import signatures
from circuits_jax.models.config import Rotary
from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.repeated_tokens import RepeatedTokens

# The planted model: tokens, tokens that a previous-token head has written, and positions have coordinates of their own.
V, T = 10, 12
TOKEN, SENT, PLACE = slice(0, V), slice(V, 2 * V), slice(2 * V, 2 * V + T)
D, K = 2 * V + T, T
QUERIES = np.ones(T, bool)
PERIOD = 8
UNIFORM = np.mean(1 / np.arange(2, T + 1))  # previous_token of uniform attention

previous_token = jax.jit(signatures.previous_token)
k_composition = jax.jit(signatures.k_composition)
induction = jax.jit(signatures.induction)
position_pattern = jax.jit(signatures.position_pattern, static_argnums=1)
matching = jax.jit(signatures.matching, static_argnums=2)
content = jax.jit(signatures.content)


def planted(senders, gain=6.0, sharpness=20.0, n_layers=2, n_heads=3, noise=0.0, positions="learned"):
    """Heads (0, s) for s in senders look one back and move the token to SENT; head (1, 0) matches tokens with SENT.

    Then a query prefers the key behind its own earlier copy by gain, from each sender. All other weights are
    Gaussian with standard deviation noise.
    """
    rng = np.random.default_rng(0)
    shape = (n_layers, n_heads)
    w = {name: noise * rng.normal(size=(*shape, D, K)) for name in ("W_Q", "W_K", "W_V")}
    w["W_O"] = noise * rng.normal(size=(*shape, K, D))
    heads = [(0, s) for s in senders] + ([(1, 0)] if n_layers > 1 else [])
    for head in heads:
        for name in w:
            w[name][head] = 0.0
    for s in senders:
        w["W_Q"][0, s, PLACE][1:, : T - 1] = np.sqrt(K) * sharpness * np.eye(T - 1)  # query t asks for place t - 1
        w["W_K"][0, s, PLACE] = np.eye(T)
        w["W_V"][0, s, TOKEN, :V] = np.eye(V)
        w["W_O"][0, s, :V, SENT] = np.eye(V)
    if n_layers > 1:
        w["W_Q"][1, 0, TOKEN, :V] = np.sqrt(K) * gain * np.eye(V)
        w["W_K"][1, 0, SENT, :V] = np.eye(V)
        w["W_V"][1, 0, TOKEN, :V] = np.eye(V)
        w["W_O"][1, 0, :V, TOKEN] = 5 * np.eye(V)
    w |= {"W_E": np.eye(D)[TOKEN], "W_U": np.eye(D)[:, TOKEN], "W_P": np.eye(D)[PLACE]}
    if positions != "learned":
        del w["W_P"]
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in w.items()}
    return CircuitWeights(**arrays, n_context=T, positions=positions)


# The oracle -------------------------------------------------------------------------------------------------------


def random_weights(positions, n_layers=3, n_heads=2, n_groups=2, rotary=Rotary(), seed=0, norm="none"):  # noqa: B008
    """Nothing planted, biases on q and k; for shortformer one W_P for each layer, as norm gains leave it."""
    rng = np.random.default_rng(seed)
    d, k, v, t = 8, 4, 6, 7
    normal = lambda *shape: jnp.asarray(0.6 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    heads, kv_heads = (n_layers, n_heads), (n_layers, n_groups)
    w_p = {"learned": (t, d), "shortformer": (n_layers, t, d)}.get(positions)
    return CircuitWeights(
        W_E=normal(v, d), W_U=normal(d, v), W_P=None if w_p is None else normal(*w_p),
        W_Q=normal(*heads, d, k), W_K=normal(*kv_heads, d, k), W_V=normal(*kv_heads, d, k), W_O=normal(*heads, k, d),
        b_Q=normal(*heads, k), b_K=normal(*kv_heads, k), n_context=t, positions=positions, rotary=rotary,
        norm=norm,
    )  # fmt: skip


def float64(weights):
    """The arrays by name; keys and values written out for each query head h, that of head h // (H/G)."""
    names = ("W_E", "W_P", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K")
    w = {name: np.asarray(getattr(weights, name), np.float64) for name in names if getattr(weights, name) is not None}
    n_heads, n_groups = w["W_Q"].shape[1], w["W_K"].shape[1]
    for name in ("W_K", "W_V", "b_K"):
        if name in w:
            w[name] = np.stack([w[name][:, h // (n_heads // n_groups)] for h in range(n_heads)], 1)
    return w


def rotation(offset, k, rotary):
    """R with q R k^T the score of a query that far behind its key: pair i turns by offset * base^(-2i/dim)."""
    matrix, dim = np.eye(k), rotary.dim or k
    for i in range(dim // 2):
        angle = offset * rotary.base ** (-2 * i / dim)
        a, b = {"half": (i, i + dim // 2), "interleaved": (2 * i, 2 * i + 1)}[rotary.pairs]
        matrix[a, a] = matrix[b, b] = np.cos(angle)
        matrix[a, b], matrix[b, a] = np.sin(angle), -np.sin(angle)
    return matrix


def oracle_size(weights, length):
    """[T]: the root mean square of a coordinate of token plus position, over tokens, as the norm divides by."""
    if weights.norm == "none":
        return np.ones(length)
    w = float64(weights)
    square = np.full(length, (w["W_E"] ** 2).sum(-1).mean())
    if weights.positions == "learned":
        square += (w["W_P"][:length] ** 2).sum(-1)
    return np.sqrt(square / w["W_E"].shape[-1] + 1e-5)


def oracle_position_pattern(weights, length):
    """Every position holds the mean token; positions are added to it before the norm, or behind it in shortformer."""
    w = float64(weights)
    mean_token, size = w["W_E"].mean(0), oracle_size(weights, length)
    n_layers, n_heads, _, k = w["W_Q"].shape
    pattern = np.zeros((n_layers, n_heads, length, length))
    for layer in range(n_layers):
        for head in range(n_heads):
            for t in range(length):
                scores = []
                for s in range(t + 1):
                    read_t, read_s = mean_token / size[t], mean_token / size[s]
                    if "W_P" in w:
                        places = w["W_P"][layer] if w["W_P"].ndim == 3 else w["W_P"]
                        learned = weights.positions == "learned"
                        read_t = read_t + places[t] / (size[t] if learned else 1)
                        read_s = read_s + places[s] / (size[s] if learned else 1)
                    q = read_t @ w["W_Q"][layer, head] + w["b_Q"][layer, head]
                    key = read_s @ w["W_K"][layer, head] + w["b_K"][layer, head]
                    turn = rotation(t - s, k, weights.rotary) if weights.positions == "rotary" else np.eye(k)
                    scores.append(q @ turn @ key / np.sqrt(k))
                pattern[layer, head, t, : t + 1] = np.exp(scores) / np.exp(scores).sum()
    return pattern


def oracle_previous_token(weights, queries):
    pattern = oracle_position_pattern(weights, len(queries))
    counted = [t for t in range(1, len(queries)) if queries[t]]
    return np.mean([pattern[:, :, t, t - 1] for t in counted], axis=0)


def oracle_mean_qk(weights, layer, head):
    w = float64(weights)
    turns = [rotation(offset, w["W_Q"].shape[-1], weights.rotary) for offset in range(weights.n_context)]
    turn = np.mean(turns, axis=0) if weights.positions == "rotary" else np.eye(w["W_Q"].shape[-1])
    return w["W_Q"][layer, head] @ turn @ w["W_K"][layer, head].T


def on_and_off(matrix):
    on = np.eye(len(matrix), dtype=bool)
    return matrix[on], matrix[~on]


def oracle_k_paths(weights):
    """W_E W_QK^b (W_OV^a)^T W_E^T / sqrt(K), dense, zero for senders that are not earlier: [L,H,L,H,V,V]."""
    w = float64(weights)
    n_layers, n_heads, _, k = w["W_Q"].shape
    n_vocab, size = len(w["W_E"]), oracle_size(weights, weights.n_context).mean()
    paths = np.zeros((n_layers, n_heads, n_layers, n_heads, n_vocab, n_vocab))
    for b in np.ndindex(n_layers, n_heads):
        for a in np.ndindex(b[0], n_heads):
            w_ov = w["W_V"][a] @ w["W_O"][a]
            paths[(*a, *b)] = w["W_E"] @ oracle_mean_qk(weights, *b) @ w_ov.T @ w["W_E"].T / np.sqrt(k)
            paths[(*a, *b)] /= size**3  # the query's, the sender's and the key's norm
    return paths


def oracle_k_composition(weights):
    paths = oracle_k_paths(weights)
    gaps = np.zeros(paths.shape[:4])
    for pair in np.ndindex(gaps.shape):
        on, off = on_and_off(paths[pair])
        gaps[pair] = on.mean() - off.mean()
    return gaps


def oracle_induction(weights, queries, n):
    w = float64(weights)
    n_layers, n_heads, _, k = w["W_Q"].shape
    tokens = w["W_E"] / oracle_size(weights, weights.n_context).mean()
    looks_back, paths, gaps = (
        oracle_previous_token(weights, queries),
        oracle_k_paths(weights),
        oracle_k_composition(weights),
    )
    attention, joint = np.zeros((n_layers, n_heads)), np.zeros((n_layers, n_heads))
    edges = np.zeros((n_layers, n_heads, n_layers, n_heads))
    for b in np.ndindex(n_layers, n_heads):
        senders = list(np.ndindex(b[0], n_heads))
        margins = {a: looks_back[a] * gaps[(*a, *b)] for a in senders}
        sent = sum((looks_back[a] * paths[(*a, *b)] for a in senders), np.zeros_like(paths[0, 0, 0, 0]))
        own = tokens @ oracle_mean_qk(weights, *b) @ tokens.T / np.sqrt(k)
        noise = sum(part.var() for part in on_and_off(sent)) + 2 * on_and_off(own)[1].var()
        softness = np.sqrt(1 + np.pi * noise / 8)
        p = lambda z, s=softness: 1 / (1 + np.exp(-(z - np.log(n)) / s))  # noqa: E731
        whole = sum(margins.values())
        attention[b], joint[b] = p(whole), p(whole) - p(0)
        for a in senders:
            edges[(*a, *b)] = p(whole) - p(whole - margins[a])
    return attention, edges, joint


RANDOM = {
    "none": {},
    "learned": {},
    "shortformer": {},
    "rotary": {},
    "learned-grouped": {"n_heads": 4},
    "rotary-grouped": {"n_heads": 4, "rotary": Rotary(2, "interleaved", 50.0)},
    "rotary-interleaved": {"rotary": Rotary(pairs="interleaved")},
    "learned-rms": {"norm": "rms"},
    "shortformer-rms": {"norm": "rms"},
}


@pytest.fixture(scope="module", params=RANDOM)
def random(request):
    return random_weights(request.param.split("-")[0], **RANDOM[request.param])


def test_position_pattern_agrees_with_the_formula(random):
    pattern = position_pattern(random, 6)
    np.testing.assert_allclose(pattern, oracle_position_pattern(random, 6), atol=1e-5)


def test_previous_token_agrees_with_the_formula(random):
    for queries in (np.ones(7, bool), np.array([True, False, True, True, False, False, True])):
        np.testing.assert_allclose(previous_token(random, queries), oracle_previous_token(random, queries), atol=1e-5)
    if random.positions == "none":
        np.testing.assert_allclose(previous_token(random, np.ones(7, bool)), np.mean(1 / np.arange(2, 8)), atol=1e-6)
    assert np.isnan(previous_token(random, np.zeros(7, bool))).all()


def test_k_composition_agrees_with_the_dense_formula(random):
    np.testing.assert_allclose(k_composition(random), oracle_k_composition(random), atol=1e-4)


def test_induction_agrees_with_the_dense_formula(random):
    queries = np.array([True, True, False, True, True, False, True])
    expected = oracle_induction(random, queries, n=5)
    got = induction(random, queries, 5)
    for value, reference in zip((got.attention, got.edges, got.joint_edges), expected, strict=True):
        np.testing.assert_allclose(value, reference, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "positions", "more"),
    [
        ("none", "learned", {}),
        ("none", "shortformer", {}),
        ("layer", "shortformer", {}),
        ("none", "rotary", {}),
        ("layer", "learned", {"n_heads": 4, "n_kv_heads": 2, "embedding_scale": 3.0}),
        ("rms", "rotary", {}),
        (
            "layer",
            "rotary",
            {"n_heads": 4, "n_kv_heads": 2, "rotary_dim": 2, "rotary_pairs": "interleaved", "embedding_scale": 3.0},
        ),
    ],
)
def test_position_pattern_is_what_a_model_does_whose_tokens_are_all_alike(norm, positions, more):
    """Equal tokens leave positions alone to decide, and what all tokens have in common is then all there is of them."""
    shape = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4}
    config = TransformerConfig(6, 7, **(shape | more), norm=norm, positions=positions, bias=True)
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: (0.7 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    params["W_E"][:] = params["W_E"][0]
    if norm != "none" and positions == "learned":
        # The size is that of a token plus that of a position, exact where they are at right angles.
        params["W_E"][:, 4:], params["W_P"][:, :4] = 0.0, 0.0
        for half, name in ((slice(0, 4), "W_E"), (slice(4, 8), "W_P")):
            params[name][:, half] -= params[name][:, half].mean(-1, keepdims=True)
    _, seen = forward(config, params, np.arange(6))
    weights = jax.jit(lambda params: CircuitWeights.from_params(config, params))(params)
    np.testing.assert_allclose(position_pattern(weights, 6), seen.patterns, atol=1e-5)


def test_a_head_that_looks_at_position_0_from_what_all_tokens_have_in_common():
    """Why positions hold the mean token: all tokens share one direction, and the query asks through it for place 0.

    Positions alone have no query then, so that the head would look uniform.
    """
    d, common, place = V + 1 + T, V, V + 1
    w_q, w_k = np.zeros((1, 1, d, K), np.float32), np.zeros((1, 1, d, K), np.float32)
    w_q[0, 0, common, 0], w_k[0, 0, place, 0] = 10 * np.sqrt(K), 1
    w_e = np.concatenate([np.eye(V), np.ones((V, 1)), np.zeros((V, T))], 1).astype(np.float32)
    weights = CircuitWeights(
        W_E=w_e, W_P=np.eye(d, dtype=np.float32)[place:], W_Q=w_q, W_K=w_k, W_V=w_k, W_O=w_k.mT, W_U=w_e.T
    )
    config, params = params_from_weights(weights)
    _, seen = forward(config, params, np.random.default_rng(0).integers(0, V, T))
    pattern = position_pattern(weights, T)
    np.testing.assert_allclose(pattern, seen.patterns, atol=1e-6)
    assert (pattern[0, 0, :, 0] > 0.999).all()
    alone = position_pattern(dataclasses.replace(weights, W_E=0 * weights.W_E), T)
    np.testing.assert_allclose(alone[0, 0, :, 0], 1 / np.arange(1, T + 1), rtol=1e-6)


# Matching and content ---------------------------------------------------------------------------------------------


def oracle_matching(scores, n_distractors, n_matches):
    scores, n, attention = np.asarray(scores, np.float64), len(scores), []
    for u in range(n):
        others = np.mean([np.exp(scores[u, w]) for w in range(n) if w != u])
        match = np.exp(scores[u, u])
        attention.append(match / (n_matches * match + n_distractors * others))
    chance = 1 / (n_matches + n_distractors)
    return (np.mean(attention) - chance) / (1 - chance)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1.0, 40.0), st.sampled_from([1, 2]))
def test_matching_agrees_with_the_formula(seed, n_distractors, n_matches):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(7, 7)) * 3 + rng.normal(size=(7, 1)) * 5
    got = matching(scores.astype(np.float32), n_distractors, n_matches)
    np.testing.assert_allclose(got, oracle_matching(scores, n_distractors, n_matches), atol=1e-5)
    assert -1 < got <= 1
    # What a query gives to all keys drops out in the softmax.
    moved = matching((scores + rng.normal(size=(7, 1))).astype(np.float32), n_distractors, n_matches)
    np.testing.assert_allclose(moved, got, atol=1e-5)


@pytest.mark.parametrize("n_matches", [1, 2])
def test_matching_is_zero_by_chance_and_at_most_what_softmax_allows(n_matches):
    n_distractors = 6.0
    chance = 1 / (n_matches + n_distractors)
    for equal in (np.zeros((5, 5), np.float32), np.full((5, 5), 300.0, np.float32)):
        np.testing.assert_allclose(matching(equal, n_distractors, n_matches), 0.0, atol=1e-5)
    most = (1 / n_matches - chance) / (1 - chance)  # 1 for one match
    for size in (60.0, 1e4):  # no overflow
        got = matching(size * np.eye(5, dtype=np.float32), n_distractors, n_matches)
        np.testing.assert_allclose(got, most, rtol=1e-6)
        least = matching(-size * np.eye(5, dtype=np.float32), n_distractors, n_matches)
        np.testing.assert_allclose(least, -chance / (1 - chance), rtol=1e-5)


def test_matching_of_an_identity_has_its_closed_form():
    got = matching(2.0 * np.eye(9, dtype=np.float32), 8.0, 1)
    p = np.exp(2) / (np.exp(2) + 8)
    np.testing.assert_allclose(got, (p - 1 / 9) / (8 / 9), rtol=1e-6)
    # One row of many that matches counts by its share.
    one = np.zeros((9, 9), np.float32)
    one[4, 4] = 60.0
    np.testing.assert_allclose(matching(one, 8.0, 1), 1 / 9, rtol=1e-5)


def oracle_energy_between_different(scores):
    """Mean square residual of the least-squares fit s_uw = r_u + c_w over u != w."""
    n = len(scores)
    pairs = [(u, w) for u in range(n) for w in range(n) if u != w]
    design, target = np.zeros((len(pairs), 2 * n)), np.array([scores[pair] for pair in pairs], np.float64)
    for row, (u, w) in enumerate(pairs):
        design[row, u] = design[row, n + w] = 1.0
    return np.mean((target - design @ np.linalg.lstsq(design, target)[0]) ** 2)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_double_centring_takes_out_what_rows_and_columns_give_alone(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(2, 5, 7))
    got = signatures.double_centred(jnp.asarray(scores, jnp.float32))
    left, right = np.eye(5) - 1 / 5, np.eye(7) - 1 / 7
    np.testing.assert_allclose(got, left @ scores @ right, atol=1e-5)
    more = scores + rng.normal(size=(2, 5, 1)) + rng.normal(size=(2, 1, 7))
    np.testing.assert_allclose(signatures.double_centred(jnp.asarray(more, jnp.float32)), got, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_energy_between_different_does_not_see_the_diagonal(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(6, 6)).astype(np.float32)
    energy = signatures.energy_between_different(scores)
    np.testing.assert_allclose(energy, oracle_energy_between_different(scores), rtol=1e-4)
    matched = scores + np.diag(rng.normal(size=6)).astype(np.float32) * 10
    np.testing.assert_allclose(signatures.energy_between_different(matched), energy, rtol=1e-4)
    alone = scores + (rng.normal(size=(6, 1)) + rng.normal(size=(1, 6))).astype(np.float32)
    np.testing.assert_allclose(signatures.energy_between_different(alone), energy, rtol=1e-3)


def test_what_keys_give_alone_is_no_energy_between_different_tokens():
    """s_uw = c_w is the column means and nothing else; double-centred with its diagonal it is 0."""
    preferred = np.zeros((10, 10), np.float32)
    preferred[:, 3] = 30.0
    np.testing.assert_allclose(signatures.double_centred(preferred), 0.0, atol=1e-4)
    np.testing.assert_allclose(signatures.energy_between_different(preferred), 0.0, atol=1e-4)


def test_content_of_planted_tables():
    n, nothing = 10, np.zeros((12, 12), np.float32)
    identity = np.eye(n, dtype=np.float32)
    token_map = np.roll(identity, 1, axis=1)
    assert content(50 * token_map, nothing, 0.0) > 0.99
    assert content(50 * identity, nothing, 0.0) < 1e-6  # duplicate_token's
    assert content(0 * identity, 50 * np.eye(12, dtype=np.float32), 3.0) == 0
    assert content(0 * identity, nothing, 0.0) == 0
    assert content(0.01 * token_map, nothing, 0.0) < 1e-4  # softmax does not see it
    noise = np.random.default_rng(0).normal(size=(12, 12))
    energy, of_positions = (
        oracle_energy_between_different(5 * token_map),
        np.square(noise - noise.mean(0) - noise.mean(1, keepdims=True) + noise.mean()).mean(),
    )
    got = content(5 * token_map, noise.astype(np.float32), 0.7)
    np.testing.assert_allclose(got, energy / (energy + of_positions + 0.7 + 1), rtol=1e-5)


@pytest.mark.parametrize("place_size", [0.5, 1.0, 2.0])
def test_content_of_random_heads_is_the_share_that_sizes_of_tokens_and_positions_give(place_size):
    """x = token + position, both random: token pairs have the energy a^4 of (a^2 + b^2)^2."""
    rng = np.random.default_rng(0)
    n, d = 40, 64

    def one():
        tokens, places = rng.normal(size=(n, d)), place_size * rng.normal(size=(n, d))
        w = 10 * rng.normal(size=(d, d)) / d
        tables = tokens @ w @ tokens.T, places @ w @ places.T
        cross = sum(np.square(x).mean() for x in (tokens @ w @ places.T, places @ w @ tokens.T))
        return content(*(x.astype(np.float32) for x in tables), cross)

    np.testing.assert_allclose(np.mean([one() for _ in range(8)]), 1 / (1 + place_size**2) ** 2, atol=0.05)


# The planted circuit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, 0.05], ids=["rest-zero", "rest-random"])
def one_sender(request):
    return planted(senders=[1], noise=request.param)


def test_previous_token_finds_the_planted_head_alone(one_sender):
    score = np.array(previous_token(one_sender, QUERIES))
    assert score[0, 1] > 1 - 1e-6
    score[0, 1] = UNIFORM
    # Small random heads are uniform up to their own scores, 0.05^2 sqrt(K) here.
    np.testing.assert_allclose(score, UNIFORM, atol=0.01)


def test_k_composition_finds_the_planted_edge_with_its_closed_form(one_sender):
    """gain * identity on the planted path: the diagonal is gain, the rest 0."""
    gap = np.array(k_composition(one_sender))
    np.testing.assert_allclose(gap[0, 1, 1, 0], 6.0, rtol=1e-5)
    gap[0, 1, 1, 0] = 0.0
    assert np.abs(gap).max() < 0.1
    assert (gap[:, :, 0] == 0).all()  # no head is in front of layer 0
    assert (gap[1] == 0).all()  # and layer 1 is in front of none


def test_induction_is_predicted_for_the_planted_head_alone(one_sender):
    n = PERIOD - 1
    got = jax.tree.map(np.array, induction(one_sender, QUERIES, n))
    np.testing.assert_allclose(got.attention[1, 0], 1 / (1 + n * np.exp(-6)), atol=1e-3)
    np.testing.assert_allclose(got.edges[0, 1, 1, 0], got.attention[1, 0] - 1 / (1 + n), atol=1e-2)
    np.testing.assert_allclose(got.joint_edges[1, 0], got.attention[1, 0] - 1 / (1 + n), atol=1e-2)  # token noise
    got.attention[1, 0], got.edges[0, 1, 1, 0], got.joint_edges[1, 0] = 1 / (1 + n), 0.0, 0.0
    np.testing.assert_allclose(got.attention, 1 / (1 + n), atol=0.01)
    np.testing.assert_allclose(got.edges, 0.0, atol=0.01)
    np.testing.assert_allclose(got.joint_edges, 0.0, atol=0.01)


def test_an_unplanted_head_attends_as_chance_has_it():
    got = induction(planted(senders=[1]), QUERIES, jnp.array([0.0, 1.0, 4.0])[:, None, None])
    expected = np.broadcast_to(np.array([1, 1 / 2, 1 / 5])[:, None], (3, 3))
    np.testing.assert_allclose(got.attention[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(got.attention[:, 1, 1:], expected[:, :2], rtol=1e-6)


def test_redundant_senders_hide_each_other_but_not_from_the_joint_cut():
    got = induction(planted(senders=[0, 2]), QUERIES, PERIOD - 1)
    p = lambda z: 1 / (1 + (PERIOD - 1) * np.exp(-z))  # noqa: E731
    np.testing.assert_allclose(got.attention[1, 0], p(12), atol=1e-5)
    np.testing.assert_allclose(got.edges[0, [0, 2], 1, 0], p(12) - p(6), atol=1e-4)
    assert (np.asarray(got.edges) < 0.02).all()
    np.testing.assert_allclose(got.joint_edges[1, 0], p(12) - p(0), atol=1e-4)
    assert got.joint_edges[1, 0] > 0.8


@pytest.mark.parametrize("senders", [[1], [0, 2]], ids=["one-sender", "redundant-senders"])
def test_the_prediction_agrees_with_cutting_the_edges(senders):
    weights = planted(senders=senders, noise=0.02)
    config, params = params_from_weights(weights)
    task = RepeatedTokens(min_period=PERIOD, max_period=PERIOD, n_vocab=V, n_context=T, bos=True)
    batch = jax.jit(sample_batch, static_argnums=(0, 3))(task, jax.random.key(0), 0, 16)
    measured = cut_edges(config, params, batch)
    predicted = induction(weights, QUERIES, PERIOD - 1)
    # The measured keys are not whole periods (9 to 10 wrong ones, not 7), and the random heads add a little.
    np.testing.assert_allclose(predicted.edges, measured.induction[1], atol=0.05)
    np.testing.assert_allclose(predicted.joint_edges, measured.joint_induction[1], atol=0.05)
    assert measured.joint_induction[1, 1, 0] > 0.8
    assert (measured.induction[1, 0, senders, 1, 0] > 0.8).all() == (len(senders) == 1)
    _, seen = forward(config, params, batch.tokens)
    rows = np.arange(16)[:, None], np.nonzero(batch.mask[0])[0]
    to_source = np.asarray(seen.patterns)[rows[0], 1, 0, rows[1], np.asarray(batch.positions["source"])[rows]]
    np.testing.assert_allclose(to_source.mean(), predicted.attention[1, 0], atol=0.05)


# Other shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_models_without_position_vectors_have_scores(positions):
    weights = planted(senders=[1], positions=positions, noise=0.05)
    got = induction(weights, QUERIES, 3.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    if positions == "none":
        # Nothing looks back for sure, so the planted edge counts by uniform attention's share of it.
        margin = UNIFORM * 6.0
        assert abs(got.attention[1, 0] - 1 / (1 + 3 * np.exp(-margin))) < 0.02


def test_a_model_of_one_layer_has_no_edges():
    weights = planted(senders=[1], n_layers=1, noise=0.3)
    assert (np.asarray(k_composition(weights)) == 0).all()
    got = induction(weights, QUERIES, 4.0)
    np.testing.assert_allclose(got.attention, 1 / 5, atol=0.01)  # the noise of its own token softens it a little
    assert (np.asarray(got.edges) == 0).all()
    assert (np.asarray(got.joint_edges) == 0).all()
    assert got.edges.shape == (1, 3, 1, 3)


def test_many_runs_come_from_vmap():
    runs = [random_weights("learned", seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    together = jax.jit(jax.vmap(lambda weights: signatures.induction(weights, np.ones(7, bool), 5.0)))(stacked)
    for run, weights in enumerate(runs):
        alone = induction(weights, np.ones(7, bool), 5.0)
        jax.tree.map(lambda x, y, run=run: np.testing.assert_allclose(x[run], y, atol=1e-5), together, alone)


def test_scores_do_not_change_with_the_basis_of_a_head():
    """W_Q G, W_K G^-T and W_V G, G^-1 W_O are the same head."""
    weights = random_weights("learned")
    weights = dataclasses.replace(weights, b_Q=None, b_K=None)
    g = jnp.asarray(np.eye(4) + 0.3 * np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
    inverse = jnp.linalg.inv(g)
    turned = dataclasses.replace(
        weights, W_Q=weights.W_Q @ g, W_K=weights.W_K @ inverse.T, W_V=weights.W_V @ g, W_O=inverse @ weights.W_O
    )
    for score in (
        lambda w: previous_token(w, np.ones(7, bool)),
        k_composition,
        lambda w: induction(w, np.ones(7, bool), 5),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), score(weights), score(turned))
