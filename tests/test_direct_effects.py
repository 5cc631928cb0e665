"""Direct logit attribution and term importance against float64 sums over nodes, and against the path expansion."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effect_oracle import CONFIGS, TIED, B, T, V, oracle_loss, random_params, repeats

from circuits_jax import CircuitWeights, TransformerConfig, forward, path_expansion
from circuits_jax.heads.direct_effects import direct_logit_attribution, term_importance

MODELS = CONFIGS | {"layernorm-bias-tied": TIED}
READOUT = np.random.default_rng(6).normal(size=(V, 3)).astype(np.float32)


def attention_only(n_layers, bias=False):
    return TransformerConfig(V, T, n_layers=n_layers, n_heads=2, d_model=8, bias=bias)


def as_they_are(logits, seen, batch):
    """A metric that leaves logits as they are."""
    return logits


# Slow float64 parts of a model ----------------------------------------------------------------------------------------


def norm_of(config, params, x):
    """(normalised x, its size s [...,1]) in float64."""
    x = np.float64(x)
    if config.norm == "none":
        return x, np.ones((*x.shape[:-1], 1))
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    size = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    out = x / size * np.float64(params["scale"])
    return (out + np.float64(params["bias"]) if config.norm == "layer" else out), size


def mlp_of(config, params, x):
    """What the MLP of a layer writes when the residual stream is x."""
    if not config.d_mlp:
        return 0.0
    mlp = jax.tree.map(np.float64, params["mlp"])
    hidden = norm_of(config, params.get("mlp_norm"), x)[0] @ mlp["W_in"] + mlp.get("b_in", 0.0)
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ mlp["W_out"] + mlp.get("b_out", 0.0)


def unembedded(config, params, x):
    w_u = np.float64(params["W_E"]).T if config.tied else np.float64(params["W_U"])
    bias = np.float64(params["b_U"]) if config.bias else 0.0
    return norm_of(config, params.get("final_norm"), x)[0] @ w_u + bias


def runs_by_length(config, params, seen):
    """The logits [B,T,V] of runs 0..L in which values are read from the run before, heads silent in run 0."""
    start, patterns, found, before = np.float64(seen.residual[:, 0]), np.float64(seen.patterns), [], None
    for _ in range(config.n_layers + 1):
        x, streams = start, []
        for layer in range(config.n_layers):
            streams.append(x)
            of_layer = params[f"layer_{layer}"]
            attention = jax.tree.map(np.float64, of_layer["attention"])
            for head in range(config.n_heads) if before is not None else ():
                group = head // (config.n_heads // config.n_groups)
                values = norm_of(config, of_layer.get("attention_norm"), before[layer])[0] @ attention["W_V"][group]
                values = values + (attention["b_V"][group] if config.bias else 0.0)
                x = x + patterns[:, layer, head] @ values @ attention["W_O"][head]
            x = x + (attention["b_O"] if config.bias else 0.0)
            x = x + mlp_of(config, of_layer, x)
        before = streams
        found.append(unembedded(config, params, x))
    return found


# Direct logit attribution ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def model(request):
    config = MODELS[request.param]
    params, batch = random_params(config), repeats()
    return config, params, batch, *forward(config, params, batch.tokens)


def test_terms_sum_to_the_logits(model):
    config, params, batch, logits, _ = model
    found = direct_logit_attribution(config, params, batch.tokens, np.eye(V, dtype=np.float32))
    size = np.abs(logits).max()
    np.testing.assert_allclose(found.total(), logits, atol=2e-6 * size)
    assert found.embedding.shape == (B, T, V)
    assert found.heads.shape == (B, config.n_layers, config.n_heads, T, V)
    assert found.mlps.shape == (B, config.n_layers, T, V)
    for name, absent in (("embedding", False), ("heads", False), ("mlps", not config.d_mlp), ("bias", not config.bias)):
        largest = np.abs(getattr(found, name)).max()
        # A term too small to matter could be wrong without the sum to show it.
        assert largest == 0 if absent else largest > 0.02 * size, name


def test_every_term_is_what_its_node_wrote_read_at_the_size_of_the_whole(model):
    """o W_U R / s: the same s [B,T] for all terms, that of the whole residual stream."""
    config, params, batch, _, seen = model
    found = direct_logit_attribution(config, params, batch.tokens, READOUT)
    _, size = norm_of(config, params.get("final_norm"), seen.residual[:, -1])
    gain = np.float64(params["final_norm"]["scale"]) if config.norm != "none" else 1.0
    w_u = np.float64(params["W_E"]).T if config.tied else np.float64(params["W_U"])

    def term(written):
        written = np.float64(written)
        if config.norm == "layer":
            written = written - written.mean(-1, keepdims=True)
        return written / size * gain @ w_u @ np.float64(READOUT)

    def close(actual, expected):
        np.testing.assert_allclose(actual, expected, atol=3e-6 * np.abs(np.asarray(found.total())).max())

    close(found.embedding, term(seen.residual[:, 0]))
    bias = np.zeros((B, T, 3))
    for layer in range(config.n_layers):
        for head in range(config.n_heads):
            close(found.heads[:, layer, head], term(seen.head_outputs[:, layer, head]))
        close(found.mlps[:, layer], term(seen.mlp_outputs[:, layer]))
        if config.bias:
            bias = bias + term(np.broadcast_to(params[f"layer_{layer}"]["attention"]["b_O"], (B, T, config.d_model)))
    if config.bias:
        bias = bias + np.float64(params["b_U"]) @ np.float64(READOUT)
    if config.norm == "layer":
        bias = bias + np.float64(params["final_norm"]["bias"]) @ w_u @ np.float64(READOUT)
    close(found.bias, bias)


def test_a_readout_of_differences_gives_logit_differences(model):
    config, params, batch, logits, _ = model
    readout = np.zeros((V, 2), np.float32)
    readout[[2, 4], 0] = readout[[0, 1], 1] = 1, -1
    found = direct_logit_attribution(config, params, batch.tokens, readout)
    expected = np.stack([logits[..., 2] - logits[..., 4], logits[..., 0] - logits[..., 1]], -1)
    np.testing.assert_allclose(found.total(), expected, atol=4e-6 * np.abs(logits).max())
    # What all logits share is in no term.
    whole = direct_logit_attribution(config, params, batch.tokens, np.eye(V, dtype=np.float32))
    np.testing.assert_allclose(
        found.heads[..., 0], whole.heads[..., 2] - whole.heads[..., 4], atol=4e-6 * np.abs(logits).max()
    )


def test_a_heads_term_is_all_paths_that_end_with_it():
    """Without norms: its own OV path, and the virtual heads with an earlier one in front."""
    config = attention_only(2)
    params, batch = random_params(config), repeats()
    _, seen = forward(config, params, batch.tokens)
    found = direct_logit_attribution(config, params, batch.tokens, READOUT)
    weights = CircuitWeights.from_params(config, params)
    for b in range(B):
        paths = path_expansion(weights, batch.tokens[b], seen.patterns[b], weights.W_U @ READOUT)
        size = np.abs(paths.total()).max()
        np.testing.assert_allclose(found.embedding[b], paths.direct, atol=3e-6 * size)
        expected = paths.one_head + paths.two_heads.sum((0, 1))
        np.testing.assert_allclose(found.heads[b], expected, atol=3e-6 * size)
        assert np.abs(paths.two_heads).max() > 0.02 * size


def test_direct_attribution_of_nothing_that_fits():
    config = CONFIGS["two-layers"]
    params, batch = random_params(config), repeats()
    with pytest.raises(ValueError, match=r"tokens must be \[B,T\]; got \[8\]"):
        direct_logit_attribution(config, params, batch.tokens[0], READOUT)
    with pytest.raises(ValueError, match="tokens must be in"):
        direct_logit_attribution(config, params, batch.tokens.at[0, 0].set(V), READOUT)
    for shape in ((V,), (8, 2), (1, V, 2)):
        with pytest.raises(ValueError, match=r"readout must be \[V,J\] with V = 5; got"):
            direct_logit_attribution(config, params, batch.tokens, np.ones(shape, np.float32))


# Term importance ------------------------------------------------------------------------------------------------------


def test_each_run_reads_values_of_the_run_before(model):
    config, params, batch, logits, seen = model
    found = term_importance(config, params, batch, as_they_are)
    expected = runs_by_length(config, params, seen)
    assert found.shape == (config.n_layers + 1, B, T, V)
    size = np.abs(expected).max()
    for n, one in enumerate(expected):
        np.testing.assert_allclose(found[n], one, atol=1e-5 * size, err_msg=str(n))
    np.testing.assert_allclose(found[-1], logits, atol=1e-5 * size)
    assert np.abs(np.diff(expected, axis=0)).max((1, 2, 3)).min() > 0.02 * size


def test_term_importance_is_the_loss_of_those_runs_and_ends_with_the_models(model):
    config, params, batch, logits, seen = model
    found = term_importance(config, params, batch)
    expected = [-oracle_loss(one, batch) for one in runs_by_length(config, params, seen)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[-1], -oracle_loss(logits, batch), atol=1e-5)


def test_run_n_has_the_paths_through_at_most_n_heads():
    """Without norms and MLPs: direct, then one head, then virtual heads, then longer paths."""
    config = attention_only(3)
    params, batch = random_params(config), repeats()
    _, seen = forward(config, params, batch.tokens)
    found = term_importance(config, params, batch, as_they_are)
    weights = CircuitWeights.from_params(config, params)
    for b in range(B):
        paths = path_expansion(weights, batch.tokens[b], seen.patterns[b])
        parts = [paths.direct, paths.one_head.sum((0, 1)), paths.two_heads.sum((0, 1, 2, 3)), paths.longer]
        size = np.abs(paths.total()).max()
        for n in range(4):
            np.testing.assert_allclose(found[n, b], sum(parts[: n + 1]), atol=5e-6 * size, err_msg=str(n))
            assert np.abs(parts[n]).max() > 0.02 * size


def test_biases_are_in_every_run_that_reaches_them():
    """b_O and b_U from run 0 on; with heads that move nothing but biases the last run has PathTerms.bias."""
    config = attention_only(2, bias=True)
    params, batch = random_params(config), repeats()
    silent = params | {"W_E": 0 * params["W_E"], "W_P": 0 * params["W_P"]}
    found = term_importance(config, silent, batch, as_they_are)
    b_o = sum(np.float64(params[f"layer_{layer}"]["attention"]["b_O"]) for layer in range(2))
    np.testing.assert_allclose(found[0], np.broadcast_to(b_o @ params["W_U"] + params["b_U"], (B, T, V)), atol=1e-5)
    _, seen = forward(config, silent, batch.tokens)
    paths = path_expansion(CircuitWeights.from_params(config, silent), batch.tokens[0], seen.patterns[0])
    np.testing.assert_allclose(found[2, 0], paths.bias, atol=1e-5)
    assert np.abs(found[1] - found[0]).max() > 0.1
    assert np.abs(found[2] - found[1]).max() > 0.1


def test_a_model_of_one_layer_has_two_terms():
    config = attention_only(1)
    params, batch = random_params(config), repeats()
    logits, _ = forward(config, params, batch.tokens)
    found = term_importance(config, params, batch)
    assert found.shape == (2,)
    x = np.float64(params["W_E"])[batch.tokens] + np.float64(params["W_P"])
    expected = [-oracle_loss(x @ np.float64(params["W_U"]), batch), -oracle_loss(logits, batch)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="tokens must be in"):
        term_importance(config, params, dataclasses.replace(batch, tokens=batch.tokens.at[0, 0].set(V)))


def test_many_runs_come_from_vmap():
    config = CONFIGS["two-layers"]
    params, batch = random_params(config), repeats()
    halved = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, halved)
    together = jax.vmap(lambda params: term_importance(config, params, batch))(runs)
    np.testing.assert_allclose(together[1], term_importance(config, halved, batch), atol=1e-5)
    direct = jax.vmap(lambda params: direct_logit_attribution(config, params, batch.tokens, READOUT))(runs)
    alone = direct_logit_attribution(config, halved, batch.tokens, READOUT)
    np.testing.assert_allclose(direct.heads[1], alone.heads, atol=1e-5)
