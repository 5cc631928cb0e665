"""Scores and effects side by side: the same numbers as the functions that they come from, against float64 by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import CircuitWeights, TransformerConfig, ablate_heads, cut_edges, forward, init_params
from circuits_jax.heads import comparison
from circuits_jax.heads.direct_effects import direct_target_logits
from circuits_jax.models import graph
from circuits_jax.models.interventions import Interventions
from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.repeated_tokens import RepeatedTokens

V, T, B = 8, 12, 4
CONFIG = TransformerConfig(V, T, n_layers=2, n_heads=2, d_model=16)
TASK = RepeatedTokens(min_period=3, max_period=5, n_vocab=V, n_context=T)


@pytest.fixture(scope="module")
def model():
    params = jax.tree.map(lambda x: 2.0 * x, init_params(CONFIG, jax.random.key(0)))
    batch = jax.jit(lambda: sample_batch(TASK, jax.random.key(1), 0, B))()
    return params, batch


@pytest.fixture(scope="module")
def effects(model):
    return jax.jit(lambda params, batch: comparison.effects_of_edges(CONFIG, params, batch))(*model)


def test_losses_and_induction_are_those_of_cut_edges(model, effects):
    single, joint = effects
    plain = cut_edges(CONFIG, *model)
    for i, name in enumerate("qkv"):
        np.testing.assert_allclose(single[name]["loss"], plain.loss[i], atol=1e-5)
        np.testing.assert_allclose(single[name]["own induction attention"], plain.induction[i], atol=1e-5)
        np.testing.assert_allclose(joint[f"all {name} cut: loss"], plain.joint_loss[i], atol=1e-5)
        all_cut = joint[f"all {name} cut: own induction attention"]
        np.testing.assert_allclose(all_cut, plain.joint_induction[i], atol=1e-5)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_a_cut_changes_in_the_receiver(model, effects, name):
    params, batch = model
    _, whole = forward(CONFIG, params, batch.tokens)
    cut = graph.cut(CONFIG, [f"0.1->1.0.{name}"])
    _, seen = forward(CONFIG, params, batch.tokens, Interventions(edges=cut))
    pick = lambda field: [np.float64(getattr(x, field))[:, 1, 0] for x in (whole, seen)]  # noqa: E731
    (before, after), (wrote, writes), (score, scores) = map(pick, ("patterns", "head_outputs", "scores"))
    measured = {what: values[0, 1, 1, 0] for what, values in effects[0][name].items()}
    np.testing.assert_allclose(measured["own attention"], np.abs(before - after).sum(-1).mean() / 2, atol=1e-5)
    np.testing.assert_allclose(
        measured["own output"], np.linalg.norm(wrote - writes) / np.linalg.norm(wrote), rtol=1e-4, atol=1e-6
    )
    squares = []
    for change in score - scores:
        for t in range(T):
            squares += list((change[t, : t + 1] - change[t, : t + 1].mean()) ** 2)
    np.testing.assert_allclose(measured["own scores"], np.sqrt(np.mean(squares)), rtol=1e-3, atol=1e-5)
    assert measured["own output"] > 1e-3


def test_effects_of_heads(model):
    params, batch = model
    found = jax.jit(lambda params, batch: comparison.effects_of_heads(CONFIG, params, batch))(params, batch)
    plain = ablate_heads(CONFIG, params, batch)
    np.testing.assert_allclose(found["loss, zero ablation"], plain.loss, atol=1e-5)
    np.testing.assert_allclose(
        found["induction attention of another head"], np.asarray(plain.induction).max((2, 3)), atol=1e-5
    )
    np.testing.assert_allclose(found["direct logit of the target"], direct_target_logits(CONFIG, params, batch))
    # Given the best of the others gone, a head costs its joint loss less the other's.
    losses = {}
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    for a in heads:
        for b in heads:
            scale = np.ones((2, 2), np.float32)
            scale[a] = scale[b] = 0.0
            logits, _ = forward(CONFIG, params, batch.tokens, Interventions(head_scale=jnp.asarray(scale)))
            log_p = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
            chosen = np.take_along_axis(log_p, np.asarray(batch.tokens)[:, 1:, None], -1)[..., 0]
            losses[a, b] = -chosen[np.asarray(batch.mask)[:, :-1]].mean()
    for b in heads:
        expected = max(losses[a, b] - losses[a, a] for a in heads if a != b)
        np.testing.assert_allclose(found["loss, once another head is gone"][b], expected, atol=2e-5)


def test_gain_is_one_for_inputs_of_random_directions():
    """Every head attends to its own position alone, and embeddings point anywhere."""
    config = TransformerConfig(64, 4, n_layers=1, n_heads=2, d_model=256, d_head=32, positions="none")
    params = init_params(config, jax.random.key(2))
    tokens = jax.random.randint(jax.random.key(3), (16, 1), 0, 64)
    batch = sample_batch(RepeatedTokens(min_period=1, max_period=1, n_vocab=64, n_context=4), jax.random.key(0), 0, 16)
    alone = type(batch)(tokens, jnp.ones(tokens.shape, bool), {})
    gain = comparison.conditions(config, params, alone)["gain"]
    np.testing.assert_allclose(gain, 1.0, atol=0.1)


def test_scores_have_one_number_for_each_head_and_edge(model):
    params, _ = model
    weights = CircuitWeights.from_params(CONFIG, params)
    queries, key = jnp.arange(T) < 5, jax.random.key(4)
    heads = jax.jit(lambda w: comparison.scores_of_heads(w, queries, 3.0, key, None))(weights)
    edges = jax.jit(lambda w: comparison.scores_of_edges(w, queries, 3.0, key))(weights)
    assert all(value.shape == (2, 2) and np.isfinite(value).all() for value in heads.values())
    assert {name: len(scores) for name, scores in edges.items()} == {"q": 4, "k": 7, "v": 4}
    for scores in edges.values():
        assert all(value.shape == (2, 2, 2, 2) and np.isfinite(value[0, :, 1]).all() for value in scores.values())
