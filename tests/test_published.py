"""Published scores against a slow forward pass by hand, on planted heads, and where attention is uniform."""

import dataclasses
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import CircuitWeights, TransformerConfig, init_params, params_from_weights
from circuits_jax.heads import published
from circuits_jax.heads.claims import Published, Score, load_claim
from circuits_jax.heads.published import compared, published_scores
from circuits_jax.models.head_types import QK_TYPES
from circuits_jax.models.planted import plant
from circuits_jax.models.planted_recipes import recipes

L, H, V, D, K, T = 3, 4, 23, 8, 3, 12
BOS, NAMES, KEY = 4, np.delete(np.arange(V), 4), jax.random.key(0)
CONFIGS = {
    "as GPT-2": TransformerConfig(V, T, L, H, D, K, d_mlp=10, norm="layer", bias=True, tied=True),
    "as Llama": TransformerConfig(
        V, T, L, H, D, K, d_mlp=10, norm="rms", positions="none", n_kv_heads=2, activation="relu", gated=True
    ),
    "nothing but heads": TransformerConfig(V, T, L, H, D, K),
}  # fmt: skip


def random_params(config, seed=0):
    """Every parameter random, gains about 1 and biases too, large enough that all of them decide ranks."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, KEY))

    def fill(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.5 * drawn if path[-1].key == "scale" else 0.8 * drawn, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


# The oracle: a forward pass in loops ------------------------------------------------------------------------------


def norm(config, x, params=None):
    if config.norm == "none":
        return x
    if config.norm == "layer":
        x = x - x.mean()
    return x / math.sqrt((x * x).mean() + config.norm_epsilon) * params["scale"] + params.get("bias", 0.0)


def mlp(config, params, x):
    hidden = x @ params["W_in"] + params.get("b_in", 0.0)
    if config.gated:
        hidden = hidden * np.maximum(x @ params["W_gate"], 0)
    else:
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ params["W_out"] + params.get("b_out", 0.0)


def value(config, params, layer, head, x):
    """What this head writes, b_O left out, where it attends to nothing but residual x."""
    layer, group = params[f"layer_{layer}"], head // (config.n_heads // config.n_groups)
    a = layer["attention"]
    read = norm(config, x, layer.get("attention_norm"))
    b_v = a["b_V"][group] if config.bias else 0.0
    return (read @ a["W_V"][group] + b_v) @ a["W_O"][head]


def after_block_0(config, params, tokens):
    """The residual stream at the last token."""
    layer, a = params["layer_0"], params["layer_0"]["attention"]
    xs = [params["W_E"][token] + (params["W_P"][t] if "W_P" in params else 0.0) for t, token in enumerate(tokens)]
    rows = [norm(config, x, layer.get("attention_norm")) for x in xs]
    out = xs[-1] + (a["b_O"] if config.bias else 0.0)
    for head in range(config.n_heads):
        group = head // (config.n_heads // config.n_groups)
        q = rows[-1] @ a["W_Q"][head] + (a["b_Q"][head] if config.bias else 0.0)
        scores = [q @ (row @ a["W_K"][group] + (a["b_K"][group] if config.bias else 0.0)) for row in rows]
        weight = np.exp(np.array(scores) / math.sqrt(config.d_head))
        for share, x in zip(weight / weight.sum(), xs, strict=True):
            out = out + share * value(config, params, 0, head, x)
    if not config.d_mlp:
        return out
    return out + mlp(config, layer["mlp"], norm(config, out, layer.get("mlp_norm")))


def oracle_copying(config, params, sign):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    unembed = params["W_E"].T if config.tied else params["W_U"]
    share = np.zeros((config.n_layers, config.n_heads))
    for layer, head in np.ndindex(*share.shape):
        for name in NAMES:
            written = sign * value(config, params, layer, head, after_block_0(config, params, [BOS, name]))
            logits = norm(config, written, params.get("final_norm")) @ unembed + params.get("b_U", 0.0)
            share[layer, head] += (name in np.argsort(-logits)[: published.TOP]) / len(NAMES)
    return share


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_copying_agrees_with_a_slow_float64_forward_pass(config):
    params = random_params(config)
    scores = published_scores(config, params, NAMES, BOS, KEY)
    assert set(scores) == set(get_args(Score))
    for name, sign in (("copying", 1), ("negative copying", -1)):
        wanted = oracle_copying(config, params, sign)
        assert len(np.unique(wanted)) > 3  # heads differ
        np.testing.assert_allclose(scores[name], wanted, atol=1e-6)


# --- planted heads ---


def one_hot_model(norm="none", b_U=None):
    """Heads of layer 1 copy, copy negatively, do nothing; those of layer 0 do nothing."""
    one = np.eye(V, dtype=np.float32)
    zero = np.zeros_like(one)
    w_o = np.array([[zero, zero, zero], [one, -one, zero]])
    w_q = np.zeros_like(w_o)
    return params_from_weights(
        CircuitWeights(
            W_E=one, W_Q=w_q, W_K=w_q, W_V=np.broadcast_to(one, w_q.shape), W_O=w_o, W_U=one, b_U=b_U,
            positions="none", n_context=T, norm=norm,
        )
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_a_copying_head_copies_every_name_and_its_negative_does_under_minus_ov(norm):
    scores = published_scores(*one_hot_model(norm), NAMES, BOS, KEY)
    np.testing.assert_array_equal(scores["copying"][1], [1, 0, 0])
    np.testing.assert_array_equal(scores["negative copying"][1], [0, 1, 0])
    # Heads that write nothing give all names the same logit: that is no copy.
    assert not scores["copying"][0].any()
    assert not scores["negative copying"][0].any()


def test_fifth_place_counts_and_sixth_does_not():
    """b_U lifts other tokens above a copied name: four leave it among the first five."""
    for n_above, share in ((4, 1.0), (5, 0.0)):
        above = np.zeros(V, np.float32)
        above[:n_above] = 9.0
        scores = published_scores(*one_hot_model(b_U=above), np.arange(8, V), BOS, KEY)
        assert scores["copying"][1, 0] == scores["negative copying"][1, 1] == share


def test_planted_heads_attend_to_what_they_are_named_for():
    recipe = recipes("learned")["k_induction"]
    planted = plant(recipe, jax.random.key(3))
    scores = published_scores(recipe.config, planted.params, np.arange(1, 5), 0, KEY)
    # A planted duplicate-token head matches its own token too, and so attends half to that.
    for name, least in {"previous token": 0.9, "duplicate token": 0.45, "induction": 0.9}.items():
        is_one = np.asarray(planted.truth.qk[..., QK_TYPES.index(name.replace(" ", "_"))])
        assert is_one.any()
        assert scores[name][is_one].min() > least
        assert scores[name][~is_one].max() < 0.4


def test_uniform_attention_gives_each_score_what_chance_does():
    """W_QK = 0: a query t attends 1/(t+1) to each key, so each score tells over which queries it is a mean."""
    scores = published_scores(*one_hot_model(), NAMES, BOS, KEY)
    p = (T - 1) // 2
    of_queries = lambda first: np.mean([1 / (t + 1) for t in range(first, 2 * p + 1)])  # noqa: E731
    np.testing.assert_allclose(scores["previous token"], of_queries(2), rtol=1e-5)
    np.testing.assert_allclose(scores["duplicate token"], of_queries(p + 1), rtol=1e-5)
    np.testing.assert_allclose(scores["induction"], of_queries(p + 1), rtol=1e-5)


@pytest.mark.parametrize("bos", [0, 2, 5])
def test_the_repeated_tokens_are_distinct_and_not_bos(bos):
    """A head that looks for bos alone: with bos among the tokens of r, it would find it elsewhere too."""
    one = np.eye(6, dtype=np.float32)[None, None]
    to_bos = np.zeros_like(one)
    to_bos[..., :, bos] = 200.0
    weights = CircuitWeights(
        W_E=one[0, 0], W_Q=to_bos, W_K=one, W_V=one, W_O=one, W_U=one[0, 0], positions="none", n_context=20
    )
    scores = published_scores(*params_from_weights(weights), np.array([1]), bos, KEY)
    for name in ("previous token", "duplicate token", "induction"):
        assert scores[name][0, 0] < 1e-6  # would be the chance of bos in r, otherwise
    same = 200.0 * one  # five distinct tokens of r are all that there are: each copy is the only one
    scores = published_scores(*params_from_weights(dataclasses.replace(weights, W_Q=same)), np.array([1]), bos, KEY)
    np.testing.assert_allclose(scores["duplicate token"], 0.5, rtol=1e-5)  # the copy, and the query itself


def test_scores_are_a_function_of_the_key_and_run_under_jit():
    config = CONFIGS["nothing but heads"]
    params = random_params(config)
    run = lambda params, names, key: published_scores(config, params, names, BOS, key)  # noqa: E731
    one, same, other = run(params, NAMES, KEY), jax.jit(run)(params, NAMES, KEY), run(params, NAMES, jax.random.key(1))
    for name in get_args(Score):
        np.testing.assert_allclose(one[name], same[name], atol=1e-6)
        assert (jnp.abs(one[name] - other[name]).max() > 1e-4) == ("copying" not in name)


# --- against what was published ---

SCORES = {name: np.array([[0.1, 0.5], [0.9, np.nan]]) for name in get_args(Score)}


@pytest.mark.parametrize(
    ("heads", "bounds", "values", "met"),
    [
        (((0, 1), (1, 0)), {"at_least": 0.5}, [0.5, 0.9], True),
        (((0, 1), (1, 0)), {"at_least": 0.51}, [0.5, 0.9], False),
        (((0, 0), (0, 1)), {"at_most": 0.5}, [0.1, 0.5], True),
        (((0, 0), (1, 0)), {"at_most": 0.5}, [0.1, 0.9], False),
        (((1, 1),), {"at_most": 0.5}, [np.nan], False),
        ("average", {"at_most": 0.5}, [np.nan], False),
    ],
)
def test_a_published_bound_is_met_by_all_heads_it_names(heads, bounds, values, met):
    found, within = compared(Published("induction", heads, "", **bounds), SCORES)
    np.testing.assert_array_equal(found, values)
    assert within == met


def test_an_average_is_of_all_heads_of_the_model():
    scores = {"copying": np.array([[0.1, 0.5], [0.9, 0.1]])}
    for most, met in ((0.41, True), (0.39, False)):
        found, within = compared(Published("copying", "average", "", at_most=most), scores)
        np.testing.assert_allclose(found, [0.4])
        assert within == met


def test_a_head_that_the_model_has_not_is_refused():
    with pytest.raises(ValueError, match=r"induction score names head 2\.0, but the model has 2 layers of 2 heads"):
        compared(Published("induction", ((2, 0),), ""), SCORES)


def test_what_is_shipped_can_be_compared():
    scores = dict.fromkeys(get_args(Score), np.full((12, 12), 0.97))
    met = [(entry.score, compared(entry, scores)[1]) for entry in load_claim("ioi_gpt2_small").published]
    assert met == [
        ("copying", True), ("copying", False), ("negative copying", False), ("previous token", True),
        ("duplicate token", True), ("induction", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "names", "bos", "message"),
    [
        ({"causal": False}, NAMES, BOS, "decoders without post-norm"),
        ({"norm": "layer", "norm_position": "post"}, NAMES, BOS, "decoders without post-norm"),
        ({"unembed_transform": True}, NAMES, BOS, "decoders without post-norm"),
        ({"n_context": 4}, NAMES, BOS, "n_context 5 and n_vocab 3; got 4 and 23"),
        ({}, NAMES[None], BOS, r"names must be token ids \[n\], at least one; got shape \[1, 22\]"),
        ({}, [], BOS, r"names must be token ids \[n\], at least one; got shape \[0\]"),
        ({}, [V], BOS, r"tokens must be in \[0, n_vocab=23\)"),
        ({}, NAMES, -1, r"tokens must be in \[0, n_vocab=23\)"),
        ({}, [0.5], BOS, "tokens must be integers"),
    ],
)
def test_bad_input_is_refused_by_name(config, names, bos, message):
    config = dataclasses.replace(CONFIGS["nothing but heads"], **config)
    with pytest.raises(ValueError, match=message):
        published_scores(config, {}, names, bos, KEY)
