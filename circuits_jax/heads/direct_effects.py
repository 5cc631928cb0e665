"""What heads say to the logits: direct logit attribution, and how much paths through more and more heads matter."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.heads.outcomes import Metric, check_metric, frozen_patterns, log_likelihood, run
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Edges, Replacement
from circuits_jax.models.transformer import Params, check_tokens
from circuits_jax.tasks.batch import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DirectAttribution:
    """What every node adds to J logits (or logit differences) itself, past all later layers; in logits.

    Attributes:
        embedding: [B,T,J].
        heads: [B,L,H,T,J].
        mlps: [B,L,T,J]; zeros in an attention-only model.
        bias: [B,T,J] what b_O, the bias of the final norm and b_U add.
    """

    embedding: Array
    heads: Array
    mlps: Array
    bias: Array

    def total(self) -> Array:
        """The sum over all nodes, [B,T,J]: the logits."""
        return self.embedding + self.heads.sum((1, 2)) + self.mlps.sum(1) + self.bias


def direct_logit_attribution(
    config: TransformerConfig, params: Params, tokens: ArrayLike, readout: ArrayLike
) -> DirectAttribution:
    """Splits logits by the node that wrote them: o W_U R / s, with the final norm's size s as it was in this run.

    The size counts as fixed, so the terms are linear in what was written, and they sum to the logits exactly: no term
    is found by subtraction. What a node writes for later layers to read is not in its own term.

    Args:
        config, params: the model.
        tokens: [B,T].
        readout: R [V,J] in the space of logits; a column +1 at the right token and -1 at the wrong one gives their
            difference.

    Raises:
        ValueError: bad tokens, a readout of another shape, or a model whose logits are no such sum: post-norm, or with
            a transform in front of the unembedding.
    """
    _check_linear(config)
    tokens, readout = check_tokens(config, tokens), jnp.asarray(readout)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B,T]; got {list(tokens.shape)}")
    if readout.ndim != 2 or readout.shape[0] != config.n_vocab:
        raise ValueError(f"readout must be [V,J] with V = {config.n_vocab}; got {list(readout.shape)}")
    return _direct(config, params, tokens, readout)


def _check_linear(config: TransformerConfig) -> None:
    """Raises ValueError for a model whose logits are no sum over what its nodes wrote, sizes of norms given."""
    if config.norm_position == "post" or config.unembed_transform:
        raise ValueError(
            "direct logit attribution needs logits that are a sum over nodes: norm_position 'pre' and no "
            f"unembed_transform; got norm_position={config.norm_position!r}, "
            f"unembed_transform={config.unembed_transform}. Use causal effects (ablate)"
        )


@partial(jax.jit, static_argnums=0)
def _direct(config: TransformerConfig, params: Params, tokens: Array, readout: Array) -> DirectAttribution:
    _, seen = run(config, params, Batch(tokens, jnp.ones(tokens.shape, bool), {}))
    unread = matmul(_unembedding(config, params), readout)
    directions, scale = _folded(config, params, unread), _over_size(config, seen.residual[:, -1])
    bias = jnp.zeros((*tokens.shape, readout.shape[1]))
    if config.norm == "layer":
        bias = bias + matmul(params["final_norm"]["bias"], unread)
    if config.bias:
        b_o = sum(params[f"layer_{layer}"]["attention"]["b_O"] for layer in range(config.n_layers))
        bias = bias + scale * matmul(b_o, directions) + matmul(params["b_U"], readout)
    return DirectAttribution(
        embedding=scale * matmul(seen.residual[:, 0], directions),
        heads=scale[:, None, None] * einsum("blhtd,dj->blhtj", seen.head_outputs, directions),
        mlps=scale[:, None] * matmul(seen.mlp_outputs, directions),
        bias=bias,
    )


def _unembedding(config: TransformerConfig, params: Params) -> Array:
    """W_U [D,V]."""
    w_u: Array = params["W_E"].T if config.tied else params["W_U"]
    return w_u


def _folded(config: TransformerConfig, params: Params, directions: Array) -> Array:
    """Directions [D,J] that W_U reads, with the gain of the final norm in them.

    LayerNorm centres what was written; that is linear, so it may as well be done to the directions.
    """
    if config.norm != "none":
        directions = params["final_norm"]["scale"][:, None] * directions
    return directions - directions.mean(0) if config.norm == "layer" else directions


def _over_size(config: TransformerConfig, final: Array) -> Array:
    """1 over the size by which the final norm divides the residual stream [...,D]: [...,1]."""
    if config.norm == "none":
        return jnp.ones((*final.shape[:-1], 1))
    if config.norm == "layer":
        final = final - final.mean(-1, keepdims=True)
    return jax.lax.rsqrt(jnp.square(final).mean(-1, keepdims=True) + config.norm_epsilon)


def direct_target_logits(config: TransformerConfig, params: Params, batch: Batch) -> Array:
    """What each head adds itself to the logit of the target, less the mean over the vocabulary, [L,H]; over batch.mask.

    Of direct_logit_attribution the part about the next token, averaged; positive for heads that vote for it.

    Raises:
        ValueError: as there, or an encoder, which sees the next token.
    """
    check_metric(config, log_likelihood)
    _check_linear(config)
    check_tokens(config, batch.tokens)
    return _direct_target_logits(config, params, batch)


@partial(jax.jit, static_argnums=0)
def _direct_target_logits(config: TransformerConfig, params: Params, batch: Batch) -> Array:
    _, seen = run(config, params, batch)
    directions = _folded(config, params, _unembedding(config, params))
    # One direction a position: all logits of all heads would take V times the memory.
    towards = (directions - directions.mean(-1, keepdims=True)).T[batch.tokens[:, 1:]]
    scale = _over_size(config, seen.residual[:, -1, :-1])
    terms = einsum("blhtd,btd->blht", seen.head_outputs[..., :-1, :], scale * towards)
    counts = batch.mask[:, None, None, :-1]
    return jnp.mean(terms, (0, 3), where=jnp.broadcast_to(counts, terms.shape))


def term_importance(config: TransformerConfig, params: Params, batch: Batch, metric: Metric = log_likelihood) -> Array:
    """The metric when only paths through at most n heads are left, n = 0..L, with the patterns frozen: [L+1].

    In run n a head's values are read from what was written in run n - 1, and in run 0 heads write nothing (Elhage et
    al. 2021, "term importance analysis"). The last entry is the metric of the model as it is; differences between
    neighbours are what paths of that length add, given the shorter ones. MLPs do not count as heads; they read what
    the heads in front of them write in the same run.

    Args:
        config, params: the model; with norms their sizes are those of each run.
        batch: B sequences.
        metric: see outcomes.Metric; one number.

    Raises:
        ValueError: bad tokens, a metric of next tokens for an encoder, or a post-norm model.
    """
    check_tokens(config, batch.tokens)
    check_metric(config, metric)
    return _term_importance(config, metric, params, batch)


@partial(jax.jit, static_argnums=(0, 1))
def _term_importance(config: TransformerConfig, metric: Metric, params: Params, batch: Batch) -> Array:
    _, whole = run(config, params, batch)
    frozen = frozen_patterns(whole)
    silent = Replacement(jnp.zeros_like(whole.head_outputs[0]), jnp.ones(whole.head_outputs.shape[1:4]))
    logits, seen = run(config, params, batch, dataclasses.replace(frozen, head_outputs=silent))
    values = [metric(logits, seen, batch)]
    # The embedding is the same in all runs, so values may be read from the run before in full.
    cut = Edges(v=jnp.asarray(graph.full(config, 0.0).v))
    for _ in range(config.n_layers):
        before = dataclasses.replace(frozen, edges=cut, edge_outputs=graph.outputs(config, seen))
        logits, seen = run(config, params, batch, before)
        values.append(metric(logits, seen, batch))
    return jnp.stack(values)
