"""What is followed while heads form: scores of every head, cheap enough to take hundreds of times inside training.

Products alone, no decomposition, so they may run inside a program that is split over devices. The taxonomy with its
nulls (heads/taxonomy.py) says what a finished head is; these say when it came.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits import reading
from circuits_jax.circuits.attention import visible_offsets
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import ideal_inputs as ideal
from circuits_jax.heads import patterns, signatures
from circuits_jax.heads.outcomes import check_metric, log_likelihood
from circuits_jax.heads.recall import output_recall, previous_recall
from circuits_jax.heads.structure import cut_to_tokens
from circuits_jax.heads.value_scores import token_match
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Interventions, with_inputs
from circuits_jax.models.transformer import Params, forward
from circuits_jax.tasks.batch import Batch, accuracy, loss_per_position, next_token_loss

MOST_TOKENS = 512  # of which tables [n,n] of every head are made


def behaviour(
    config: TransformerConfig, params: Params, batch: Batch, interventions: Interventions | None = None
) -> dict[str, Array]:
    """What the model does on B sequences: {evaluation_loss, accuracy: [], loss_per_position: [T]}; not for encoders."""
    check_metric(config, log_likelihood)
    changes = with_inputs(config, interventions or Interventions(), batch.inputs)
    with jax.default_matmul_precision("highest"):
        logits, _ = forward(config, params, batch.tokens, changes)
    return {
        "evaluation_loss": next_token_loss(logits, batch),
        "accuracy": accuracy(logits, batch),
        "loss_per_position": loss_per_position(logits, batch),
    }


def weight_signatures(
    config: TransformerConfig, params: Params, looks_back: ArrayLike, n_distractors: float | Array
) -> dict[str, Array]:
    """Every weight-only signature that needs products alone.

    {previous_token, same_position, first_token, entropy, duplicate_token, induction, copying, output_recall,
    previous_recall: [L,H], edge: [L,H,L,H]}, each name with _weights behind it. Positional scores and entropy are those
    of patterns.py on the pattern that positions alone would give; duplicate_token is signatures.matching among the
    tokens; induction and edge are what signatures.induction predicts; copying is the cosine of the logit table
    W_E W_OV W_U with the identity; recalls are those of recall.py. Of more than MOST_TOKENS tokens, duplicate_token,
    copying and output_recall see that many at most, evenly spaced.

    Args:
        config, params: the model.
        looks_back: [T] bool, the queries that count for positional scores.
        n_distractors: of induction, see signatures.induction.
    """
    weights = CircuitWeights.from_params(config, params)
    looks_back = jnp.asarray(looks_back)
    length = len(looks_back)
    n_vocab = len(weights.W_E)
    seen = cut_to_tokens(weights, jnp.arange(0, n_vocab, -(-n_vocab // MOST_TOKENS)))
    tokens = ideal.token_inputs(seen, length)
    by_token = reading.token_scores(seen, tokens, tokens, visible_offsets(length, weights.causal))
    n_distractors_of_copies = signatures.usual_distractors(weights, length)
    pattern = signatures.position_pattern(weights, length)
    predicted = signatures.induction(weights, looks_back, n_distractors)

    def of_heads(score: Callable[..., Array], *args: Array) -> Array:
        return jax.vmap(jax.vmap(score))(*args)

    scores = {
        "previous_token": of_heads(lambda x: patterns.previous_token(x, looks_back), pattern),
        "same_position": of_heads(lambda x: patterns.same_position(x, looks_back), pattern),
        "first_token": of_heads(lambda x: patterns.first_token(x, looks_back), pattern),
        "entropy": of_heads(lambda x: patterns.entropy(x, looks_back, config.causal), pattern),
        "duplicate_token": of_heads(lambda x: signatures.matching(x, n_distractors_of_copies, 2), by_token),
        "induction": predicted.joint_edges,
        "edge": predicted.edges,
        "copying": token_match(reading.values(seen, tokens), seen.W_O, seen.W_U).cosine,
        "output_recall": output_recall(seen),
        "previous_recall": previous_recall(weights, looks_back),
    }
    return {f"{name}_weights": score for name, score in scores.items()}
