"""What a head does, causally: every ablation of single heads, pairs or sets in one compiled program.

An effect is a fall: the metric of the model as it is minus the metric after the change. It is what the head gives,
where nothing else makes up for its loss; where others do, single effects are about 0 and joint ones are not.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.heads.outcomes import (
    Metric,
    Repeats,
    difference,
    in_chunks,
    log_likelihood,
    on_repeats,
    value_under,
)
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Interventions, Replacement
from circuits_jax.models.transformer import Params, check_tokens
from circuits_jax.tasks.batch import Batch

CHUNK = 32


def ablate(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    sets: ArrayLike,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    within: Interventions | None = None,
    chunk: int = CHUNK,
) -> Any:
    """The fall of the metric when the heads of each set are ablated together.

    Args:
        config, params: the model.
        batch: B sequences.
        sets: [n,L,H] bool, which heads.
        metric: see outcomes.Metric.
        reference: what an ablated head writes, [L,H,T,D] or [B,L,H,T,D]: its mean over a batch (mean ablation), or
            what it wrote in another run (resample ablation). Nothing (zero ablation) when left out.
        within: interventions that are in place all the time; frozen patterns make it pattern-preserving ablation.
            Must not hold head_scale or head_outputs.
        chunk: how many runs are held in memory at once.

    Returns:
        What the metric returns, with n in front.

    Raises:
        ValueError: bad tokens, an array of another shape, or a metric of next tokens for an encoder.
    """
    check_tokens(config, batch.tokens)
    sets, wanted = jnp.asarray(sets), (config.n_layers, config.n_heads)
    if sets.ndim != 3 or sets.shape[1:] != wanted:
        raise ValueError(f"sets must be [n,L,H] with [L,H] = {list(wanted)}; got {list(sets.shape)}")
    base = within or Interventions()
    if base.head_scale is not None or base.head_outputs is not None:
        raise ValueError("within must leave head_scale and head_outputs to the ablation")
    return _ablate(config, metric, chunk, params, batch, sets, reference, base)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ablate(
    config: TransformerConfig, metric: Metric, chunk: int, params: Params, batch: Batch, sets: Array,
    reference: Array | None, within: Interventions,
) -> Any:  # fmt: skip
    length = batch.tokens.shape[-1]

    def without(heads: Array) -> Any:
        if reference is None:
            changed = dataclasses.replace(within, head_scale=1.0 - heads)
        else:
            mask = jnp.broadcast_to(heads[..., None], (*heads.shape, length)).astype(reference.dtype)
            changed = dataclasses.replace(within, head_outputs=Replacement(reference, mask))
        return value_under(config, params, batch, metric, changed)

    whole = value_under(config, params, batch, metric, within)
    return difference(whole, in_chunks(without, sets.astype(jnp.float32), chunk))


def single_heads(config: TransformerConfig) -> Array:
    """[LH,L,H] bool: every head alone."""
    n = config.n_layers * config.n_heads
    return jnp.eye(n, dtype=bool).reshape(n, config.n_layers, config.n_heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairEffects:
    """Falls of a metric; a metric that is no number adds its own axes behind.

    Attributes:
        single: [L,H] when one head is ablated.
        joint: [L,H,L,H] when two are; the single one on the diagonal.
        synergy: [L,H,L,H] joint minus the sum of the singles, 0 on the diagonal. Positive: each makes up for the
            loss of the other (redundancy). Negative: one needs the other, so that its loss is counted twice.
    """

    single: Any
    joint: Any
    synergy: Any


def ablate_pairs(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    within: Interventions | None = None,
    chunk: int = CHUNK,
) -> PairEffects:
    """Ablates every head and every pair of heads; arguments and errors are those of ablate."""
    heads = single_heads(config)
    n, shape = len(heads), heads.shape[1:]
    first, second = np.triu_indices(n)
    fall = ablate(config, params, batch, heads[first] | heads[second], metric, reference, within, chunk)
    place = np.zeros((n, n), int)
    place[first, second] = place[second, first] = np.arange(len(first))

    def pairs(values: Array) -> tuple[Array, Array, Array]:
        joint = values[place]
        single = joint[np.arange(n), np.arange(n)]
        same = jnp.eye(n, dtype=bool).reshape(n, n, *[1] * (single.ndim - 1))
        synergy = jnp.where(same, 0.0, joint - single[:, None] - single)
        tail = single.shape[1:]
        return single.reshape(*shape, *tail), joint.reshape(*shape * 2, *tail), synergy.reshape(*shape * 2, *tail)

    leaves, structure = jax.tree.flatten(fall)
    return PairEffects(*(jax.tree.unflatten(structure, part) for part in zip(*map(pairs, leaves), strict=True)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadEffects:
    """Zero ablation of each head.

    Attributes:
        loss: [L,H] rise of the loss in nats.
        induction: [L,H,L,H] fall of the induction attention of every head, last, when the first is ablated.
    """

    loss: Array
    induction: Array


def ablate_heads(config: TransformerConfig, params: Params, batch: Batch, chunk: int = CHUNK) -> HeadEffects:
    """Zero-ablates every head, one at a time: what that does to repeats. ablate has other metrics and sets.

    Args:
        config, params: the model.
        batch: B sequences; the loss is over batch.mask.
        chunk: how many runs are held in memory at once.

    Raises:
        ValueError: a token out of the vocabulary, too long a sequence.
    """
    fall: Repeats = ablate(config, params, batch, single_heads(config), on_repeats, chunk=chunk)
    shape = (config.n_layers, config.n_heads)
    return HeadEffects(loss=-fall.loss.reshape(shape), induction=fall.induction.reshape(*shape, *shape))
