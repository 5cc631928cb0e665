"""All that speaks for previous-token and induction heads in one model: weights, attention and causal effects."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.composition import composition_scores
from circuits_jax.circuits.token_space import token_ov
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import edge_effects, effects, patterns, signatures, taxonomy
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Interventions, with_inputs
from circuits_jax.models.transformer import Params, forward
from circuits_jax.tasks.batch import Batch


def from_attention(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    looks_back: ArrayLike,
    interventions: Interventions | None = None,
) -> dict[str, Array]:
    """Pattern scores of every head, averaged over the sequences that have queries for them: {name: [L,H]}.

    Args:
        config, params: the model.
        batch: B sequences with repeats; scores of what an induction head does count the queries in batch.mask.
        looks_back: [T] bool, the queries that count for a previous-token head.
        interventions: under which to look.
    """
    with jax.default_matmul_precision("highest"):
        changes = with_inputs(config, interventions or Interventions(), batch.inputs)
        _, seen = forward(config, params, batch.tokens, changes)
    looks_back = jnp.asarray(looks_back)

    def of_sequence(pattern: Array, tokens: Array, mask: Array) -> dict[str, Array]:
        return {
            "previous_token": patterns.previous_token(pattern, looks_back),
            "induction": patterns.induction(pattern, tokens, mask),
            "duplicate_token": patterns.duplicate_token(pattern, tokens, mask),
            "same_position": patterns.same_position(pattern, mask),
            "first_token": patterns.first_token(pattern, mask),
            "entropy": patterns.entropy(pattern, mask, config.causal),
        }

    per_head = jax.vmap(jax.vmap(of_sequence, (0, None, None)), (0, None, None))
    scores = jax.vmap(per_head)(seen.patterns, batch.tokens, batch.mask)
    targets = {"induction": patterns.after_copies, "duplicate_token": patterns.earlier_copies}
    means = {
        name: patterns.mean_over_sequences(value, targets[name], batch) if name in targets else value.mean(0)
        for name, value in scores.items()
    }
    return {f"{name}_attention": value for name, value in means.items()}


def from_weights(
    config: TransformerConfig, params: Params, looks_back: ArrayLike, n_distractors: float | Array
) -> dict[str, Array]:
    """Weight-only scores, cheap enough to take during training.

    {previous_token_weights, induction_weights: [L,H], edge_weights: [L,H,L,H]}; induction and edges are in units of
    induction attention, as signatures.induction predicts them.
    """
    weights = CircuitWeights.from_params(config, params)
    looks_back = jnp.asarray(looks_back)
    predicted = signatures.induction(weights, looks_back, n_distractors)
    return {
        "previous_token_weights": signatures.previous_token(weights, looks_back),
        "induction_weights": predicted.joint_edges,
        "edge_weights": predicted.edges,
    }


def from_spectra(config: TransformerConfig, params: Params) -> dict[str, Array]:
    """Spectra, and the scores that rival from_weights.

    {ov_eigenvalues: complex [L,H,R] of W_E W_OV W_U, k_gap, k_frobenius: [L,H,L,H]}.
    """
    weights = CircuitWeights.from_params(config, params)
    return {
        "ov_eigenvalues": token_ov(weights).eigenvalues(),
        "k_gap": signatures.k_composition(weights),
        "k_frobenius": composition_scores(weights).k,
    }


def from_effects(config: TransformerConfig, params: Params, batch: Batch) -> dict[str, Array]:
    """Every head ablated and every edge cut; the axis in front of an edge is q, k, v.

    {ablation_loss: [L,H], ablation_effect: [L,H,L,H], edge_loss, edge_effect: [3,L,H,L,H], joint_loss, joint_effect:
    [3,L,H]}; an effect is the fall of the last head's own induction attention.
    """
    heads, edges = effects.ablate_heads(config, params, batch), edge_effects.cut_edges(config, params, batch)
    return {
        "ablation_loss": heads.loss,
        "ablation_effect": heads.induction,
        "edge_loss": edges.loss,
        "edge_effect": edges.induction,
        "joint_loss": edges.joint_loss,
        "joint_effect": edges.joint_induction,
    }


def everything(
    config: TransformerConfig, params: Params, batch: Batch, looks_back: ArrayLike, n_distractors: float, key: Array
) -> dict[str, Array]:
    """All of the above for one model, its taxonomy, and example_patterns [L,H,T,T], its attention on one sequence.

    {type_scores, type_z: [2,13,L,H]}: see taxonomy.stacked; key draws its inputs and nulls.

    jax.lax.map it over runs, not vmap, to bound the memory.
    """
    with jax.default_matmul_precision("highest"):
        return {
            "example_patterns": forward(config, params, batch.tokens)[1].patterns[0],
            **from_attention(config, params, batch, looks_back),
            **from_weights(config, params, looks_back, n_distractors),
            **from_spectra(config, params),
            **taxonomy.stacked(*taxonomy.evidence(config, params, jnp.asarray(looks_back), key)),
            **from_effects(config, params, batch),
        }
