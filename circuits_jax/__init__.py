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
from circuits_jax.circuits.reading import attention_scores
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
from circuits_jax.heads.attribution import Agreement, agreement, attribute_edges
from circuits_jax.heads.circuit_quality import Quality, SetQuality, quality
from circuits_jax.heads.composition_evidence import CompositionEvidence, composition_evidence
from circuits_jax.heads.direct_effects import DirectAttribution, direct_logit_attribution, term_importance
from circuits_jax.heads.directions import MaxActivating, OVProbe, max_activating, probe_ov
from circuits_jax.heads.discovery import Discovery, discover, discover_by_attribution, discover_greedy
from circuits_jax.heads.edge_effects import EdgeEffects, cut_edges, edge_effects
from circuits_jax.heads.edge_sets import Circuit, circuit_of, faithfulness
from circuits_jax.heads.effects import HeadEffects, PairEffects, ablate, ablate_heads, ablate_pairs
from circuits_jax.heads.nulls import Null, benjamini_hochberg, p_value, spectral_null, z_score
from circuits_jax.heads.outcomes import frozen_patterns, log_likelihood, logit_difference, values_under
from circuits_jax.heads.patching import knock_out_direction, patch_edges, patch_heads, patch_mlps, patch_residual
from circuits_jax.heads.taxonomy import HeadReport, classify_heads, classify_weights
from circuits_jax.models.config import Rotary, TransformerConfig
from circuits_jax.models.graph import between_heads, cut, edge_names, keep_only
from circuits_jax.models.graph import outputs as sender_outputs
from circuits_jax.models.interventions import Edges, Interventions, Replacement
from circuits_jax.models.planted import Planted, plant
from circuits_jax.models.planted_recipes import PlantedHead, Recipe
from circuits_jax.models.pretrained import load_pretrained, load_tokenizer
from circuits_jax.models.transformer import Activations, forward, init_params, segment_inputs
from circuits_jax.tasks.batch import Batch, accuracy, next_token_loss

__all__ = [
    "SVD",
    "Activations",
    "Agreement",
    "Batch",
    "Circuit",
    "CircuitWeights",
    "CompositionEvidence",
    "CompositionScores",
    "DirectAttribution",
    "Discovery",
    "EdgeEffects",
    "Edges",
    "Eigen",
    "Eigenvalues",
    "Entries",
    "HeadEffects",
    "HeadReport",
    "Interventions",
    "LowRank",
    "MaxActivating",
    "Null",
    "OVProbe",
    "PairEffects",
    "PathTerms",
    "Planted",
    "PlantedHead",
    "Quality",
    "Recipe",
    "Replacement",
    "Rotary",
    "SetQuality",
    "SpectralSummary",
    "TokenAttribution",
    "TokenCircuit",
    "TransformerConfig",
    "ablate",
    "ablate_heads",
    "ablate_pairs",
    "accuracy",
    "agreement",
    "attention_scores",
    "attribute_edges",
    "benjamini_hochberg",
    "between_heads",
    "circuit_of",
    "classify_heads",
    "classify_weights",
    "component_scores",
    "composition_evidence",
    "composition_scores",
    "copying_score",
    "cut",
    "cut_edges",
    "diagonal_gap",
    "direct_logit_attribution",
    "directionality",
    "discover",
    "discover_by_attribution",
    "discover_greedy",
    "edge_effects",
    "edge_names",
    "effective_rank",
    "eigenvalue_positivity",
    "eigenvalues",
    "eigenvectors",
    "energy_curve",
    "faithfulness",
    "flatness",
    "forward",
    "frozen_patterns",
    "init_params",
    "k_path",
    "k_path_gaps",
    "keep_only",
    "key_preference",
    "knock_out_direction",
    "leading_ratio",
    "load_pretrained",
    "load_tokenizer",
    "log_likelihood",
    "logit_difference",
    "matching_score",
    "max_activating",
    "mean_qk",
    "next_token_loss",
    "offset_profile",
    "ov",
    "ov_bias",
    "p_value",
    "params_from_weights",
    "participation_ratio",
    "patch_edges",
    "patch_heads",
    "patch_mlps",
    "patch_residual",
    "path_expansion",
    "per_query_head",
    "plant",
    "position_qk",
    "probe_ov",
    "projection_kernel",
    "qk",
    "qk_with_bias",
    "quality",
    "same_layer_scores",
    "segment_inputs",
    "sender_outputs",
    "spectral_gaps",
    "spectral_null",
    "stable_rank",
    "subspace_overlap",
    "summarize",
    "symmetry",
    "term_importance",
    "token_attribution",
    "token_ov",
    "token_qk",
    "top_share",
    "values_under",
    "virtual_head",
    "z_score",
]
