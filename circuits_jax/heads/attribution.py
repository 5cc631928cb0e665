"""Edge attribution: the effect of every edge of a model estimated from one backward pass.

Edge attribution patching (Syed et al. 2310.10348), with integrated gradients (Sundararajan et al. 1703.01365; for edges
Hanna et al. 2403.17806), as the gradient with respect to Interventions.edges.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from circuits_jax.heads.outcomes import Metric, check_chunk, check_metric, log_likelihood
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, Interventions, batch_axes, with_inputs
from circuits_jax.models.transformer import Activations, Params, apply, apply_batch, check_tokens
from circuits_jax.tasks.batch import Batch


def attribute_edges(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    n_steps: int = 0,
    chunk: int = 8,
) -> Edges:
    """Estimates edge_effects.edge_effects, the fall of the metric m when an edge is cut, for all edges at once.

        dm/de at e = 1, the model as it is                      n_steps = 0, one backward pass
        mean of dm/de at e = (i + 1/2)/n, i < n, for all edges  n_steps = n, integrated gradients

    The first is exact where m is linear in the edge, and blind where softmax is saturated: a head whose attention
    has no slope gets none. The second sees that; with many steps it sums to m(no edge cut) - m(all edges cut), so it
    shares an effect out among the edges that bring it about and is not the effect of one alone.

    Args:
        config, params: the model.
        batch: B sequences.
        metric: one number; see outcomes.Metric.
        reference: what a cut edge carries, [N,T,D] or [B,N,T,D]: graph.outputs of another run. Nothing when left out.
        n_steps: at least 0.
        chunk: how many sequences are held in memory at once; the others are run again in the backward pass.

    Returns:
        Edges in units of the metric; 0 where there is no edge.

    Raises:
        ValueError: bad tokens, an array of another shape, n_steps below 0, a metric of next tokens for an encoder, or
            a post-norm model.
    """
    check_tokens(config, batch.tokens)
    check_metric(config, metric)
    check_chunk(chunk)
    if n_steps < 0:
        raise ValueError(f"n_steps must be at least 0; got {n_steps}")
    return _attribute_edges(config, metric, n_steps, chunk, params, batch, reference)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attribute_edges(
    config: TransformerConfig, metric: Metric, n_steps: int, chunk: int, params: Params, batch: Batch,
    reference: Array | None,
) -> Edges:  # fmt: skip
    uncut = jax.tree.map(jnp.asarray, graph.full(config, 1.0))

    def value(edges: Edges) -> Array:
        cut = Interventions(edges=edges, edge_outputs=reference)
        interventions = with_inputs(config, cut, batch.inputs)
        logits, seen = _in_turn(config, params, batch.tokens, interventions, chunk)
        return metric(logits, seen, batch)

    def slope(share: Array) -> Edges:
        return jax.grad(value)(jax.tree.map(lambda one: share * one, uncut))

    if n_steps == 0:
        return slope(jnp.ones(()))
    slopes = jax.lax.map(slope, (jnp.arange(n_steps) + 0.5) / n_steps)
    return jax.tree.map(lambda x: x.mean(0), slopes)


def _in_turn(
    config: TransformerConfig, params: Params, tokens: Array, interventions: Interventions, chunk: int
) -> tuple[Array, Activations]:
    """apply_batch, a chunk of the sequences at a time; the backward pass repeats a chunk instead of keeping it."""
    if len(tokens) <= chunk:
        with jax.default_matmul_precision("highest"):
            return apply_batch(config, params, tokens, interventions)
    axes = batch_axes(config, interventions, tokens.shape[1], len(tokens))

    @jax.checkpoint
    def one(number: Array) -> tuple[Array, Activations]:
        own = jax.tree.map(lambda x, axis: x if axis is None else x[number], interventions, axes)
        with jax.default_matmul_precision("highest"):
            return apply(config, params, tokens[number], own)

    return jax.lax.map(one, jnp.arange(len(tokens)), batch_size=chunk)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well estimates of edge effects agree with exact ones; NaN where one of them does not vary.

    Attributes:
        n: number of edges.
        pearson, spearman: correlations, in [-1, 1].
        largest: share of the tenth of the edges with the largest exact effects (by size) that are also among the
            tenth with the largest estimates.
    """

    n: int
    pearson: float
    spearman: float
    largest: float


def agreement(config: TransformerConfig, estimates: Edges, exact: Edges) -> dict[str, Agreement]:
    """Of all edges ("all"), and of those into each kind of receiver ("q", "k", "v", "mlp", "logits")."""
    there = graph.existing(config)
    fields = {field.name: getattr(there, field.name) for field in dataclasses.fields(Edges)}
    pairs = {
        name: (np.asarray(getattr(estimates, name))[mask], np.asarray(getattr(exact, name))[mask])
        for name, mask in fields.items()
        if mask is not None
    }
    estimated, measured = (np.concatenate(parts) for parts in zip(*pairs.values(), strict=True))
    pairs["all"] = estimated, measured
    return {name: _agreement(*pair) for name, pair in pairs.items()}


def _agreement(estimate: np.ndarray, exact: np.ndarray) -> Agreement:
    n = len(exact)
    varies = n > 1 and np.ptp(estimate) > 0 and np.ptp(exact) > 0
    top = max(1, n // 10)
    best = [set(np.argsort(-np.abs(x), kind="stable")[:top]) for x in (estimate, exact)]
    return Agreement(
        n=n,
        pearson=float(stats.pearsonr(estimate, exact).statistic) if varies else float("nan"),
        spearman=float(stats.spearmanr(estimate, exact).statistic) if varies else float("nan"),
        largest=len(best[0] & best[1]) / top,
    )
