"""The decoder-only transformer that is studied, and what a forward pass saw.

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

from circuits_jax.models.config import Norm, TransformerConfig
from circuits_jax.models.interventions import Interventions
from circuits_jax.models.rotary import rotate

Params = dict[str, Any]

NORM_EPSILON = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """What one forward pass saw. A field that the caller does not use costs nothing under jit.

    Attributes:
        residual: [L+1,T,D] residual stream before each layer, then after the last one (before the final norm).
        scores: [L,H,T,T] q k^T / sqrt(K) before the causal mask, query position first.
        patterns: [L,H,T,T] attention probabilities; zero above the diagonal, rows sum to 1.
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


class Normalize(nn.Module):
    """LayerNorm or RMSNorm with gain (LayerNorm also with bias); the identity for "none"."""

    kind: Norm

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[...,D] -> [...,D]."""
        if self.kind == "none":
            return x
        d_model = x.shape[-1]
        if self.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + NORM_EPSILON)
        x = x * self.param("scale", nn.initializers.ones, (d_model,))
        return x + self.param("bias", nn.initializers.zeros, (d_model,)) if self.kind == "layer" else x


def repeat_groups(x: Array, n_heads: int, axis: int = 0) -> Array:
    """[...,G,...] -> [...,H,...]: query head h gets the entry of its key/value head h // (H/G); x itself if G = H."""
    n_groups = x.shape[axis]
    return x if n_groups == n_heads else jnp.repeat(x, n_heads // n_groups, axis)


def project(x: Array, weights: Array, n_heads: int) -> Array:
    """x W for all heads: [T,D] shared or [H,T,D] per-head inputs, weights [G,D,K] -> [H,T,K].

    A shared input is one [T,D] x [D,GK] product, 1.6x faster on CPU than an einsum over heads.
    """
    if x.ndim == 3:
        return jnp.einsum("htd,hdk->htk", x, repeat_groups(weights, n_heads))
    g, d, k = weights.shape
    flat = weights.transpose(1, 0, 2).reshape(d, g * k)
    return repeat_groups((x @ flat).reshape(-1, g, k).transpose(1, 0, 2), n_heads)


class Attention(nn.Module):
    """All heads of one layer on normed inputs, each [T,D] or [H,T,D]: pattern softmax(q k^T / sqrt(K)) v W_O."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x_q: Array, x_k: Array, x_v: Array, head_scale: Array | None
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """-> output [T,D], (scores [H,T,T], pattern [H,T,T], head outputs [H,T,D]); head_scale [H] scales z."""
        config = self.config
        n_heads, n_groups, d_head, d_model = config.n_heads, config.n_groups, config.d_head, config.d_model
        read = _initializer(config, fan_in=d_model)
        w_q = self.param("W_Q", read, (n_heads, d_model, d_head))
        w_k, w_v = (self.param(name, read, (n_groups, d_model, d_head)) for name in ("W_K", "W_V"))
        w_o = self.param("W_O", _initializer(config, fan_in=n_heads * d_head), (n_heads, d_head, d_model))

        q, k, v = (project(x, w, n_heads) for x, w in ((x_q, w_q), (x_k, w_k), (x_v, w_v)))
        if config.bias:
            zeros = nn.initializers.zeros
            q = q + self.param("b_Q", zeros, (n_heads, d_head))[:, None]
            k = k + repeat_groups(self.param("b_K", zeros, (n_groups, d_head)), n_heads)[:, None]
            v = v + repeat_groups(self.param("b_V", zeros, (n_groups, d_head)), n_heads)[:, None]
        length = q.shape[1]
        if config.positions == "rotary":
            q, k = (rotate(x, jnp.arange(length), config.rotary) for x in (q, k))

        scores = q @ k.transpose(0, 2, 1) / math.sqrt(d_head)
        causal = jnp.tril(jnp.ones((length, length), bool))
        pattern = jax.nn.softmax(scores, axis=-1, where=causal)
        z = pattern @ v
        if head_scale is not None:
            z = z * head_scale[:, None, None]
        head_outputs = jnp.einsum("htk,hkd->htd", z, w_o)
        output = z.transpose(1, 0, 2).reshape(length, -1) @ w_o.reshape(-1, d_model)
        if config.bias:
            output = output + self.param("b_O", nn.initializers.zeros, (d_model,))
        return output, (scores, pattern, head_outputs)


class MLP(nn.Module):
    """GELU(x W_in + b_in) W_out + b_out, GELU in its tanh form."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[T,D] -> [T,D]."""
        config = self.config
        d_model, d_mlp = config.d_model, config.d_mlp
        hidden = x @ self.param("W_in", _initializer(config, fan_in=d_model), (d_model, d_mlp))
        if config.bias:
            hidden = hidden + self.param("b_in", nn.initializers.zeros, (d_mlp,))
        output = nn.gelu(hidden) @ self.param("W_out", _initializer(config, fan_in=d_mlp), (d_mlp, d_model))
        return output + self.param("b_out", nn.initializers.zeros, (d_model,)) if config.bias else output


class Block(nn.Module):
    """One layer: every head reads the residual stream and writes to it, then the MLP does, if there is one."""

    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(
        self, x: Array, positions: Array | float, senders: list[Array], interventions: Interventions
    ) -> tuple[Array, tuple[Array, ...]]:
        """The residual stream x [T,D] after the layer, and the layer's fields of Activations after the first.

        Args:
            x: [T,D].
            positions: [T,D], added to what q and k read.
            senders: head outputs [H,T,D] of every earlier layer.
            interventions: on the whole model.
        """
        norm = Normalize(self.config.norm, name="attention_norm")
        edges = (interventions.q_edges, interventions.k_edges, interventions.v_edges)
        read_q, read_k, read_v = (norm(read_through(x, senders, scale, self.layer)) for scale in edges)
        scale = None if interventions.head_scale is None else interventions.head_scale[self.layer]
        attention = Attention(self.config, name="attention")
        output, seen = attention(read_q + positions, read_k + positions, read_v, scale)
        x = x + output
        mlp_output = jnp.zeros_like(x)
        if self.config.d_mlp:
            mlp_output = MLP(self.config, name="mlp")(Normalize(self.config.norm, name="mlp_norm")(x))
        return x + mlp_output, (*seen, output, mlp_output)


class Transformer(nn.Module):
    """One sequence of T tokens -> logits [T,V] and Activations; batches and runs come from vmap at the call site.

    Parameters: W_E [V,D], W_P [n_context,D], layer_0.../{attention_norm, attention, mlp_norm, mlp}, final_norm,
    W_U [D,V], b_U [V]; those that the configuration does not use are absent.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: Array, interventions: Interventions | None = None) -> tuple[Array, Activations]:
        """Tokens [T] -> logits [T,V], Activations."""
        config = self.config
        embed = _initializer(config, fan_in=config.d_model)
        w_e = self.param("W_E", embed, (config.n_vocab, config.d_model))
        # Under jit a token cannot be checked: one out of range becomes NaN logits, never another token.
        x = config.embedding_scale * w_e.at[tokens].get(mode="fill", wrap_negative_indices=False)
        positions: Array | float = 0.0
        if config.positions in ("learned", "shortformer"):
            positions = self.param("W_P", embed, (config.n_context, config.d_model))[: len(tokens)]
        if config.positions == "learned":
            x, positions = x + positions, 0.0

        residual = [x]
        seen: list[tuple[Array, ...]] = []
        senders: list[Array] = []
        for layer in range(config.n_layers):
            block = Block(config, layer, name=f"layer_{layer}")
            x, (scores, pattern, head_outputs, *outputs) = block(
                x, positions, senders, interventions or Interventions()
            )
            residual.append(x)
            seen.append((scores, pattern, head_outputs, *outputs))
            senders.append(head_outputs)

        final = Normalize(config.norm, name="final_norm")(x)
        w_u = w_e.T if config.tied else self.param("W_U", embed, (config.d_model, config.n_vocab))
        logits = final @ w_u
        if config.bias:
            logits = logits + self.param("b_U", nn.initializers.zeros, (config.n_vocab,))
        return logits, Activations(jnp.stack(residual), *(jnp.stack(field) for field in zip(*seen, strict=True)))


def read_through(x: Array, senders: list[Array], edges: Array | None, layer: int) -> Array:
    """What each head of a layer reads when the edges into it are scaled: x_h = x - sum_a (1 - e_ah) o_a.

    Args:
        x: [T,D] residual stream in front of the layer.
        senders: head outputs o [H,T,D] of every earlier layer.
        edges: e [L,H,L,H], sender then receiver, 1 keeps and 0 cuts; None means all kept.
        layer: the receiving layer.

    Returns:
        [H,T,D], or x itself when nothing can be cut.
    """
    if edges is None or not senders:
        return x
    return x - jnp.einsum("latd,lah->htd", jnp.stack(senders), 1.0 - edges[:layer, :, layer])


def _initializer(config: TransformerConfig, fan_in: int) -> nn.initializers.Initializer:
    return nn.initializers.normal(config.init_std or 1.0 / math.sqrt(fan_in))


def init_params(config: TransformerConfig, key: Array) -> Params:
    """Random parameters as a plain dict; vmap over keys for many seeds."""
    return Transformer(config).init(key, jnp.zeros(1, jnp.int32))["params"]


def forward(
    config: TransformerConfig, params: Params, tokens: ArrayLike, interventions: Interventions | None = None
) -> tuple[Array, Activations]:
    """Logits and Activations of one sequence [T] or a batch [B,T]; jit, vmap and grad go through it.

    Args:
        config: the model.
        params: what init_params returned for this config.
        tokens: integers in [0, V), T at most n_context.
        interventions: what to change on the way; None changes nothing and costs nothing.

    Returns:
        Logits [T,V] and Activations, with B in front for a batch.

    Raises:
        ValueError: wrong rank, dtype or length, or a token out of the vocabulary. Traced tokens (under jit or vmap)
            cannot be checked for their values: there a token out of range makes the logits of its sequence NaN.
    """
    tokens = check_tokens(config, tokens)
    return _forward(config, params, tokens, interventions)


@partial(jax.jit, static_argnums=0)
def _forward(
    config: TransformerConfig, params: Params, tokens: Array, interventions: Interventions | None
) -> tuple[Array, Activations]:
    def of_sequence(sequence: Array) -> tuple[Array, Activations]:
        return apply(config, params, sequence, interventions)

    return jax.vmap(of_sequence)(tokens) if tokens.ndim == 2 else of_sequence(tokens)


def apply(
    config: TransformerConfig, params: Params, tokens: Array, interventions: Interventions | None = None
) -> tuple[Array, Activations]:
    """forward for one sequence [T], tokens unchecked and not jitted: the building block of other compiled programs."""
    if interventions is not None:
        check_interventions(config, interventions)
    # Linen's apply is typed for modules that also return updated variables.
    return cast(tuple[Array, Activations], Transformer(config).apply({"params": params}, tokens, interventions))


def check_interventions(config: TransformerConfig, interventions: Interventions) -> None:
    """Raises ValueError that names the first array of another shape than the model's."""
    heads = (config.n_layers, config.n_heads)
    for name, value in vars(interventions).items():
        wanted = heads if name == "head_scale" else heads * 2
        if value is not None and jnp.shape(value) != wanted:
            raise ValueError(f"{name} must have shape {list(wanted)}; got {list(jnp.shape(value))}")


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
