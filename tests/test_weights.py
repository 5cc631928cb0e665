"""CircuitWeights: the folded weights must reproduce, in plain float64 NumPy, what the model's forward pass saw."""

import dataclasses
import math
import re
import textwrap

import jax
import numpy as np
import pytest

import circuits_jax as cj
from circuits_jax.circuits.weights import CircuitWeights, check_params, params_from_weights, per_query_head
from circuits_jax.models.config import Rotary, TransformerConfig
from circuits_jax.models.transformer import forward, init_params

TOKENS = np.array([3, 0, 4, 4, 1, 6])
SHAPE = {"n_vocab": 7, "n_context": 8, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 6}
GROUPED = SHAPE | {"n_heads": 4, "n_kv_heads": 2}
# Each value of each option, and the pairs that interact: norm x positions, norm x bias, LayerNorm x tied, and shared
# keys and values, embedding scale x tied, and forms of rotary positions with each norm.
CONFIGS = {
    "plain": TransformerConfig(**SHAPE, positions="shortformer", bias=True),
    "layer-tied": TransformerConfig(**SHAPE, norm="layer", positions="learned", tied=True),
    "layer-rotary": TransformerConfig(**SHAPE, norm="layer", positions="rotary", bias=True),
    "layer-shortformer": TransformerConfig(**SHAPE, norm="layer", positions="shortformer"),
    "rms-shortformer": TransformerConfig(**SHAPE, norm="rms", positions="shortformer", bias=True, tied=True),
    "rms-none": TransformerConfig(**SHAPE, norm="rms", positions="none"),
    "grouped-learned-scaled": TransformerConfig(**GROUPED, bias=True, embedding_scale=0.5),
    "layer-grouped-interleaved-part-tied-scaled": TransformerConfig(
        **GROUPED, norm="layer", positions="rotary", rotary_dim=4, rotary_pairs="interleaved", rotary_base=100.0,
        tied=True, embedding_scale=3.0,
    ),
    "rms-grouped-half-part-tied-scaled": TransformerConfig(
        **GROUPED, norm="rms", positions="rotary", rotary_dim=2, bias=True, tied=True, embedding_scale=4.0
    ),
    "layer-grouped-shortformer": TransformerConfig(**GROUPED, norm="layer", positions="shortformer", bias=True),
    "interleaved": TransformerConfig(**SHAPE, positions="rotary", rotary_pairs="interleaved", bias=True),
}  # fmt: skip
fold = jax.jit(CircuitWeights.from_params, static_argnums=0)


def random_params(config, seed=0):
    """As init_params lays them out, but with every bias and every norm gain away from 0 and 1."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / (2 if name in ("bias", "W_E") or name[0] == "b" else 4)).astype("f")

    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """(config, params, weights in float64, logits and activations of the forward pass in float64)."""
    config = CONFIGS[request.param]
    params = random_params(config)
    return config, params, float64(fold(config, params)), *float64(forward(config, params, TOKENS))


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def normalise(weights, x):
    """The model's norm without gain and bias."""
    if weights.norm == "none":
        return x
    if weights.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def seen_by_readers(weights, x):
    """x up to what no reader sees: under LayerNorm, its mean."""
    return x - x.mean(-1, keepdims=True) if weights.norm == "layer" else x


def rotation(offset, width, rotary=None):
    """R with q R_{i-j} k^T = (q turned by i)(k turned by j)^T: each pair of components turns by offset * its speed."""
    matrix = np.eye(width)
    if rotary is None:
        return matrix
    dim = rotary.dim or width
    for i in range(dim // 2):
        angle = offset * rotary.base ** (-2 * i / dim)
        a, b = {"half": (i, i + dim // 2), "interleaved": (2 * i, 2 * i + 1)}[rotary.pairs]
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[a, b], matrix[b, a] = math.sin(angle), -math.sin(angle)
    return matrix


def shared(config, head):
    """The key/value head of a query head."""
    return head // (config.n_heads // (config.n_kv_heads or config.n_heads))


def bias(weights, name, layer, head):
    value = getattr(weights, name)
    return 0.0 if value is None else value[layer, head]


def position_vectors(weights, layer, length):
    """[T,D], what shortformer adds to the normalised inputs of q and k; zero for other positions."""
    if weights.positions != "shortformer":
        return 0.0
    return (weights.W_P[layer] if weights.W_P.ndim == 3 else weights.W_P)[:length]


def assert_close(actual, expected):
    """To 1e-5 of the largest entry: the forward pass is float32."""
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_scores_are_those_of_the_folded_weights(case):
    config, _, weights, _, seen = case
    length, width = len(TOKENS), config.d_head
    for layer in range(config.n_layers):
        n = normalise(weights, seen.residual[layer]) + position_vectors(weights, layer, length)
        for head in range(config.n_heads):
            q = n @ weights.W_Q[layer, head] + bias(weights, "b_Q", layer, head)
            k = n @ weights.W_K[layer, shared(config, head)] + bias(weights, "b_K", layer, shared(config, head))
            expected = np.zeros((length, length))
            for i in range(length):
                for j in range(length):
                    turn = rotation(i - j, width, config.rotary if config.positions == "rotary" else None)
                    expected[i, j] = q[i] @ turn @ k[j] / math.sqrt(width)
            assert_close(seen.scores[layer, head], expected)


def test_head_outputs_are_those_of_the_folded_weights(case):
    config, _, weights, _, seen = case
    for layer in range(config.n_layers):
        n, total = normalise(weights, seen.residual[layer]), 0.0
        for head in range(config.n_heads):
            v = n @ weights.W_V[layer, shared(config, head)] + bias(weights, "b_V", layer, shared(config, head))
            expected = seen.patterns[layer, head] @ v @ weights.W_O[layer, head]
            assert_close(seen_by_readers(weights, seen.head_outputs[layer, head]), expected)
            total = total + expected
        total = total + (0.0 if weights.b_O is None else weights.b_O[layer])
        assert_close(seen_by_readers(weights, seen.residual[layer + 1] - seen.residual[layer]), total)


def test_embedding_and_logits_are_those_of_the_folded_weights(case):
    _, _, weights, logits, seen = case
    embedded = weights.W_E[TOKENS] + (weights.W_P[: len(TOKENS)] if weights.positions == "learned" else 0.0)
    assert_close(seen_by_readers(weights, seen.residual[0]), embedded)
    expected = normalise(weights, seen.residual[-1]) @ weights.W_U + (0.0 if weights.b_U is None else weights.b_U)
    assert_close(logits, expected)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.norm == "layer"])
def test_layer_norm_readers_and_writers_have_no_mean(name):
    weights = fold(CONFIGS[name], random_params(CONFIGS[name]))
    # Shortformer adds positions behind the norm, mean and all: there W_Q and W_K do see a mean.
    readers = (weights.W_V, weights.W_U) + ((weights.W_Q, weights.W_K) if weights.positions != "shortformer" else ())
    for reader in readers:
        assert np.abs(reader.mean(-2)).max() < 1e-6
    for writer in (weights.W_O, weights.W_E):
        assert np.abs(writer.mean(-1)).max() < 1e-6


def test_shapes_and_static_fields(case):
    config, _, weights, _, _ = case
    assert (weights.n_context, weights.positions, weights.norm) == (8, config.positions, config.norm)
    assert weights.rotary == config.rotary
    assert weights.W_Q.shape == (2, config.n_heads, 16, 6)
    assert weights.W_K.shape == weights.W_V.shape == (2, 2, 16, 6)  # kept as shared, in every row of the table
    assert weights.W_O.shape == (2, config.n_heads, 6, 16)
    per_layer = config.positions == "shortformer" and config.norm != "none"
    expected = None if config.positions in ("none", "rotary") else (2, 8, 16) if per_layer else (8, 16)
    assert (None if weights.W_P is None else weights.W_P.shape) == expected
    with_bias = config.bias or config.norm == "layer"
    assert (weights.b_Q is not None) == (weights.b_V is not None) == (weights.b_U is not None) == with_bias
    assert (weights.b_O is not None) == config.bias
    assert weights.context_length == 8
    assert dataclasses.replace(weights, n_context=0).context_length == (0 if weights.W_P is None else 8)


def test_round_trip_gives_the_same_logits(case):
    config, params, _, logits, _ = case
    weights = fold(config, params)
    if weights.W_P is not None and weights.W_P.ndim == 3:
        with pytest.raises(ValueError, match=r"W_P must be \[T,D\].*shortformer"):
            params_from_weights(weights)
        return
    new_config, new_params = params_from_weights(weights)
    check_params(new_config, new_params)
    assert (new_config.norm, new_config.positions, new_config.n_context) == (config.norm, config.positions, 8)
    assert (new_config.n_groups, new_config.rotary) == (config.n_groups, config.rotary)
    assert (new_config.tied, new_config.embedding_scale) == (False, 1.0)
    assert_close(np.asarray(forward(new_config, new_params, TOKENS)[0]), logits)


def test_folding_many_runs_under_vmap():
    config = CONFIGS["layer-tied"]
    runs = [random_params(config, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    together = jax.jit(jax.vmap(lambda params: CircuitWeights.from_params(config, params)))(stacked)
    for i, params in enumerate(runs):
        alone = fold(config, params)
        assert jax.tree.structure(together) == jax.tree.structure(alone)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-6)


def test_each_query_head_gets_its_neighbours_shared_head():
    config = CONFIGS["layer-grouped-shortformer"]
    weights = fold(config, random_params(config))
    for x in (weights.W_K, weights.b_V):
        repeated = per_query_head(weights, x)
        assert repeated.shape == (2, 4, *x.shape[2:])
        for head, shared_head in enumerate((0, 0, 1, 1)):
            np.testing.assert_array_equal(repeated[:, head], x[:, shared_head])
    alone = raw_arrays()
    assert per_query_head(alone, alone.W_K) is alone.W_K


def raw_arrays(**replaced):
    """Weights from arrays of one's own: W_E to W_U and W_P, nothing else."""
    rng = np.random.default_rng(3)
    shapes = {
        "W_E": (7, 16), "W_U": (16, 7), "W_P": (8, 16), "W_O": (2, 2, 6, 16),
        "W_Q": (2, 2, 16, 6), "W_K": (2, 2, 16, 6), "W_V": (2, 2, 16, 6),
    }  # fmt: skip
    arrays = {name: (rng.normal(size=shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    return CircuitWeights(**(arrays | replaced))


def test_raw_arrays_become_a_model_that_uses_exactly_them():
    weights = raw_arrays()
    config, params = params_from_weights(weights)
    assert (config.n_vocab, config.n_context, config.n_layers, config.n_heads) == (7, 8, 2, 2)
    assert (config.d_model, config.d_head, config.d_mlp, config.bias, config.tied) == (16, 6, 0, False, False)
    again = fold(config, params)
    for name in ("W_E", "W_P", "W_U", "W_Q", "W_K", "W_V", "W_O"):
        np.testing.assert_array_equal(getattr(again, name), getattr(weights, name))

    w = float64(weights)
    x = w.W_E[TOKENS] + w.W_P[: len(TOKENS)]
    for layer in range(2):
        written = 0.0
        for head in range(2):
            scores = x @ w.W_Q[layer, head] @ w.W_K[layer, head].T @ x.T / math.sqrt(6)
            pattern = np.tril(np.exp(scores))
            pattern /= pattern.sum(-1, keepdims=True)
            written = written + pattern @ x @ w.W_V[layer, head] @ w.W_O[layer, head]
        x = x + written
    assert_close(np.asarray(forward(config, params, TOKENS)[0]), x @ w.W_U)


def test_raw_arrays_with_one_bias_leave_the_others_zero():
    config, params = params_from_weights(raw_arrays(b_Q=np.ones((2, 2, 6), np.float32)))
    assert config.bias
    attention = params["layer_1"]["attention"]
    assert (np.asarray(attention["b_Q"]) == 1).all()
    for value in (attention["b_K"], attention["b_V"], attention["b_O"], params["b_U"]):
        assert not np.asarray(value).any()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"W_P": None}, "W_P must be given .* positions='learned' with W_P missing"),
        ({"W_P": None, "positions": "shortformer"}, "positions='shortformer' with W_P missing"),
        ({"positions": "rotary"}, "left out for none and rotary; got positions='rotary' with W_P given"),
        ({"positions": "none"}, "positions='none' with W_P given"),
        ({"W_P": None, "positions": "rotary"}, "n_context must be given"),
        ({"W_P": None, "positions": "none"}, "n_context must be given"),
    ],
)
def test_weights_that_are_no_model_say_why(replaced, message):
    with pytest.raises(ValueError, match=message):
        params_from_weights(raw_arrays(**replaced))


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O", "W_E", "W_U", "W_P", "b_Q", "b_K", "b_V", "b_O", "b_U"])
def test_weights_of_a_wrong_shape_are_refused(name):
    biases = {"b_Q": (2, 2, 6), "b_K": (2, 2, 6), "b_V": (2, 2, 6), "b_O": (2, 16), "b_U": (7,)}
    whole = raw_arrays(**{bias: np.zeros(shape, np.float32) for bias, shape in biases.items()})
    params_from_weights(whole)
    wrong = dataclasses.replace(whole, **{name: getattr(whole, name)[..., :-1]})
    with pytest.raises(ValueError, match=r"does not fit W_E .* expected .* got") as error:
        params_from_weights(wrong)
    # Which of W_E, W_Q and W_K is wrong cannot be known, so the message shows all three.
    assert f"{name} " in str(error.value)
    assert str(list(getattr(wrong, name).shape)) in str(error.value)


def test_the_first_array_that_does_not_fit_is_named():
    whole = raw_arrays()
    for replaced, message in (
        (
            {"W_V": whole.W_V[:, :1]},
            "W_V does not fit W_E [7, 16], W_Q [2, 2, 16, 6] and W_K [2, 2, 16, 6]: "
            "expected [L,G,D,K] = [2, 2, 16, 6], got [2, 1, 16, 6]",
        ),
        ({"W_Q": whole.W_Q[0]}, "W_Q must have shape [L,H,D,K]; got [2, 16, 6]"),
        ({"W_P": whole.W_P[0]}, "W_P must have shape [T,D]; got [16]"),
        (
            {"W_K": whole.W_K[:, [0, 1, 1]], "W_V": whole.W_V[:, [0, 1, 1]]},
            "the 3 heads of W_K and W_V must divide the 2 heads of W_Q and W_O",
        ),
        ({"W_K": whole.W_K[:, :0], "W_V": whole.W_V[:, :0]}, "the 0 heads of W_K and W_V must divide the 2 heads"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            params_from_weights(dataclasses.replace(whole, **replaced))


def test_a_rotation_that_does_not_fit_is_refused():
    weights = raw_arrays(W_P=None, positions="rotary", n_context=5, rotary=Rotary(dim=8))
    with pytest.raises(ValueError, match="rotary_dim must be at most d_head=6; got 8"):
        params_from_weights(weights)


def test_n_context_replaces_position_vectors():
    config, _ = params_from_weights(raw_arrays(W_P=None, positions="rotary", n_context=5))
    assert config.n_context == 5


CHECKED = TransformerConfig(**SHAPE, norm="layer", bias=True)


def broken(*path, value=None):
    """params of CHECKED with the entry at path replaced, or taken out."""
    params = random_params(CHECKED)
    *outer, last = path
    place = params
    for key in outer:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return params


@pytest.mark.parametrize("config", [CHECKED, TransformerConfig(**SHAPE, d_mlp=5, norm="rms")], ids=["attention", "mlp"])
def test_params_that_fit_pass(config):
    check_params(config, random_params(config))


@pytest.mark.parametrize(
    ("params", "name", "expected", "got"),
    [
        (broken("W_P"), "['W_P']", [8, 16], "nothing"),
        (broken("layer_1", "attention", "b_V"), "['layer_1']['attention']['b_V']", [2, 6], "nothing"),
        (broken("W_X", value=np.ones(16)), "['W_X']", "nothing", [16]),
        (
            broken("layer_0", "mlp_norm", value={"scale": np.ones(16)}),
            "['layer_0']['mlp_norm']['scale']", "nothing", [16],
        ),
        (
            broken("layer_0", "attention", "W_Q", value=np.zeros((2, 16, 4))),
            "['layer_0']['attention']['W_Q']", [2, 16, 6], [2, 16, 4],
        ),
        (broken("final_norm", "scale", value=np.ones(8)), "['final_norm']['scale']", [16], [8]),
        (
            broken("layer_2", value=random_params(CHECKED)["layer_1"]),
            "['layer_2']['attention']['W_K']", "nothing", [2, 16, 6],
        ),
    ],
    ids=["missing", "missing-inside", "unexpected", "unexpected-inside", "shape", "norm-shape", "extra-layer"],
)  # fmt: skip
def test_params_that_do_not_fit_are_named(params, name, expected, got):
    message = re.escape(f"params{name} does not fit the config: expected {expected}, got {got}")
    with pytest.raises(ValueError, match=message):
        check_params(CHECKED, params)
    with pytest.raises(ValueError, match=message):
        CircuitWeights.from_params(CHECKED, params)


def test_the_worked_example_of_params_from_weights():
    block = cj.params_from_weights.__doc__.split("what it finds:")[1].split("The same arrays")[0]
    names = {"np": np, "cj": cj}
    exec(textwrap.dedent(block), names)
    np.testing.assert_allclose(names["seen"].patterns[0, 0, 2], [0.5, 0, 0.5], atol=1e-4)
    assert names["logits"][2].argmax() == 2


@pytest.mark.parametrize(("given", "other"), [("q_gain", "k_gain"), ("k_gain", "q_gain")])
def test_one_gain_of_two_is_refused(given, other):
    weights = raw_arrays(**{given: np.ones((2, 6), np.float32)})
    with pytest.raises(
        ValueError, match=f"q_gain and k_gain must be given both or neither; got {given} without {other}"
    ):
        params_from_weights(weights)
