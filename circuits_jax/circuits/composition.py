"""How much a head reads of what an earlier head wrote: Q-, K- and V-composition of all pairs of heads.

Post-norm models have no composition through these weights, and are refused (weights.check_composes).

All pairs of two layers are one matmul [H K, D] x [D, H K], and one pair of layers is held at a time: memory is
(H K)^2 numbers whatever the number of layers. Weights may be bfloat16; a layer is float32 while it is looked at.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits import orthonormalisation
from circuits_jax.circuits.attention import mean_qk, ov, rotated_queries, visible_offsets
from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.token_space import TokenCircuit
from circuits_jax.circuits.weights import CircuitWeights, check_composes, per_query_head
from circuits_jax.models.rotary import relative
from circuits_jax.models.transformer import repeat_groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompositionScores:
    """q, k, v: [L,H,L,H], the sending head first; 0 where the sender is not in an earlier layer."""

    q: Array
    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Reads:
    """What the heads of one layer read through: M_h = into_g outof_h with g = h // (H/G).

    into [G,D,K] faces the residual stream; outof [G,H/G,K,r] is small and changes lengths only. None: lengths are kept.
    """

    into: Array
    outof: Array | None


Layer = Callable[[Array], Array]
Readers = Callable[[Array], tuple[_Reads, ...]]  # through q, k and v


def composition_scores(weights: CircuitWeights, offset: ArrayLike = 0) -> CompositionScores:
    """Frobenius composition of head a with every later head b (Elhage et al. 2021), in [0, 1].

    Q: ||W_OV^a W_QK^b|| / (||W_OV^a|| ||W_QK^b||)      K: ||W_OV^a (W_QK^b)^T|| / ...      V: ||W_OV^a W_OV^b|| / ...

    Only K x K matrices are formed for a pair: ||W_OV^a W_QK^b|| = ||R_V (W_O^a W_Q^b) R_K^T|| with the triangular
    factors of W_V^a and W_K^b; heads that share keys and values share W_O^a W_K^b and W_O^a W_V^b. Two random matrices
    score about 1/sqrt(D), so a score means nothing before that is taken off (heads.nulls.composition_evidence). With
    rotary positions W_QK is the one at the given offset. A zero head scores 0.

    What it establishes: how much of the sender's output subspace the receiver reads. Not that the receiver's
    attention depends on it: junk of a large norm scores as high as a circuit.
    """
    senders, readers = _factors(weights, offset)
    return over_layer_pairs(len(weights.W_Q), readers, lambda layer, reads: _of_layers(senders(layer), reads, _norms))


def same_layer_scores(weights: CircuitWeights, offset: ArrayLike = 0) -> CompositionScores:
    """composition_scores of the pairs within each layer, which cannot compose: a null, [L,H,H] with q, k, v."""
    senders, readers = _factors(weights, offset)
    n_layers = len(weights.W_Q)
    return jax.lax.map(lambda layer: _of_layers(senders(layer), readers(layer), _norms), jnp.arange(n_layers))


def component_scores(weights: CircuitWeights, offset: ArrayLike = 0) -> CompositionScores:
    """Composition of each singular component of the sender, [L,H,L,H,K] in [0, 1] (Merullo et al. 2406.09519).

    Q: ||v_r W_QK^b|| / ||W_QK^b|| with v_r the r-th direction that W_OV^a = U S V^T writes, strongest first; K and V
    alike. The whole score is made of them: score^2 = sum_r sigma_r^2 score_r^2 / sum_r sigma_r^2.
    """
    directions = ov(weights).svd().Vh
    _, readers = _factors(weights, offset)

    def lengths(product: Array) -> Array:
        return jnp.sqrt(jnp.square(product).sum(-1)).transpose(0, 2, 1)

    def measure(layer: Array, reads: tuple[_Reads, ...]) -> CompositionScores:
        return _of_layers(directions[layer], reads, lengths)

    return over_layer_pairs(len(weights.W_Q), readers, measure)


def projection_kernel(weights: CircuitWeights) -> CompositionScores:
    """||U^T V||_F^2 between what the sender writes and what the receiver reads, in [0, K] (2601.10266).

    U, V: orthonormal bases of the rows of W_O^a and of the columns of W_Q^b, W_K^b and W_V^b. The dimension that the
    two subspaces share, whatever the strength in it; K^2 / D on average for random ones.
    """
    check_composes(weights)
    writes = orthonormalisation.qr(weights.W_O.mT.astype(jnp.float32))[0].mT
    reads = [orthonormalisation.qr(w.astype(jnp.float32))[0] for w in (weights.W_Q, weights.W_K, weights.W_V)]

    def readers(layer: Array) -> tuple[_Reads, ...]:
        return tuple(_Reads(w[layer], None) for w in reads)

    def shared(layer: Array, reads: tuple[_Reads, ...]) -> CompositionScores:
        squares = jax.tree.map(jnp.square, _of_layers(writes[layer], reads, _norms))
        return jax.tree.map(lambda x: repeat_groups(x, weights.W_Q.shape[1], axis=1), squares)

    return over_layer_pairs(len(weights.W_Q), readers, shared)


def virtual_head(weights: CircuitWeights, sender: tuple[int, int], receiver: tuple[int, int]) -> LowRank:
    """W_OV^a W_OV^b, [D,D]: what two heads in a row move, attending along the product of their patterns.

    Args:
        weights: of the model.
        sender: (layer, head) of a, in an earlier layer than b.
        receiver: (layer, head) of b.

    Raises:
        ValueError: the sender is not in an earlier layer.
        IndexError: no such head.
    """
    _check_pair(weights, sender, receiver)
    circuits = ov(weights)
    return circuits[sender] @ circuits[receiver]


def k_path(weights: CircuitWeights, sender: tuple[int, int], receiver: tuple[int, int]) -> TokenCircuit:
    """W_E W_QK^b (W_OV^a)^T W_E^T for one sender a and receiver b, [V,V].

    Entry (u, w) is how much head b, at a query token u, wants a key at which head a has written what it took from
    token w. If a looks one position back, that key is the position after w, so a large diagonal is what an induction
    head needs: the query matches the token before the key. With rotary positions W_QK is averaged over all offsets
    of the context.

    Raises:
        ValueError: the sender is not in an earlier layer.
        IndexError: no such head.
    """
    _check_pair(weights, sender, receiver)
    return TokenCircuit(weights.W_E, mean_qk(weights)[receiver] @ ov(weights)[sender].T)


def k_path_gaps(weights: CircuitWeights) -> Array:
    """diagonal_gap of k_path for all pairs, [L,H,L,H], sender first; 0 where it is not in an earlier layer.

    tr/V - (sum - tr)/(V (V - 1)) of W_E W_QK^b (W_OV^a)^T W_E^T with tr = <W_V^T G W_Q, W_O W_K>, G = W_E^T W_E, and
    the sum the same with G = s s^T, s the sum of all embeddings: no vocabulary, one pair of layers at a time.
    """
    check_composes(weights)
    n_vocab, total = float(len(weights.W_E)), weights.W_E.sum(0)  # V (V - 1) is more than an int32 holds
    gram = matmul(weights.W_E.T, weights.W_E)
    n_layers, n_heads = weights.W_Q.shape[:2]

    def reads(layer: Array) -> tuple[Array, Array, Array]:
        of_layer = dataclasses.replace(weights, W_Q=weights.W_Q[layer][None])
        query = rotated_queries(of_layer, visible_offsets(weights.n_context, weights.causal))[0]
        key = repeat_groups(weights.W_K[layer], n_heads)
        return matmul(gram, query), einsum("d,hdk->hk", total, query), key

    def gap(layer: Array, read: tuple[Array, Array, Array]) -> Array:
        matched, summed, key = read
        value = repeat_groups(weights.W_V[layer], n_heads)
        through_keys = einsum("akd,bdj->abkj", weights.W_O[layer], key)
        trace = einsum("abkj,abkj->ab", einsum("adk,bdj->abkj", value, matched), through_keys)
        whole = einsum("ak,abkj,bj->ab", einsum("adk,d->ak", value, total), through_keys, summed)
        return trace / n_vocab - (whole - trace) / (n_vocab * (n_vocab - 1))

    return over_layer_pairs(n_layers, reads, gap)


def _check_pair(weights: CircuitWeights, sender: tuple[int, int], receiver: tuple[int, int]) -> None:
    check_composes(weights)
    if not sender[0] < receiver[0]:
        raise ValueError(f"the sender must be in an earlier layer than the receiver; got {sender} and {receiver}")


def _factors(weights: CircuitWeights, offset: ArrayLike) -> tuple[Layer, Readers]:
    """For a layer: what its heads write [H,r,D], and what they read through, both of Frobenius norm 1 for each head.

    W_OV = W_V W_O has the norms, and the norms of products, of R_V W_O; W_QK of W_Q R_K^T, its transpose of W_K R_Q^T.
    """
    check_composes(weights)
    n_heads, n_groups = weights.W_Q.shape[1], weights.W_K.shape[1]

    def triangles(layer: Array) -> Array:
        w_q, w_k, w_v, w_o = (_of_layer(w, layer) for w in (weights.W_Q, weights.W_K, weights.W_V, weights.W_O))
        return orthonormalisation.triangle(jnp.concatenate([w_q, w_o.mT, w_k, w_v]))

    def by_group(x: Array) -> Array:
        return x.reshape(n_groups, n_heads // n_groups, *x.shape[1:])

    def turned(x: Array) -> Array:
        return relative(x, jnp.atleast_1d(jnp.asarray(offset)), weights.rotary) if weights.positions == "rotary" else x

    factors = jax.lax.map(triangles, jnp.arange(len(weights.W_Q)))
    r_q, r_o, r_k, r_v = jnp.split(factors, (n_heads, 2 * n_heads, 2 * n_heads + n_groups), axis=1)
    r_q = turned(r_q)
    k_of_head, v_of_head = per_query_head(weights, r_k), per_query_head(weights, r_v)
    ov_size, qk_size = (_length(matmul(x, y.mT)) for x, y in ((v_of_head, r_o), (r_q, k_of_head)))

    def senders(layer: Array) -> Array:
        return matmul(v_of_head[layer] / ov_size[layer], _of_layer(weights.W_O, layer))

    def readers(layer: Array) -> tuple[_Reads, ...]:
        w_q, w_k, w_v = (_of_layer(w, layer) for w in (weights.W_Q, weights.W_K, weights.W_V))
        out_q = (k_of_head[layer] / qk_size[layer]).mT[:, None]
        out_k, out_v = by_group((r_q[layer] / qk_size[layer]).mT), by_group((r_o[layer] / ov_size[layer]).mT)
        return _fold(turned(w_q), out_q), _fold(w_k, out_k), _fold(w_v, out_v)

    return senders, readers


def _of_layer(weights: Array, layer: Array) -> Array:
    """One layer in float32. Half precision is picked as bits: XLA's CPU would make float32 of all layers first."""
    if weights.dtype.itemsize != 2:
        return weights[layer].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint16)[layer]
    return jax.lax.bitcast_convert_type(bits, weights.dtype).astype(jnp.float32)


def _length(x: Array) -> Array:
    """Frobenius norms [...,1,1], infinite for zero so that what is divided by them becomes zero."""
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    return jnp.where(norm == 0, jnp.inf, norm)


def _fold(into: Array, outof: Array) -> _Reads:
    """Where no heads share, the small factor goes into the large one once and for all senders."""
    return _Reads(into, outof) if outof.shape[1] > 1 else _Reads(matmul(into, outof[:, 0]), None)


def over_layer_pairs(n_layers: int, reads: Callable[[Array], Any], measure: Callable[[Array, Any], Any]) -> Any:
    """measure(sending layer, reads(receiving layer)) [H,H,...] of all pairs of layers, [L,H,L,H,...].

    One pair of layers after the other; 0 where the sender is not earlier.
    """

    def of_receiver(layer: Array) -> Any:
        read = reads(layer)
        shapes = jax.eval_shape(measure, layer, read)
        nothing = jax.tree.map(lambda x: jnp.zeros((n_layers, *x.shape), x.dtype), shapes)

        def add(sender: Array, found: Any) -> Any:
            return jax.tree.map(lambda all_, x: all_.at[sender].set(x), found, measure(sender, read))

        return jax.lax.fori_loop(0, layer, add, nothing)

    by_receiver = jax.lax.map(of_receiver, jnp.arange(n_layers))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), by_receiver)


def _of_layers(sent: Array, reads: tuple[_Reads, ...], measure: Callable[[Array], Array]) -> CompositionScores:
    """The measure of (sender, receiver) for all heads of two layers, [H,H,...] with q, k, v."""
    return CompositionScores(*(measure(_product(sent, read)) for read in reads))


def _product(sent: Array, reads: _Reads) -> Array:
    """sent_a M_b for all heads a, b of two layers: [H,r,H,r] from [H,r,D], as one matmul."""
    n_heads, rank, d_model = sent.shape
    n_groups, _, width = reads.into.shape
    flat = matmul(sent.reshape(-1, d_model), reads.into.transpose(1, 0, 2).reshape(d_model, -1))
    if reads.outof is None:
        return flat.reshape(n_heads, rank, n_groups, width)
    product = einsum("agk,gjkn->agjn", flat.reshape(-1, n_groups, width), reads.outof)
    return product.reshape(n_heads, rank, -1, product.shape[-1])


def _norms(product: Array) -> Array:
    """Frobenius norm for each pair of heads, [H,r,H,r] -> [H,H]. Over rows first, the fast order in memory."""
    return jnp.sqrt(jnp.square(product).sum(1).sum(-1))
