"""What a model makes of a batch, as numbers: metrics, and their values under many interventions in one program."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.heads import patterns
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Interventions, Replacement, with_inputs
from circuits_jax.models.transformer import Activations, Params, apply_batch, check_tokens
from circuits_jax.tasks.batch import Batch, next_token_loss

Metric = Callable[[Array, Activations, Batch], Any]
"""(logits [B,T,V], activations with B in front, batch) -> a number or a pytree of arrays; a plain function, as it is a
static argument of compiled programs. What is attributed or patched has to be one number that rises with success."""


def log_likelihood(logits: Array, seen: Activations, batch: Batch) -> Array:
    """Mean log-probability in nats of the targets in batch.mask: minus the loss. Not for encoders (check_metric)."""
    return -next_token_loss(logits, batch)


def logit_difference(logits: Array, seen: Activations, batch: Batch) -> Array:
    """Mean over sequences of the logit of the right token minus that of the wrong one.

    batch.positions has "at", the position that is asked, and the tokens "right" and "wrong", each [B].
    """
    at, right, wrong = (batch.positions[name][:, None] for name in ("at", "right", "wrong"))
    asked = jnp.take_along_axis(logits, at[..., None], axis=1)[:, 0]
    return (jnp.take_along_axis(asked, right, axis=1) - jnp.take_along_axis(asked, wrong, axis=1)).mean()


def induction_attention(logits: Array, seen: Activations, batch: Batch) -> Array:
    """patterns.induction of every head, [L,H], over the queries in batch.mask."""
    per_head = jax.vmap(jax.vmap(patterns.induction, (0, None, None)), (0, None, None))
    scores = jax.vmap(per_head)(seen.patterns, batch.tokens, batch.mask)
    return patterns.mean_over_sequences(scores, patterns.after_copies, batch)


def nothing(logits: Array, seen: Activations, batch: Batch) -> dict[str, Array]:
    """The metric that measures nothing."""
    return {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repeats:
    """How a model does on repeats.

    Attributes:
        loss: [] in nats, over batch.mask.
        induction: [L,H] induction attention of every head.
    """

    loss: Array
    induction: Array


def on_repeats(logits: Array, seen: Activations, batch: Batch) -> Repeats:
    """Loss, and the induction attention of every head."""
    return Repeats(next_token_loss(logits, batch), induction_attention(logits, seen, batch))


OF_NEXT_TOKENS = (log_likelihood, on_repeats)
NOTHING = Interventions()


def check_metric(config: TransformerConfig, metric: Metric) -> None:
    """Raises ValueError for a metric of next tokens and a model that sees them."""
    if not config.causal and metric in OF_NEXT_TOKENS:
        raise ValueError(
            "metric must be one of your own, such as logit_difference, for a model with causal=False: an encoder sees "
            "the next token, whose likelihood says nothing"
        )


def run(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    interventions: Interventions = NOTHING,
    start: Activations | None = None,
    n_done: int = 0,
) -> tuple[Array, Activations]:
    """transformer.apply_batch at the highest matmul precision, with the batch's inputs if there are any."""
    changes = with_inputs(config, interventions, batch.inputs)
    with jax.default_matmul_precision("highest"):
        return apply_batch(config, params, batch.tokens, changes, start, n_done)


def value_under(
    config: TransformerConfig, params: Params, batch: Batch, metric: Metric, interventions: Interventions
) -> Any:
    """The metric of one run; tokens are not checked, nothing is jitted."""
    check_metric(config, metric)
    return metric(*run(config, params, batch, interventions), batch)


def values_under(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric,
    interventions: Interventions,
    chunk: int = 16,
) -> Any:
    """The metric under each of n interventions, in one program: any set of changes to heads, edges, patterns, ...

    Args:
        config, params: the model.
        batch: B sequences.
        metric: see Metric.
        interventions: with n in front of every array that is not None (and, behind it, B where sequences differ).
        chunk: how many runs are held in memory at once.

    Returns:
        What the metric returns, with n in front.

    Raises:
        ValueError: bad tokens, or an array of another shape.
    """
    check_tokens(config, batch.tokens)
    return _values_under(config, metric, chunk, params, batch, interventions)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _values_under(
    config: TransformerConfig, metric: Metric, chunk: int, params: Params, batch: Batch, interventions: Interventions
) -> Any:
    return in_chunks(lambda one: value_under(config, params, batch, metric, one), interventions, chunk)


def in_chunks(function: Callable[[Any], Any], arguments: Any, chunk: int) -> Any:
    """function of every row of the arguments, at most chunk of them at once."""
    check_chunk(chunk)
    n = len(jax.tree.leaves(arguments)[0])
    return jax.vmap(function)(arguments) if n <= chunk else jax.lax.map(function, arguments, batch_size=chunk)


def check_chunk(chunk: int) -> None:
    """Raises ValueError for a number of runs that cannot be held at once."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")


def frozen_patterns(seen: Activations) -> Interventions:
    """Heads look where they looked in a run before, whatever changes in front of them."""
    return Interventions(patterns=Replacement(seen.patterns, jnp.ones(seen.patterns.shape[-4:-1])))


def difference(a: Any, b: Any) -> Any:
    """a - b, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)
