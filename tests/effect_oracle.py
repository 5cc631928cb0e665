"""What the tests of effects share: models, batches, float64 metrics, and one forward pass for one intervention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from circuits_jax import (
    Batch,
    CircuitWeights,
    Interventions,
    TransformerConfig,
    forward,
    init_params,
    params_from_weights,
)
from circuits_jax.models import graph
from circuits_jax.models.interventions import Edges

V, T, B = 5, 8, 3
CONFIGS = {
    "two-layers": TransformerConfig(V, T, n_layers=2, n_heads=2, d_model=8),
    "three-layers-layernorm-bias-mlp": TransformerConfig(
        V, T, n_layers=3, n_heads=2, d_model=8, norm="layer", bias=True, d_mlp=6, positions="shortformer"
    ),
    "rms-rotary-grouped-mlp": TransformerConfig(
        V, T, n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, d_mlp=6, norm="rms", positions="rotary"
    ),
}
TIED = TransformerConfig(
    V, T, n_layers=2, n_heads=2, d_model=8, norm="layer", bias=True, tied=True, embedding_scale=1.5
)  # fmt: skip


def random_params(config, seed=3):
    """Every leaf random: large enough for cuts to matter, not so large that rounding of logits does (they reach 14)."""
    rng, std = np.random.default_rng(seed), 0.5 if config.norm == "none" else 0.7

    def fill(path, leaf):
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + std * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))


def repeats():
    """Three letters more than once in every sequence, and a mask that leaves some of the repeats out."""
    tokens = np.array([[4, 0, 1, 2, 0, 1, 2, 0], [3, 3, 1, 0, 1, 3, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2]])
    mask = np.array([[0, 0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1, 1, 1]], bool)
    positions = {"at": [7, 4, 5], "right": [0, 1, 0], "wrong": [3, 4, 2]}
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), {name: jnp.asarray(x) for name, x in positions.items()})


def corrupted():
    """The same places, other letters, and another mask and other answers, which nothing should read."""
    tokens = np.array([[4, 3, 1, 2, 0, 2, 2, 1], [3, 0, 1, 0, 2, 3, 1, 2], [0, 4, 4, 3, 4, 1, 1, 2]])
    positions = {"at": [1, 2, 3], "right": [2, 2, 2], "wrong": [1, 1, 1]}
    mask = jnp.ones((B, T), bool)
    return Batch(jnp.asarray(tokens), mask, {name: jnp.asarray(x) for name, x in positions.items()})


# Metrics, in float64 and one position at a time --------------------------------------------------------------------


def oracle_loss(logits, batch):
    losses = []
    for row, tokens, mask in zip(np.float64(logits), np.asarray(batch.tokens), np.asarray(batch.mask), strict=True):
        losses += [np.log(np.exp(row[t]).sum()) - row[t, tokens[t + 1]] for t in range(len(row) - 1) if mask[t]]
    return np.mean(losses)


def oracle_difference(logits, batch):
    """Mean over sequences of the logit of the right minus that of the wrong token at the place that is asked."""
    at, right, wrong = (np.asarray(batch.positions[name]) for name in ("at", "right", "wrong"))
    rows = np.float64(logits)
    return np.mean([rows[b, at[b], right[b]] - rows[b, at[b], wrong[b]] for b in range(len(rows))])


def oracle_induction(pattern, batch):
    """Mean over sequences of the mean over masked queries t of the attention to j + 1 < t with token j = token t."""
    means = []
    for row, tokens, mask in zip(np.float64(pattern), np.asarray(batch.tokens), np.asarray(batch.mask), strict=True):
        scores = []
        for t in np.nonzero(mask)[0]:
            after = [j + 1 for j in range(t - 1) if tokens[j] == tokens[t]]
            if after:
                scores.append(row[t, after].sum())
        if scores:
            means.append(np.mean(scores))
    return np.mean(means)


def oracle_inductions(patterns, batch):
    """oracle_induction of every head, [L,H], from patterns [B,L,H,T,T]."""
    patterns = np.asarray(patterns)
    induction = np.zeros(patterns.shape[1:3])
    for head in np.ndindex(induction.shape):
        induction[head] = oracle_induction(patterns[(slice(None), *head)], batch)
    return induction


# Loops ---------------------------------------------------------------------------------------------------------------


def outcome(config, params, batch, **fields):
    """Loss, and the induction attention [L,H] of every head, of one run."""
    logits, seen = forward(config, params, batch.tokens, Interventions(**fields))
    return oracle_loss(logits, batch), oracle_inductions(seen.patterns, batch)


def edge_by_edge(config, value):
    """Edges float64 from a function of the name of one edge, zero where there is no edge."""
    out = jax.tree.map(np.float64, graph.full(config, 0.0))
    for name in graph.edge_names(config):
        field, index = graph.index_of(config, name)
        getattr(out, field)[index] = value(name)
    return out


def all_edges(config, edges):
    """Edges as one array, in the order of graph.edge_names."""
    places = [graph.index_of(config, name) for name in graph.edge_names(config)]
    return np.array([np.asarray(getattr(edges, field))[index] for field, index in places])


def close_edges(config, actual, expected, atol):
    """Every edge close, and exactly zero where there is no edge."""
    np.testing.assert_allclose(all_edges(config, actual), all_edges(config, expected), rtol=0, atol=atol)
    there = graph.existing(config)
    for field in dataclasses.fields(Edges):
        values, mask = getattr(actual, field.name), getattr(there, field.name)
        assert (values is None) == (mask is None), field.name
        if mask is not None:
            assert values.shape == mask.shape
            assert (np.asarray(values)[~mask] == 0).all(), field.name


def one_hot(shape, index, dtype=np.float32):
    out = np.zeros(shape, dtype)
    out[index] = 1
    return out


# Models for pencil and paper ------------------------------------------------------------------------------------------
# Each part of the residual stream is one-hot: the letter and the place of a token, and what the heads write of letters.

BETA, GAMMA, SATURATED = 6.0, 4.0, 20.0
PARTS = {"letter": V, "place": T, "previous": V, "same": V, "found": V, "mean": V}


def letters():
    """A first token, then three letters twice, then once more; asked where their repeat is known, t = 4, 5, 6."""
    tokens = np.array([[4, 0, 1, 2, 0, 1, 2, 0], [3, 2, 4, 0, 2, 4, 0, 2]])
    mask = np.zeros((2, T), bool)
    mask[:, 4:7] = True
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), {})


def by_hand(heads, readout):
    """A model of two layers with two heads each.

    Args:
        heads: {(layer, head): (q, k, v, o, score, offset)}: the parts that the inputs read and the output writes;
            the score of a q that equals a k, at distance offset for places. None for q and k: uniform attention.
        readout: {part: what a letter in it adds to its logit}.
    """
    starts = dict(zip(PARTS, np.cumsum([0, *PARTS.values()]), strict=False))
    d_model, d_head = sum(PARTS.values()), T

    def read(part, offset=0):
        """[D,K]: place t in column t + offset, letter v in column v."""
        weights = np.zeros((d_model, d_head), np.float32)
        for i in range(PARTS[part]):
            if 0 <= i + offset < d_head:
                weights[starts[part] + i, i + offset] = 1
        return weights

    w_q, w_k, w_v, w_o = (np.zeros((2, 2, d_model, d_head), np.float32) for _ in range(4))
    for head, (q, k, v, o, score, offset) in heads.items():
        if q is not None:
            w_q[head], w_k[head] = score * np.sqrt(d_head) * read(q, offset), read(k)
        w_v[head], w_o[head] = read(v), read(o)
    w_e, w_p = np.zeros((V, d_model), np.float32), np.zeros((T, d_model), np.float32)
    w_e[:, starts["letter"] : starts["letter"] + V] = np.eye(V)
    w_p[:, starts["place"] : starts["place"] + T] = np.eye(T)
    w_u = sum(gain * read(part)[:, :V] for part, gain in readout.items())
    arrays = {"W_E": w_e, "W_P": w_p, "W_Q": w_q, "W_K": w_k, "W_V": w_v, "W_O": w_o.swapaxes(-1, -2), "W_U": w_u}
    return params_from_weights(CircuitWeights(**{name: jnp.asarray(x) for name, x in arrays.items()}))


def worked_example():
    """0.0 looks back by one (score BETA), 0.1 at itself; 1.0 looks for what 0.1 says among what 0.0 says (score GAMMA),
    and 1.1 averages what 0.0 says. All nodes speak to the logits."""
    return by_hand(
        {
            (0, 0): ("place", "place", "letter", "previous", BETA, -1),
            (0, 1): ("place", "place", "letter", "same", 60.0, 0),
            (1, 0): ("same", "previous", "letter", "found", GAMMA, 0),
            (1, 1): (None, None, "previous", "mean", 0.0, 0),
        },
        {"found": 5.0, "mean": 3.0, "previous": 2.0, "same": -1.0, "letter": 0.5},
    )


def worked_solution(tokens, off):
    """The attention of 1.0 [T,T] and the logits [T,V] of the worked example without the edges in off, in float64."""
    on = lambda *edges: float(not off & set(edges))  # noqa: E731
    letter = np.eye(V)[tokens]

    def looks(score, back):
        """Attention e^score / (e^score + t) to the place t - back, 1 / (e^score + t) to each other one up to t."""
        attention = np.zeros((T, T))
        for t in range(T):
            e = np.exp(score)
            attention[t, : t + 1] = 1 / (e + t) if t >= back else 1 / (t + 1)
            if t >= back:
                attention[t, t - back] = e / (e + t)
        return attention

    previous = looks(BETA * on("embedding->0.0.q", "embedding->0.0.k"), 1) @ letter * on("embedding->0.0.v")
    same = looks(60.0 * on("embedding->0.1.q", "embedding->0.1.k"), 0) @ letter * on("embedding->0.1.v")
    attention = np.tril(np.exp(GAMMA * on("0.1->1.0.q", "0.0->1.0.k") * same @ previous.T))
    attention /= attention.sum(1, keepdims=True)
    mean = np.cumsum(previous, 0) / np.arange(1, T + 1)[:, None] * on("0.0->1.1.v")
    found = attention @ letter * on("embedding->1.0.v")
    logits = 5 * on("1.0->logits") * found + 3 * on("1.1->logits") * mean + 2 * on("0.0->logits") * previous
    return attention, logits - on("0.1->logits") * same + 0.5 * on("embedding->logits") * letter


def redundant_example():
    """0.0 and 0.1 do the same: look back by one, and nowhere else; 1.0 looks for the letter among what they say, with
    score SATURATED for each of them. 1.1 does nothing that is read."""
    back = ("place", "place", "letter", "previous", 60.0, -1)
    return by_hand(
        {
            (0, 0): back,
            (0, 1): back,
            (1, 0): ("letter", "previous", "letter", "found", SATURATED, 0),
            (1, 1): (None, None, "letter", "mean", 0.0, 0),
        },
        {"found": 5.0},
    )
