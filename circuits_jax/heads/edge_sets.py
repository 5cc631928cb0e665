"""Circuits as sets of edges of a model's graph (models/graph.py), and what a set of edges is worth.

All edges outside a set C carry what they carried in a reference run, or nothing, and its faithfulness is the share of
the metric m that is left, between the empty set and the whole model M:

    F(C) = (m(C) - m(empty)) / (m(M) - m(empty))            F(empty) = 0, F(M) = 1, above 1 where M hinders itself

Sets of edges are [E] bool in the order of graph.edge_names.
"""

import dataclasses
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from circuits_jax.heads.outcomes import Metric, check_chunk, log_likelihood, value_under
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, Interventions
from circuits_jax.models.transformer import Params, check_tokens
from circuits_jax.tasks.batch import Batch

CHUNK = 8
EdgeSet = NDArray[np.bool_]


class NothingToExplainError(ValueError):
    """The model is no better on this batch than no edges at all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Circuit:
    """Edges that are kept, all of them on a path from the embedding to the logits; made by circuit_of.

    Attributes:
        config: of the model.
        edges: which edges are kept, NumPy bool; as floats they are Interventions.edges.
    """

    config: TransformerConfig
    edges: Edges

    @property
    def kept(self) -> EdgeSet:
        """[E] bool in the order of graph.edge_names."""
        return flat(self.config, self.edges).astype(bool)

    @property
    def n_edges(self) -> int:
        """How many edges are kept."""
        return int(self.kept.sum())

    def edge_names(self) -> tuple[str, ...]:
        """The edges, "sender->receiver", in the order of graph.edge_names."""
        return tuple(np.array(graph.edge_names(self.config))[self.kept].tolist())

    def nodes(self) -> tuple[str, ...]:
        """The senders in the circuit, in the order of graph.senders: "embedding", "0.1", "0.mlp", ..."""
        senders, _ = ends(self.config)
        return tuple(graph.senders(self.config)[number] for number in np.unique(senders[self.kept]))

    def heads(self) -> tuple[str, ...]:
        """The heads in the circuit: "0.1", "1.2", ..."""
        return tuple(node for node in self.nodes() if node != "embedding" and not node.endswith("mlp"))


def circuit_of(config: TransformerConfig, kept: Iterable[str] | EdgeSet) -> Circuit:
    """The circuit of some edges; those on no path from the embedding to the logits are dropped.

    Args:
        config: of the model.
        kept: names "sender->receiver", or [E] bool in the order of graph.edge_names.

    Raises:
        ValueError: a name that is no edge, or an array of another shape.
    """
    if not isinstance(kept, np.ndarray):
        kept = flat(config, graph.keep_only(config, kept)).astype(bool)
    edges = edges_of(config, live(config, jnp.asarray(as_sets(config, kept)[0])))
    return Circuit(config, jax.tree.map(np.asarray, edges))


@cache
def ends(config: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
    """[E], [E]: the numbers of the nodes that each edge goes from and to; N is the logits. Do not write to them."""
    number = {name: place for place, name in enumerate((*graph.senders(config), "logits"))}
    into = {name: graph.n_read(config, name) for name in graph.receivers(config)}
    nodes = [number[name if name in number else name.rpartition(".")[0]] for name in into]
    return np.concatenate([np.arange(n) for n in into.values()]), np.repeat(nodes, list(into.values()))


def flat(config: TransformerConfig, edges: Edges) -> np.ndarray:
    """[E] the entries of Edges that are edges, in the order of graph.edge_names."""

    def into(receiver: str, field: str, place: tuple[Any, ...]) -> np.ndarray:
        return np.asarray(getattr(edges, field))[: graph.n_read(config, receiver), *place]

    return np.concatenate([into(name, *at) for name, at in graph.receivers(config).items()])


@cache
def _places(config: TransformerConfig) -> np.ndarray:
    """[E] where each edge stands among all entries of Edges, one field after the other."""
    leaves, structure = jax.tree.flatten(graph.full(config, 0.0))
    firsts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    numbers = [first + np.arange(leaf.size).reshape(leaf.shape) for first, leaf in zip(firsts, leaves, strict=False)]
    return flat(config, jax.tree.unflatten(structure, numbers))


def edges_of(config: TransformerConfig, values: Array) -> Edges:
    """Edges with these values [E]; 0 where there is no edge."""
    leaves, structure = jax.tree.flatten(graph.full(config, 0.0))
    sizes = [leaf.size for leaf in leaves]
    entries = jnp.zeros(sum(sizes), values.dtype).at[_places(config)].set(values)
    parts = jnp.split(entries, np.cumsum(sizes)[:-1])
    return jax.tree.unflatten(structure, [x.reshape(leaf.shape) for x, leaf in zip(parts, leaves, strict=True)])


@partial(jax.jit, static_argnums=0)
def live(config: TransformerConfig, kept: Array) -> Array:
    """[E] bool: those of the kept edges that lie on a path of kept edges from the embedding to the logits."""
    sender, receiver = ends(config)
    n, depth = len(graph.senders(config)), 1 + config.n_layers * (1 + bool(config.d_mlp))

    def spread(start: int, tail: np.ndarray, head: np.ndarray) -> Array:
        """[N+1] which nodes can be reached."""
        nodes = jnp.zeros(n + 1, bool).at[start].set(True)
        return jax.lax.fori_loop(0, depth, lambda _, x: x.at[head].max(kept & x[tail]), nodes)

    return kept & spread(0, sender, receiver)[sender] & spread(n, receiver, sender)[receiver]


def as_sets(config: TransformerConfig, kept: ArrayLike) -> EdgeSet:
    """[n,E] bool from [E] or [n,E]."""
    sets, n_edges = np.asarray(kept), len(ends(config)[0])
    if sets.dtype != bool or sets.ndim not in (1, 2) or sets.shape[-1] != n_edges:
        raise ValueError(
            f"kept must be bool [E] or [n,E] with E = {n_edges} edges; got {sets.dtype} {list(sets.shape)}"
        )
    return sets.reshape(-1, n_edges)


# --- what a set of edges is worth ---


def value_of(
    config: TransformerConfig, metric: Metric, params: Params, batch: Batch, reference: Array | None, kept: Array
) -> Array:
    """The metric with these edges [E] alone."""
    edges = edges_of(config, kept.astype(jnp.float32))
    value = value_under(config, params, batch, metric, Interventions(edges=edges, edge_outputs=reference))
    if jnp.shape(value) != ():
        raise ValueError(f"metric must return one number; got {jax.tree.map(jnp.shape, value)}")
    return value


@partial(jax.jit, static_argnums=(0, 1))
def _values(
    config: TransformerConfig, metric: Metric, params: Params, batch: Batch, reference: Array | None, kept: Array
) -> Array:
    """[n] the metric of sets [n,E]."""
    return jax.vmap(lambda one: value_of(config, metric, params, batch, reference, one))(kept)


def values_of(
    config: TransformerConfig, params: Params, batch: Batch, metric: Metric, reference: Array | None, sets: EdgeSet,
    chunk: int,
) -> np.ndarray:  # fmt: skip
    """[n] the metric of sets [n,E], by one program for any n."""
    check_tokens(config, batch.tokens)
    check_chunk(chunk)
    padded = np.pad(sets, ((0, -len(sets) % chunk), (0, 0)))
    parts = padded.reshape(-1, chunk, sets.shape[1])
    values = [_values(config, metric, params, batch, reference, jnp.asarray(part)) for part in parts]
    return np.concatenate([np.asarray(value, np.float64) for value in values])[: len(sets)]


def shares(values: np.ndarray) -> np.ndarray:
    """Faithfulness of all but the first two of the values, which are those of the empty set and of the model."""
    (empty, whole), rest = values[:2], values[2:]
    if not whole - empty > 1e-5 * max(abs(whole), abs(empty)):
        raise NothingToExplainError(
            "there is nothing to explain: the metric of the model must be above that of no edges at all; got "
            f"{whole:g} and {empty:g}. Either the model has no skill on this batch, or the reference run has it too"
        )
    return (rest - empty) / (whole - empty)


def faithfulness(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    kept: ArrayLike,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    chunk: int = CHUNK,
) -> np.ndarray:
    """F(C) = (m(C) - m(empty)) / (m(M) - m(empty)), one forward pass for each set of edges.

    1 does not mean that the set does what the model does, only that it scores as much: what helps and what hinders
    can be left out together.

    Args:
        config, params: the model.
        batch: B sequences.
        kept: [n,E] or [E] bool in the order of graph.edge_names (Circuit.kept). All other edges are cut.
        metric: one number that rises with success; see outcomes.Metric.
        reference: what a cut edge carries, [N,T,D] or [B,N,T,D]: graph.outputs of another run. Nothing when left out.
        chunk: how many sets are held in memory at once.

    Returns:
        [n], 1 for the model and 0 for no edges; NumPy float64.

    Raises:
        NothingToExplainError: m(M) is not above m(empty) by more than rounding, so that there is nothing to explain.
        ValueError: bad tokens, an array of another shape, a metric that is not one number, or a chunk below 1.
    """
    sets = as_sets(config, kept)
    rows = np.concatenate([np.repeat([[False], [True]], sets.shape[1], 1), sets])
    return shares(values_of(config, params, batch, metric, reference, rows, chunk))
