"""Circuit discovery: a few edges of a model's graph that do on a task what the whole model does (see edge_sets.py).

discover_greedy tries every edge and ends with a minimal circuit (as Conmy et al. 2304.14997, with an order by
attribution), discover_by_attribution takes the edges of the largest attribution (Syed et al. 2310.10348), and discover
goes on to look for what would take over: backups, which no minimal circuit shows. circuit_quality.py judges the result.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.heads.attribution import attribute_edges
from circuits_jax.heads.edge_sets import (
    CHUNK,
    Circuit,
    EdgeSet,
    circuit_of,
    ends,
    faithfulness,
    flat,
    live,
    shares,
    value_of,
    values_of,
)
from circuits_jax.heads.outcomes import Metric, log_likelihood
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges
from circuits_jax.models.transformer import Params
from circuits_jax.tasks.batch import Batch

N_STEPS = 8
# Of faithfulness, so that a target of 1 is not missed by rounding.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Discovery:
    """A circuit, and the other ones that do the same.

    Attributes:
        circuit: minimal: without any one of its edges it misses the target. An alternative may still be smaller.
        alternatives: minimal circuits, `circuit` first; each has an edge that is in none before it.
        union: all of their edges.
        ended: whether the search found nothing more; False where it stopped at max_alternatives.
    """

    circuit: Circuit
    alternatives: tuple[Circuit, ...]
    union: Circuit
    ended: bool


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
        return value_of(config, metric, params, batch, reference, one)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, todo = state
        tried = padded[jnp.nonzero((todo & kept)[order], size=chunk, fill_value=n_edges)[0]]
        gone = jnp.cumsum(jax.nn.one_hot(tried, n_edges, dtype=jnp.int32), 0) > 0
        left = jax.vmap(partial(live, config))(kept & ~gone)
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
    empty, whole = values = values_of(config, params, batch, metric, reference, nothing_and_all, chunk)
    shares(values)
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
        left = np.asarray(live(config, kept))
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
        return np.asarray(jax.vmap(partial(live, config))(jnp.asarray(rank < sizes[:, None])))

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
