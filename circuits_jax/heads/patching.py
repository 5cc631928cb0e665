"""Patching: what of a clean run has to be put into a corrupted one for the answer to come back.

Clean and corrupted sequences correspond position by position and differ in what is asked about. A place is patched by
giving it, in the corrupted run, what it held in the clean one. Results are shares of the metric m that come back,

    (m(patched) - m(corrupted)) / (m(clean) - m(corrupted)),

1 where the place carries all of the difference, 0 where none; it may lie outside. It says what is enough, given the
rest of the corrupted run; ablation (effects.py) says what is needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.heads.edge_effects import cut_senders
from circuits_jax.heads.effects import CHUNK
from circuits_jax.heads.outcomes import (
    NOTHING,
    Metric,
    check_chunk,
    check_metric,
    difference,
    in_chunks,
    log_likelihood,
    run,
    value_under,
)
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, Interventions, Replacement, n_senders
from circuits_jax.models.transformer import Activations, Params, check_tokens
from circuits_jax.tasks.batch import Batch


def patch_heads(
    config: TransformerConfig, params: Params, clean: Batch, corrupted: Batch, metric: Metric = log_likelihood,
    chunk: int = CHUNK,
) -> Array:  # fmt: skip
    """Activation patching of every head's output, one at a time: [L,H].

    Args:
        config, params: the model.
        clean, corrupted: batches of the same shape. The metric gets the clean batch, so that the same answer is asked
            of every run.
        metric: one number; see outcomes.Metric.
        chunk: how many runs are held in memory at once.

    Returns:
        Shares of the metric that come back, as at the top of this file; NaN or infinite where clean and corrupted runs
        do not differ.

    Raises:
        ValueError: bad tokens, or batches of different shapes.
    """
    _check(config, clean, corrupted)
    return _patch(config, _heads, metric, chunk, params, clean, corrupted)


def patch_mlps(
    config: TransformerConfig, params: Params, clean: Batch, corrupted: Batch, metric: Metric = log_likelihood,
    chunk: int = CHUNK,
) -> Array:  # fmt: skip
    """Activation patching of every MLP's output, one at a time: [L]. All else is as in patch_heads."""
    _check(config, clean, corrupted)
    if not config.d_mlp:
        raise ValueError("this model has no MLPs (d_mlp=0)")
    return _patch(config, _mlps, metric, chunk, params, clean, corrupted)


def patch_residual(
    config: TransformerConfig, params: Params, clean: Batch, corrupted: Batch, metric: Metric = log_likelihood,
    chunk: int = CHUNK,
) -> Array:  # fmt: skip
    """Activation patching of the residual stream at every layer and position, one at a time: [L+1,T].

    Entry (l, t) is in front of layer l, the last one behind all layers. All else is as in patch_heads.
    """
    _check(config, clean, corrupted)
    return _patch(config, _residual, metric, chunk, params, clean, corrupted)


def patch_edges(
    config: TransformerConfig, params: Params, clean: Batch, corrupted: Batch, metric: Metric = log_likelihood,
    chunk: int = CHUNK,
) -> Edges:  # fmt: skip
    """Edge patching: one receiver reads of one sender what it wrote in the clean run, for every edge of the graph.

    Path patching along one edge; several edges at once are Interventions.edges with edge_outputs. All else is as in
    patch_heads.
    """
    _check(config, clean, corrupted)
    return _patch(config, _edges, metric, chunk, params, clean, corrupted)


def _check(config: TransformerConfig, clean: Batch, corrupted: Batch) -> None:
    for batch in (clean, corrupted):
        check_tokens(config, batch.tokens)
    shapes = [list(jnp.shape(batch.tokens)) for batch in (clean, corrupted)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ValueError(f"clean and corrupted tokens must both be [B,T]; got {shapes[0]} and {shapes[1]}")


Falls = Callable[[TransformerConfig, Params, Batch, Metric, Activations, int], Any]
"""(config, params, corrupted, metric, what was seen in the clean run, chunk) -> m(corrupted) - m(patched)."""


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _patch(
    config: TransformerConfig, falls: Falls, metric: Metric, chunk: int, params: Params, clean: Batch, corrupted: Batch
) -> Any:
    def asked(logits: Array, seen: Activations, batch: Batch) -> Array:
        return metric(logits, seen, clean)

    check_metric(config, metric)
    logits, seen = run(config, params, clean)
    gap = asked(logits, seen, clean) - value_under(config, params, corrupted, asked, NOTHING)
    return jax.tree.map(lambda fall: -fall / gap, falls(config, params, corrupted, asked, seen, chunk))


def _each(
    config: TransformerConfig, params: Params, corrupted: Batch, metric: Metric, chunk: int, value: Array, name: str,
    shape: tuple[int, ...],
) -> Array:  # fmt: skip
    """The fall when one row of the mask of a replacement is 1, [*shape], for masks [*shape] or [*shape,T]."""
    whole = value_under(config, params, corrupted, metric, NOTHING)
    n = int(np.prod(shape))

    def patched(one: Array) -> Array:
        mask = jnp.broadcast_to(one.reshape(*shape, *[1] * (value.ndim - 2 - len(shape))), value.shape[1:-1])
        field: dict[str, Any] = {name: Replacement(value, mask)}
        return value_under(config, params, corrupted, metric, Interventions(**field))

    return difference(whole, in_chunks(patched, jnp.eye(n), chunk)).reshape(shape)


def _heads(
    config: TransformerConfig, params: Params, corrupted: Batch, metric: Metric, seen: Activations, chunk: int
) -> Array:
    shape = (config.n_layers, config.n_heads)
    return _each(config, params, corrupted, metric, chunk, seen.head_outputs, "head_outputs", shape)


def _mlps(
    config: TransformerConfig, params: Params, corrupted: Batch, metric: Metric, seen: Activations, chunk: int
) -> Array:
    return _each(config, params, corrupted, metric, chunk, seen.mlp_outputs, "mlp_outputs", (config.n_layers,))


def _residual(
    config: TransformerConfig, params: Params, corrupted: Batch, metric: Metric, seen: Activations, chunk: int
) -> Array:
    shape = seen.residual.shape[1:3]
    return _each(config, params, corrupted, metric, chunk, seen.residual, "residual", shape)


def _edges(
    config: TransformerConfig, params: Params, corrupted: Batch, metric: Metric, seen: Activations, chunk: int
) -> Edges:
    every = np.eye(n_senders(config), dtype=bool)
    return cut_senders(config, params, corrupted, metric, every, graph.outputs(config, seen), chunk).total


def knock_out_direction(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    directions: ArrayLike,
    metric: Metric = log_likelihood,
    becomes: ArrayLike = 0.0,
    chunk: int = CHUNK,
) -> Any:
    """The fall of the metric when one head no longer sees a direction at its q or its k input.

    What the head reads through that input, x, becomes x + (c - x d) d, d the unit direction: in front of the norm,
    without the positions that shortformer models add to it. With c = 0 the direction is removed; with the value it has
    for the other class of a task variable, it is swapped.

    Args:
        config, params: the model.
        batch: B sequences.
        directions: [D] for all heads or [L,H,D], of any length but 0.
        metric: see outcomes.Metric; its patterns give the change of attention.
        becomes: c: a number, or [T] or [B,T].
        chunk: how many runs are held in memory at once.

    Returns:
        What the metric returns, with [2,L,H] in front: q, then k.

    Raises:
        ValueError: bad tokens, an array of another shape, or a direction of length 0.
    """
    check_tokens(config, batch.tokens)
    check_chunk(chunk)
    directions, becomes = jnp.asarray(directions), jnp.asarray(becomes)
    wanted = (config.n_layers, config.n_heads, config.d_model)
    if directions.shape not in (wanted, wanted[-1:]):
        raise ValueError(f"directions must be [D] or [L,H,D] = {list(wanted)}; got {list(directions.shape)}")
    if not isinstance(directions, jax.core.Tracer) and not np.linalg.norm(directions, axis=-1).all():
        raise ValueError("directions must not be zero: a head cannot lose a direction that is none")
    try:
        becomes = jnp.broadcast_to(becomes, batch.tokens.shape)
    except ValueError:
        sizes = list(batch.tokens.shape)
        raise ValueError(f"becomes must be a number, [T] or [B,T] = {sizes}; got {list(becomes.shape)}") from None
    return _knock_out(config, metric, chunk, params, batch, jnp.broadcast_to(directions, wanted), becomes)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _knock_out(
    config: TransformerConfig, metric: Metric, chunk: int, params: Params, batch: Batch, directions: Array,
    becomes: Array,
) -> Any:  # fmt: skip
    check_metric(config, metric)
    logits, seen = run(config, params, batch)
    whole = metric(logits, seen, batch)
    unit = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    shape = (config.n_layers, config.n_heads)

    def without(place: Array) -> Any:
        layer, head = place
        # Nothing in front of this one head changes, so that what it reads is known from the run before.
        d = unit[layer, head]
        missing = becomes - jnp.matmul(seen.residual[:, layer], d, precision=jax.lax.Precision.HIGHEST)
        added = jnp.zeros((len(batch.tokens), *shape, *seen.residual.shape[2:]))
        added = added.at[:, layer, head].set(missing[..., None] * d)
        inputs = Interventions(q_added=added), Interventions(k_added=added)
        falls = [difference(whole, value_under(config, params, batch, metric, changed)) for changed in inputs]
        return jax.tree.map(lambda *x: jnp.stack(x), *falls)

    places = jnp.stack(jnp.indices(shape), -1).reshape(-1, 2)
    found = in_chunks(without, places, max(1, chunk // 2))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).reshape(2, *shape, *x.shape[2:]), found)
