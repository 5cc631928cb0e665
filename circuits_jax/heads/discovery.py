"""Circuit discovery: a few edges of a model's graph (models/graph.py) that do on a task what the whole model does.

A circuit C is a set of edges. All edges outside it carry what they carried in a reference run, or nothing, and its
faithfulness is the share of the metric m that is left, between the empty set and the whole model M:

    F(C) = (m(C) - m(empty)) / (m(M) - m(empty))            F(empty) = 0, F(M) = 1, above 1 where M hinders itself

discover_greedy tries every edge and ends with a minimal circuit (as Conmy et al. 2304.14997, with an order by
attribution), discover_by_attribution takes the edges of the largest attribution (Syed et al. 2310.10348), and discover
goes on to look for what would take over: backups, which no minimal circuit shows. circuit_quality.py judges the result.

Sets of edges are [E] bool in the order of graph.edge_names.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

from circuits_jax.heads.attribution import attribute_edges
from circuits_jax.heads.outcomes import Metric, log_likelihood, value_under
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, Interventions
from circuits_jax.models.transformer import Params, check_tokens
from circuits_jax.tasks.batch import Batch

CHUNK = 8
N_STEPS = 8
# Of faithfulness, so that a target of 1 is not missed by rounding.
TOLERANCE = 1e-5
EdgeSet = NDArray[np.bool_]


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


@dataclasses.dataclass(frozen=True, eq=False)
class Discovery:
    """A circuit, and the other ones that do the same.

    Attributes:
        circuit: minimal: without any one of its edges it misses the target.
        alternatives: minimal circuits, `circuit` first; each has an edge that is in none before it.
        union: all of their edges.
        ended: whether the search found nothing more; False where it stopped at max_alternatives.
    """

    circuit: Circuit
    alternatives: tuple[Circuit, ...]
    union: Circuit
    ended: bool


# --- sets of edges ---


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
    edges = edges_of(config, _live(config, jnp.asarray(_sets(config, kept)[0])))
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
def _live(config: TransformerConfig, kept: Array) -> Array:
    """[E] bool: those of the kept edges that lie on a path of kept edges from the embedding to the logits."""
    sender, receiver = ends(config)
    n, depth = len(graph.senders(config)), 1 + config.n_layers * (1 + bool(config.d_mlp))

    def spread(start: int, tail: np.ndarray, head: np.ndarray) -> Array:
        """[N+1] which nodes can be reached."""
        nodes = jnp.zeros(n + 1, bool).at[start].set(True)
        return jax.lax.fori_loop(0, depth, lambda _, x: x.at[head].max(kept & x[tail]), nodes)

    return kept & spread(0, sender, receiver)[sender] & spread(n, receiver, sender)[receiver]


def _sets(config: TransformerConfig, kept: ArrayLike) -> EdgeSet:
    """[n,E] bool from [E] or [n,E]."""
    sets, n_edges = np.asarray(kept), len(ends(config)[0])
    if sets.dtype != bool or sets.ndim not in (1, 2) or sets.shape[-1] != n_edges:
        raise ValueError(
            f"kept must be bool [E] or [n,E] with E = {n_edges} edges; got {sets.dtype} {list(sets.shape)}"
        )
    return sets.reshape(-1, n_edges)


# --- what a set of edges is worth ---


def _value(
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
    return jax.vmap(lambda one: _value(config, metric, params, batch, reference, one))(kept)


def _values_in_chunks(
    config: TransformerConfig, params: Params, batch: Batch, metric: Metric, reference: Array | None, sets: EdgeSet,
    chunk: int,
) -> np.ndarray:  # fmt: skip
    """[n] the metric of sets [n,E], by one program for any n."""
    check_tokens(config, batch.tokens)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    padded = np.pad(sets, ((0, -len(sets) % chunk), (0, 0)))
    parts = padded.reshape(-1, chunk, sets.shape[1])
    values = [_values(config, metric, params, batch, reference, jnp.asarray(part)) for part in parts]
    return np.concatenate([np.asarray(value, np.float64) for value in values])[: len(sets)]


def _shares(values: np.ndarray) -> np.ndarray:
    """Faithfulness of all but the first two of the values, which are those of the empty set and of the model."""
    (empty, whole), rest = values[:2], values[2:]
    if not whole - empty > 1e-5 * max(abs(whole), abs(empty)):
        raise ValueError(
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
        ValueError: m(M) is not above m(empty) by more than rounding, so that there is nothing to explain; bad tokens,
            an array of another shape, a metric that is not one number, or a chunk below 1.
    """
    sets = _sets(config, kept)
    rows = np.concatenate([np.repeat([[False], [True]], sets.shape[1], 1), sets])
    return _shares(_values_in_chunks(config, params, batch, metric, reference, rows, chunk))


# --- one minimal circuit ---


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prune(
    config: TransformerConfig, metric: Metric, chunk: int, params: Params, batch: Batch, reference: Array | None,
    kept: Array, order: Array, least: Array,
) -> Array:  # fmt: skip
    """[E] what is left of the kept edges when each is tried once, in this order, and cut if the value stays >= least.

    The next `chunk` edges are tried together, the i-th with all before it cut, and what comes after the first one
    that has to stay is tried again. That is what trying one after the other gives, in fewer steps.

    Args:
        kept: [E] bool.
        order: [E] int, all edges.
        least: value that has to be reached.
    """
    n_edges = len(order)
    padded = jnp.append(order, n_edges)

    def evaluate(one: Array) -> Array:
        return _value(config, metric, params, batch, reference, one)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, todo = state
        tried = padded[jnp.nonzero((todo & kept)[order], size=chunk, fill_value=n_edges)[0]]
        gone = jnp.cumsum(jax.nn.one_hot(tried, n_edges, dtype=jnp.int32), 0) > 0
        left = jax.vmap(partial(_live, config))(kept & ~gone)
        n_cut = jnp.cumprod(jax.vmap(evaluate)(left) >= least).sum()
        decided = jnp.where(jnp.arange(chunk) <= n_cut, tried, n_edges)
        return jnp.concatenate([kept[None], left])[n_cut], todo.at[decided].set(False, mode="drop")

    return jax.lax.while_loop(lambda state: (state[0] & state[1]).any(), step, (kept, kept))[0]


def _least(
    config: TransformerConfig, params: Params, batch: Batch, metric: Metric, reference: Array | None, target: float,
    chunk: int,
) -> float:  # fmt: skip
    """The metric at the target of faithfulness."""
    if not 0 < target <= 1:
        raise ValueError(f"target must be above 0 and at most 1; got {target}")
    nothing_and_all = np.repeat([[False], [True]], len(ends(config)[0]), 1)
    empty, whole = values = _values_in_chunks(config, params, batch, metric, reference, nothing_and_all, chunk)
    _shares(values)
    return float(empty + (target - TOLERANCE) * (whole - empty))


def _pruner(
    config: TransformerConfig, params: Params, batch: Batch, metric: Metric, reference: Array | None, target: float,
    chunk: int | None,
) -> Callable[[EdgeSet, np.ndarray], EdgeSet]:  # fmt: skip
    """(edges [E], order [E]) -> a minimal circuit among them: cutting any one of its edges misses the target."""
    least = jnp.float32(_least(config, params, batch, metric, reference, target, CHUNK if chunk is None else chunk))
    # Accelerators have room for more than one toy model at once; a CPU would only repeat work.
    at_once = chunk or (1 if jax.default_backend() == "cpu" else CHUNK)

    def prune(kept: EdgeSet, order: np.ndarray) -> EdgeSet:
        left = np.asarray(_live(config, kept))
        before = -1
        # An edge that had to stay may be free to go once others are gone.
        while left.sum() != before:
            before = left.sum()
            pruned = _prune(config, metric, at_once, params, batch, reference, jnp.asarray(left), order, least)
            left = np.asarray(pruned)
        return left

    return prune


def _strengths(
    config: TransformerConfig, params: Params, batch: Batch, metric: Metric, reference: Array | None,
    attribution: Edges | None,
) -> np.ndarray:  # fmt: skip
    """[E] |attribution|."""
    if attribution is None:
        attribution = attribute_edges(config, params, batch, metric, reference, n_steps=N_STEPS)
    return np.abs(flat(config, attribution))


def _weakest_first(strengths: np.ndarray, *more_important: np.ndarray) -> np.ndarray:
    """[E] the edges in order; where they tie, those into later receivers first."""
    return np.lexsort((-np.arange(len(strengths)), strengths, *more_important)).astype(np.int32)


def discover_greedy(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    target: float = 0.9,
    attribution: Edges | None = None,
    within: Circuit | None = None,
    chunk: int | None = None,
) -> Circuit:
    """A minimal circuit: tries to cut each edge, weakest first, and cuts it if F stays at the target or above.

    What is left is tried again until nothing more can be cut. Edges that a cut leaves on no path from the embedding
    to the logits go with it. About one forward pass for each edge of the model; `within` makes that fewer.

    It establishes that these edges suffice on this batch and that none of them can be missed among them. It does not
    establish that the model uses them and no others: of several backups one is in it (discover finds the others), and
    where M hinders itself (F above 1), cutting what hinders pays for cutting what helps.

    Args:
        config, params, batch, metric, reference: as in faithfulness.
        target: of F, above 0 and at most 1.
        attribution: edges are tried by the size of these numbers, ties by later receivers first. By default
            attribution.attribute_edges with 8 steps.
        within: start from this circuit instead of the whole model, say that of discover_by_attribution.
        chunk: how many runs are held in memory at once; more of them mean fewer steps and the same circuit. By
            default 1 on a CPU and 8 elsewhere.

    Raises:
        ValueError: a bad target, a `within` that is below it, and as in faithfulness.
    """
    prune = _pruner(config, params, batch, metric, reference, target, chunk)
    start = np.ones(len(ends(config)[0]), bool) if within is None else within.kept
    if within is not None:
        reached = float(faithfulness(config, params, batch, start, metric, reference, chunk or CHUNK)[0])
        if reached < target - TOLERANCE:
            raise ValueError(f"within must reach the target of {target:g} on this batch; it reaches {reached:g}")
    strengths = _strengths(config, params, batch, metric, reference, attribution)
    return circuit_of(config, prune(start, _weakest_first(strengths)))


def discover_by_attribution(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    target: float = 0.9,
    attribution: Edges | None = None,
    chunk: int = CHUNK,
) -> Circuit:
    """The n edges of the largest |attribution|, n about the smallest that reaches the target; for large models.

    Attribution and a few dozen forward passes, however many edges. F need not rise with n, so the smallest n is not
    certain: a geometric grid of sizes is tried, then finer ones in front of the first size that reaches the target.
    What is returned reaches it, n - 1 edges do not, and nor did any smaller size that was tried. It is not minimal:
    one weak edge that is needed brings all stronger ones along (discover_greedy with within=). Attribution from the
    gradient at the model alone (n_steps=0) is blind to saturated attention and then makes it several times as large.

    Args:
        config, params, batch, metric, reference, target, attribution: as in discover_greedy.
        chunk: how many sizes are tried at once.

    Raises:
        ValueError: a bad target, and as in faithfulness.
    """
    _least(config, params, batch, metric, reference, target, chunk)  # What is wrong is said before the backward pass.
    strengths = _strengths(config, params, batch, metric, reference, attribution)
    rank = np.argsort(_weakest_first(strengths)[::-1])

    def largest(sizes: np.ndarray) -> EdgeSet:
        return np.asarray(jax.vmap(partial(_live, config))(jnp.asarray(rank < sizes[:, None])))

    missed, reached = 0, len(rank)
    sizes = np.unique(np.geomspace(1, len(rank), chunk + 1).astype(int)[:-1])
    while len(sizes):
        enough = faithfulness(config, params, batch, largest(sizes), metric, reference, chunk) >= target - TOLERANCE
        first = int(np.argmax(enough)) if enough.any() else len(sizes)
        missed, reached = [missed, *sizes][first], [*sizes, reached][first]
        sizes = np.unique(np.linspace(missed, reached, chunk + 2).astype(int))
        sizes = sizes[(sizes > missed) & (sizes < reached)]
    return circuit_of(config, largest(np.array([reached]))[0])


# --- and what would take over ---


def discover(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    target: float = 0.9,
    attribution: Edges | None = None,
    max_alternatives: int = 8,
    chunk: int | None = None,
) -> Discovery:
    """discover_greedy, then what takes over where edges that were found are cut: backups.

    Each further search starts from the whole model and tries the edges of all circuits found so far first, those
    between heads and MLPs in front: as many of them are cut as others can stand in for, and the minimal circuit that
    is left shows which. It counts when it has an edge that is new. When it has none, the search is repeated with the
    edges of one node tried last, for every node of the union: what needs that node and was hidden behind others can be
    seen then.

    It finds all heads of which each suffices, and all of which any k do. It cannot promise all backups there are;
    that would take every set of edges. Where many small effects add up to a little more than the target, there are
    many minimal circuits that differ in what is not quite needed, and alternatives are no sign of backups. With a
    reference from another run, backups that are cut go on saying what they said there, against the one that is kept:
    a minimal circuit may then hold several of them.

    Args:
        config, params, batch, metric, reference, target, attribution, chunk: as in discover_greedy.
        max_alternatives: at most how many circuits, at least 1.

    Raises:
        ValueError: max_alternatives below 1, and as in discover_greedy.
    """
    if max_alternatives < 1:
        raise ValueError(f"max_alternatives must be at least 1; got {max_alternatives}")
    prune = _pruner(config, params, batch, metric, reference, target, chunk)
    strengths = _strengths(config, params, batch, metric, reference, attribution)
    everything = np.ones(len(strengths), bool)
    sender, receiver = ends(config)
    inner = (sender > 0) & (receiver < len(graph.senders(config)))

    found = [prune(everything, _weakest_first(strengths))]
    union, in_vain = found[0], set[int]()
    while True:
        # 0 is the embedding, which every circuit needs: there no node is spared.
        node = next((n for n in np.unique(sender[union]).tolist() if n not in in_vain), None)
        if node is None or len(found) == max_alternatives:
            break
        spared = union & ((sender == node) | (receiver == node)) & (node > 0)
        turn = np.select([spared, union & inner, union], [3, 0, 1], 2)
        another = prune(everything, _weakest_first(strengths, turn))
        if (another & ~union).any():
            found.append(another)
            union, in_vain = union | another, set()
        else:
            in_vain.add(node)
    circuits = tuple(circuit_of(config, kept) for kept in found)
    return Discovery(circuits[0], circuits, circuit_of(config, union), ended=node is None)
