"""What is followed in training: every number equals what its source gives, and all of it runs anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import CircuitWeights, Interventions, TransformerConfig, accuracy, forward, next_token_loss
from circuits_jax.circuits import reading
from circuits_jax.heads import evidence, patterns, recall, signatures, trajectory
from circuits_jax.heads import ideal_inputs as ideal
from circuits_jax.models.transformer import init_params
from circuits_jax.tasks.batch import Batch, loss_per_position

L, H, V, T, D, B = 2, 4, 9, 8, 12, 3
LOOKS_BACK = np.arange(T) >= 2
N_DISTRACTORS = 3.0
# Norms, biases, rotary and shortformer positions, shared keys and values, an MLP, a tied unembedding.
CONFIGS = {
    "rms-rotary-grouped-bias-mlp": TransformerConfig(
        V, T, L, H, D, d_head=4, n_kv_heads=2, d_mlp=10, norm="rms", positions="rotary", bias=True
    ),
    "layer-shortformer-bias-tied": TransformerConfig(
        V, T, L, H, D, norm="layer", positions="shortformer", bias=True, tied=True
    ),
}
NAMES = {
    "previous_token", "same_position", "first_token", "entropy", "duplicate_token", "induction", "edge", "copying",
    "output_recall", "previous_recall",
}  # fmt: skip
# Each program runs a few times: LLVM unoptimized compiles them in a fraction of the time.
QUICK = {"xla_backend_optimization_level": 0}


def random_params(config, seed=7):
    """Every leaf random, also the biases and gains that init_params leaves at 0 and 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + 0.5 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))


signatures_of = jax.jit(trajectory.weight_signatures, static_argnums=0, compiler_options=QUICK)


def weight_signatures(config, params, looks_back=LOOKS_BACK):
    return {name: np.asarray(x) for name, x in signatures_of(config, params, looks_back, N_DISTRACTORS).items()}


# Weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CONFIGS)
def signed(request):
    config = CONFIGS[request.param]
    params = random_params(config)
    return config, params, weight_signatures(config, params)


def test_names_shapes_and_no_nan(signed):
    _, _, found = signed
    assert found.keys() == {f"{name}_weights" for name in NAMES}
    for name, score in found.items():
        assert score.shape == ((L, H, L, H) if name == "edge_weights" else (L, H)), name
        assert np.isfinite(score).all(), name


def test_every_score_is_that_of_its_source(signed):
    config, params, found = signed

    @jax.jit
    def sources(params):
        weights = CircuitWeights.from_params(config, params)
        return {
            "pattern": signatures.position_pattern(weights, T),
            "scores": reading.token_scores(weights, *[ideal.token_inputs(weights, T)] * 2, np.arange(T)),
            "output_recall_weights": recall.output_recall(weights),
            "previous_recall_weights": recall.previous_recall(weights, LOOKS_BACK),
            **evidence.from_weights(config, params, LOOKS_BACK, N_DISTRACTORS),
        }

    expected = {name: np.asarray(x) for name, x in sources.lower(params).compile(QUICK)(params).items()}
    pattern, scores = expected.pop("pattern"), expected.pop("scores")
    assert expected.keys() == {
        "output_recall_weights", "previous_recall_weights", "previous_token_weights", "induction_weights",
        "edge_weights",
    }  # fmt: skip
    positional = {
        name: getattr(patterns, name) for name in ("previous_token", "same_position", "first_token", "entropy")
    }
    of_pattern = jax.jit(lambda x: {name: score(x, LOOKS_BACK) for name, score in positional.items()})
    matching = jax.jit(lambda x: signatures.matching(x, T / 2, 2))
    by_head = {name: np.zeros((L, H)) for name in (*positional, "duplicate_token")}
    for at in np.ndindex(L, H):
        for name, score in (of_pattern(pattern[at]) | {"duplicate_token": matching(scores[at])}).items():
            by_head[name][at] = score
    for name, value in (expected | {f"{name}_weights": x for name, x in by_head.items()}).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_copying_is_the_cosine_with_the_identity(signed):
    """tr(A) / (|A| sqrt(r)) of the double-centred logit table A, r = min(K, V - 1), written out in float64."""
    config, params, found = signed
    weights = jax.jit(lambda params: CircuitWeights.from_params(config, params), compiler_options=QUICK)(params)
    w_e, w_u, w_v, w_o = (np.asarray(getattr(weights, name), np.float64) for name in ("W_E", "W_U", "W_V", "W_O"))
    for layer, head in np.ndindex(L, H):
        table = w_e @ w_v[layer, head // (H // w_v.shape[1])] @ w_o[layer, head] @ w_u
        table = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        cosine = np.trace(table) / np.linalg.norm(table) / np.sqrt(min(w_v.shape[-1], V - 1))
        np.testing.assert_allclose(found["copying_weights"][layer, head], cosine, rtol=1e-3, atol=1e-5)


def test_only_the_queries_that_look_back_count_for_positional_scores():
    config = CONFIGS["layer-shortformer-bias-tied"]
    params = random_params(config)
    found, other = (weight_signatures(config, params, queries) for queries in (LOOKS_BACK, np.arange(T) == T - 1))
    changed = {name for name in found if not np.allclose(found[name], other[name], atol=1e-6)}
    assert changed >= {f"{name}_weights" for name in ("previous_token", "same_position", "first_token", "entropy")}
    assert not changed & {"duplicate_token_weights", "copying_weights", "output_recall_weights"}


def test_many_runs_come_from_vmap():
    config = CONFIGS["rms-rotary-grouped-bias-mlp"]
    runs = [random_params(config, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    swept = jax.vmap(lambda params: trajectory.weight_signatures(config, params, LOOKS_BACK, N_DISTRACTORS))
    together = jax.jit(swept, compiler_options=QUICK)(stacked)
    for run, params in enumerate(runs):
        for name, score in weight_signatures(config, params).items():
            np.testing.assert_allclose(together[name][run], score, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_decomposition_is_called_on_any_platform(name):
    """So that it may run inside a program that is split over devices, where such calls can wait forever."""
    config, platforms = CONFIGS[name], ("cpu", "cuda", "tpu")
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    signed = jax.vmap(lambda params: trajectory.weight_signatures(config, params, LOOKS_BACK, N_DISTRACTORS))
    runs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), params)
    exported = jax.export.export(jax.jit(signed), platforms=platforms)(runs)
    assert exported.platforms == platforms
    text = exported.mlir_module()
    assert "custom_call" not in text
    assert "lapack" not in text.lower()
    assert "stablehlo.dot_general" in text


def test_the_check_for_decompositions_sees_one():
    square = jax.ShapeDtypeStruct((3, 3), np.float32)
    text = jax.export.export(jax.jit(jnp.linalg.svd), platforms=["cpu"])(square).mlir_module()
    assert "custom_call" in text
    assert "lapack" in text


# Behaviour --------------------------------------------------------------------------------------------------------


def make_batch(inputs=None, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < 0.6
    mask[0, :3] = True
    return Batch(jnp.asarray(rng.integers(0, 3, (B, T))), jnp.asarray(mask), {}, inputs)


def random_inputs(seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), jnp.float32)


CONFIG = TransformerConfig(V, T, L, H, D)
PARAMS = random_params(CONFIG)
behaviour = jax.jit(
    lambda params, batch, changes: trajectory.behaviour(CONFIG, params, batch, changes), compiler_options=QUICK
)


def shifted(params, by):
    """One model for each position and sequence would be needed for inputs; one vector for all is W_E + by."""
    return params | {"W_E": params["W_E"] + by}


def test_behaviour_is_that_of_the_forward_pass():
    batch = make_batch()
    logits, _ = forward(CONFIG, PARAMS, batch.tokens)
    found = behaviour(PARAMS, batch, None)
    assert {name: x.shape for name, x in found.items()} == {
        "evaluation_loss": (), "accuracy": (), "loss_per_position": (T,),
    }  # fmt: skip
    np.testing.assert_allclose(found["evaluation_loss"], next_token_loss(logits, batch), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], accuracy(logits, batch), rtol=1e-6)
    np.testing.assert_allclose(found["loss_per_position"], loss_per_position(logits, batch), rtol=1e-4, atol=1e-5)


def test_loss_per_position_averages_to_the_loss():
    batch = make_batch()
    found = behaviour(PARAMS, batch, None)
    counts = np.asarray(batch.mask)[:, :-1].sum(0)
    by_position = np.asarray(found["loss_per_position"])[:-1]
    total = sum(loss * count for loss, count in zip(by_position, counts, strict=True) if count)
    np.testing.assert_allclose(total / counts.sum(), found["evaluation_loss"], rtol=1e-5)


def test_behaviour_reads_the_inputs_of_the_batch():
    """One vector added at all positions is the model whose embeddings hold it; others change the loss too."""
    vector = random_inputs()[0, 0]
    same = behaviour(PARAMS, make_batch(jnp.broadcast_to(vector, (B, T, D))), None)
    expected = behaviour(shifted(PARAMS, vector), make_batch(), None)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), same, expected)
    assert abs(same["evaluation_loss"] - behaviour(PARAMS, make_batch(), None)["evaluation_loss"]) > 1e-2
    # One sequence's inputs, here those of the first, are its own.
    one = behaviour(PARAMS, make_batch(random_inputs().at[1:].set(0.0)), None)["loss_per_position"]
    batch = make_batch()
    rest = jax.tree.map(lambda x: x[1:], batch)
    others = np.where(np.asarray(rest.mask).any(0), loss_per_position(forward(CONFIG, PARAMS, rest.tokens)[0], rest), 0)
    first = jax.tree.map(lambda x: x[:1], make_batch(random_inputs()))
    changes = Interventions(residual_added=jnp.zeros((L + 1, T, D)).at[0].set(first.inputs[0]))
    alone = loss_per_position(forward(CONFIG, PARAMS, first.tokens, changes)[0], first)
    counts = np.asarray(batch.mask).sum(0)
    for t in range(T - 1):
        if batch.mask[0, t]:
            expected = (alone[t] + others[t] * (counts[t] - 1)) / counts[t]
            np.testing.assert_allclose(one[t], expected, rtol=1e-4, atol=1e-5)


def test_behaviour_under_interventions():
    scale = Interventions(head_scale=jnp.array([[0.0, 1, 1, 1], [1, 1, 0.5, 1]]))
    without = jax.tree.map(np.array, PARAMS)
    without["layer_0"]["attention"]["W_O"][0] = 0.0
    without["layer_1"]["attention"]["W_O"][2] *= 0.5
    inputs = random_inputs()
    for batch in (make_batch(), make_batch(inputs)):
        found, expected = behaviour(PARAMS, batch, scale), behaviour(without, batch, None)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected)
    # What is added to the residual stream adds to the inputs.
    added = jnp.zeros((L + 1, T, D)).at[0].set(0.3)
    found = behaviour(PARAMS, make_batch(inputs), Interventions(residual_added=added))
    expected = behaviour(PARAMS, make_batch(inputs + 0.3), None)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected)


# Attention --------------------------------------------------------------------------------------------------------

from_attention = jax.jit(
    lambda params, batch, changes: evidence.from_attention(CONFIG, params, batch, LOOKS_BACK, changes),
    compiler_options=QUICK,
)


def oracle_attention(seen, batch):
    """Each score of each sequence, then the mean over those where a query of the mask has a target."""
    scores = {
        "previous_token": lambda x, tokens, mask: patterns.previous_token(x, LOOKS_BACK),
        "induction": patterns.induction,
        "duplicate_token": patterns.duplicate_token,
        "same_position": lambda x, tokens, mask: patterns.same_position(x, mask),
        "first_token": lambda x, tokens, mask: patterns.first_token(x, mask),
        "entropy": lambda x, tokens, mask: patterns.entropy(x, mask),
    }
    found = {}
    for name, score in scores.items():
        of_one, table = jax.jit(score), np.zeros((B, L, H))
        for b, layer, head in np.ndindex(B, L, H):
            table[b, layer, head] = of_one(seen.patterns[b, layer, head], batch.tokens[b], batch.mask[b])
        found[f"{name}_attention"] = np.nanmean(table, axis=0)
    return found


@pytest.mark.parametrize("kind", ["plain", "inputs", "interventions", "both"])
def test_attention_scores_are_those_of_the_patterns_that_are_seen(kind):
    inputs = random_inputs() if kind in ("inputs", "both") else None
    changes = Interventions(scores_added=jnp.zeros((L, H, T, T)).at[1, 2, :, 0].set(4.0))
    batch, changes = make_batch(inputs), changes if kind in ("interventions", "both") else None
    added = jnp.zeros((B, L + 1, T, D)).at[:, 0].set(0.0 if inputs is None else inputs)
    under = Interventions(residual_added=added, scores_added=None if changes is None else changes.scores_added)
    _, seen = forward(CONFIG, PARAMS, batch.tokens, under)
    seen = jax.tree.map(np.asarray, seen)
    expected, found = oracle_attention(seen, batch), from_attention(PARAMS, batch, changes)
    assert found.keys() == expected.keys()
    for name, score in found.items():
        np.testing.assert_allclose(score, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    plain = from_attention(PARAMS, make_batch(), None)["first_token_attention"]
    differs = np.abs(found["first_token_attention"] - plain) > 1e-3
    expected_change = {
        "plain": np.zeros((L, H), bool), "inputs": np.ones((L, H), bool),
        "interventions": np.arange(L * H).reshape(L, H) == 6, "both": np.ones((L, H), bool),
    }  # fmt: skip
    np.testing.assert_array_equal(differs, expected_change[kind])
