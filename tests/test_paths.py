"""Path expansion: sums to the logits of the model, and every term against paths listed one by one in float64."""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import circuits_jax as cj
from circuits_jax.circuits.paths import path_expansion, token_attribution

V, T, H, D, K, J = 7, 6, 2, 8, 3, 2
TOKENS = np.array([3, 0, 4, 4, 1, 6])
POSITIONS = ("learned", "shortformer", "rotary", "none")

expand = jax.jit(path_expansion)
attribute = jax.jit(token_attribution)


@cache
def model(n_layers=2, positions="learned", bias=True, seed=0, n_heads=H, n_kv_heads=0):
    """Config, params with every bias drawn at random, weights, logits and patterns of TOKENS."""
    d_head = K + 1 if positions == "rotary" else K  # rotary needs pairs
    config = cj.TransformerConfig(
        V, T, n_layers, n_heads, d_model=D, d_head=d_head, positions=positions, bias=bias, n_kv_heads=n_kv_heads
    )
    params = cj.init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        is_bias = path[-1].key.startswith("b_")
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if is_bias else leaf

    params = jax.tree.map_with_path(draw, params)
    logits, seen = cj.forward(config, params, TOKENS)
    return config, params, cj.CircuitWeights.from_params(config, params), np.asarray(logits), np.asarray(seen.patterns)


def directions(weights):
    """[D,J]: two logit differences."""
    return weights.W_U[:, :J] - weights.W_U[:, J : 2 * J]


def listed_paths(weights, patterns, readout):
    """{path: [T,S,J]} of every path, a path being the heads ((layer, head), ...) it goes through; float64."""
    x = np.asarray(weights.W_E, np.float64)[TOKENS]
    if weights.positions == "learned":
        x = x + np.asarray(weights.W_P, np.float64)
    w_ov = np.asarray(weights.W_V, np.float64) @ np.asarray(weights.W_O, np.float64)
    n_layers = len(patterns)
    paths = {}
    for choice in itertools.product([None, *range(H)], repeat=n_layers):
        path = tuple((layer, head) for layer, head in enumerate(choice) if head is not None)
        flow, moved = np.eye(T), x
        for head in path:
            flow, moved = patterns[head].astype(np.float64) @ flow, moved @ w_ov[head]
        paths[path] = flow[:, :, None] * (moved @ np.asarray(readout, np.float64))[None]
    return paths


def close(actual, expected, scale):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(
    ("n_layers", "positions", "bias"),
    [(n_layers, positions, True) for n_layers in (1, 2, 3) for positions in POSITIONS]
    + [(n_layers, "learned", False) for n_layers in (1, 2, 3)],
)
def test_terms_sum_to_the_logits_of_the_model(n_layers, positions, bias):
    _, _, weights, logits, patterns = model(n_layers, positions, bias)
    terms = expand(weights, TOKENS, patterns)
    close(terms.total(), logits, np.abs(logits).max())
    assert terms.one_head.shape == (n_layers, H, T, V)
    assert terms.two_heads.shape == (n_layers, H, n_layers, H, T, V)
    sizes = {field.name: np.abs(getattr(terms, field.name)).max() for field in dataclasses.fields(terms)}
    absent = {"two_heads": n_layers < 2, "longer": n_layers < 3, "bias": not bias}
    for name, size in sizes.items():
        # A term too small to matter could be wrong without the sum to show it.
        assert size == 0 if absent.get(name) else size > 0.02 * np.abs(logits).max(), name


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("few", [False, True], ids=["all logits", "two directions"])
def test_terms_are_those_of_the_paths_listed_one_by_one(n_layers, few):
    """J = 2 < K and J = V > K take different routes."""
    _, _, weights, logits, patterns = model(n_layers)
    readout = directions(weights) if few else weights.W_U
    terms, scale = expand(weights, TOKENS, patterns, readout), np.abs(logits).max()
    paths = {path: term.sum(1) for path, term in listed_paths(weights, patterns, readout).items()}
    heads = list(np.ndindex(n_layers, H))
    close(terms.direct, paths[()], scale)
    for a in heads:
        close(terms.one_head[a], paths[(a,)], scale)
        for b in heads:
            if a[0] < b[0]:
                close(terms.two_heads[a][b], paths[a, b], scale)
            else:
                assert not terms.two_heads[a][b].any()
    close(terms.longer, sum((term for path, term in paths.items() if len(path) > 2), np.zeros(())), scale)


def test_longer_holds_paths_of_every_length_from_three():
    """Four layers: paths through three heads, and through four."""
    _, _, weights, logits, patterns = model(4, "none")
    paths = listed_paths(weights, patterns, weights.W_U)
    by_length = [sum(term.sum(1) for path, term in paths.items() if len(path) == n) for n in (3, 4)]
    scale = np.abs(logits).max()
    assert min(np.abs(term).max() for term in by_length) > 0.02 * scale
    terms = expand(weights, TOKENS, patterns)
    close(terms.longer, sum(by_length), scale)
    close(terms.total(), logits, scale)


def test_two_heads_are_a_virtual_head():
    """Pattern A^b A^a, OV circuit W_OV^a W_OV^b: the same as one head made of both."""
    _, _, weights, logits, patterns = model(3)
    circuits = cj.ov(weights)
    a, b = (0, 1), (2, 0)
    virtual = circuits[a] @ circuits[b]
    x = weights.W_E[TOKENS] + weights.W_P
    expected = patterns[b] @ patterns[a] @ x @ virtual.left @ virtual.right @ weights.W_U
    assert np.abs(expected).max() > 0.02
    close(expand(weights, TOKENS, patterns).two_heads[a][b], expected, np.abs(logits).max())


def test_bias_is_what_the_model_says_of_zero_embeddings():
    """Without tokens and positions only the biases are left, through later heads too."""
    config, params, weights, _, patterns = model(3)
    silent = params | {"W_E": jnp.zeros((V, D)), "W_P": jnp.zeros((T, D))}
    logits, _ = cj.forward(config, silent, TOKENS)
    terms = expand(weights, TOKENS, patterns)
    assert np.abs(logits - params["b_U"]).max() > 0.1
    close(terms.bias, logits, np.abs(logits).max())
    without_b_u = expand(weights, TOKENS, patterns, weights.W_U).bias
    close(without_b_u, logits - params["b_U"], np.abs(logits).max())


@pytest.mark.parametrize("missing", [("b_V",), ("b_O",), ("b_U",), ("b_V", "b_O", "b_U")])
def test_missing_biases_are_zero(missing):
    _, _, weights, _, patterns = model(3)
    zero = dataclasses.replace(weights, **{name: jnp.zeros_like(getattr(weights, name)) for name in missing})
    none = dataclasses.replace(weights, **dict.fromkeys(missing))
    expected, actual = expand(zero, TOKENS, patterns), expand(none, TOKENS, patterns)
    assert (np.abs(expected.bias).max() == 0) == (len(missing) == 3)
    close(actual.bias, expected.bias, np.abs(expected.bias).max())


def test_heads_that_share_keys_and_values():
    """Four query heads on two key/value heads: query head h reads the values of head h // 2."""
    _, _, weights, logits, patterns = model(3, n_heads=4, n_kv_heads=2)
    assert weights.W_V.shape[1] == 2
    terms, attribution = expand(weights, TOKENS, patterns), attribute(weights, TOKENS, patterns, weights.W_U)
    assert terms.two_heads.shape == (3, 4, 3, 4, T, V)
    close(terms.total(), logits, np.abs(logits).max())
    close(attribution.total().sum(1) + terms.bias, logits, np.abs(logits).max())


def test_head_with_a_pattern_of_zeros_is_off():
    """The patterns are taken as they are: sums to the logits of the model with that head ablated, biases too."""
    config, params, weights, *_ = model(3)
    scale = jnp.ones((3, H)).at[1, 0].set(0.0)
    ablated, seen = cj.forward(config, params, TOKENS, cj.Interventions(head_scale=scale))
    terms = expand(weights, TOKENS, seen.patterns.at[1, 0].set(0.0))
    close(terms.total(), ablated, np.abs(ablated).max())


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_attribution_is_that_of_the_paths_listed_one_by_one(n_layers):
    _, _, weights, logits, patterns = model(n_layers)
    readout = directions(weights)
    attribution, scale = attribute(weights, TOKENS, patterns, readout), np.abs(logits).max()
    paths = listed_paths(weights, patterns, readout)
    heads = list(np.ndindex(n_layers, H))
    close(attribution.direct, paths[()], scale)
    for a in heads:
        close(attribution.one_head[a], paths[(a,)], scale)
        for b in heads:
            if a[0] < b[0]:
                close(attribution.two_heads[a][b], paths[a, b], scale)
            else:
                assert not attribution.two_heads[a][b].any()
    close(attribution.longer, sum((term for path, term in paths.items() if len(path) > 2), np.zeros(())), scale)
    close(attribution.total(), sum(paths.values()), scale)


@pytest.mark.parametrize("positions", ["learned", "shortformer"])
def test_attribution_sums_over_tokens_to_the_terms(positions):
    _, _, weights, logits, patterns = model(3, positions)
    attribution, terms = attribute(weights, TOKENS, patterns, weights.W_U), expand(weights, TOKENS, patterns)
    scale = np.abs(logits).max()
    for field in dataclasses.fields(attribution):
        close(getattr(attribution, field.name).sum(-2), getattr(terms, field.name), scale)
    close(attribution.total().sum(1) + terms.bias, logits, scale)


def test_no_later_token_adds_anything():
    _, _, weights, _, patterns = model(3)
    attribution = attribute(weights, TOKENS, patterns, directions(weights))
    target, source = np.triu_indices(T, 1)
    for name, term in vars(attribution).items():
        assert not np.asarray(term)[..., target, source, :].any(), name
        assert np.abs(term[..., T - 1, T - 1, :]).max() > 0, name


def test_terms_do_not_depend_on_the_basis_inside_a_head():
    """W_V -> W_V G, W_O -> G^-1 W_O, b_V -> b_V G."""
    _, _, weights, logits, patterns = model(3)
    gauge = np.eye(K) + np.random.default_rng(1).normal(size=(3, H, K, K)) / 4
    turned = dataclasses.replace(
        weights,
        W_V=jnp.asarray(weights.W_V @ gauge, jnp.float32),
        W_O=jnp.asarray(np.linalg.inv(gauge) @ weights.W_O, jnp.float32),
        b_V=jnp.asarray(np.einsum("lhk,lhkj->lhj", weights.b_V, gauge), jnp.float32),
    )
    assert np.abs(turned.W_V - weights.W_V).max() > 0.1
    same = jax.tree.map(
        lambda a, b: close(a, b, 5 * np.abs(logits).max()),
        (expand(turned, TOKENS, patterns), attribute(turned, TOKENS, patterns, directions(weights))),
        (expand(weights, TOKENS, patterns), attribute(weights, TOKENS, patterns, directions(weights))),
    )
    assert not jax.tree.leaves(same)


def test_readout_of_one_logit_difference_is_the_difference_of_columns():
    _, _, weights, logits, patterns = model(3)
    right, wrong = 2, 5
    terms = expand(weights, TOKENS, patterns)
    difference = expand(weights, TOKENS, patterns, weights.W_U[:, [right]] - weights.W_U[:, [wrong]])
    scale = np.abs(logits).max()
    for name, term in vars(terms).items():
        expected = term[..., right] - term[..., wrong]
        if name == "bias":
            expected = expected - (weights.b_U[right] - weights.b_U[wrong])
        assert getattr(difference, name).shape[-1] == 1
        close(getattr(difference, name)[..., 0], expected, scale)


def test_batch_and_models_under_vmap():
    config, _, weights, *_ = model()
    other = model(seed=1)[2]
    tokens = np.stack([TOKENS, TOKENS[::-1]])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), weights, other)
    readout = directions(weights)

    def analyse(weights, tokens):
        _, seen = cj.forward(config, cj.params_from_weights(weights)[1], tokens)
        terms = path_expansion(weights, tokens, seen.patterns, readout)
        return terms, token_attribution(weights, tokens, seen.patterns, readout)

    over_batch = jax.vmap(analyse, in_axes=(None, 0))
    together = jax.jit(jax.vmap(over_batch, in_axes=(0, None)))(stacked, tokens)
    alone = jax.jit(analyse)
    for i, each in enumerate((weights, other)):
        for j in range(2):
            found = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], together)
            jax.tree.map(lambda a, b: close(a, b, 5.0), found, alone(each, tokens[j]))


def test_weights_as_numpy_arrays_without_jit():
    _, _, weights, logits, patterns = model()
    raw = jax.tree.map(np.asarray, weights)
    terms = path_expansion(raw, TOKENS.tolist(), patterns)
    close(terms.total(), logits, np.abs(logits).max())
    attribution = token_attribution(raw, TOKENS.tolist(), patterns, raw.W_U)
    close(attribution.total().sum(1) + terms.bias, logits, np.abs(logits).max())


def test_single_token():
    config, params, weights, *_ = model(3)
    logits, seen = cj.forward(config, params, TOKENS[:1])
    terms = expand(weights, TOKENS[:1], seen.patterns)
    close(terms.total(), logits, np.abs(logits).max())


def test_token_out_of_the_vocabulary_is_nan_not_another_token():
    _, _, weights, _, patterns = model()
    for token in (V, -1):
        tokens = np.where(np.arange(T) == T - 1, token, TOKENS)
        assert np.isnan(expand(weights, tokens, patterns).direct[-1]).all()


def test_norms_are_refused():
    _, _, weights, _, patterns = model()
    for function in (path_expansion, token_attribution):
        with pytest.raises(ValueError, match=r"norm='none'.*got norm='rms'.*ablate_heads"):
            function(dataclasses.replace(weights, norm="rms"), TOKENS, patterns, weights.W_U)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": TOKENS[None]}, r"tokens must be integers \[T\].*got int.. \[1, 6\].*vmap"),
        ({"tokens": TOKENS / 1.0}, r"tokens must be integers \[T\].*got float"),
        ({"tokens": TOKENS[:0]}, r"tokens must be integers \[T\].*got int.. \[0\]"),
        ({"tokens": TOKENS[:-1]}, r"patterns must be \[L,H,T,T\] = \[2, 2, 5, 5\]; got \[2, 2, 6, 6\]"),
        ({"patterns": np.zeros((1, H, T, T))}, r"patterns must be .* = \[2, 2, 6, 6\]; got \[1, 2, 6, 6\]"),
        ({"readout": np.zeros(D)}, r"readout must be \[D,J\] with D = 8; got \[8\]"),
        ({"readout": np.zeros((V, D))}, r"readout must be \[D,J\] with D = 8; got \[7, 8\]"),
        (
            {"tokens": np.zeros(T + 1, int), "patterns": np.zeros((2, H, T + 1, T + 1))},
            "tokens must hold at most 6 positions, those of W_P; got 7",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    _, _, weights, _, patterns = model()
    arguments = {"tokens": TOKENS, "patterns": patterns, "readout": directions(weights)} | change
    for function in (path_expansion, token_attribution):
        with pytest.raises(ValueError, match=message):
            function(weights, **arguments)


def test_positions_and_their_vectors_must_agree():
    _, _, weights, _, patterns = model()
    with pytest.raises(ValueError, match="W_P must be given"):
        path_expansion(dataclasses.replace(weights, W_P=None), TOKENS, patterns)
