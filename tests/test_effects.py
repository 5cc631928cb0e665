"""All ablations and cuts in one program, against one forward pass at a time in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import Batch, Interventions, TransformerConfig, ablate_heads, cut_edges, forward, init_params

V, T, B = 5, 8, 3
CONFIGS = {
    "two-layers": TransformerConfig(V, T, n_layers=2, n_heads=2, d_model=8),
    "three-layers-layernorm-bias-mlp": TransformerConfig(
        V, T, n_layers=3, n_heads=2, d_model=8, norm="layer", bias=True, d_mlp=6, positions="shortformer"
    ),
}


def random_params(config):
    """Every leaf random and large enough for cuts to matter."""
    rng = np.random.default_rng(3)

    def fill(path, leaf):
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + 0.7 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))


def repeats():
    """Three letters more than once in every sequence, and a mask that leaves some of the repeats out."""
    tokens = np.array([[4, 0, 1, 2, 0, 1, 2, 0], [3, 3, 1, 0, 1, 3, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2]])
    mask = np.array([[0, 0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1, 1, 1]], bool)
    return Batch(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), positions={})


def oracle_loss(logits, batch):
    losses = []
    for row, tokens, mask in zip(np.float64(logits), np.asarray(batch.tokens), np.asarray(batch.mask), strict=True):
        losses += [np.log(np.exp(row[t]).sum()) - row[t, tokens[t + 1]] for t in range(T - 1) if mask[t]]
    return np.mean(losses)


def oracle_induction(pattern, batch):
    """Mean over sequences of the mean over masked queries t of the attention to j + 1 < t with token j = token t."""
    means = []
    for row, tokens, mask in zip(pattern, np.asarray(batch.tokens), np.asarray(batch.mask), strict=True):
        scores = []
        for t in np.nonzero(mask)[0]:
            after = [j + 1 for j in range(t - 1) if tokens[j] == tokens[t]]
            if after:
                scores.append(row[t, after].sum())
        means.append(np.mean(scores))
    return np.mean(means)


def outcome(config, params, batch, **fields):
    """Loss, and the induction attention [L,H] of every head."""
    logits, seen = forward(config, params, batch.tokens, Interventions(**fields))
    induction = np.zeros((config.n_layers, config.n_heads))
    patterns = np.asarray(seen.patterns)
    for head in np.ndindex(induction.shape):
        induction[head] = oracle_induction(patterns[(slice(None), *head)], batch)
    return oracle_loss(logits, batch), induction


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def model(request):
    config = CONFIGS[request.param]
    params, batch = random_params(config), repeats()
    return config, params, batch, cut_edges(config, params, batch)


def test_ablating_heads_one_at_a_time(model):
    config, params, batch, _ = model
    whole, _ = outcome(config, params, batch)
    expected = np.zeros((config.n_layers, config.n_heads))
    for head in np.ndindex(expected.shape):
        scale = np.ones_like(expected, np.float32)
        scale[head] = 0.0
        expected[head] = outcome(config, params, batch, head_scale=scale)[0] - whole
    np.testing.assert_allclose(ablate_heads(config, params, batch).loss, expected, atol=2e-5)
    assert np.abs(expected).min() > 1e-3


def test_cutting_edges_one_at_a_time(model):
    config, params, batch, effects = model
    shape = (config.n_layers, config.n_heads) * 2
    whole_loss, whole_induction = outcome(config, params, batch)
    loss, induction = np.zeros((3, *shape)), np.zeros((3, *shape))
    for i, name in enumerate(("q_edges", "k_edges", "v_edges")):
        for edge in np.ndindex(shape):
            if edge[0] < edge[2]:
                keep = np.ones(shape, np.float32)
                keep[edge] = 0.0
                cut_loss, cut_induction = outcome(config, params, batch, **{name: keep})
                loss[(i, *edge)] = cut_loss - whole_loss
                induction[(i, *edge)] = (whole_induction - cut_induction)[edge[2:]]
    np.testing.assert_allclose(effects.loss, loss, atol=2e-5)
    np.testing.assert_allclose(effects.induction, induction, atol=2e-5)
    exists = np.arange(shape[0])[:, None, None, None] < np.arange(shape[0])[:, None]
    exists = np.broadcast_to(exists, (3, *shape))
    assert (np.asarray(effects.loss)[~exists] == 0).all()
    assert (np.asarray(effects.induction)[~exists] == 0).all()
    assert (np.abs(loss[exists]) > 1e-4).all()
    assert np.abs(induction[:2][exists[:2]]).max() > 1e-2
    # What the receiver moves does not change where it looks.
    np.testing.assert_allclose(effects.induction[2], 0.0, atol=1e-6)


def test_cutting_the_edges_from_all_senders_at_once(model):
    config, params, batch, effects = model
    shape = (config.n_layers, config.n_heads)
    whole_loss, whole_induction = outcome(config, params, batch)
    loss, induction = np.zeros((3, *shape)), np.zeros((3, *shape))
    for i, name in enumerate(("q_edges", "k_edges", "v_edges")):
        for receiver in np.ndindex(shape):
            if receiver[0] > 0:
                keep = np.ones(shape * 2, np.float32)
                keep[(slice(None), slice(None), *receiver)] = 0.0
                cut_loss, cut_induction = outcome(config, params, batch, **{name: keep})
                loss[(i, *receiver)] = cut_loss - whole_loss
                induction[(i, *receiver)] = (whole_induction - cut_induction)[receiver]
    np.testing.assert_allclose(effects.joint_loss, loss, atol=2e-5)
    np.testing.assert_allclose(effects.joint_induction, induction, atol=2e-5)
    assert (np.asarray(effects.joint_loss)[:, 0] == 0).all()
    assert (np.abs(loss[:, 1:]) > 1e-4).all()


def test_only_the_mask_counts():
    config = CONFIGS["two-layers"]
    params, batch = random_params(config), repeats()
    other = Batch(tokens=batch.tokens, mask=batch.mask.at[:, 6].set(~batch.mask[:, 6]), positions={})
    first, second = cut_edges(config, params, batch), cut_edges(config, params, other)
    whole_loss, whole_induction = outcome(config, params, other)
    keep = np.ones((2, 2, 2, 2), np.float32)
    keep[0, 1, 1, 0] = 0.0
    loss, induction = outcome(config, params, other, k_edges=keep)
    np.testing.assert_allclose(second.loss[1, 0, 1, 1, 0], loss - whole_loss, atol=2e-5)
    np.testing.assert_allclose(second.induction[1, 0, 1, 1, 0], (whole_induction - induction)[1, 0], atol=2e-5)
    assert abs(second.loss[1, 0, 1, 1, 0] - first.loss[1, 0, 1, 1, 0]) > 1e-4


def test_a_model_of_one_layer_has_no_edges():
    config = TransformerConfig(V, T, n_layers=1, n_heads=2, d_model=8)
    effects = cut_edges(config, random_params(config), repeats())
    assert [leaf.shape for leaf in jax.tree.leaves(effects)] == [(3, 1, 2, 1, 2)] * 2 + [(3, 1, 2)] * 2
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(effects))


def test_many_runs_come_from_vmap():
    config, batch = CONFIGS["two-layers"], repeats()
    params = random_params(config)
    runs = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
    together = jax.jit(jax.vmap(lambda params: ablate_heads(config, params, batch)))(runs)
    np.testing.assert_allclose(together.loss[0], ablate_heads(config, params, batch).loss, atol=2e-5)
    halved = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    np.testing.assert_allclose(together.loss[1], ablate_heads(config, halved, batch).loss, atol=2e-5)
