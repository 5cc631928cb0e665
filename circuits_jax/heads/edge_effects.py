"""What an edge does, causally: every edge of a model cut alone, exactly, in one compiled program.

An effect is a fall: the metric of the model as it is minus the metric after the cut, as in effects.py.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.heads.effects import CHUNK
from circuits_jax.heads.outcomes import (
    Metric,
    check_metric,
    difference,
    in_chunks,
    induction_attention,
    log_likelihood,
    nothing,
    run,
)
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, Interventions, n_senders
from circuits_jax.models.transformer import Activations, Params, check_tokens
from circuits_jax.tasks.batch import Batch


def edge_effects(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    chunk: int = CHUNK,
) -> Edges:
    """The fall of the metric when one edge is cut, for every edge of the graph (models/graph.py).

    Args:
        config, params: the model.
        batch: B sequences.
        metric: see outcomes.Metric.
        reference: what a cut edge carries, [N,T,D] or [B,N,T,D]: graph.outputs of another run. Nothing when left out.
        chunk: how many runs are held in memory at once.

    Returns:
        Edges whose entries are what the metric returns; 0 where there is no edge.

    Raises:
        ValueError: bad tokens, an array of another shape, a metric of next tokens for an encoder, or a post-norm
            model, whose residual stream is no sum over senders.
    """
    check_tokens(config, batch.tokens)
    return _edge_effects(config, metric, chunk, params, batch, reference)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _edge_effects(
    config: TransformerConfig, metric: Metric, chunk: int, params: Params, batch: Batch, reference: Array | None
) -> Edges:
    every = np.eye(n_senders(config), dtype=bool)
    return cut_senders(config, params, batch, metric, every, reference, chunk).total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cuts:
    """Falls of a metric when all edges from a set of senders into one receiver are cut.

    Attributes:
        total: what the metric says of the whole model, with C in the place of N.
        own: [3,C,L,H,...] what a second metric says of the receiving head itself; q, k, v in front.
    """

    total: Edges
    own: Any


def cut_senders(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric,
    sets: np.ndarray,
    reference: Array | None = None,
    chunk: int = CHUNK,
    own: Metric = nothing,
) -> Cuts:
    """edge_effects for C sets of senders.

    Exact, and cheaper than a run for each edge: what comes before the receiver is not repeated, and all heads of its
    layer lose the senders in the same run, because they do not read each other. What follows runs for each edge.

    Args:
        sets: [C,N] bool, NumPy: which senders.
        own: a metric [L,H,...] of every head, of which the receiver's is taken.
        others: as in edge_effects; tokens are not checked, nothing is jitted.
    """
    check_metric(config, metric)
    logits, start = run(config, params, batch)
    whole, own_whole = metric(logits, start, batch), own(logits, start, batch)
    n_layers, n_heads = config.n_layers, config.n_heads

    def cut(edges: Edges, n_done: int) -> tuple[Array, Activations]:
        return run(config, params, batch, Interventions(edges=edges, edge_outputs=reference), start, n_done)

    def into_heads(layer: int, name: str, chosen: Array) -> Any:
        """Of one set, into each head of a layer: [H,...]."""
        keep = jnp.ones((len(chosen), n_layers, n_heads)).at[:, layer].add(-chosen[:, None])
        logits, seen = cut(Edges(**{name: keep}), layer)

        def into(head: Array) -> Any:
            alone = _with_head_of(seen, start, layer, head)
            return difference(whole, metric(*run(config, params, batch, start=alone, n_done=layer + 1), batch))

        of_receiver = difference(_at(own_whole, layer), _at(own(logits, seen, batch), layer))
        return in_chunks(into, jnp.arange(n_heads), chunk), of_receiver

    def into_mlp(layer: int, chosen: Array) -> Any:
        keep = jnp.ones((len(chosen), n_layers)).at[:, layer].add(-chosen)
        return difference(whole, metric(*cut(Edges(mlp=keep), layer + 1), batch))

    def into_logits(chosen: Array) -> Any:
        return difference(whole, metric(*cut(Edges(logits=1.0 - chosen), n_layers), batch))

    def of_sets(receiver: str, function: Callable[[Array], Any], at_once: int) -> Any:
        """[C,...]: 0 for sets of which the receiver reads nothing."""
        rows = np.flatnonzero(sets[:, : graph.n_read(config, receiver)].any(1))
        shapes = jax.eval_shape(function, jnp.zeros(sets.shape[1]))
        zeros = jax.tree.map(lambda x: jnp.zeros((len(sets), *x.shape), x.dtype), shapes)
        if not len(rows):
            return zeros
        found = in_chunks(function, jnp.asarray(sets[rows], jnp.float32), at_once)
        return jax.tree.map(lambda x, y: x.at[rows].set(y), zeros, found)

    def layers(of_layer: Callable[[int], Any]) -> Any:
        """[C,L,...]."""
        return jax.tree.map(lambda *x: jnp.stack(x, 1), *map(of_layer, range(n_layers)))

    def heads(name: str) -> Any:
        at_once = max(1, chunk // n_heads)
        return layers(lambda layer: of_sets(f"{layer}.0.{name}", partial(into_heads, layer, name), at_once))

    (q, own_q), (k, own_k), (v, own_v) = map(heads, graph.INPUTS)
    mlp = layers(lambda layer: of_sets(f"{layer}.mlp", partial(into_mlp, layer), chunk)) if config.d_mlp else None
    total = Edges(q, k, v, mlp, of_sets("logits", into_logits, chunk))
    return Cuts(total, jax.tree.map(lambda *x: jnp.stack(x), own_q, own_k, own_v))


def _with_head_of(seen: Activations, start: Activations, layer: int, head: Array) -> Activations:
    """start, in which one head does what it does in seen."""
    new, old = seen.head_outputs[:, layer, head], start.head_outputs[:, layer, head]
    return dataclasses.replace(
        start,
        scores=start.scores.at[:, layer, head].set(seen.scores[:, layer, head]),
        patterns=start.patterns.at[:, layer, head].set(seen.patterns[:, layer, head]),
        head_outputs=start.head_outputs.at[:, layer, head].set(new),
        attention_outputs=start.attention_outputs.at[:, layer].add(new - old),
    )


def _at(tree: Any, layer: int) -> Any:
    return jax.tree.map(lambda x: x[layer], tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EdgeEffects:
    """Edges from head to head cut into the q, k and v input of a receiver; the first axis is that input.

    Attributes:
        loss: [3,L,H,L,H] rise of the loss in nats when the edge sender -> receiver alone is cut.
        induction: [3,L,H,L,H] fall of the receiver's own induction attention, in [-1, 1].
        joint_loss, joint_induction: [3,L,H] the same with the edges from all heads into the receiver cut at once,
            which redundant senders cannot hide.

    Zero where the sender is not in an earlier layer.
    """

    loss: Array
    induction: Array
    joint_loss: Array
    joint_induction: Array


def cut_edges(config: TransformerConfig, params: Params, batch: Batch, chunk: int = CHUNK) -> EdgeEffects:
    """Cuts every edge from a head to a head of a later layer: what that does to repeats. edge_effects has all edges.

    A single edge h0 -> h1 is scored by what its cut does to h1's own induction attention: other heads that do the
    same job hide it from the loss.

    Args:
        config, params: the model.
        batch: B sequences with repeats; the loss is over batch.mask.
        chunk: how many runs are held in memory at once.

    Raises:
        ValueError: a token out of the vocabulary, too long a sequence.
    """
    check_tokens(config, batch.tokens)
    return _cut_edges(config, chunk, params, batch)


@partial(jax.jit, static_argnums=(0, 1))
def _cut_edges(config: TransformerConfig, chunk: int, params: Params, batch: Batch) -> EdgeEffects:
    one = np.eye(n_senders(config), dtype=bool)[graph.head_senders(config).ravel()]
    sets = np.concatenate([one, one.any(0)[None]])
    cuts = cut_senders(config, params, batch, log_likelihood, sets, None, chunk, own=induction_attention)
    rise = jnp.stack([cuts.total.q, cuts.total.k, cuts.total.v])  # [3,LH+1,L,H]
    shape = (3, config.n_layers, config.n_heads, config.n_layers, config.n_heads)
    return EdgeEffects(
        loss=rise[:, :-1].reshape(shape), induction=cuts.own[:, :-1].reshape(shape),
        joint_loss=rise[:, -1], joint_induction=cuts.own[:, -1],
    )  # fmt: skip
