"""The forward pass against a slow float64 NumPy one, what it costs, and what it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import Interventions, TransformerConfig, forward, init_params
from circuits_jax.models import graph
from circuits_jax.models.config import Rotary
from circuits_jax.models.rotary import rotate

V, T = 11, 7
# Covers every norm, every kind of positions, biases, tied unembedding, MLP, d_head apart from D / H, and 1-3 layers;
# with shared keys and values, both pairings of rotary coordinates, some of them or all, and a scaled embedding.
CONFIGS = {
    "plain": TransformerConfig(V, T, n_layers=1, n_heads=2, d_model=8),
    "layer-learned-bias-tied-mlp": TransformerConfig(
        V, T + 2, n_layers=2, n_heads=2, d_model=8, norm="layer", bias=True, tied=True, d_mlp=12
    ),
    "rms-rotary": TransformerConfig(V, T, n_layers=3, n_heads=2, d_model=8, d_head=6, norm="rms", positions="rotary"),
    "shortformer-bias": TransformerConfig(
        V, T + 2, n_layers=2, n_heads=3, d_model=8, d_head=5, bias=True, positions="shortformer"
    ),
    "layer-shortformer-mlp": TransformerConfig(
        V, T, n_layers=2, n_heads=2, d_model=8, d_mlp=10, norm="layer", positions="shortformer"
    ),
    "rms-none-bias": TransformerConfig(V, T, n_layers=2, n_heads=4, d_model=8, norm="rms", positions="none", bias=True),
    "layer-rotary-bias": TransformerConfig(
        V, T, n_layers=2, n_heads=2, d_model=8, norm="layer", positions="rotary", bias=True
    ),
    "llama-like": TransformerConfig(
        V, T, n_layers=2, n_heads=4, n_kv_heads=2, d_model=8, d_head=6, d_mlp=10, norm="rms", positions="rotary",
        rotary_base=500.0,
    ),
    "gptj-like": TransformerConfig(
        V, T, n_layers=2, n_heads=2, d_model=8, d_head=7, norm="layer", positions="rotary", rotary_dim=4,
        rotary_pairs="interleaved", bias=True,
    ),
    "neox-like-grouped": TransformerConfig(
        V, T, n_layers=1, n_heads=6, n_kv_heads=3, d_model=8, d_head=6, norm="layer", positions="rotary", rotary_dim=4,
        bias=True,
    ),
    "gemma-like": TransformerConfig(
        V, T, n_layers=2, n_heads=3, n_kv_heads=1, d_model=8, d_head=4, norm="rms", positions="rotary",
        rotary_pairs="interleaved", tied=True, embedding_scale=8**0.5,
    ),
    "learned-scaled-grouped": TransformerConfig(
        V, T, n_layers=2, n_heads=4, n_kv_heads=2, d_model=8, d_head=3, bias=True, tied=True, embedding_scale=0.5
    ),
}  # fmt: skip
GROUPED = [name for name, config in CONFIGS.items() if 1 < config.n_kv_heads < config.n_heads]
PLAIN = CONFIGS["plain"]


def random_params(config, seed):
    """Every leaf random, also the biases and gains that init_params leaves at 0 and 1: otherwise no test sees them."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + 0.4 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


# The oracle -------------------------------------------------------------------------------------------------------


def oracle_norm(config, params, name, x):
    if config.norm == "none":
        return x
    rows = []
    for row in x:
        if config.norm == "layer":
            row = (row - row.mean()) / np.sqrt(row.var() + 1e-5) * params[name]["scale"] + params[name]["bias"]
        else:
            row = row / np.sqrt((row**2).mean() + 1e-5) * params[name]["scale"]
        rows.append(row)
    return np.array(rows)


def oracle_rotary(x, pairs, dim, base, positions):
    """Pair i of the first dim coordinates as one complex number that position p turns by p * base^(-2i/dim)."""
    turned = x.copy()
    for t, position in enumerate(positions):
        for i in range(dim // 2):
            a, b = {"half": (i, i + dim // 2), "interleaved": (2 * i, 2 * i + 1)}[pairs]
            z = (x[t, a] + 1j * x[t, b]) * np.exp(1j * position * base ** (-2 * i / dim))
            turned[t, a], turned[t, b] = z.real, z.imag
    return turned


def oracle_head(config, attention, head, x_qk, x_v):
    """Scores, pattern and output of one head."""
    shared = head // (config.n_heads // (config.n_kv_heads or config.n_heads))
    q, k, v = x_qk @ attention["W_Q"][head], x_qk @ attention["W_K"][shared], x_v @ attention["W_V"][shared]
    if config.bias:
        q, k, v = q + attention["b_Q"][head], k + attention["b_K"][shared], v + attention["b_V"][shared]
    if config.positions == "rotary":
        dim = config.rotary_dim or config.d_head
        q, k = (oracle_rotary(x, config.rotary_pairs, dim, config.rotary_base, range(len(x))) for x in (q, k))
    length = len(q)
    scores, pattern, output = np.zeros((length, length)), np.zeros((length, length)), np.zeros_like(x_v)
    for t in range(length):
        for s in range(length):
            scores[t, s] = q[t] @ k[s] / np.sqrt(config.d_head)
        for s in range(t + 1):
            pattern[t, s] = np.exp(scores[t, s]) / np.exp(scores[t, : t + 1]).sum()
            output[t] += pattern[t, s] * (v[s] @ attention["W_O"][head])
    return scores, pattern, output


def oracle_forward(config, params, tokens):
    """Logits and the fields of Activations by their names, float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    length = len(tokens)
    x = np.array([config.embedding_scale * params["W_E"][token] for token in tokens])
    if config.positions == "learned":
        x = x + params["W_P"][:length]
    seen = {"residual": [x]}
    for layer in range(config.n_layers):
        block = params[f"layer_{layer}"]
        read = oracle_norm(config, block, "attention_norm", x)
        read_qk = read + params["W_P"][:length] if config.positions == "shortformer" else read
        heads = [oracle_head(config, block["attention"], h, read_qk, read) for h in range(config.n_heads)]
        scores, patterns, outputs = (np.array(field) for field in zip(*heads, strict=True))
        attention_output = sum(outputs) + (block["attention"]["b_O"] if config.bias else 0.0)
        x = x + attention_output
        mlp_output = np.zeros_like(x)
        if config.d_mlp:
            mlp = block["mlp"]
            hidden = oracle_norm(config, block, "mlp_norm", x) @ mlp["W_in"] + (mlp["b_in"] if config.bias else 0.0)
            hidden = hidden * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
            mlp_output = hidden @ mlp["W_out"] + (mlp["b_out"] if config.bias else 0.0)
        x = x + mlp_output
        fields = ("residual", "scores", "patterns", "head_outputs", "attention_outputs", "mlp_outputs")
        for name, value in zip(fields, (x, scores, patterns, outputs, attention_output, mlp_output), strict=True):
            seen.setdefault(name, []).append(value)
    unembed = params["W_E"].T if config.tied else params["W_U"]
    logits = oracle_norm(config, params, "final_norm", x) @ unembed + (params["b_U"] if config.bias else 0.0)
    return logits, {name: np.array(values) for name, values in seen.items()}


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def case(request):
    """config, params, tokens [2,T] and what forward says of them."""
    config = CONFIGS[request.param]
    params, tokens = random_params(config, 1), random_tokens((2, T))
    return config, params, tokens, jax.tree.map(np.asarray, forward(config, params, tokens))


# What it computes -------------------------------------------------------------------------------------------------


def test_forward_agrees_with_a_slow_float64_one(case):
    config, params, tokens, (logits, seen) = case
    for b in range(len(tokens)):
        expected_logits, expected = oracle_forward(config, params, tokens[b])
        np.testing.assert_allclose(logits[b], expected_logits, atol=2e-5, rtol=2e-5)
        assert expected.keys() == {field.name for field in dataclasses.fields(seen)}
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(seen, name)[b], value, atol=2e-5, rtol=2e-5, err_msg=name)


def test_head_outputs_sum_to_the_attention_output(case):
    config, params, _, (_, seen) = case
    for layer in range(config.n_layers):
        b_o = params[f"layer_{layer}"]["attention"]["b_O"] if config.bias else 0.0
        total = np.asarray(seen.head_outputs)[:, layer].sum(1) + b_o
        np.testing.assert_allclose(total, seen.attention_outputs[:, layer], atol=1e-5)


def test_layer_outputs_sum_to_the_residual_stream(case):
    _, _, _, (_, seen) = case
    residual = np.asarray(seen.residual)
    steps = np.asarray(seen.attention_outputs) + np.asarray(seen.mlp_outputs)
    np.testing.assert_allclose(residual[:, :1] + steps.cumsum(1), residual[:, 1:], atol=1e-5)


def test_patterns_are_causal_and_rows_sum_to_one(case):
    _, _, _, (_, seen) = case
    patterns = np.asarray(seen.patterns)
    above = np.triu(np.ones((T, T), bool), k=1)
    assert (patterns[..., above] == 0).all()
    assert (patterns >= 0).all()
    np.testing.assert_allclose(patterns.sum(-1), 1.0, atol=1e-6)


def test_a_batch_is_each_sequence_alone(case):
    config, params, tokens, batched = case
    for b in range(len(tokens)):
        alone = forward(config, params, tokens[b])
        jax.tree.map(lambda x, y, b=b: np.testing.assert_allclose(x[b], y, atol=1e-5), batched, alone)


@pytest.mark.parametrize("name", ["plain", "layer-learned-bias-tied-mlp"])
def test_vmap_over_parameters_is_each_model_alone(name):
    config, tokens = CONFIGS[name], random_tokens(T)
    runs = [random_params(config, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    together = jax.vmap(lambda params: forward(config, params, tokens))(stacked)
    for run, params in enumerate(runs):
        alone = forward(config, params, tokens)
        jax.tree.map(lambda x, y, run=run: np.testing.assert_allclose(x[run], y, atol=1e-5), together, alone)


def test_later_tokens_do_not_change_earlier_logits(case):
    config, params, tokens, (logits, _) = case
    changed = tokens.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % V
    other, _ = forward(config, params, changed)
    np.testing.assert_allclose(other[:, :4], logits[:, :4], atol=1e-6)
    assert (np.abs(other[:, 4:] - logits[:, 4:]).max(-1) > 1e-3).all()


def test_one_position_attends_to_itself():
    logits, seen = forward(PLAIN, random_params(PLAIN, 0), [3])
    assert logits.shape == (1, V)
    np.testing.assert_array_equal(seen.patterns, np.ones((1, 2, 1, 1)))


# Rotary positions and shared keys and values ----------------------------------------------------------------------

ROTARIES = [Rotary(), Rotary(pairs="interleaved"), Rotary(dim=4, base=50.0), Rotary(4, "interleaved", 50.0)]
by_rotary = pytest.mark.parametrize("rotary", ROTARIES, ids=["half", "interleaved", "half-part", "interleaved-part"])
K = 8


def queries_and_keys():
    return np.random.default_rng(5).normal(size=(2, T, K)).astype(np.float32)


@by_rotary
def test_rotation_agrees_with_complex_multiplication(rotary):
    x, positions = queries_and_keys()[0], np.array([0, 1, -1, 5, -40, 300, 2])
    expected = oracle_rotary(x.astype(np.float64), rotary.pairs, rotary.dim or K, rotary.base, positions)
    turned = rotate(x, positions, rotary)
    np.testing.assert_allclose(turned, expected, atol=1e-4)
    np.testing.assert_array_equal(turned[0], x[0])
    np.testing.assert_array_equal(turned[:, rotary.dim or K :], x[:, rotary.dim or K :])


@by_rotary
def test_rotary_scores_depend_on_the_offset_alone(rotary):
    q, k = queries_and_keys()
    scores = [np.asarray(rotate(q, i, rotary)) @ np.asarray(rotate(k, j, rotary)).T for i, j in ((9, 4), (0, -5))]
    np.testing.assert_allclose(*scores, atol=1e-4)
    np.testing.assert_allclose(scores[0], np.asarray(rotate(q, 5, rotary)) @ k.T, atol=1e-4)
    assert np.abs(scores[0] - np.asarray(rotate(q, 4, rotary)) @ k.T).max() > 0.1


def test_a_rotation_wider_than_the_head_is_refused():
    with pytest.raises(ValueError, match="rotary_dim must be even and at most d_head=4; got 6"):
        rotate(np.ones((T, 4), np.float32), 1, Rotary(dim=6))
    with pytest.raises(ValueError, match="rotary_dim must be even and at most d_head=5; got 5"):
        rotate(np.ones((T, 5), np.float32), 1, Rotary())


def test_long_positions_keep_their_angles_in_half_precision():
    """Position 4001 in bfloat16 is 4000: its angles would be off by a whole radian."""
    x = jnp.ones((1, 2), jnp.bfloat16)
    expected = oracle_rotary(np.ones((1, 2)), "half", 2, 10_000.0, [4001])
    turned = rotate(x, np.array([4001]), Rotary())
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(turned, np.float64), expected, atol=0.02)


def edit_attention(params, edit):
    """params with every attention module replaced by edit of it."""
    layers = {
        name: {**layer, "attention": edit(layer["attention"])} for name, layer in params.items() if "layer" in name
    }
    return params | layers


@pytest.mark.parametrize("name", ["gptj-like", "llama-like"])
def test_the_two_pairings_are_one_model_up_to_the_order_of_components(name):
    config, tokens = CONFIGS[name], random_tokens((2, T))
    params, dim = random_params(config, 2), config.rotary_dim or config.d_head
    pairs = np.arange(dim).reshape(-1, 2)  # (0, 1), (2, 3), ...: where interleaved has its pairs
    order = pairs.T.ravel()  # first components of all pairs, then the second ones: where half has them
    if config.rotary_pairs == "half":
        order = np.argsort(order)
    order = np.concatenate([order, np.arange(dim, config.d_head)])
    moved = ("W_Q", "W_K", "b_Q", "b_K")
    other = edit_attention(params, lambda a: {n: w[..., order] if n in moved else w for n, w in a.items()})
    pairing = {"half": "interleaved", "interleaved": "half"}[config.rotary_pairs]
    logits = forward(config, params, tokens)[0]
    same = forward(dataclasses.replace(config, rotary_pairs=pairing), other, tokens)[0]
    np.testing.assert_allclose(same, logits, atol=1e-5)
    assert np.abs(forward(config, other, tokens)[0] - logits).max() > 1e-2


@pytest.mark.parametrize("name", GROUPED)
def test_neighbouring_query_heads_share_keys_and_values(name):
    """Head h reads key/value head h // (H/G): each written out for its H/G neighbours; h mod G is another model."""
    config, tokens = CONFIGS[name], random_tokens((2, T))
    params, groups = random_params(config, 3), config.n_kv_heads
    written_out = dataclasses.replace(config, n_kv_heads=0)

    def logits(kv_heads):
        shared = ("W_K", "W_V", "b_K", "b_V")
        full = edit_attention(params, lambda a: {n: w[kv_heads] if n in shared else w for n, w in a.items()})
        return forward(written_out, full, tokens)[0]

    grouped, heads = forward(config, params, tokens)[0], np.arange(config.n_heads)
    np.testing.assert_allclose(grouped, logits(heads // (config.n_heads // groups)), atol=1e-5)
    assert np.abs(grouped - logits(heads % groups)).max() > 1e-2


def test_edges_into_heads_that_share_keys_are_cut_for_one_query_head_alone():
    config = CONFIGS["llama-like"]
    params, tokens = random_params(config, 4), random_tokens(T)
    edges = [f"0.{sender}->1.1.{name}" for sender in range(4) for name in "kv"]
    run = jax.jit(lambda edges: forward(config, params, tokens, Interventions(edges=edges)))
    (logits, seen), (_, seen_cut) = run(graph.cut(config, [])), run(graph.cut(config, edges))
    np.testing.assert_allclose(logits, forward(config, params, tokens)[0], atol=1e-5)
    change = np.abs(np.asarray(seen.head_outputs[1]) - seen_cut.head_outputs[1]).max((1, 2))
    assert change[1] > 1e-3
    assert (change[[0, 2, 3]] == 0).all()


# Initial parameters -----------------------------------------------------------------------------------------------


def test_init_is_a_function_of_the_key():
    config = dataclasses.replace(PLAIN, positions="none", tied=True)  # every parameter takes half a second to compile
    keys = jax.random.split(jax.random.key(0), 3)
    init = jax.jit(lambda key: init_params(config, key))
    first, again, other = init(keys[0]), init(keys[0]), init(keys[1])
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).all()), first, other)))
    together = jax.jit(jax.vmap(lambda key: init_params(config, key)))(keys)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-6), together, other)


@pytest.mark.parametrize("init_std", [None, 0.02])
def test_initial_weights_have_the_documented_spread(init_std):
    config = TransformerConfig(
        64, 64, n_layers=1, n_heads=4, d_model=64, d_head=24, d_mlp=128, norm="layer", bias=True, init_std=init_std
    )
    # The hardware generator's key compiles three times faster than the default one.
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0, impl="rbg"))
    fan_in = {"W_O": 4 * 24, "W_out": 128}  # all others read d_model = 64
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if name.startswith("W_"):
            std = init_std or fan_in.get(name, 64) ** -0.5
            # Five standard errors of a standard deviation, 1/sqrt(2n), and of a mean.
            assert abs(np.std(leaf) / std - 1) < 5 / np.sqrt(2 * leaf.size), name
            assert abs(np.mean(leaf)) < 5 * std / np.sqrt(leaf.size), name
        else:
            assert (np.asarray(leaf) == (1.0 if name == "scale" else 0.0)).all(), name


def test_parameters_that_a_model_does_not_use_are_absent():
    attention = {"W_Q": (2, 8, 4), "W_K": (2, 8, 4), "W_V": (2, 8, 4), "W_O": (2, 4, 8)}

    def shapes(**changes):
        config = dataclasses.replace(PLAIN, **changes)
        tree = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        return jax.tree.map(lambda leaf: leaf.shape, tree)

    expected = {"W_E": (V, 8), "W_P": (T, 8), "layer_0": {"attention": attention}, "W_U": (8, V)}
    assert shapes() == expected
    assert shapes(positions="rotary").keys() == expected.keys() - {"W_P"}
    assert shapes(positions="none").keys() == expected.keys() - {"W_P"}
    assert shapes(tied=True).keys() == expected.keys() - {"W_U"}
    assert shapes(n_kv_heads=1, bias=True)["layer_0"]["attention"] == {
        "W_Q": (2, 8, 4), "W_K": (1, 8, 4), "W_V": (1, 8, 4), "W_O": (2, 4, 8),
        "b_Q": (2, 4), "b_K": (1, 4), "b_V": (1, 4), "b_O": (8,),
    }  # fmt: skip
    assert shapes(n_kv_heads=2) == expected
    assert shapes(norm="rms", bias=True, d_mlp=5) == {
        "W_E": (V, 8),
        "W_P": (T, 8),
        "layer_0": {
            "attention_norm": {"scale": (8,)},
            "attention": attention | {"b_Q": (2, 4), "b_K": (2, 4), "b_V": (2, 4), "b_O": (8,)},
            "mlp_norm": {"scale": (8,)},
            "mlp": {"W_in": (8, 5), "b_in": (5,), "W_out": (5, 8), "b_out": (8,)},
        },
        "final_norm": {"scale": (8,)},
        "W_U": (8, V),
        "b_U": (V,),
    }
    assert shapes(norm="layer")["final_norm"] == {"scale": (8,), "bias": (8,)}


# What it costs ----------------------------------------------------------------------------------------------------


def plain_logits(params, tokens):
    """The attention-only model with learned positions, and nothing kept on the way."""
    length = len(tokens)
    x = jnp.take(params["W_E"], tokens, axis=0, mode="fill") + params["W_P"][:length]
    for layer in ("layer_0", "layer_1"):
        w = params[layer]["attention"]
        q, k, v = (jnp.einsum("td,hdk->htk", x, w[name]) for name in ("W_Q", "W_K", "W_V"))
        scores = jnp.einsum("htk,hsk->hts", q, k) / np.sqrt(q.shape[-1])
        pattern = jax.nn.softmax(scores, axis=-1, where=jnp.tril(jnp.ones((length, length), bool)))
        x = x + jnp.einsum("hts,hsk,hkd->td", pattern, v, w["W_O"], optimize=((0, 1), (0, 1)))
    return x @ params["W_U"]


def test_unused_activations_cost_nothing():
    config = TransformerConfig(16, 12, n_layers=2, n_heads=4, d_model=16)
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((12,), np.int32)

    def flops(function):
        return jax.jit(function).lower(params, tokens).compile().cost_analysis()["flops"]

    used = flops(lambda p, t: forward(config, p, t)[0])
    by_hand = flops(plain_logits)
    everything = flops(lambda p, t: forward(config, p, t))
    heads_apart = (
        2 * config.n_layers * 12 * 16 * 16
    )  # of [T,K] x [K,D] for every head, on top of the layer's own product
    # 2 %: the one thing counted beside the matmuls is how the compiler fuses the elementwise work.
    assert abs(used / by_hand - 1) < 0.02
    assert everything - used > 0.9 * heads_apart


# What it refuses --------------------------------------------------------------------------------------------------

GOOD = {"n_vocab": V, "n_context": T, "n_layers": 2, "n_heads": 2, "d_model": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm must be one of none, layer, rms; got 'batch'"),
        ({"norm": None}, "norm must be one of .* got None"),
        ({"positions": "alibi"}, "positions must be one of none, learned, shortformer, rotary; got 'alibi'"),
        ({"d_model": 9}, "d_model must be a multiple of n_heads .* got d_model=9, n_heads=2"),
        ({"d_head": 3, "positions": "rotary"}, "d_head must be even with rotary positions; got 3"),
        ({"d_model": 6, "positions": "rotary"}, "d_head must be even with rotary positions; got 3"),
        ({"n_layers": 0}, "n_layers must be an integer of at least 1; got 0"),
        ({"n_heads": 0}, "n_heads must be an integer of at least 1; got 0"),
        ({"n_vocab": 0}, "n_vocab must be an integer of at least 1; got 0"),
        ({"n_context": -3}, "n_context must be an integer of at least 1; got -3"),
        ({"d_model": 8.0}, "d_model must be an integer of at least 1; got 8.0"),
        ({"n_layers": True}, "n_layers must be an integer of at least 1; got True"),
        ({"d_head": -1}, "d_head must be an integer of at least 0; got -1"),
        ({"d_mlp": -1}, "d_mlp must be an integer of at least 0; got -1"),
        ({"d_mlp": None}, "d_mlp must be an integer of at least 0; got None"),
        ({"init_std": 0.0}, "init_std must be a positive finite number; got 0.0"),
        ({"init_std": -1.0}, "init_std must be a positive finite number; got -1.0"),
        ({"init_std": float("inf")}, "init_std must be a positive finite number; got inf"),
        ({"init_std": float("nan")}, "init_std must be a positive finite number; got nan"),
        ({"init_std": "small"}, "init_std must be a positive finite number; got 'small'"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads; got n_kv_heads=3, n_heads=2"),
        ({"n_kv_heads": 4}, "n_kv_heads must divide n_heads; got n_kv_heads=4, n_heads=2"),
        ({"n_kv_heads": -1}, "n_kv_heads must be an integer of at least 0; got -1"),
        ({"rotary_dim": 3}, "rotary_dim must be even; got 3"),
        ({"rotary_dim": 6}, "rotary_dim must be at most d_head=4; got 6"),
        ({"rotary_dim": 2.0}, "rotary_dim must be an integer of at least 0; got 2.0"),
        ({"rotary_pairs": "neox"}, "rotary_pairs must be one of half, interleaved; got 'neox'"),
        ({"rotary_base": 0}, "rotary_base must be a positive finite number; got 0"),
        ({"rotary_base": None}, "rotary_base must be a positive finite number; got None"),
        ({"embedding_scale": 0.0}, "embedding_scale must be a positive finite number; got 0.0"),
        ({"embedding_scale": True}, "embedding_scale must be a positive finite number; got True"),
    ],
)
def test_a_bad_config_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TransformerConfig(**(GOOD | changes))


def test_a_good_config_is_hashable_and_fills_in_d_head():
    config = TransformerConfig(**GOOD)
    assert config.d_head == 4
    assert TransformerConfig(**GOOD, d_head=3).d_head == 3
    assert hash(config) == hash(TransformerConfig(**GOOD))
    assert config == TransformerConfig(**GOOD, d_head=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_head = 2
    assert (config.n_groups, dataclasses.replace(config, n_kv_heads=1).n_groups) == (2, 1)
    scaled = TransformerConfig(**GOOD, embedding_scale=np.float32(2), rotary_base=50, rotary_dim=np.int64(2))
    assert hash(scaled) == hash(TransformerConfig(**GOOD, embedding_scale=2.0, rotary_base=50.0, rotary_dim=2))
    assert scaled.rotary == Rotary(2, "half", 50.0)
    # An odd head has no last pair, but a part of it does.
    assert TransformerConfig(**GOOD, d_head=3, positions="rotary", rotary_dim=2).rotary.dim == 2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, V], f"tokens must be in [0, n_vocab={V}); got values from 0 to {V}"),
        ([[0, 1], [2, -1]], f"tokens must be in [0, n_vocab={V}); got values from -1 to 2"),
        ([0] * (T + 1), f"tokens must hold 1 to n_context={T} positions; got {T + 1}"),
        (np.zeros((2, 0), np.int32), f"tokens must hold 1 to n_context={T} positions; got 0"),
        (np.zeros(2, np.float32), "tokens must be integers [T] or [B,T]; got float32 [2]"),
        ([True, False], "tokens must be integers [T] or [B,T]; got bool [2]"),
        (np.int32(3), "tokens must be integers [T] or [B,T]; got int32 []"),
        (np.zeros((1, 2, 3), np.int32), "tokens must be integers [T] or [B,T]; got int32 [1, 2, 3]"),
        # An id that only 64 bits hold must not come back as another token.
        (np.array([0, 2**32 + 1]), f"tokens must be in [0, n_vocab={V}); got values from 0 to {2**32 + 1}"),
    ],
    ids=["too-large", "negative", "too-long", "empty", "float", "bool", "scalar", "rank-3", "beyond-32-bits"],
)
def test_bad_tokens_are_refused_by_name(tokens, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        forward(PLAIN, random_params(PLAIN, 0), tokens)


def test_wrong_length_and_dtype_are_refused_under_jit_too():
    run = jax.jit(lambda params, tokens: forward(PLAIN, params, tokens)[0])
    params = random_params(PLAIN, 0)
    with pytest.raises(ValueError, match=r"^tokens must hold 1 to n_context"):
        run(params, np.zeros(T + 1, np.int32))
    with pytest.raises(ValueError, match=r"^tokens must be integers"):
        run(params, np.zeros(T, np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_any_integer_dtype_gives_the_same_logits(dtype):
    params, tokens = random_params(PLAIN, 0), random_tokens(T)
    expected = forward(PLAIN, params, tokens.astype(np.int32))[0]
    np.testing.assert_array_equal(forward(PLAIN, params, tokens.astype(dtype))[0], expected)


@pytest.mark.parametrize("bad", [V, V + 100, -1, -V, -V - 1])
def test_under_jit_a_token_out_of_range_is_nan_never_another_token(bad):
    run = jax.jit(lambda params, tokens: forward(PLAIN, params, tokens)[0])
    params, tokens = random_params(PLAIN, 0), random_tokens((2, T))
    spoilt = tokens.copy()
    spoilt[0, 3] = bad
    logits = run(params, spoilt)
    assert np.isnan(logits[0]).all()
    np.testing.assert_array_equal(logits[1], run(params, tokens)[1])
