"""Ideal inputs: rows of the residual stream that hold one thing alone, and how heads score them against each other.

What weights alone say of a head is what it does with such inputs. Every head of a model is asked about the same ones,
so heads, null heads and models cost a few small matmuls each, whatever D and V: V is seen through n of its tokens.

In a post-norm model what heads write does not reach later heads through these weights alone (weights.check_composes).
There it is left out of all inputs, so that weights never say of a head that another one serves it, as in induction.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.reading import normalized, values
from circuits_jax.circuits.weights import CircuitWeights, check_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdealInputs:
    """Rows as the heads of each layer read them, in a model with norms divided by the size that norms divide by.

    Attributes:
        tokens: [n,D] embeddings.
        positions: [L,T,D] positions, all holding the mean token (the start token at position 0, where one is given).
        places: [T,D] positions alone as values carry them; zeros where they do not.
        sent: [L,n,D] a token as the previous-token heads of earlier layers write it, each counted as much as it looks
            back. Zeros in a post-norm model.
        pointers: [L,T,D] a position as the duplicate-token heads of earlier layers write it, counted alike.
        mixed: [L,T,D] all at once: a token, its position, and what every head of earlier layers would write if it
            attended to one random row (without b_V and b_O, which do not depend on it).
        mixed_values: [L,T,D] the same as values read it, without the positions of shortformer.
        raw_size: [L] root mean square length of the mixed rows as heads add to them: before a norm, after it in a
            post-norm model.
        embedded_size: [] by what a norm divides the embedded residual; 1 without one.
    """

    tokens: Array
    positions: Array
    places: Array
    sent: Array
    pointers: Array
    mixed: Array
    mixed_values: Array
    raw_size: Array
    embedded_size: Array


def residual_size(weights: CircuitWeights, length: int) -> Array:
    """By what the norm divides the embedded residual at each position, averaged over tokens: [T]; 1 without a norm.

    sqrt(mean over tokens of |W_E|^2 / D + |W_P|^2 / D + epsilon), W_P where positions are added to the residual.
    """
    if weights.norm == "none":
        return jnp.ones(length)
    d_model = weights.W_E.shape[-1]
    square = jnp.broadcast_to(jnp.square(weights.W_E).sum(-1).mean(), (length,))
    if weights.positions == "learned" and weights.W_P is not None:
        square = square + jnp.square(weights.W_P[:length]).sum(-1)
    return jnp.sqrt(square / d_model + weights.norm_epsilon)


def position_inputs(weights: CircuitWeights, length: int, start: Array | None = None) -> Array:
    """The first T positions, all holding the mean token, [L,T,D].

    Positions alone would miss what all queries have in common: a head that looks at position 0 from every token does
    so through the mean token.

    Args:
        weights: of the model.
        length: T.
        start: [D] embedding of the token at position 0; the mean token if left out.
    """
    check_positions(weights)
    size = residual_size(weights, length)[:, None]
    content = jnp.broadcast_to(weights.W_E.mean(0), (length, weights.W_E.shape[-1]))
    if start is not None:
        content = content.at[0].set(start)
    added = 0.0 if weights.W_P is None else weights.W_P[..., :length, :]
    rows = content / size + (added / size if weights.positions == "learned" else added)
    return jnp.broadcast_to(rows, (len(weights.W_Q), *rows.shape[-2:]))


def token_inputs(weights: CircuitWeights, length: int) -> Array:
    """Embeddings as heads read them, [n,D]."""
    return weights.W_E / residual_size(weights, length).mean()


def written(weights: CircuitWeights, rows: Array, share: Array) -> Array:
    """sum over the heads of earlier layers of share_a x W_OV^a: rows [n,D], share [L,H] -> [L,n,D]; 0 if post-norm."""
    return _of_earlier(weights, einsum("lh,lhnk,lhkd->lnd", share, values(weights, rows), weights.W_O))


def _of_earlier(weights: CircuitWeights, moved: Array) -> Array:
    """The sum over earlier layers of what each adds [L,n,D]: what later ones read of it; nothing if post-norm."""
    if weights.norm_position == "post":
        return jnp.zeros_like(moved)
    return jnp.cumsum(moved, 0) - moved


def added_to(weights: CircuitWeights, residual: Array) -> Array:
    """What heads add to: the residual stream [...,D]; in a post-norm model its norm, the gain left out."""
    return normalized(weights, residual) if weights.norm_position == "post" else residual


def at_size_of(weights: CircuitWeights, rows: Array) -> CircuitWeights:
    """The same heads with W_Q and W_K over the size that qk-norm gives q and k of these rows, instead of qk-norm.

    For inputs that are part of what a head reads: qk-norm divides the part by the size of the whole. The size is the
    root mean square over the rows. Without qk-norm the weights as they are.

    Args:
        weights: of the model.
        rows: [n,D], or [L,n,D] by layer.
    """
    if weights.q_gain is None or weights.k_gain is None:
        return weights
    square = einsum("...nd,...ne->...de", rows, rows) / rows.shape[-2]
    mean = rows.mean(-2)

    def size(w: Array, b: Array | None, gain: Array) -> Array:
        """[L,H,1,1] of W [L,H,D,K], without the gain [L,K]."""
        w = w / gain[:, None, None]
        total = (w * matmul(square[..., None, :, :], w)).sum((-2, -1))
        if b is not None:
            b = b / gain[:, None]
            total = total + (b * (2 * matmul(mean[..., None, None, :], w)[..., 0, :] + b)).sum(-1)
        return jnp.sqrt(total / w.shape[-1] + weights.norm_epsilon)[..., None, None]

    def over(w: Array, b: Array | None, gain: Array) -> tuple[Array, Array | None]:
        by = size(w, b, gain)
        return w / by, None if b is None else b / by[..., 0]

    w_q, b_q = over(weights.W_Q, weights.b_Q, weights.q_gain)
    w_k, b_k = over(weights.W_K, weights.b_K, weights.k_gain)
    return dataclasses.replace(weights, W_Q=w_q, b_Q=b_q, W_K=w_k, b_K=b_k, q_gain=None, k_gain=None)


def ideal_inputs(
    weights: CircuitWeights, length: int, looks_back: Array, copies: Array, start: Array | None, key: Array
) -> IdealInputs:
    """Everything that a head can be asked about.

    Args:
        weights: of the model, with W_E and W_U cut down to the n tokens to ask about.
        length: T.
        looks_back, copies: [L,H] in [0, 1], how much of a previous-token and of a duplicate-token head each head is.
        start: [D] embedding of the start token, or None.
        key: places the tokens of the mixed rows.
    """
    n_layers, n_heads = weights.W_Q.shape[:2]
    size = residual_size(weights, length)[:, None]
    mean_size = size.mean()
    tokens = token_inputs(weights, length)
    places = jnp.zeros((length, weights.W_E.shape[-1]))
    if weights.positions == "learned" and weights.W_P is not None:
        places = weights.W_P[:length] / size

    order_key, shift_key = jax.random.split(key)
    order = jax.random.permutation(order_key, len(tokens))[jnp.arange(length) % len(tokens)]
    content = tokens[order] if start is None else tokens[order].at[0].set(start / mean_size)
    rows = content + places
    moved = values(weights, rows)
    shifts = jax.random.randint(shift_key, (n_layers, n_heads), 0, length)
    moved = jax.vmap(jax.vmap(lambda x, by: jnp.roll(x, by, 0)))(moved, shifts)
    added = einsum("lhnk,lhkd->lnd", moved, weights.W_O)
    raw = rows * size + _of_earlier(weights, added)
    mixed = normalized(weights, raw)
    with_positions = mixed
    if weights.positions == "shortformer" and weights.W_P is not None:
        with_positions = mixed + weights.W_P[..., :length, :]
    return IdealInputs(
        tokens=tokens,
        positions=position_inputs(weights, length, start),
        places=places,
        sent=written(weights, tokens, looks_back) / mean_size,
        pointers=written(weights, places, copies) / mean_size,
        mixed=with_positions,
        mixed_values=mixed,
        raw_size=jnp.sqrt(jnp.square(added_to(weights, raw)).sum(-1).mean(-1)),
        embedded_size=mean_size,
    )
