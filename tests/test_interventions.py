"""Head scales and cut edges against a slow float64 forward pass in which each head reads its own residual stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import Interventions, TransformerConfig, forward, init_params

V, T = 9, 6
CONFIGS = {
    "attention-only": TransformerConfig(V, T, n_layers=3, n_heads=2, d_model=8),
    # A norm between the cut and the reader, positions that only q and k read, biases, and an MLP between the layers.
    "layernorm-shortformer-bias-mlp": TransformerConfig(
        V, T, n_layers=2, n_heads=2, d_model=8, d_head=3, d_mlp=10, norm="layer", positions="shortformer", bias=True
    ),
}
TOKENS = np.array([3, 1, 4, 1, 5, 8])


def random_params(config):
    """Every leaf random, also the biases and gains that init_params leaves at 0 and 1."""
    rng = np.random.default_rng(7)

    def fill(path, leaf):
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + 0.5 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))


def oracle_norm(config, params, x):
    if config.norm == "none":
        return x
    centred = x - x.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def oracle_logits(config, params, tokens, head_scale=None, q_edges=None, k_edges=None, v_edges=None):
    """Head b of layer m reads, at each of its inputs, x - sum over the heads a of layers l < m of (1 - e[a,b]) o_a."""
    shape = (config.n_layers, config.n_heads)
    scale = np.ones(shape) if head_scale is None else np.asarray(head_scale, np.float64)
    edges = [np.ones(shape * 2) if e is None else np.asarray(e, np.float64) for e in (q_edges, k_edges, v_edges)]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    w_p, length = params["W_P"][: len(tokens)], len(tokens)
    x = params["W_E"][tokens] + (w_p if config.positions == "learned" else 0.0)
    written = {}
    for layer in range(config.n_layers):
        block = params[f"layer_{layer}"]
        w = block["attention"]
        outputs = []
        for head in range(config.n_heads):
            reads = []
            for edge in edges:
                read = x.copy()
                for (sender_layer, sender), output in written.items():
                    read -= (1 - edge[sender_layer, sender, layer, head]) * output
                reads.append(oracle_norm(config, block.get("attention_norm"), read))
            if config.positions == "shortformer":
                reads = [reads[0] + w_p, reads[1] + w_p, reads[2]]
            q, k, v = (read @ w[f"W_{name}"][head] for name, read in zip("QKV", reads, strict=True))
            if config.bias:
                q, k, v = q + w["b_Q"][head], k + w["b_K"][head], v + w["b_V"][head]
            mixed = np.zeros_like(v)
            for t in range(length):
                weight = np.exp(q[t] @ k[: t + 1].T / np.sqrt(config.d_head))
                mixed[t] = weight / weight.sum() @ v[: t + 1]
            outputs.append(scale[layer, head] * mixed @ w["W_O"][head])
        x = x + sum(outputs) + (w["b_O"] if config.bias else 0.0)
        written |= {(layer, head): output for head, output in enumerate(outputs)}
        if config.d_mlp:
            mlp = block["mlp"]
            hidden = oracle_norm(config, block["mlp_norm"], x) @ mlp["W_in"] + mlp["b_in"]
            hidden = hidden * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
            x = x + hidden @ mlp["W_out"] + mlp["b_out"]
    return oracle_norm(config, params.get("final_norm"), x) @ params["W_U"] + (params["b_U"] if config.bias else 0.0)


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def model(request):
    config = CONFIGS[request.param]
    return config, random_params(config)


def ones(config):
    shape = (config.n_layers, config.n_heads)
    return {"head_scale": np.ones(shape, np.float32)} | {
        name: np.ones(shape * 2, np.float32) for name in ("q_edges", "k_edges", "v_edges")
    }


def logits(config, params, **fields):
    return np.asarray(forward(config, params, TOKENS, Interventions(**fields))[0])


def existing(config):
    """[L,H,L,H] true where the sender is in an earlier layer."""
    layers = np.arange(config.n_layers)
    shape = (config.n_layers, config.n_heads) * 2
    return np.broadcast_to((layers[:, None] < layers)[:, None, :, None], shape)


def test_no_intervention_is_bit_for_bit_no_intervention(model):
    config, params = model
    jax.tree.map(
        np.testing.assert_array_equal,
        forward(config, params, TOKENS),
        forward(config, params, TOKENS, Interventions()),
    )


def test_all_ones_change_nothing(model):
    config, params = model
    plain = forward(config, params, TOKENS)
    changed = forward(config, params, TOKENS, Interventions(**ones(config)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), plain, changed)


def test_head_scale_is_a_factor_on_w_o(model):
    config, params = model
    for layer in range(config.n_layers):
        for head in range(config.n_heads):
            for factor in (0.0, 0.5):
                scale = ones(config)["head_scale"]
                scale[layer, head] = factor
                scaled = jax.tree.map(np.copy, params)
                scaled[f"layer_{layer}"]["attention"]["W_O"][head] *= factor
                changed = logits(config, params, head_scale=scale)
                np.testing.assert_allclose(changed, logits(config, scaled), atol=1e-5)
                assert np.abs(changed - logits(config, params)).max() > 1e-2


def test_one_vmap_ablates_every_head(model):
    config, params = model
    n = config.n_layers * config.n_heads

    def run(head):
        scale = jnp.ones(config.n_layers * config.n_heads).at[head].set(0.0).reshape(config.n_layers, config.n_heads)
        return forward(config, params, TOKENS, Interventions(head_scale=scale))[0]

    together = jax.vmap(run)(jnp.arange(n))
    for index in range(n):
        scale = ones(config)["head_scale"]
        scale[divmod(index, config.n_heads)] = 0.0
        expected = oracle_logits(config, params, TOKENS, head_scale=scale)
        np.testing.assert_allclose(together[index], expected, atol=5e-5)


@pytest.mark.parametrize("inputs", [("q_edges",), ("k_edges",), ("v_edges",), ("q_edges", "k_edges", "v_edges")])
def test_cutting_an_edge_takes_the_senders_output_out_of_that_input_only(model, inputs):
    config, params = model
    plain = logits(config, params)
    for a, b in [((0, 1), (1, 0)), ((config.n_layers - 2, 0), (config.n_layers - 1, 1))]:
        fields = {name: ones(config)[name] for name in inputs}
        for name in inputs:
            fields[name][*a, *b] = 0.0
        cut = logits(config, params, **fields)
        np.testing.assert_allclose(cut, oracle_logits(config, params, TOKENS, **fields), atol=5e-5)
        assert np.abs(cut - plain).max() > 1e-3


def test_cutting_k_leaves_queries_values_and_other_receivers_alone(model):
    config, params = model
    fields = {"k_edges": ones(config)["k_edges"]}
    fields["k_edges"][0, 1, 1, 0] = 0.0
    _, plain = jax.tree.map(np.asarray, forward(config, params, TOKENS))
    _, cut = jax.tree.map(np.asarray, forward(config, params, TOKENS, Interventions(**fields)))
    np.testing.assert_array_equal(cut.residual[:2], plain.residual[:2])
    # The other head of the receiving layer does not notice.
    np.testing.assert_allclose(cut.scores[1, 1], plain.scores[1, 1], atol=1e-5)
    np.testing.assert_allclose(cut.head_outputs[1, 1], plain.head_outputs[1, 1], atol=1e-5)
    # The receiver looks elsewhere, but moves the same from there: pattern^-1 output is v W_O.
    assert np.abs(cut.scores[1, 0] - plain.scores[1, 0]).max() > 1e-2
    moved = [np.linalg.solve(np.float64(s.patterns[1, 0]), np.float64(s.head_outputs[1, 0])) for s in (plain, cut)]
    # Solving with a pattern whose diagonal is small loses digits.
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-3)


def test_any_mixture_of_factors_agrees_with_the_oracle(model):
    config, params = model
    rng = np.random.default_rng(3)
    fields = {name: rng.uniform(-0.5, 1.5, one.shape).astype(np.float32) for name, one in ones(config).items()}
    expected = oracle_logits(config, params, TOKENS, **fields)
    np.testing.assert_allclose(logits(config, params, **fields), expected, atol=1e-4)


def test_edges_to_the_same_or_an_earlier_layer_are_ignored(model):
    config, params = model
    fields = ones(config)
    for name in ("q_edges", "k_edges", "v_edges"):
        fields[name] = np.where(existing(config), 1.0, np.nan).astype(np.float32)
    np.testing.assert_array_equal(logits(config, params, **fields), logits(config, params, **ones(config)))


def test_a_batch_gets_the_same_intervention_in_every_sequence(model):
    config, params = model
    batch = np.stack([TOKENS, TOKENS[::-1]])
    fields = ones(config)
    fields["head_scale"][0, 0] = 0.0
    fields["v_edges"][0, 1, 1, 1] = 0.0
    together = forward(config, params, batch, Interventions(**fields))[0]
    for tokens, changed in zip(batch, together, strict=True):
        np.testing.assert_allclose(changed, oracle_logits(config, params, tokens, **fields), atol=5e-5)


def test_gradients_match_finite_differences(model):
    config, params = model
    rng = np.random.default_rng(5)
    at = {name: rng.uniform(0.2, 1.2, one.shape).astype(np.float32) for name, one in ones(config).items()}
    direction = rng.normal(size=(T, V)).astype(np.float32)
    objective = lambda interventions: (forward(config, params, TOKENS, interventions)[0] * direction).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(objective))(Interventions(**at))

    step = 1e-5
    for name in at:
        exists = np.ones_like(at[name], bool) if name == "head_scale" else existing(config)
        computed = np.asarray(getattr(gradient, name))
        assert (computed[~exists] == 0).all()
        places = np.argwhere(exists)
        for place in places[rng.permutation(len(places))[:6]]:
            values = []
            for sign in (1, -1):
                moved = {key: value.astype(np.float64) for key, value in at.items()}
                moved[name][*place] += sign * step
                values.append((oracle_logits(config, params, TOKENS, **moved) * direction).sum())
            expected = (values[0] - values[1]) / (2 * step)
            np.testing.assert_allclose(computed[*place], expected, rtol=1e-3, atol=1e-3, err_msg=f"{name} {place}")


def test_new_values_do_not_recompile():
    config = dataclasses.replace(CONFIGS["attention-only"], n_layers=2)
    params, traces = random_params(config), []

    @jax.jit
    def run(params, tokens, interventions):
        traces.append(1)
        return forward(config, params, tokens, interventions)[0]

    results = []
    for factor in (0.0, 0.3, 1.0):
        fields = {name: factor * one for name, one in ones(config).items()}
        results.append(np.asarray(run(params, TOKENS, Interventions(**fields))))
    assert len(traces) == 1
    assert np.abs(results[0] - results[1]).max() > 1e-3
    run(params, TOKENS, None)
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head_scale", (1, 2)),  # an index out of bounds would be clamped: layer 0's factors for every layer
        ("head_scale", (3, 1)),
        ("head_scale", (4, 2)),
        ("head_scale", (6,)),
        ("q_edges", (3, 2, 3, 1)),
        ("k_edges", (3, 1, 3, 2)),
        ("v_edges", (2, 3, 2, 3)),
    ],
)
def test_arrays_of_another_shape_are_refused_by_name(name, shape):
    config = CONFIGS["attention-only"]
    with pytest.raises(ValueError, match=name):
        logits(config, random_params(config), **{name: np.ones(shape, np.float32)})
