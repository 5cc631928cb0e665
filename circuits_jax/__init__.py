"""Attention-head circuits of transformers: exact QK/OV algebra, causal effects, and models that grow the circuits."""

from circuits_jax.circuits.attention import mean_qk, ov, position_qk, qk, token_ov, token_qk
from circuits_jax.circuits.composition import CompositionScores, composition_scores, k_path
from circuits_jax.circuits.low_rank import SVD, LowRank
from circuits_jax.circuits.spectra import copying_score, diagonal_gap, eigenvalue_positivity, matching_score
from circuits_jax.circuits.weights import CircuitWeights, params_from_weights
from circuits_jax.heads.effects import EdgeEffects, HeadEffects, ablate_heads, cut_edges
from circuits_jax.models.interventions import Interventions
from circuits_jax.models.transformer import Activations, TransformerConfig, forward, init_params
from circuits_jax.tasks.batch import Batch, accuracy, next_token_loss

__all__ = [
    "SVD",
    "Activations",
    "Batch",
    "CircuitWeights",
    "CompositionScores",
    "EdgeEffects",
    "HeadEffects",
    "Interventions",
    "LowRank",
    "TransformerConfig",
    "ablate_heads",
    "accuracy",
    "composition_scores",
    "copying_score",
    "cut_edges",
    "diagonal_gap",
    "eigenvalue_positivity",
    "forward",
    "init_params",
    "k_path",
    "matching_score",
    "mean_qk",
    "next_token_loss",
    "ov",
    "params_from_weights",
    "position_qk",
    "qk",
    "token_ov",
    "token_qk",
]
