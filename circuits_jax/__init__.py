"""Attention-head circuits of transformers: exact QK/OV algebra, causal effects, and models that grow the circuits."""

from circuits_jax.circuits.attention import mean_qk, offset_profile, ov, ov_bias, position_qk, qk, qk_with_bias
from circuits_jax.circuits.composition import (
    CompositionScores,
    component_scores,
    composition_scores,
    k_path,
    k_path_gaps,
    projection_kernel,
    same_layer_scores,
    virtual_head,
)
from circuits_jax.circuits.eigenvalues import Eigenvalues, eigenvalues
from circuits_jax.circuits.eigenvectors import Eigen, eigenvectors
from circuits_jax.circuits.low_rank import SVD, Entries, LowRank, subspace_overlap
from circuits_jax.circuits.paths import PathTerms, TokenAttribution, path_expansion, token_attribution
from circuits_jax.circuits.spectra import (
    SpectralSummary,
    copying_score,
    diagonal_gap,
    directionality,
    effective_rank,
    eigenvalue_positivity,
    energy_curve,
    flatness,
    leading_ratio,
    matching_score,
    participation_ratio,
    spectral_gaps,
    stable_rank,
    summarize,
    symmetry,
)
from circuits_jax.circuits.token_space import TokenCircuit, key_preference, token_ov, token_qk, top_share
from circuits_jax.circuits.weights import CircuitWeights, params_from_weights, per_query_head
from circuits_jax.heads.composition_evidence import CompositionEvidence, composition_evidence
from circuits_jax.heads.effects import EdgeEffects, HeadEffects, ablate_heads, cut_edges
from circuits_jax.heads.nulls import Null, benjamini_hochberg, p_value, spectral_null, z_score
from circuits_jax.heads.taxonomy import HeadReport, classify_heads, classify_weights
from circuits_jax.models.config import Rotary, TransformerConfig
from circuits_jax.models.interventions import Interventions
from circuits_jax.models.planted import Planted, plant
from circuits_jax.models.planted_recipes import PlantedHead, Recipe
from circuits_jax.models.transformer import Activations, forward, init_params
from circuits_jax.tasks.batch import Batch, accuracy, next_token_loss

__all__ = [
    "SVD",
    "Activations",
    "Batch",
    "CircuitWeights",
    "CompositionEvidence",
    "CompositionScores",
    "EdgeEffects",
    "Eigen",
    "Eigenvalues",
    "Entries",
    "HeadEffects",
    "HeadReport",
    "Interventions",
    "LowRank",
    "Null",
    "PathTerms",
    "Planted",
    "PlantedHead",
    "Recipe",
    "Rotary",
    "SpectralSummary",
    "TokenAttribution",
    "TokenCircuit",
    "TransformerConfig",
    "ablate_heads",
    "accuracy",
    "benjamini_hochberg",
    "classify_heads",
    "classify_weights",
    "component_scores",
    "composition_evidence",
    "composition_scores",
    "copying_score",
    "cut_edges",
    "diagonal_gap",
    "directionality",
    "effective_rank",
    "eigenvalue_positivity",
    "eigenvalues",
    "eigenvectors",
    "energy_curve",
    "flatness",
    "forward",
    "init_params",
    "k_path",
    "k_path_gaps",
    "key_preference",
    "leading_ratio",
    "matching_score",
    "mean_qk",
    "next_token_loss",
    "offset_profile",
    "ov",
    "ov_bias",
    "p_value",
    "params_from_weights",
    "participation_ratio",
    "path_expansion",
    "per_query_head",
    "plant",
    "position_qk",
    "projection_kernel",
    "qk",
    "qk_with_bias",
    "same_layer_scores",
    "spectral_gaps",
    "spectral_null",
    "stable_rank",
    "subspace_overlap",
    "summarize",
    "symmetry",
    "token_attribution",
    "token_ov",
    "token_qk",
    "top_share",
    "virtual_head",
    "z_score",
]
