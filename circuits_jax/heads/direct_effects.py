"""What heads say to the logits: direct logit attribution, and how much paths through more and more heads matter."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.heads.outcomes import Metric, frozen_patterns, log_likelihood, run
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
        ValueError: bad tokens, or a readout of another shape.
    """
    tokens, readout = check_tokens(config, tokens), jnp.asarray(readout)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B,T]; got {list(tokens.shape)}")
    if readout.ndim != 2 or readout.shape[0] != config.n_vocab:
        raise ValueError(f"readout must be [V,J] with V = {config.n_vocab}; got {list(readout.shape)}")
    return _direct(config, params, tokens, readout)


@partial(jax.jit, static_argnums=0)
def _direct(config: TransformerConfig, params: Params, tokens: Array, readout: Array) -> DirectAttribution:
    _, seen = run(config, params, Batch(tokens, jnp.ones(tokens.shape, bool), {}))
    w_u = params["W_E"].T if config.tied else params["W_U"]
    directions, final = matmul(w_u, readout), seen.residual[:, -1]
    bias = jnp.zeros((*tokens.shape, readout.shape[1]))
    scale = jnp.ones((*tokens.shape, 1))
    if config.norm != "none":
        norm = params["final_norm"]
        if config.norm == "layer":
            bias = bias + matmul(norm["bias"], directions)
        directions = norm["scale"][:, None] * directions
        if config.norm == "layer":
            # Centring is linear: as well done to the directions as to everything that is written.
            directions = directions - directions.mean(0)
            final = final - final.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(final).mean(-1, keepdims=True) + config.norm_epsilon)
    if config.bias:
        b_o = sum(params[f"layer_{layer}"]["attention"]["b_O"] for layer in range(config.n_layers))
        bias = bias + scale * matmul(b_o, directions) + matmul(params["b_U"], readout)
    return DirectAttribution(
        embedding=scale * matmul(seen.residual[:, 0], directions),
        heads=scale[:, None, None] * einsum("blhtd,dj->blhtj", seen.head_outputs, directions),
        mlps=scale[:, None] * matmul(seen.mlp_outputs, directions),
        bias=bias,
    )


def direct_target_logits(config: TransformerConfig, params: Params, batch: Batch) -> Array:
    """What each head adds itself to the logit of the target, less the mean over the vocabulary, [L,H]; over batch.mask.

    Of direct_logit_attribution the part about the next token, averaged; positive for heads that vote for it.
    """
    terms = direct_logit_attribution(config, params, batch.tokens, jnp.eye(config.n_vocab)).heads[..., :-1, :]
    target = jnp.take_along_axis(terms, batch.tokens[:, None, None, 1:, None], axis=-1)[..., 0]
    counts = batch.mask[:, None, None, :-1]
    return jnp.mean(target - terms.mean(-1), (0, 3), where=jnp.broadcast_to(counts, target.shape))


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
        ValueError: bad tokens.
    """
    check_tokens(config, batch.tokens)
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
