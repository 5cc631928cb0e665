"""Path expansion: the logits of an attention-only model as a sum over the paths from a token through heads to a logit.

With its attention patterns frozen, a model without norms and MLPs is linear in the embedded tokens, so that its
logits are a sum over paths (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). A path picks at
most one head in each layer; it carries x_s W_OV^a W_OV^b ... W_U, weighted by the product of the patterns. Here x_s is
the residual in front of the first layer: W_E[token_s], and W_P[s] with "learned" positions (others enter q and k only).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.attention import ov, ov_bias
from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights, check_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PathTerms:
    """What every kind of path adds to J logits (or directions) at every position t; all in units of a logit.

    Attributes:
        direct: [T,J] x_t W_U, past every head.
        one_head: [L,H,T,J] sum_s A^a_ts x_s W_OV^a W_U, A^a [T,T] being the pattern of head a.
        two_heads: [L,H,L,H,T,J] sum_s (A^b A^a)_ts x_s W_OV^a W_OV^b W_U, the first head a in front: the virtual heads
            of V-composition. 0 where a is not in an earlier layer than b.
        longer: [T,J] all paths through three or more heads; 0 with one or two layers.
        bias: [T,J] what b_V, b_O and b_U add, whatever the tokens; through later heads too.
    """

    direct: Array
    one_head: Array
    two_heads: Array
    longer: Array
    bias: Array

    def total(self) -> Array:
        """The sum over all paths, [T,J]: the logits."""
        heads = self.one_head.sum((0, 1)) + self.two_heads.sum((0, 1, 2, 3))
        return self.direct + heads + self.longer + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenAttribution:
    """The terms of PathTerms split by the position s where a path starts; exactly 0 for s after t in a causal model.

    Attributes:
        direct: [T,S,J], 0 off the diagonal.
        one_head: [L,H,T,S,J].
        two_heads: [L,H,L,H,T,S,J], the first head in front; 0 where it is not in an earlier layer.
        longer: [T,S,J].

    The bias term starts at no token and is not part of it.
    """

    direct: Array
    one_head: Array
    two_heads: Array
    longer: Array

    def total(self) -> Array:
        """What the token at s adds to the logits at t over all paths, [T,S,J]; + PathTerms.bias = logits over S."""
        return self.direct + self.one_head.sum((0, 1)) + self.two_heads.sum((0, 1, 2, 3)) + self.longer


def path_expansion(
    weights: CircuitWeights, tokens: ArrayLike, patterns: ArrayLike, readout: ArrayLike | None = None
) -> PathTerms:
    """The logits of one sequence as a sum over paths, with the attention patterns held fixed.

        logits_t = x_t W_U + sum_a sum_s A^a_ts x_s W_OV^a W_U
                   + sum_{a before b} sum_s (A^b A^a)_ts x_s W_OV^a W_OV^b W_U + ... + bias

    No term is found by subtraction, so that total() == logits is a check of the whole. The patterns are used as they
    are, also when their rows do not sum to 1 (a row of zeros switches a head off).

    Memory is that of two_heads, (LH)^2 T J floats: for a large vocabulary give a few directions as the readout.

    Args:
        weights: of an attention-only model without norms. CircuitWeights holds no MLPs: of a model that has them,
            the terms leave out every path through an MLP, and do not sum to its logits; nor do they where a transform
            stands in front of the unembedding.
        tokens: [T] integers; one out of the vocabulary makes its terms NaN.
        patterns: [L,H,T,T], query first: Activations.patterns of the same tokens. For a batch, vmap.
        readout: [D,J] directions in the residual stream, for example W_U[:, [right]] - W_U[:, [wrong]] for one logit
            difference; W_U by default (J = V). b_U is in the bias term with the default readout only.

    Returns:
        PathTerms, in logits.

    Raises:
        ValueError: the model has norms, or an argument has another shape.

    What it establishes: what each OV path moves to the logits, given where the heads look. Not why they look there
    (the QK side), nor what happens when a token is changed, which moves the patterns too.

    Reference: Elhage et al. 2021, transformer-circuits.pub/2021/framework.
    """
    x, patterns, directions = _check(weights, tokens, patterns, weights.W_U if readout is None else readout)
    circuits = ov(weights)
    read = _read_out(circuits, directions)
    written = _attend(x, patterns, circuits)  # [L,H,T,D]
    two_heads = _attend(written[:, :, None, None], patterns, read)
    bias = matmul(_through_biases(weights, x, patterns), directions)
    return PathTerms(
        direct=matmul(x, directions),
        one_head=_attend(x, patterns, read),
        two_heads=_where_earlier(two_heads),
        longer=matmul(_through_three_or_more(circuits, x, patterns), directions),
        bias=bias + weights.b_U if readout is None and weights.b_U is not None else bias,
    )


def token_attribution(
    weights: CircuitWeights, tokens: ArrayLike, patterns: ArrayLike, readout: ArrayLike
) -> TokenAttribution:
    """path_expansion split by the token that a path starts at: which earlier token moved a logit, through which heads.

        one head: A^a_ts x_s W_OV^a R      two heads: (A^b A^a)_ts x_s W_OV^a W_OV^b R      with the readout R [D,J]

    Summed over S every term is that of path_expansion with the same readout; the bias term has no token.

    Memory is (LH)^2 T T J floats, and a few T T D more with three layers or more: meant for a few directions J.

    Args, errors and what it establishes are those of path_expansion; the readout has to be given.
    """
    x, patterns, directions = _check(weights, tokens, patterns, readout)
    circuits = ov(weights)
    read = _read_out(circuits, directions)
    moved = matmul(matmul(x, circuits.left), circuits.right)  # x_s W_OV, [L,H,S,D]
    flow = einsum("mgtu,lhus->lhmgts", patterns, patterns)
    virtual = matmul(matmul(moved[:, :, None, None], read.left), read.right)  # x_s W_OV^a W_OV^b R, [L,H,L,H,S,J]
    same = jnp.eye(len(x), dtype=x.dtype)[..., None]
    longer = jax.vmap(lambda source: _through_three_or_more(circuits, source, patterns), out_axes=1)(same * x)
    return TokenAttribution(
        direct=same * matmul(x, directions),
        one_head=patterns[..., None] * matmul(moved, directions)[..., None, :, :],
        two_heads=_where_earlier(flow[..., None] * virtual[..., None, :, :]),
        longer=matmul(longer, directions),
    )


def _attend(x: Array, patterns: Array, circuit: LowRank) -> Array:
    """Pattern x W of every head: x [...,T,D], patterns [...,T,T], W [...,D,N] -> [...,T,N]."""
    return matmul(matmul(patterns, matmul(x, circuit.left)), circuit.right)


def _layer(x: Array, patterns: Array, circuits: LowRank) -> Array:
    """The sum of pattern x W_OV over the heads of a layer: x [T,D], patterns [H,T,T], W_OV [H,D,D] -> [T,D]."""
    return einsum("htk,hkd->td", matmul(patterns, matmul(x, circuits.left)), circuits.right)


def _read_out(circuits: LowRank, directions: Array) -> LowRank:
    """W_OV R of every head, [L,H,D,J], at rank min(K,J): what a pair of heads holds per position is never wider."""
    right = matmul(circuits.right, directions)
    n_directions = directions.shape[1]
    if right.shape[-2] <= n_directions:
        return LowRank(circuits.left, right)
    return LowRank(matmul(circuits.left, right), jnp.eye(n_directions, dtype=right.dtype))


def _where_earlier(two_heads: Array) -> Array:
    """two_heads [L,H,L,H,...] with 0 where the first head is not in an earlier layer than the second."""
    layer = jnp.arange(len(two_heads))
    earlier = layer[:, None, None, None] < layer[:, None]
    return jnp.where(earlier.reshape(earlier.shape + (1,) * (two_heads.ndim - 4)), two_heads, 0.0)


def _through_three_or_more(circuits: LowRank, x: Array, patterns: Array) -> Array:
    """What x [T,D] writes through three heads or more, [T,D]: layer by layer, so that no path is listed."""
    one = two = more = jnp.zeros_like(x)
    if len(patterns) < 3:
        return more
    for layer in range(len(patterns)):
        into_one, into_two, into_more = (
            _layer(part, patterns[layer], circuits[layer]) for part in (x, one, two + more)
        )
        one, two, more = one + into_one, two + into_two, more + into_more
    return more


def _through_biases(weights: CircuitWeights, x: Array, patterns: Array) -> Array:
    """What the biases put into the residual stream, [T,D]; x [T,D] only tells shape and type.

    A head adds b_V W_O times the sum of its pattern's row (1 unless edited), and passes on what earlier biases wrote.
    """
    circuits, constants, bias = ov(weights), ov_bias(weights), jnp.zeros_like(x)
    for layer in range(len(patterns)):
        passed_on = _layer(bias, patterns[layer], circuits[layer])
        bias += passed_on + matmul(patterns[layer].sum(-1).T, constants[layer])
        if weights.b_O is not None:
            bias += weights.b_O[layer]
    return bias


def _check(
    weights: CircuitWeights, tokens: ArrayLike, patterns: ArrayLike, readout: ArrayLike
) -> tuple[Array, Array, Array]:
    """The embedded tokens x [T,D], patterns and readout as arrays, or a ValueError that says what is wrong."""
    if weights.norm != "none":
        raise ValueError(
            "paths need norm='none': a norm divides by the size of the whole residual, so the logits are no sum over "
            f"paths; got norm={weights.norm!r}. Use a model without norms, or causal effects (ablate_heads, cut_edges)"
        )
    check_positions(weights)
    tokens, patterns, readout = jnp.asarray(tokens), jnp.asarray(patterns), jnp.asarray(readout)
    if tokens.ndim != 1 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers [T], one sequence; got {tokens.dtype} {list(tokens.shape)}. For a batch use vmap"
        )
    length, (n_layers, n_heads, _, d_model) = len(tokens), weights.W_O.shape
    if patterns.shape != (n_layers, n_heads, length, length):
        raise ValueError(
            f"patterns must be [L,H,T,T] = {[n_layers, n_heads, length, length]}; got {list(patterns.shape)}"
        )
    if readout.ndim != 2 or readout.shape[0] != d_model:
        raise ValueError(f"readout must be [D,J] with D = {d_model}; got {list(readout.shape)}")
    # As in the model: a token out of range becomes NaN, never another token.
    x = jnp.asarray(weights.W_E).at[tokens].get(mode="fill", wrap_negative_indices=False)
    if weights.positions == "learned" and weights.W_P is not None:
        if length > len(weights.W_P):
            raise ValueError(f"tokens must hold at most {len(weights.W_P)} positions, those of W_P; got {length}")
        x = x + weights.W_P[:length]
    return x, patterns, readout
