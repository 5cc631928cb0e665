"""The transformer that is studied, and what a forward pass saw.

Shape glossary, used in every docstring and einsum of the project:

    S run (seed)   B batch    T position (t query, s key)   V vocabulary   D d_model   G key/value head
    L layer        H head     K d_head                      M d_mlp        R rank

Row vectors: a residual is x in R^{1xD}, W_QK = W_Q W_K^T and W_OV = W_V W_O (science.md, Conventions).
In the column convention of Elhage et al. 2021 these are W_Q^T W_K and W_O W_V.
"""

import dataclasses
import math
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, Interventions, batch_axes, check
from circuits_jax.models.position_wise import MLP, Normalize, UnembedTransform, initializer, unit_rms
from circuits_jax.models.residual import Read, Senders, change_residual, plus, read_through, replaced, times
from circuits_jax.models.rotary import rotate

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """What one forward pass saw. A field that the caller does not use costs nothing under jit.

    Attributes:
        residual: [L+1,T,D] residual stream before each layer (and its norm), then after the last one (before the
            final norm). With norm_position "post" a layer replaces it by the normed one, and adds to that.
        scores: [L,H,T,T] q k^T / sqrt(K), and what interventions add to it, before the causal mask; query first.
        patterns: [L,H,T,T] attention probabilities; rows sum to 1, and in a causal model are zero above the diagonal.
        head_outputs: [L,H,T,D] what each head adds to the residual stream, b_O left out;
            their sum over H, plus b_O, is attention_outputs.
        attention_outputs: [L,T,D] what each attention layer adds to the residual stream.
        mlp_outputs: [L,T,D] what each MLP adds; zeros in an attention-only model.

    Batched input puts B in front of every field.
    """

    residual: Array
    scores: Array
    patterns: Array
    head_outputs: Array
    attention_outputs: Array
    mlp_outputs: Array


def repeat_groups(x: Array, n_heads: int, axis: int = 0) -> Array:
    """[...,G,...] -> [...,H,...]: query head h gets the entry of its key/value head h // (H/G); x itself if G = H."""
    n_groups = x.shape[axis]
    return x if n_groups == n_heads else jnp.repeat(x, n_heads // n_groups, axis)


def project(read: Read, weights: Array, n_heads: int) -> Array:
    """What all heads read, times their weights [G,D,K]: [H,T,K].

    What they share is one product, 1.6x faster on CPU than an einsum over heads. Its weights are [GK,D]: their gradient
    is then a plain product too, which XLA's CPU backend runs faster than the transposed one of [D,GK].
    """
    shared, own = read
    g, d, k = weights.shape
    flat = weights.transpose(0, 2, 1).reshape(g * k, d)
    projected = repeat_groups(jnp.einsum("td,nd->tn", shared, flat).reshape(-1, g, k).transpose(1, 0, 2), n_heads)
    return projected if own is None else projected + jnp.einsum("htd,hdk->htk", own, repeat_groups(weights, n_heads))


def attend(scores: Array, causal: bool) -> Array:
    """Softmax of scores [...,T,T] over the keys that a query can see: all, or none after itself."""
    length = scores.shape[-1]
    return jax.nn.softmax(scores, axis=-1, where=jnp.tril(jnp.ones((length, length), bool)) if causal else None)


class Attention(nn.Module):
    """All heads of one layer on normed inputs: pattern softmax(q k^T / sqrt(K)) v W_O."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, read_q: Read, read_k: Read, read_v: Read, interventions: Interventions
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """-> output [T,D], (scores [H,T,T], pattern [H,T,T], head outputs [H,T,D]); interventions on this layer."""
        config = self.config
        n_heads, n_groups, d_head, d_model = config.n_heads, config.n_groups, config.d_head, config.d_model
        read = initializer(config, fan_in=d_model)
        w_q = self.param("W_Q", read, (n_heads, d_model, d_head))
        w_k, w_v = (self.param(name, read, (n_groups, d_model, d_head)) for name in ("W_K", "W_V"))
        w_o = self.param("W_O", initializer(config, fan_in=n_heads * d_head), (n_heads, d_head, d_model))

        q, k, v = (project(x, w, n_heads) for x, w in ((read_q, w_q), (read_k, w_k), (read_v, w_v)))
        if config.bias:
            zeros = nn.initializers.zeros
            q = q + self.param("b_Q", zeros, (n_heads, d_head))[:, None]
            k = k + repeat_groups(self.param("b_K", zeros, (n_groups, d_head)), n_heads)[:, None]
            v = v + repeat_groups(self.param("b_V", zeros, (n_groups, d_head)), n_heads)[:, None]
        if config.qk_norm:
            q, k = (
                unit_rms(x, config.norm_epsilon) * self.param(name, nn.initializers.ones, (d_head,))
                for x, name in ((q, "q_gain"), (k, "k_gain"))
            )
        length = q.shape[1]
        if config.positions == "rotary":
            q, k = (rotate(x, jnp.arange(length), config.rotary) for x in (q, k))

        # Not q @ k.T: XLA would lay a changed k out in another way, and round otherwise.
        scores = jnp.einsum("htk,hsk->hts", q, k) / math.sqrt(d_head)
        if interventions.scores_added is not None:
            scores = scores + interventions.scores_added
        pattern = replaced(attend(scores, config.causal), interventions.patterns)
        z = pattern @ v
        if interventions.head_scale is not None:
            z = z * interventions.head_scale[:, None, None]
        written = jnp.einsum("htk,hkd->htd", z, w_o)
        head_outputs = replaced(written, interventions.head_outputs)
        output = jnp.einsum("htk,hkd->td", z, w_o)
        if interventions.head_outputs is not None:
            output = output + (head_outputs - written).sum(0)
        if config.bias:
            output = output + self.param("b_O", nn.initializers.zeros, (d_model,))
        return output, (scores, pattern, head_outputs)


class Block(nn.Module):
    """One layer: every head reads the residual stream and writes to it, then the MLP does, if there is one."""

    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array | float,
        senders: Senders,
        interventions: Interventions,
        done: Activations | None,
    ) -> tuple[Array, tuple[Array, ...], Senders]:
        """The residual stream x [T,D] after the layer, the layer's fields of Activations after the first, the senders.

        Args:
            x: [T,D].
            positions: [T,D], added to what q and k read.
            senders: everything that was written before the layer.
            interventions: on the whole model.
            done: what the heads of this layer do, without L, or None to compute it.
        """
        config, layer, here = self.config, self.layer, interventions.at_layer(self.layer)
        edges = interventions.edges or Edges()
        norm = Normalize(config.norm, config.norm_epsilon, name="attention_norm")
        before, senders_before = x, senders
        if done is None:
            (shared, q), (_, k), (_, v) = (
                read_through(norm, x, plus(senders.read(x, into, layer), added))
                for into, added in ((edges.q, here.q_added), (edges.k, here.k_added), (edges.v, here.v_added))
            )
            attention = Attention(config, name="attention")
            output, (scores, pattern, head_outputs) = attention(
                (shared + positions, q), (shared + positions, k), (shared, v), here
            )
        else:
            output, scores, pattern, head_outputs = (
                done.attention_outputs, done.scores, done.patterns, done.head_outputs,
            )  # fmt: skip
        post = config.norm_position == "post"
        x, senders = (norm(x) if post else x) + output, senders.followed_by(head_outputs)
        mlp_output = jnp.zeros_like(x)
        if config.d_mlp:
            norm = Normalize(config.norm, config.norm_epsilon, name="mlp_norm")
            stream, known = (before, senders_before) if config.parallel else (x, senders)
            read = read_through(norm, stream, known.read(stream, edges.mlp, layer))
            mlp_output = replaced(MLP(config, name="mlp")(read), here.mlp_outputs)
            x, senders = (norm(x) if post else x) + mlp_output, senders.followed_by(mlp_output[None])
        return x, (scores, pattern, head_outputs, output, mlp_output), senders


class Transformer(nn.Module):
    """One sequence of T tokens -> logits [T,V] and Activations; batches and runs come from vmap at the call site.

    Parameters: W_E [V,D], W_P [n_context,D], W_S [n_segments,D], layer_0.../{attention_norm, attention, mlp_norm, mlp},
    final_norm, unembed_transform, W_U [D,V], b_U [V]; those that the configuration does not use are absent.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens: Array, interventions: Interventions, start: Activations | None, n_done: int
    ) -> tuple[Array, Activations]:
        """Tokens [T] -> logits [T,V], Activations; start and n_done as in apply."""
        config = self.config
        embed = initializer(config, fan_in=config.d_model)
        w_e = self.param("W_E", embed, (config.n_vocab, config.d_model))
        # Under jit a token cannot be checked: one out of range becomes NaN logits, never another token.
        x = config.embedding_scale * jnp.asarray(w_e).at[tokens].get(mode="fill", wrap_negative_indices=False)
        positions: Array | float = 0.0
        if config.positions in ("learned", "shortformer"):
            positions = self.param("W_P", embed, (config.n_context, config.d_model))[: len(tokens)]
        if config.positions == "learned":
            x, positions = x + positions, 0.0
        if config.n_segments:
            x = x + self.param("W_S", embed, (config.n_segments, config.d_model))[0]

        senders = Senders((), interventions.edge_outputs).followed_by(x[None])
        x, senders = change_residual(x, senders, interventions, 0)
        residual, seen = [x], []
        for layer in range(config.n_layers):
            block = Block(config, layer, name=f"layer_{layer}")
            done = None if start is None or layer >= n_done else jax.tree.map(lambda a, at=layer: a[at], start)
            x, of_layer, senders = block(x, positions, senders, interventions, done)
            seen.append(of_layer)
            x, senders = change_residual(x, senders, interventions, layer + 1)
            residual.append(x)

        changed = senders.read(x, None if interventions.edges is None else interventions.edges.logits)
        read = read_through(Normalize(config.norm, config.norm_epsilon, name="final_norm"), x, changed)
        if config.unembed_transform:
            transform = UnembedTransform(config, name="unembed_transform")
            read = read_through(transform, read[0], read[0] if read[1] is None else read[0] + read[1])
        w_u = w_e.T if config.tied else self.param("W_U", embed, (config.d_model, config.n_vocab))
        logits = times(read, w_u)
        if config.bias:
            logits = logits + self.param("b_U", nn.initializers.zeros, (config.n_vocab,))
        return logits, Activations(jnp.stack(residual), *(jnp.stack(field) for field in zip(*seen, strict=True)))


def init_params(config: TransformerConfig, key: Array) -> Params:
    """Random parameters as a plain dict; vmap over keys for many seeds."""
    return Transformer(config).init(key, jnp.zeros(1, jnp.int32), Interventions(), None, 0)["params"]


def forward(
    config: TransformerConfig, params: Params, tokens: ArrayLike, interventions: Interventions | None = None
) -> tuple[Array, Activations]:
    """Logits and Activations of one sequence [T] or a batch [B,T]; jit, vmap and grad go through it.

    Args:
        config: the model.
        params: what init_params returned for this config.
        tokens: integers in [0, V), T at most n_context.
        interventions: what to change on the way, the same in all sequences or one for each (B in front of an array);
            None changes nothing and costs nothing.

    Returns:
        Logits [T,V] and Activations, with B in front for a batch.

    Raises:
        ValueError: wrong rank, dtype or length, a token out of the vocabulary, or an intervention of another shape.
            Traced tokens (under jit or vmap) cannot be checked for their values: there a token out of range makes the
            logits of its sequence NaN.
    """
    tokens = check_tokens(config, tokens)
    return _forward(config, params, tokens, interventions)


@partial(jax.jit, static_argnums=0)
def _forward(
    config: TransformerConfig, params: Params, tokens: Array, interventions: Interventions | None
) -> tuple[Array, Activations]:
    if tokens.ndim == 1:
        return apply(config, params, tokens, interventions)
    return apply_batch(config, params, tokens, interventions or Interventions())


def segment_inputs(params: Params, segments: ArrayLike) -> Array:
    """What makes tokens of segment 0 tokens of these segments [...,T]: [...,T,D], Batch.inputs of a model with W_S.

    Raises:
        ValueError: the model has no segments, or not so many.
    """
    if "W_S" not in params:
        raise ValueError("segments need a model with segment embeddings (n_segments)")
    segments, w_s = np.asarray(segments), params["W_S"]
    if not np.issubdtype(segments.dtype, np.integer) or segments.min() < 0 or segments.max() >= len(w_s):
        raise ValueError(f"segments must be integers in [0, n_segments={len(w_s)}); got {segments.dtype} {segments}")
    return w_s[segments] - w_s[0]


def apply(
    config: TransformerConfig,
    params: Params,
    tokens: Array,
    interventions: Interventions | None = None,
    start: Activations | None = None,
    n_done: int = 0,
) -> tuple[Array, Activations]:
    """forward for one sequence [T], tokens unchecked and not jitted: the building block of other compiled programs.

    Args:
        config, params, tokens, interventions: as in forward.
        start: what an earlier run of the same tokens saw.
        n_done: in how many layers the heads do what they did in start, whatever the interventions. Under vmap over
            interventions these layers are not repeated, as far as nothing in front of them changes.
    """
    interventions = interventions or Interventions()
    check(config, interventions, len(tokens))
    done = Transformer(config).apply({"params": params}, tokens, interventions, start, n_done)
    # Linen's apply is typed for modules that also return updated variables.
    return cast(tuple[Array, Activations], done)


def apply_batch(
    config: TransformerConfig,
    params: Params,
    tokens: Array,
    interventions: Interventions,
    start: Activations | None = None,
    n_done: int = 0,
) -> tuple[Array, Activations]:
    """apply for sequences [B,T]; arrays of the interventions may have B in front, those of start do."""
    axes = batch_axes(config, interventions, tokens.shape[1], len(tokens))

    def one(sequence: Array, interventions: Interventions, start: Activations | None) -> tuple[Array, Activations]:
        return apply(config, params, sequence, interventions, start, n_done)

    return jax.vmap(one, (0, axes, 0))(tokens, interventions, start)


def check_tokens(config: TransformerConfig, tokens: ArrayLike) -> Array:
    """Tokens as a jax array, or a ValueError that says what is wrong with them."""
    array = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if array.ndim not in (1, 2) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [T] or [B,T]; got {array.dtype} {list(array.shape)}")
    if not 1 <= array.shape[-1] <= config.n_context:
        raise ValueError(f"tokens must hold 1 to n_context={config.n_context} positions; got {array.shape[-1]}")
    if not isinstance(array, jax.core.Tracer) and array.size:
        values = np.asarray(array)
        if values.min() < 0 or values.max() >= config.n_vocab:
            raise ValueError(
                f"tokens must be in [0, n_vocab={config.n_vocab}); got values from {values.min()} to {values.max()}"
            )
    return jnp.asarray(array)
