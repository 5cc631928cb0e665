"""A model as a graph: heads, MLPs, the embedding and the logits are nodes, and what one reads of another is an edge.

Senders, in this order: the embedding, then of each layer its heads and its MLP, if there is one. Receivers: each head
through its q, k and v input, each MLP, the logits. Every receiver reads every sender that comes before it. Biases that
belong to no node (b_O) always stay. Edges are written "sender->receiver": "embedding->0.1.v", "0.1->1.2.k",
"0.mlp->1.0.q", "1.2->logits".
"""

from collections.abc import Iterable, Mapping
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, n_senders
from circuits_jax.models.transformer import Activations

INPUTS = ("q", "k", "v")


@cache
def senders(config: TransformerConfig) -> tuple[str, ...]:
    """The names of the N senders in their order: "embedding", "0.0", ..., "0.mlp", "1.0", ..."""
    names = ["embedding"]
    for layer in range(config.n_layers):
        names += [f"{layer}.{head}" for head in range(config.n_heads)]
        names += [f"{layer}.mlp"] if config.d_mlp else []
    return tuple(names)


def head_senders(config: TransformerConfig) -> np.ndarray:
    """[L,H] where each head is among the senders."""
    per_layer = config.n_heads + bool(config.d_mlp)
    return 1 + per_layer * np.arange(config.n_layers)[:, None] + np.arange(config.n_heads)


@cache
def receivers(config: TransformerConfig) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Where each receiver stands in Edges: {"0.1.v": ("v", (0, 1)), "0.mlp": ("mlp", (0,)), "logits": ("logits", ())}.

    In the order in which they are computed.
    """
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(config.n_layers):
        for head in range(config.n_heads):
            places |= {f"{layer}.{head}.{name}": (name, (layer, head)) for name in INPUTS}
        if config.d_mlp:
            places[f"{layer}.mlp"] = ("mlp", (layer,))
    return places | {"logits": ("logits", ())}


def n_read(config: TransformerConfig, receiver: str) -> int:
    """How many senders come before a receiver."""
    if receiver == "logits":
        return n_senders(config)
    layer, node, *_ = receiver.split(".")
    after_heads = node == "mlp" and not config.parallel
    return int(head_senders(config)[int(layer), 0]) + (config.n_heads if after_heads else 0)


def full(config: TransformerConfig, value: float) -> Edges:
    """The same number at every edge, NumPy float32; 1 in Interventions.edges cuts nothing, 0 everything."""
    n, layers, heads = n_senders(config), config.n_layers, config.n_heads
    q, k, v = (np.full((n, layers, heads), value, np.float32) for _ in INPUTS)
    mlp = np.full((n, layers), value, np.float32) if config.d_mlp else None
    return Edges(q, k, v, mlp, np.full(n, value, np.float32))


@cache
def existing(config: TransformerConfig) -> Edges:
    """Which entries of Edges are edges, NumPy bool; do not write to it."""
    there = full(config, 0.0)
    for name, (field, index) in receivers(config).items():
        getattr(there, field)[: n_read(config, name), *index] = 1.0
    return jax.tree.map(lambda x: x.astype(bool), there)


@cache
def edge_names(config: TransformerConfig) -> tuple[str, ...]:
    """Every edge, in the order in which receivers are computed."""
    names = senders(config)
    return tuple(f"{a}->{b}" for b in receivers(config) for a in names[: n_read(config, b)])


def index_of(config: TransformerConfig, edge: str) -> tuple[str, tuple[int, ...]]:
    """The field of Edges and the index in it of an edge "sender->receiver".

    Raises:
        ValueError: there is no such edge in this model.
    """
    sender, _, receiver = edge.partition("->")
    if sender not in senders(config) or receiver not in receivers(config):
        which = f"sender {sender!r}" if sender not in senders(config) else f"receiver {receiver!r}"
        raise ValueError(
            f"{edge!r} is no edge: there is no {which}. Edges are written like 'embedding->0.0.q', '0.1->1.2.k', "
            f"'1.0->logits'{', 0.mlp->1.0.v' if config.d_mlp else ''}"
        )
    number, (field, place) = senders(config).index(sender), receivers(config)[receiver]
    if number >= n_read(config, receiver):
        raise ValueError(f"{edge!r} is no edge: {receiver} is computed before {sender}")
    return field, (number, *place)


def cut(config: TransformerConfig, edges: Iterable[str]) -> Edges:
    """Interventions.edges that cut these edges, "sender->receiver", and keep all others; NumPy float32."""
    return _with(config, 1.0, edges)


def keep_only(config: TransformerConfig, edges: Iterable[str]) -> Edges:
    """Interventions.edges that keep these edges alone; NumPy float32.

    A path is what is left when only its edges are kept, say "embedding->0.1.v", "0.1->1.2.v", "1.2->logits", with
    the patterns frozen (outcomes.frozen_patterns): with all others cut, no head would look where it did.
    """
    return _with(config, 0.0, edges)


def _with(config: TransformerConfig, others: float, edges: Iterable[str]) -> Edges:
    out = full(config, others)
    for edge in edges:
        field, index = index_of(config, edge)
        getattr(out, field)[index] = 1.0 - others
    return out


def outputs(config: TransformerConfig, seen: Activations) -> Array:
    """What every sender wrote in one run, [N,T,D] or [B,N,T,D]: Interventions.edge_outputs of another one.

    The embedding's is the residual stream in front of the first layer, so that run must not change it there.
    """
    parts = [seen.residual[..., :1, :, :]]
    for layer in range(config.n_layers):
        parts.append(seen.head_outputs[..., layer, :, :, :])
        if config.d_mlp:
            parts.append(seen.mlp_outputs[..., layer : layer + 1, :, :])
    return jnp.concatenate(parts, axis=-3)


def between_heads(config: TransformerConfig, edges: Edges) -> Array:
    """[3,L,H,L,H,...] from Edges: q, k, v, then the sending and the receiving head; 0 where there is no edge."""
    at = head_senders(config)
    into = jnp.stack([edges.q[at], edges.k[at], edges.v[at]])
    layer = np.arange(config.n_layers)
    there = (layer[:, None] < layer)[:, None, :, None]
    return jnp.where(there.reshape(there.shape + (1,) * (into.ndim - 5)), into, 0.0)
