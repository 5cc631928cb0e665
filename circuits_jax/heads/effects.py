"""What a head or an edge does, causally: every ablation and every cut edge of a model in one compiled program."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.heads import patterns
from circuits_jax.models.interventions import Interventions
from circuits_jax.models.transformer import Params, TransformerConfig, apply
from circuits_jax.tasks.batch import Batch, next_token_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadEffects:
    """Zero ablation of each head.

    Attributes:
        loss: [L,H] rise of the loss in nats.
    """

    loss: Array


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


@partial(jax.jit, static_argnums=0)
def ablate_heads(config: TransformerConfig, params: Params, batch: Batch) -> HeadEffects:
    """Zero-ablates every head, one at a time, in one vmap.

    Args:
        config, params: the model.
        batch: B sequences; the loss is over batch.mask.
    """
    n = config.n_layers * config.n_heads
    scales = (1.0 - jnp.eye(n)).reshape(n, config.n_layers, config.n_heads)
    loss, _ = jax.vmap(lambda scale: _outcome(config, params, batch, Interventions(head_scale=scale)))(scales)
    whole, _ = _outcome(config, params, batch, None)
    return HeadEffects(loss=(loss - whole).reshape(config.n_layers, config.n_heads))


@partial(jax.jit, static_argnums=0)
def cut_edges(config: TransformerConfig, params: Params, batch: Batch) -> EdgeEffects:
    """Cuts every edge from a head to a head of a later layer, through q, k and v, one at a time, in one vmap.

    A single edge h0 -> h1 is scored by what its cut does to h1's own induction attention: other heads that do the
    same job hide it from the loss.

    Args:
        config, params: the model.
        batch: B sequences with repeats; the loss is over batch.mask.
    """
    n_layers, n_heads = config.n_layers, config.n_heads
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    pairs = [(a, b) for a in heads for b in heads if a[0] < b[0]]
    receivers = [b for b in heads if b[0] > 0]
    shape = (n_layers, n_heads, n_layers, n_heads)
    whole_loss, whole_induction = _outcome(config, params, batch, None)
    zeros = jnp.zeros((3, *shape)), jnp.zeros((3, n_layers, n_heads))
    if not pairs:
        return EdgeEffects(zeros[0], zeros[0], zeros[1], zeros[1])

    single = jnp.stack([jnp.ones(shape).at[(*a, *b)].set(0.0) for a, b in pairs])
    joint = jnp.stack([jnp.ones(shape).at[:, :, *b].set(0.0) for b in receivers])
    keep = jnp.concatenate([single, joint])
    read_by = jnp.array([b for _, b in pairs] + receivers)

    def cut(field: str, kept: Array, receiver: Array) -> tuple[Array, Array]:
        loss, induction = _outcome(config, params, batch, Interventions(**{field: kept}))
        return loss - whole_loss, (whole_induction - induction)[receiver[0], receiver[1]]

    effects = [jax.vmap(partial(cut, field))(keep, read_by) for field in ("q_edges", "k_edges", "v_edges")]
    loss, induction = (jnp.stack(part) for part in zip(*effects, strict=True))
    at_pairs = tuple(jnp.array([(*a, *b) for a, b in pairs]).T)
    at_receivers = tuple(jnp.array(receivers).T)
    place = lambda zero, where, values: zero.at[(slice(None), *where)].set(values)  # noqa: E731
    n = len(pairs)
    return EdgeEffects(
        loss=place(zeros[0], at_pairs, loss[:, :n]),
        induction=place(zeros[0], at_pairs, induction[:, :n]),
        joint_loss=place(zeros[1], at_receivers, loss[:, n:]),
        joint_induction=place(zeros[1], at_receivers, induction[:, n:]),
    )


def _outcome(
    config: TransformerConfig, params: Params, batch: Batch, interventions: Interventions | None
) -> tuple[Array, Array]:
    """Loss and the induction attention [L,H] of every head, over the positions in batch.mask."""
    logits, seen = jax.vmap(lambda tokens: apply(config, params, tokens, interventions))(batch.tokens)
    per_head = jax.vmap(jax.vmap(patterns.induction, (0, None, None)), (0, None, None))
    induction = jax.vmap(per_head)(seen.patterns, batch.tokens, batch.mask)
    return next_token_loss(logits, batch), induction.mean(0)
