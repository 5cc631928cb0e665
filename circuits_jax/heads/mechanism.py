"""By which mechanism a two-layer model can repeat tokens, as its weights alone say."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import reading
from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import patterns, signatures
from circuits_jax.heads.structure import structure
from circuits_jax.heads.type_evidence import relay_scores
from circuits_jax.heads.value_scores import Matches, token_match
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params
from circuits_jax.tasks.batch import Batch

MECHANISMS = ("Q", "K", "V", "positions")


def mechanisms(config: TransformerConfig, params: Params, looks_back: Array, batch: Batch) -> Array:
    """Attention above chance to what followed earlier copies, that each mechanism would give: [4], as MECHANISMS.

    Q and K: the induction score of the best head (heads/structure.py) of those that get it through a pointer in the
    query, and of those that get it through a token in the key.

    Positions and V: let P_h be the pattern that positions alone give head h, a(P) the mean attention of a pattern to
    those targets, and g the mean of a logit table on its diagonal minus that off it, in nats:

        single = sum over heads h of a(P_h) g(W_E W_OV^h W_U)
        pairs  = sum over second-layer b, first-layer c of a(P_b P_c) g(W_E W_OV^c W_OV^b W_U)
        score  = (max over all P_h, P_b P_c of a(P) - a(uniform)) / (1 - a(uniform))

    The score is that of V if single < ln(V - 1), which would make the target as probable as all other tokens together,
    and single < pairs; else it is that of positions. The other of the two is 0.

    It says where heads would look, not that they move what they see there. The rule that parts V from positions is
    not calibrated. With biases or norms, P_b P_c leaves out what they do between the layers.

    Args:
        config, params: the model, of two layers.
        looks_back: [T] bool, the queries that count for heads that look back.
        batch: B sequences that say which positions are asked for; nothing is run on them.

    Raises:
        ValueError: the model has not two layers, sees the next token, or what its heads write neither reaches later
            heads nor the logits through these weights alone.
    """
    if config.n_layers != 2:
        raise ValueError(f"n_layers must be 2 for mechanisms of two layers; got {config.n_layers}")
    if not config.causal or config.norm_position == "post" or config.unembed_transform:
        raise ValueError(
            "mechanisms need a decoder (causal=True) with norm_position 'pre' and no unembed_transform; got causal="
            f"{config.causal}, norm_position={config.norm_position!r}, unembed_transform={config.unembed_transform}"
        )
    length = batch.tokens.shape[-1]
    weights = CircuitWeights.from_params(config, params)
    found = structure(weights, looks_back, jax.random.key(0), n_draws=1)  # the null is not asked
    score, by_k = found.evidence.scores["induction"], found.evidence.details["by_k"]

    def on_targets(pattern: Array) -> Array:
        scores = jax.vmap(patterns.induction, (None, 0, 0))(pattern, batch.tokens, batch.mask)
        return patterns.mean_over_sequences(scores, patterns.after_copies, batch)

    looks = signatures.position_pattern(weights, length)
    of_heads = jax.vmap(jax.vmap(on_targets))(looks)
    of_pairs = jax.vmap(jax.vmap(on_targets))(einsum("bts,csu->cbtu", looks[1], looks[0]))
    token_values, place_values = (reading.values(found.weights, x) for x in (found.inputs.tokens, found.inputs.places))
    n, rank = token_values.shape[-2:]
    by_heads = token_match(token_values, weights.W_O, found.weights.W_U)
    by_pairs = relay_scores(found.weights, found.inputs, token_values, place_values).v
    single = jnp.sum(of_heads * _gap(by_heads, n, rank))
    pairs = jnp.sum(of_pairs * _gap(by_pairs, n, rank)[0, :, 1])
    by_position = patterns.above_chance(
        jnp.maximum(of_heads.max(), of_pairs.max()), on_targets(patterns.uniform(length))
    )
    relayed = (single < math.log(config.n_vocab - 1)) & (single < pairs)
    return jnp.stack([
        jnp.where(by_k, 0.0, score).max(), jnp.where(by_k, score, 0.0).max(),
        jnp.where(relayed, by_position, 0.0), jnp.where(relayed, 0.0, by_position),
    ])  # fmt: skip


def _gap(found: Matches, n: int, rank: int) -> Array:
    """Mean on the diagonal minus that off it, of tables [n,n] whose double-centred trace is tr: tr / (n - 1)."""
    return found.cosine * found.norm * math.sqrt(min(rank, n - 1)) / (n - 1)
