"""What a head or an edge does, causally: every ablation and every cut edge of a model in one compiled program."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.heads import patterns
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Interventions
from circuits_jax.models.transformer import Params, apply, check_tokens
from circuits_jax.tasks.batch import Batch, next_token_loss


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EdgeEffects:
    """Edges cut into the q, k and v input of a receiving head; the first axis is that input.

    Attributes:
        loss: [3,L,H,L,H] rise of the loss in nats when the edge sender -> receiver alone is cut.
        induction: [3,L,H,L,H] fall of the receiver's own induction attention, in [-1, 1].
        joint_loss, joint_induction: [3,L,H] the same with the edges from all senders into the receiver cut at once,
            which redundant senders cannot hide.

    Zero where the sender is not in an earlier layer.
    """

    loss: Array
    induction: Array
    joint_loss: Array
    joint_induction: Array


def ablate_heads(config: TransformerConfig, params: Params, batch: Batch) -> HeadEffects:
    """Zero-ablates every head, one at a time, in one vmap.

    Args:
        config, params: the model.
        batch: B sequences; the loss is over batch.mask.

    Raises:
        ValueError: a token out of the vocabulary, too long a sequence.
    """
    check_tokens(config, batch.tokens)
    return _ablate_heads(config, params, batch)


@partial(jax.jit, static_argnums=0)
def _ablate_heads(config: TransformerConfig, params: Params, batch: Batch) -> HeadEffects:
    shape = (config.n_layers, config.n_heads)
    n = math.prod(shape)
    scales = jnp.concatenate([jnp.ones((1, n)), 1.0 - jnp.eye(n)]).reshape(n + 1, *shape)  # the first changes nothing
    loss, induction = jax.vmap(lambda scale: _outcome(config, params, batch, Interventions(head_scale=scale)))(scales)
    return HeadEffects(
        loss=(loss[1:] - loss[0]).reshape(shape), induction=(induction[0] - induction[1:]).reshape(*shape, *shape)
    )


def cut_edges(config: TransformerConfig, params: Params, batch: Batch) -> EdgeEffects:
    """Cuts every edge from a head to a head of a later layer, through q, k and v, one at a time, in one vmap.

    A single edge h0 -> h1 is scored by what its cut does to h1's own induction attention: other heads that do the
    same job hide it from the loss.

    Args:
        config, params: the model.
        batch: B sequences with repeats; the loss is over batch.mask.

    Raises:
        ValueError: a token out of the vocabulary, too long a sequence.
    """
    check_tokens(config, batch.tokens)
    return _cut_edges(config, params, batch)


@partial(jax.jit, static_argnums=0)
def _cut_edges(config: TransformerConfig, params: Params, batch: Batch) -> EdgeEffects:
    n_layers, n_heads = config.n_layers, config.n_heads
    shape = (3, n_layers, n_heads, n_layers, n_heads)
    edges = np.array([index for index in np.ndindex(*shape) if index[1] < index[3]], int).reshape(-1, 5)
    receivers = np.array([index for index in np.ndindex(3, n_layers, n_heads) if index[1] > 0], int).reshape(-1, 3)

    keep = np.ones((1 + len(edges) + len(receivers), *shape), np.float32)  # the first changes nothing
    for row, (path, *edge) in enumerate(edges, start=1):
        keep[(row, path, *edge)] = 0.0
    for row, (path, layer, head) in enumerate(receivers, start=1 + len(edges)):
        keep[row, path, :, :, layer, head] = 0.0

    def outcome(scale: Array) -> tuple[Array, Array]:
        q, k, v = scale
        return _outcome(config, params, batch, Interventions(q_edges=q, k_edges=k, v_edges=v))

    loss, induction = jax.vmap(outcome)(jnp.asarray(keep))
    rise, fall = loss[1:] - loss[0], induction[0] - induction[1:]
    read_by = np.concatenate([edges[:, -2:], receivers[:, -2:]])
    fall = fall[np.arange(len(fall)), read_by[:, 0], read_by[:, 1]]
    at_edges, at_receivers = tuple(edges.T), tuple(receivers.T)
    single, joint = jnp.zeros(shape), jnp.zeros((3, n_layers, n_heads))
    n = len(edges)
    return EdgeEffects(
        loss=single.at[at_edges].set(rise[:n]),
        induction=single.at[at_edges].set(fall[:n]),
        joint_loss=joint.at[at_receivers].set(rise[n:]),
        joint_induction=joint.at[at_receivers].set(fall[n:]),
    )


def _outcome(
    config: TransformerConfig, params: Params, batch: Batch, interventions: Interventions
) -> tuple[Array, Array]:
    """Loss and the induction attention [L,H] of every head, over the positions in batch.mask."""
    with jax.default_matmul_precision("highest"):
        logits, seen = jax.vmap(lambda tokens: apply(config, params, tokens, interventions))(batch.tokens)
    per_head = jax.vmap(jax.vmap(patterns.induction, (0, None, None)), (0, None, None))
    induction = jax.vmap(per_head)(seen.patterns, batch.tokens, batch.mask)
    return next_token_loss(logits, batch), patterns.mean_over_sequences(induction, patterns.after_copies, batch)
