"""Every public function lowers for CPU, GPU and TPU; jax.export needs none of the devices for that."""

import inspect

import jax
import numpy as np
import pytest

import circuits_jax as cj
from circuits_jax.circuits import (
    attention,
    composition,
    eigenvalues,
    eigenvectors,
    low_rank,
    orthonormalisation,
    paths,
    reading,
    spectra,
    token_space,
)
from circuits_jax.heads import (
    alignment,
    attribution,
    circuit_quality,
    claim_verdicts,
    claims,
    comparison,
    composition_evidence,
    direct_effects,
    directions,
    discovery,
    edge_effects,
    edge_sets,
    effects,
    evidence,
    ideal_inputs,
    loss_drop,
    nulls,
    outcomes,
    patching,
    patterns,
    portraits,
    published,
    realisation,
    recall,
    role_edges,
    role_effects,
    role_evidence,
    role_rows,
    role_structure,
    signatures,
    structure,
    taxonomy,
    trajectory,
    type_evidence,
    value_scores,
)
from circuits_jax.models import graph, interventions, planted, planted_recipes, position_wise, residual, rotary
from circuits_jax.tasks import (
    agreement,
    batch,
    designed,
    gaussian_exemplars,
    ioi,
    markov_chains,
    parent_graph,
    text,
    trigger_bigrams,
    wording,
)
from circuits_jax.tasks.agreement import Agreement
from circuits_jax.tasks.gaussian_exemplars import GaussianExemplars
from circuits_jax.tasks.ioi import IOI
from circuits_jax.tasks.markov_chains import MarkovChains
from circuits_jax.tasks.parent_graph import ParentGraph
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.tasks.text import Text
from circuits_jax.tasks.trigger_bigrams import TriggerBigrams
from circuits_jax.training import setting, train
from circuits_jax.training.setting import Setting

ALL = ("cpu", "cuda", "tpu")
B, T, L, H, V = 2, 8, 2, 2, 6
CONFIG = cj.TransformerConfig(V, T, n_layers=L, n_heads=H, d_model=8, norm="layer", bias=True, d_mlp=8)
TASK = RepeatedTokens(min_period=2, max_period=4, n_vocab=V, n_context=T)


def array(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# Shapes only: nothing here is ever computed.
KEY = jax.eval_shape(lambda: jax.random.key(0))
PARAMS = jax.eval_shape(lambda key: cj.init_params(CONFIG, key), KEY)
WEIGHTS = jax.eval_shape(lambda params: cj.CircuitWeights.from_params(CONFIG, params), PARAMS)
ROTARY = jax.eval_shape(
    lambda w: cj.CircuitWeights(
        W_E=w.W_E, W_Q=w.W_Q, W_K=w.W_K, W_V=w.W_V, W_O=w.W_O, W_U=w.W_U, n_context=T, positions="rotary"
    ),
    WEIGHTS,
)
CIRCUIT = cj.LowRank(array(L, H, 8, 4), array(L, H, 4, 8))
LAYER_CIRCUIT = cj.LowRank(array(H, 8, 4), array(H, 4, 8))
TOKEN_CIRCUIT = cj.TokenCircuit(array(20, 8), CIRCUIT, array(8, 20))
SQUARE, VALUES, SIGMA = array(L, H, 4, 4), array(L, H, 4, dtype=np.complex64), array(L, H, 4)
ATTENTION = array(L, H, T, T)
BATCH = cj.Batch(tokens=array(B, T, dtype=np.int32), mask=array(B, T, dtype=bool), positions={})
LOGITS = array(B, T, V)
PATTERN, TOKENS, QUERIES = array(T, T), array(T, dtype=np.int32), array(T, dtype=bool)
N = 1 + L * (H + 1)
EDGES = cj.Edges(array(N, L, H), array(N, L, H), array(N, L, H), array(N, L), array(N))
OUTPUTS = array(B, N, T, 8)
CHANGES = cj.Interventions(
    array(L, H),
    cj.Replacement(array(B, L, H, T, 8), array(L, H, T)), array(L, H, T, T),
    cj.Replacement(array(L, H, T, T), array(L, H, T)),
    cj.Replacement(array(L, T, 8), array(L, T)), cj.Replacement(array(L + 1, T, 8), array(L + 1, T)),
    array(L + 1, T, 8), array(L, H, T, 8), array(L, H, T, 8), array(L, H, T, 8), EDGES, OUTPUTS,
)  # fmt: skip
SEEN = jax.eval_shape(lambda params, tokens: cj.forward(CONFIG, params, tokens)[1], PARAMS, BATCH.tokens)
N_EDGES = len(graph.edge_names(CONFIG))
ROWS, PLACE_ROWS, SHARE, OFFSETS = array(V, 8), array(L, T, 8), array(L, H), array(T, dtype=np.int32)
HEAD = (array(L, H, V, 4), array(L, H, 4, 8), array(8, V))  # values, W_O, W_U
INPUTS = jax.eval_shape(
    lambda w, share, key: ideal_inputs.ideal_inputs(w, T, share, share, None, key), WEIGHTS, SHARE, KEY
)
RELAYED = jax.eval_shape(
    value_scores.relays, WEIGHTS, array(L, H, V, 4), array(L, H, T, 4), array(L, H, V, 4), array(L, H, T, 4)
)
STRUCTURE = jax.eval_shape(
    lambda w, queries, key: structure.structure(w, queries, key, n_draws=3), WEIGHTS, QUERIES, KEY
)
RECIPE = planted_recipes.recipes("learned")["basic"]
CHAINS = MarkovChains(array(), n_context=T)
GRAPH = ParentGraph(array(T - 2, dtype=np.int32), array())
NAMES = IOI(
    array(2, T, dtype=np.int32), array(6, dtype=np.int32), array(2, dtype=np.int32), array(2, dtype=np.int32), array(),
    n_vocab=V,
)  # fmt: skip
NUMBERS = Agreement(
    array(2, T, dtype=np.int32), array(2, dtype=np.int32), array(3, 2, dtype=np.int32), array(2, 2, dtype=np.int32),
    array(2, dtype=np.int32), V, array(), array(),
)  # fmt: skip
NAMED, NUMBERED = (jax.eval_shape(type(task).sample, task, KEY) for task in (NAMES, NUMBERS))
CLASSES, R, AT, CHANGE = 3, 2, array(B, dtype=np.int32), array(L, B, 8)
ASKED, PAIRS = role_rows.Asked(AT, AT, AT, AT), role_rows.Pairs(BATCH.tokens, BATCH.tokens, AT, AT, AT, AT)
ROWS_OF_PROMPTS = role_rows.Rows(array(L, B, T, 8), array(L, B, T, 8))
QUESTIONS = role_rows.Questions(
    ASKED, ASKED, PAIRS, PAIRS, PAIRS, array(dtype=bool), array(dtype=bool), array(dtype=np.int32),
    array(dtype=np.int32), array(CLASSES, 2, dtype=np.int32), AT,
)  # fmt: skip
JUDGED = cj.Batch(BATCH.tokens, BATCH.mask, dict.fromkeys(("at", "right", "wrong"), AT))
PROMPTS = role_rows.Prompts(JUDGED, JUDGED, jax.tree.map(lambda x: array(R, *x.shape, dtype=x.dtype), QUESTIONS))
WATCHED = (JUDGED, AT, AT, array(B, 8), array(B, 8), array(B, 8))
HEAD_PLACE = array(2, dtype=np.int32)
SWEPT_TASK = jax.tree.map(lambda leaf: array(dtype=np.asarray(leaf).dtype.name.replace("64", "32")), TASK)

# name -> (function, its arguments); static arguments are closed over.
TABLE = {
    "LowRank.svd": (cj.LowRank.svd, (CIRCUIT,)),
    "LowRank.singular_values": (cj.LowRank.singular_values, (CIRCUIT,)),
    "LowRank.frobenius_norm": (cj.LowRank.frobenius_norm, (CIRCUIT,)),
    "LowRank.trace": (cj.LowRank.trace, (CIRCUIT,)),
    "LowRank.sum": (cj.LowRank.sum, (CIRCUIT,)),
    "LowRank.diagonal": (cj.LowRank.diagonal, (CIRCUIT,)),
    "LowRank.rows": (cj.LowRank.rows, (CIRCUIT, array(3, dtype=np.int32))),
    "LowRank.__matmul__": (cj.LowRank.__matmul__, (CIRCUIT, CIRCUIT)),
    "LowRank.__getitem__": (lambda circuit, head: circuit[:, head], (CIRCUIT, array(dtype=np.int32))),
    "LowRank.spectral_norm": (cj.LowRank.spectral_norm, (CIRCUIT,)),
    "LowRank.columns": (cj.LowRank.columns, (CIRCUIT, array(3, dtype=np.int32))),
    "LowRank.block": (cj.LowRank.block, (CIRCUIT, array(3, dtype=np.int32), array(2, dtype=np.int32))),
    "LowRank.top_k": (lambda circuit: circuit.top_k(5), (CIRCUIT,)),
    "LowRank.one_by_one": (lambda circuit: circuit.one_by_one(cj.LowRank.diagonal), (CIRCUIT,)),
    "LowRank arithmetic": (lambda a, b, w: 2.0 * (w @ (a - b) @ w + -a), (CIRCUIT, CIRCUIT, array(8, 8))),
    "TokenCircuit.low_rank": (cj.TokenCircuit.low_rank, (TOKEN_CIRCUIT,)),
    "TokenCircuit.block": (cj.TokenCircuit.block, (TOKEN_CIRCUIT, array(3, dtype=np.int32), array(2, dtype=np.int32))),
    "TokenCircuit.singular_values": (cj.TokenCircuit.singular_values, (TOKEN_CIRCUIT,)),
    "TokenCircuit.frobenius_norm": (cj.TokenCircuit.frobenius_norm, (TOKEN_CIRCUIT,)),
    "TokenCircuit.trace": (cj.TokenCircuit.trace, (TOKEN_CIRCUIT,)),
    "TokenCircuit.sum": (cj.TokenCircuit.sum, (TOKEN_CIRCUIT,)),
    "TokenCircuit.diagonal": (cj.TokenCircuit.diagonal, (TOKEN_CIRCUIT,)),
    "TokenCircuit.rows": (cj.TokenCircuit.rows, (TOKEN_CIRCUIT, array(3, dtype=np.int32))),
    "TokenCircuit.columns": (cj.TokenCircuit.columns, (TOKEN_CIRCUIT, array(3, dtype=np.int32))),
    "TokenCircuit.top_k": (lambda circuit: circuit.top_k(5), (TOKEN_CIRCUIT,)),
    "TokenCircuit.own_row_rank": (cj.TokenCircuit.own_row_rank, (TOKEN_CIRCUIT,)),
    "PathTerms.total": (lambda w, t, p: cj.path_expansion(w, t, p).total(), (ROTARY, TOKENS, ATTENTION)),
    "TokenAttribution.total": (
        lambda w, t, p, r: cj.token_attribution(w, t, p, r).total(),
        (ROTARY, TOKENS, ATTENTION, array(8, 1)),
    ),
    "benjamini_hochberg": (cj.benjamini_hochberg, (array(L, H),)),
    "component_scores": (cj.component_scores, (WEIGHTS,)),
    "composition_evidence": (cj.composition_evidence, (WEIGHTS, KEY)),
    "directionality": (cj.directionality, (CIRCUIT,)),
    "effective_rank": (cj.effective_rank, (SIGMA,)),
    "energy_curve": (cj.energy_curve, (SIGMA,)),
    "flatness": (cj.flatness, (SIGMA,)),
    "key_preference": (cj.key_preference, (WEIGHTS,)),
    "leading_ratio": (cj.leading_ratio, (SIGMA,)),
    "offset_profile": (cj.offset_profile, (ROTARY,)),
    "ov_bias": (cj.ov_bias, (WEIGHTS,)),
    "p_value": (cj.p_value, (array(L, H), cj.Null(array(5, L, H)))),
    "participation_ratio": (cj.participation_ratio, (SIGMA,)),
    "path_expansion": (cj.path_expansion, (ROTARY, TOKENS, ATTENTION)),
    "per_query_head": (lambda weights: cj.per_query_head(weights, weights.W_K), (WEIGHTS,)),
    "projection_kernel": (cj.projection_kernel, (WEIGHTS,)),
    "qk_with_bias": (cj.qk_with_bias, (ROTARY, array(dtype=np.int32))),
    "same_layer_scores": (cj.same_layer_scores, (WEIGHTS,)),
    "spectral_gaps": (cj.spectral_gaps, (SIGMA,)),
    "stable_rank": (cj.stable_rank, (SIGMA,)),
    "subspace_overlap": (cj.subspace_overlap, (array(L, 8, 3), array(L, 8, 2))),
    "symmetry": (cj.symmetry, (CIRCUIT,)),
    "token_attribution": (cj.token_attribution, (ROTARY, TOKENS, ATTENTION, array(8, 1))),
    "top_share": (lambda ranks: cj.top_share(ranks, 5), (array(L, H, V, dtype=np.int32),)),
    "virtual_head": (lambda weights: cj.virtual_head(weights, (0, 1), (1, 0)), (WEIGHTS,)),
    "z_score": (cj.z_score, (array(L, H), cj.Null(array(5, L, H)))),
    "composition_evidence.rotation_deviation": (
        lambda a, b: composition_evidence.rotation_deviation(a, b, 8),
        (array(L, H), array(L, H)),
    ),
    "eigenvalues.checked": (eigenvalues.checked, (SQUARE, VALUES)),
    "eigenvalues.francis": (eigenvalues.francis, (SQUARE,)),
    "eigenvalues.francis_schur": (eigenvalues.francis_schur, (SQUARE,)),
    "eigenvalues.of_quasi_triangle": (eigenvalues.of_quasi_triangle, (SQUARE,)),
    "eigenvalues.scaled": (eigenvalues.scaled, (SQUARE,)),
    "eigenvalues.times": (eigenvalues.times, (VALUES, array(L, H, 1))),
    "nulls.random_circuits": (nulls.random_circuits, (CIRCUIT, KEY)),
    "orthonormalisation.qr": (orthonormalisation.qr, (array(L, 8, 4),)),
    "orthonormalisation.triangle": (orthonormalisation.triangle, (array(L, 8, 4),)),
    "rotary.rotate": (lambda x: rotary.rotate(x, np.arange(T), cj.Rotary(dim=2)), (array(T, 4),)),
    "rotary.rotary_angles": (lambda x: rotary.rotary_angles(x, np.arange(T), cj.Rotary()), (array(T, 4),)),
    "rotary.turn_pairs": (
        lambda x, c, s: rotary.turn_pairs(x, c, s, cj.Rotary()),
        (array(T, 4), array(T, 2), array(T, 2)),
    ),
    "CircuitWeights.from_params": (lambda params: cj.CircuitWeights.from_params(CONFIG, params), (PARAMS,)),
    "ablate_heads": (lambda params, batch: cj.ablate_heads(CONFIG, params, batch), (PARAMS, BATCH)),
    "accuracy": (cj.accuracy, (LOGITS, BATCH)),
    "composition_scores": (cj.composition_scores, (WEIGHTS,)),
    "cut_edges": (lambda params, batch: cj.cut_edges(CONFIG, params, batch), (PARAMS, BATCH)),
    "ablate": (
        lambda params, batch, sets, mean: cj.ablate(CONFIG, params, batch, sets, reference=mean),
        (PARAMS, BATCH, array(3, L, H, dtype=bool), array(L, H, T, 8)),
    ),
    "ablate_pairs": (lambda params, batch: cj.ablate_pairs(CONFIG, params, batch), (PARAMS, BATCH)),
    "effects.single_heads": (lambda: effects.single_heads(CONFIG), ()),
    "edge_effects": (lambda p, b, r: cj.edge_effects(CONFIG, p, b, reference=r), (PARAMS, BATCH, OUTPUTS)),
    "edge_effects.cut_senders": (
        lambda params, batch: edge_effects.cut_senders(
            CONFIG, params, batch, outcomes.log_likelihood, np.eye(N, dtype=bool), own=outcomes.induction_attention
        ),
        (PARAMS, BATCH),
    ),
    "attribute_edges": (
        lambda p, b, r: cj.attribute_edges(CONFIG, p, b, reference=r, n_steps=2, chunk=1),
        (PARAMS, BATCH, OUTPUTS),
    ),
    "patch_heads": (lambda params, a, b: cj.patch_heads(CONFIG, params, a, b), (PARAMS, BATCH, BATCH)),
    "patch_mlps": (lambda params, a, b: cj.patch_mlps(CONFIG, params, a, b), (PARAMS, BATCH, BATCH)),
    "patch_residual": (lambda params, a, b: cj.patch_residual(CONFIG, params, a, b), (PARAMS, BATCH, BATCH)),
    "patch_edges": (lambda params, a, b: cj.patch_edges(CONFIG, params, a, b), (PARAMS, BATCH, BATCH)),
    "knock_out_direction": (
        lambda params, batch, directions: cj.knock_out_direction(CONFIG, params, batch, directions),
        (PARAMS, BATCH, array(L, H, 8)),
    ),
    "direct_logit_attribution": (
        lambda params, tokens, readout: cj.direct_logit_attribution(CONFIG, params, tokens, readout),
        (PARAMS, BATCH.tokens, array(V, 2)),
    ),
    "DirectAttribution.total": (
        lambda params, tokens: cj.direct_logit_attribution(CONFIG, params, tokens, np.eye(V)).total(),
        (PARAMS, BATCH.tokens),
    ),
    "direct_effects.direct_target_logits": (
        lambda params, batch: direct_effects.direct_target_logits(CONFIG, params, batch),
        (PARAMS, BATCH),
    ),
    "term_importance": (lambda params, batch: cj.term_importance(CONFIG, params, batch), (PARAMS, BATCH)),
    "values_under": (
        lambda params, batch, masks: cj.values_under(
            CONFIG, params, batch, cj.log_likelihood, cj.Interventions(head_scale=masks), chunk=2
        ),
        (PARAMS, BATCH, array(3, L, H)),
    ),
    "outcomes.value_under": (
        lambda p, b, changes: outcomes.value_under(CONFIG, p, b, cj.log_likelihood, changes),
        (PARAMS, BATCH, CHANGES),
    ),
    "outcomes.run": (lambda params, batch: outcomes.run(CONFIG, params, batch), (PARAMS, BATCH)),
    "outcomes.in_chunks": (lambda x: outcomes.in_chunks(np.sum, x, 2), (array(5, 3),)),
    "outcomes.difference": (outcomes.difference, (array(3), array(3))),
    "outcomes.induction_attention": (outcomes.induction_attention, (LOGITS, SEEN, BATCH)),
    "outcomes.on_repeats": (outcomes.on_repeats, (LOGITS, SEEN, BATCH)),
    "outcomes.nothing": (outcomes.nothing, (LOGITS, SEEN, BATCH)),
    "log_likelihood": (cj.log_likelihood, (LOGITS, SEEN, BATCH)),
    "logit_difference": (
        lambda logits, seen, tokens, at: cj.logit_difference(
            logits, seen, cj.Batch(tokens, tokens, {"at": at, "right": at, "wrong": at})
        ),
        (LOGITS, SEEN, BATCH.tokens, array(B, dtype=np.int32)),
    ),
    "frozen_patterns": (cj.frozen_patterns, (SEEN,)),
    "Interventions.at_layer": (lambda changes: changes.at_layer(1), (CHANGES,)),
    "Replacement.of": (cj.Replacement.of, (cj.Replacement(array(T, 8), array(T)), array(T, 8))),
    "residual.plus": (residual.plus, (array(T, 8), array(T, 8))),
    "residual.replaced": (residual.replaced, (array(T, 8), cj.Replacement(array(T, 8), array(T)))),
    "residual.change_residual": (
        lambda x, changes: residual.change_residual(x, residual.Senders((x[None],), None), changes, 0)[0],
        (array(T, 8), cj.Interventions(residual_added=array(L + 1, T, 8))),
    ),
    "sender_outputs": (lambda seen: cj.sender_outputs(CONFIG, seen), (SEEN,)),
    "graph.outputs": (lambda seen: graph.outputs(CONFIG, seen), (SEEN,)),
    "between_heads": (lambda edges: graph.between_heads(CONFIG, edges), (EDGES,)),
    "edge_sets.edges_of": (lambda values: edge_sets.edges_of(CONFIG, values), (array(N_EDGES),)),
    "edge_sets.live": (lambda kept: edge_sets.live(CONFIG, kept), (array(N_EDGES, dtype=bool),)),
    "edge_sets.value_of": (
        lambda p, b, kept: edge_sets.value_of(CONFIG, cj.log_likelihood, p, b, None, kept),
        (PARAMS, BATCH, array(N_EDGES, dtype=bool)),
    ),
    "comparison.effects_of_edges": (lambda p, b: comparison.effects_of_edges(CONFIG, p, b), (PARAMS, BATCH)),
    "comparison.effects_of_heads": (lambda p, b: comparison.effects_of_heads(CONFIG, p, b), (PARAMS, BATCH)),
    "comparison.conditions": (lambda p, b: comparison.conditions(CONFIG, p, b), (PARAMS, BATCH)),
    "comparison.of_receivers": (comparison.of_receivers, (LOGITS, SEEN, BATCH)),
    "comparison.scores_of_edges": (
        lambda weights, queries, key: comparison.scores_of_edges(weights, queries, 3.0, key),
        (WEIGHTS, QUERIES, KEY),
    ),
    "diagonal_gap": (cj.diagonal_gap, (CIRCUIT,)),
    "eigenvalue_positivity": (cj.eigenvalue_positivity, (array(L, H, 4, dtype=np.complex64),)),
    "forward": (lambda p, t, i: cj.forward(CONFIG, p, t, i), (PARAMS, BATCH.tokens, CHANGES)),
    "init_params": (lambda key: cj.init_params(CONFIG, key), (KEY,)),
    "k_path": (lambda weights: cj.k_path(weights, (0, 1), (1, 0)).low_rank(), (WEIGHTS,)),
    "k_path_gaps": (cj.k_path_gaps, (WEIGHTS,)),
    "mean_qk": (cj.mean_qk, (ROTARY,)),
    "next_token_loss": (cj.next_token_loss, (LOGITS, BATCH)),
    "next_token_loss gradient": (jax.grad(cj.next_token_loss), (LOGITS, BATCH)),
    "ov": (cj.ov, (WEIGHTS,)),
    "params_from_weights": (lambda weights: cj.params_from_weights(weights)[1], (WEIGHTS,)),
    "position_qk": (cj.position_qk, (WEIGHTS,)),
    "qk": (cj.qk, (ROTARY, array(dtype=np.int32))),
    "token_ov": (cj.token_ov, (WEIGHTS,)),
    "token_qk": (cj.token_qk, (ROTARY, array(dtype=np.int32))),
    "attention.rotated_queries": (attention.rotated_queries, (ROTARY, array(3, dtype=np.int32))),
    "spectra.entry_variance": (spectra.entry_variance, (CIRCUIT,)),
    "patterns.previous_token": (patterns.previous_token, (PATTERN, QUERIES)),
    "patterns.same_position": (patterns.same_position, (PATTERN, QUERIES)),
    "patterns.first_token": (patterns.first_token, (PATTERN, QUERIES)),
    "patterns.duplicate_token": (patterns.duplicate_token, (PATTERN, TOKENS, QUERIES)),
    "patterns.induction": (patterns.induction, (PATTERN, TOKENS, QUERIES)),
    "patterns.entropy": (patterns.entropy, (PATTERN, QUERIES)),
    "patterns.earlier_copies": (patterns.earlier_copies, (TOKENS,)),
    "signatures.additive_diagonal": (signatures.additive_diagonal, (array(L, V, V),)),
    "type_evidence.against": (type_evidence.against, (array(L, H), array(5, L, H))),
    "signatures.previous_token": (signatures.previous_token, (WEIGHTS, QUERIES)),
    "signatures.position_pattern": (lambda weights: signatures.position_pattern(weights, T), (ROTARY,)),
    "signatures.matching": (lambda scores, n: signatures.matching(scores, n, 2), (array(V, V), array())),
    "signatures.content": (signatures.content, (array(V, V), PATTERN, array())),
    "signatures.double_centred": (signatures.double_centred, (array(V, T),)),
    "signatures.energy_between_different": (signatures.energy_between_different, (array(V, V),)),
    "patterns.offset_profile": (patterns.offset_profile, (PATTERN, QUERIES)),
    "patterns.uniform": (lambda: patterns.uniform(T), ()),
    "patterns.above_chance": (patterns.above_chance, (SHARE, array())),
    "ideal_inputs.residual_size": (lambda weights: ideal_inputs.residual_size(weights, T), (WEIGHTS,)),
    "reading.normalized": (reading.normalized, (WEIGHTS, PLACE_ROWS)),
    "ideal_inputs.position_inputs": (
        lambda weights, start: ideal_inputs.position_inputs(weights, T, start),
        (WEIGHTS, array(8)),
    ),
    "ideal_inputs.token_inputs": (lambda weights: ideal_inputs.token_inputs(weights, T), (WEIGHTS,)),
    "reading.qk_rows": (reading.qk_rows, (WEIGHTS, PLACE_ROWS)),
    "reading.queries": (reading.queries, (WEIGHTS, ROWS)),
    "reading.keys": (reading.keys, (WEIGHTS, ROWS)),
    "reading.values": (reading.values, (WEIGHTS, PLACE_ROWS)),
    "reading.position_scores": (reading.position_scores, (ROTARY, PLACE_ROWS, PLACE_ROWS)),
    "reading.token_scores": (reading.token_scores, (ROTARY, ROWS, ROWS, OFFSETS)),
    "reading.mean_over_offsets": (reading.mean_over_offsets, (ROTARY, array(L, H, T, 4), OFFSETS)),
    "attention_scores": (cj.attention_scores, (ROTARY, PLACE_ROWS)),
    "position_wise.unit_rms": (lambda x: position_wise.unit_rms(x, 1e-5), (ROWS,)),
    "position_wise.unit_norm": (lambda x: position_wise.unit_norm("layer", x, 1e-5), (ROWS,)),
    "directions.tied_groups": (directions.tied_groups, (SIGMA,)),
    "directions.uniform_directions": (lambda rows, key: directions.uniform_directions(rows, key, 3, 2), (ROWS, KEY)),
    "directions.covariance_directions": (
        lambda rows, key: directions.covariance_directions(rows, key, 3, 2),
        (ROWS, KEY),
    ),
    "max_activating": (
        lambda circuit, rows, key: cj.max_activating(circuit, rows, key, n=2, k=3, n_draws=3),
        (CIRCUIT, ROWS, KEY),
    ),
    "probe_ov": (lambda weights, rows: cj.probe_ov(weights, rows, k=3), (WEIGHTS, ROWS)),
    "TokenCircuit.likely_extremes": (lambda circuit: circuit.likely_extremes(5, 4), (TOKEN_CIRCUIT,)),
    "segment_inputs": (lambda w_s: cj.segment_inputs({"W_S": w_s}, np.array([0, 1])), (array(2, 8),)),
    "attention.visible_offsets": (lambda: attention.visible_offsets(T, causal=False), ()),
    "ideal_inputs.added_to": (ideal_inputs.added_to, (WEIGHTS, PLACE_ROWS)),
    "ideal_inputs.at_size_of": (ideal_inputs.at_size_of, (WEIGHTS, PLACE_ROWS)),
    "patterns.n_visible": (lambda: patterns.n_visible(T), ()),
    "residual.times": (lambda x, w: residual.times((x, None), w), (ROWS, array(8, 3))),
    "residual.read_through": (lambda x, changed: residual.read_through(jax.nn.relu, x, changed), (ROWS, ROWS)),
    "rotary.relative": (lambda x: rotary.relative(x, np.arange(T), cj.Rotary(dim=2)), (array(T, 4),)),
    "ideal_inputs.written": (ideal_inputs.written, (WEIGHTS, ROWS, SHARE)),
    "ideal_inputs.ideal_inputs": (
        lambda weights, share, start, key: ideal_inputs.ideal_inputs(weights, T, share, share, start, key),
        (WEIGHTS, SHARE, array(8), KEY),
    ),
    "value_scores.logit_circuit": (value_scores.logit_circuit, HEAD),
    "value_scores.map_sharpness": (value_scores.map_sharpness, (array(L, H, V, V),)),
    "value_scores.concentration": (value_scores.concentration, HEAD[:2]),
    "value_scores.matches": (lambda trace, norm: value_scores.matches(trace, norm, V, 4), (SHARE, SHARE)),
    "value_scores.token_match": (value_scores.token_match, HEAD),
    "value_scores.relays": (
        value_scores.relays,
        (WEIGHTS, array(L, H, V, 4), array(L, H, T, 4), array(L, H, V, 4), array(L, H, T, 4)),
    ),
    "value_scores.centred": (value_scores.centred, (ROWS,)),
    "structure.sample_tokens": (lambda key: structure.sample_tokens(key, V, 3, 0), (KEY,)),
    "structure.cut_to_tokens": (structure.cut_to_tokens, (WEIGHTS, array(3, dtype=np.int32))),
    "structure.qk_evidence": (structure.qk_evidence, (WEIGHTS, INPUTS, QUERIES, STRUCTURE.null)),
    "type_evidence.positional_scores": (type_evidence.positional_scores, (array(L, H, T), SHARE)),
    "type_evidence.above_chance_profiles": (type_evidence.above_chance_profiles, (ATTENTION, QUERIES)),
    "type_evidence.relay_scores": (
        type_evidence.relay_scores,
        (STRUCTURE.weights, STRUCTURE.inputs, array(L, H, V, 4), array(L, H, T, 4)),
    ),
    "type_evidence.written_length": (type_evidence.written_length, HEAD[:2]),
    "realisation.on_own_batch": (
        lambda params, tokens: realisation.on_own_batch(CONFIG, params, tokens),
        (PARAMS, BATCH.tokens),
    ),
    "realisation.positional_z": (
        realisation.positional_z,
        (ATTENTION, QUERIES, array(L, H, dtype=np.int32)),
    ),
    "realisation.content_share": (
        lambda scores, tokens, ids: realisation.content_share(scores, tokens, ids, 1),
        (array(2, B, L, H, T, T), array(2, B, T, dtype=np.int32), array(V, dtype=np.int32)),
    ),
    "realisation.agreement": (realisation.agreement, (HEAD[0], HEAD[0], HEAD[1])),
    "realisation.mean_values": (
        realisation.mean_values,
        (array(B, L, H, T, 4), array(B, L, H, T), array(B, L, H, T, V)),
    ),
    "designed.designed_inputs": (
        lambda key, ids: designed.designed_inputs(key, ids, T, B, 0),
        (KEY, array(V, dtype=np.int32)),
    ),
    "plant": (lambda key, noise: planted.plant(RECIPE, key, noise), (KEY, array())),
    "taxonomy.stacked": (taxonomy.stacked, (STRUCTURE.evidence, STRUCTURE.evidence)),
    "nulls.draw": (
        lambda w, k: nulls.draw(lambda n: cj.token_ov(n).trace(), w, nulls.random_rotation, k, 3),
        (WEIGHTS, KEY),
    ),
    "nulls.random_rotation": (nulls.random_rotation, (WEIGHTS, KEY)),
    "nulls.random_frames": (lambda key: nulls.random_frames(key, (L, 8, 4), np.float32), (KEY,)),
    "nulls.token_permutation": (nulls.token_permutation, (WEIGHTS, KEY)),
    "nulls.same_layer_permutation": (nulls.same_layer_permutation, (WEIGHTS, array(dtype=np.int32))),
    "nulls.diagonal_z": (nulls.diagonal_z, (array(L, V, V),)),
    "nulls.upper_p": (nulls.upper_p, (SHARE,)),
    "signatures.k_composition": (signatures.k_composition, (WEIGHTS,)),
    "signatures.induction": (signatures.induction, (WEIGHTS, QUERIES, array())),
    "evidence.from_attention": (
        lambda params, batch, queries, changes: evidence.from_attention(CONFIG, params, batch, queries, changes),
        (PARAMS, BATCH, QUERIES, CHANGES),
    ),
    "evidence.from_weights": (
        lambda params, queries, n: evidence.from_weights(CONFIG, params, queries, n),
        (PARAMS, QUERIES, array()),
    ),
    "evidence.from_effects": (lambda params, batch: evidence.from_effects(CONFIG, params, batch), (PARAMS, BATCH)),
    "nulls.norm_matched": (nulls.norm_matched, (WEIGHTS, KEY)),
    "patterns.after_copies": (patterns.after_copies, (array(T, dtype=np.int32),)),
    "patterns.mean_over_sequences": (
        lambda scores, batch: patterns.mean_over_sequences(scores, patterns.earlier_copies, batch),
        (array(B, L, H), BATCH),
    ),
    "train.train": (
        lambda task, seed, steps: train.train(CONFIG, Setting(seed, task), steps, train.measure_nothing),
        (SWEPT_TASK, array(dtype=np.int32), array(3, dtype=np.int32)),
    ),
    "RepeatedTokens.sample": (RepeatedTokens.sample, (SWEPT_TASK, KEY)),
    "TriggerBigrams.sample": (
        TriggerBigrams.sample,
        (TriggerBigrams(array(V, V), array(V), array(2, dtype=np.int32), array(), n_context=T), KEY),
    ),
    "trigger_bigrams.random_bigrams": (
        lambda key, concentration: trigger_bigrams.random_bigrams(key, V, concentration),
        (KEY, array()),
    ),
    "MarkovChains.sample": (MarkovChains.sample, (CHAINS, KEY)),
    "MarkovChains.sample, doubly stochastic": (
        MarkovChains.sample,
        (MarkovChains(array(), n_context=T, kind="doubly_stochastic"), KEY),
    ),
    "markov_chains.bayes_predictor": (markov_chains.bayes_predictor, (CHAINS, TOKENS)),
    "markov_chains.bayes_predictor, by draws": (
        markov_chains.bayes_predictor,
        (MarkovChains(array(), n_context=T, kind="doubly_stochastic"), TOKENS),
    ),
    "markov_chains.bigram_predictor": (markov_chains.bigram_predictor, (CHAINS, TOKENS)),
    "markov_chains.unigram_predictor": (markov_chains.unigram_predictor, (CHAINS, TOKENS)),
    "markov_chains.uniform_predictor": (markov_chains.uniform_predictor, (CHAINS, TOKENS)),
    "ParentGraph.sample": (ParentGraph.sample, (GRAPH, KEY)),
    "parent_graph.bayes_predictor": (parent_graph.bayes_predictor, (GRAPH, TOKENS)),
    "parent_graph.identifiable": (parent_graph.identifiable, (array(T - 2, dtype=np.int32),)),
    "parent_graph.random_parents": (lambda key, share: parent_graph.random_parents(key, T, share), (KEY, array())),
    "parent_graph.chain_parents": (lambda: parent_graph.chain_parents(T), ()),
    "GaussianExemplars.sample": (
        GaussianExemplars.sample,
        (GaussianExemplars(array(9, 8), array(), array(), array()), KEY),
    ),
    "gaussian_exemplars.random_means": (lambda key: gaussian_exemplars.random_means(key, 9, 8), (KEY,)),
    "Text.sample": (Text.sample, (Text(array(50, dtype=np.int32), n_context=T), KEY)),
    "batch.loss_per_position": (batch.loss_per_position, (LOGITS, BATCH)),
    "interventions.with_inputs": (
        lambda changes, inputs: interventions.with_inputs(CONFIG, changes, inputs),
        (CHANGES, array(B, T, 8)),
    ),
    "setting.trained_only": (
        lambda factor: setting.trained_only(CONFIG, {"layer_0/attention/W_K": factor}),
        (array(H, 1, 1),),
    ),
    "loss_drop.loss_drop": (
        lambda before, after, batch: loss_drop.loss_drop(CONFIG, before, after, batch),
        (PARAMS, PARAMS, BATCH),
    ),
    "recall.output_recall": (recall.output_recall, (WEIGHTS,)),
    "recall.previous_recall": (recall.previous_recall, (WEIGHTS, QUERIES)),
    "recall.match_recall": (recall.match_recall, (ROTARY, array(3, dtype=np.int32))),
    "alignment.covariance_root": (alignment.covariance_root, (ROWS_OF_PROMPTS.qk, AT)),
    "alignment.gain": (alignment.gain, (array(CLASSES, 8), LAYER_CIRCUIT)),
    "alignment.trace": (
        lambda x, circuit, y: alignment.trace(x, circuit, y=y),
        (array(CLASSES, 8), LAYER_CIRCUIT, array(CLASSES, 8)),
    ),
    "alignment.rotation_z": (alignment.rotation_z, (array(H), array(CLASSES, 8), array(CLASSES, 8))),
    "alignment.top_overlap": (alignment.top_overlap, (array(CLASSES, 8), array(H, 8, 2))),
    "alignment.of_classes": (
        lambda changes, was, root, circuits, key: alignment.of_classes(
            changes, was, was, CLASSES, root, circuits, None, 1, key, 3
        ),
        (CHANGE, AT, array(L, 8, 8), CIRCUIT, KEY),
    ),
    "alignment.of_classes, both sides": (
        lambda changes, was, root, circuits, other, sign, key: alignment.of_classes(
            changes, was, was, CLASSES, root, circuits, other, sign, key, 3
        ),
        (CHANGE, AT, array(L, 8, 8), CIRCUIT, array(L, CLASSES, 8), array(dtype=np.int32), KEY),
    ),
    "alignment.preference": (
        lambda scores, reading, contrast, root, asked, key: alignment.preference(
            scores, reading, contrast, root, asked, key, 3
        ),
        (array(L, H, B, T), array(L, H, B, 8), CHANGE, array(L, 8, 8), ASKED, KEY),
    ),
    "alignment.against": (alignment.against, (array(dtype=np.int32), SHARE, array(L, 5, H), array(L, 5, H))),
    "alignment.nothing": (lambda: alignment.nothing((L, H)), ()),
    "alignment.upper_share": (alignment.upper_share, (SHARE, array(L, 5, H))),
    "role_rows.read_rows": (role_rows.read_rows, (WEIGHTS, array(B, L, T, 8))),
    "role_rows.at": (role_rows.at, (ROWS_OF_PROMPTS.qk, AT)),
    "role_rows.words_up_to": (lambda query: role_rows.words_up_to(query, T), (AT,)),
    "role_rows.others": (lambda asked: role_rows.others(asked, T), (ASKED,)),
    "role_rows.contrasts": (role_rows.contrasts, (ROWS_OF_PROMPTS.qk, ASKED)),
    "role_rows.frame_means": (role_rows.frame_means, (CHANGE, AT, AT)),
    "role_rows.class_effects": (
        lambda changes, was, becomes: role_rows.class_effects(changes, was, becomes, CLASSES),
        (CHANGE, AT, AT),
    ),
    "role_rows.class_answers": (role_rows.class_answers, (array(8, V), QUESTIONS.answers)),
    "role_rows.other_classes": (role_rows.other_classes, (AT,)),
    "role_effects.attention_between": (role_effects.attention_between, (SEEN, AT, AT)),
    "role_effects.with_other_query": (role_effects.with_other_query, (ROTARY, ROWS_OF_PROMPTS.qk, AT, CHANGE)),
    "role_effects.with_other_key": (role_effects.with_other_key, (ROTARY, ROWS_OF_PROMPTS.qk, AT, AT, CHANGE)),
    "role_effects.with_other_value": (role_effects.with_other_value, (WEIGHTS, array(B, L, H), CHANGE)),
    "role_effects.query_scores": (role_effects.query_scores, (ROTARY, CHANGE, AT, ROWS_OF_PROMPTS.qk)),
    "role_effects.swapped": (role_effects.swapped, (array(L, CLASSES, 8), AT, AT)),
    "role_effects.last_residual": (role_effects.last_residual, (SEEN, JUDGED)),
    "role_effects.readers": (
        role_effects.readers,
        (WEIGHTS, array(B, 8), array(B, 2, dtype=np.int32), array(B, 2, dtype=np.int32)),
    ),
    "role_effects.with_scores": (
        lambda p, watched, added, place: role_effects.with_scores(
            CONFIG, p, role_effects.Watched(*watched), added, place
        ),
        (PARAMS, WATCHED, array(B, T), HEAD_PLACE),
    ),
    "role_effects.with_output": (
        lambda p, watched, output, place: role_effects.with_output(
            CONFIG, p, role_effects.Watched(*watched), output, place
        ),
        (PARAMS, WATCHED, array(B, 8), HEAD_PLACE),
    ),
    "role_effects.blocked": (lambda key: role_effects.blocked(T, key), (AT,)),
    "role_structure.structure": (
        lambda weights, known, change, asked, key: role_structure.structure(
            weights, known, *[role_structure.Changes(change, change, change)] * 2, asked, 3, key
        ),
        (ROTARY, ROWS_OF_PROMPTS, CHANGE, QUESTIONS, KEY),
    ),
    "role_evidence.stream": (
        lambda params, tokens: role_evidence.stream(CONFIG, params, tokens),
        (PARAMS, BATCH.tokens),
    ),
    "role_evidence.role_structures": (
        lambda params, prompts, key: role_evidence.role_structures(CONFIG, params, prompts, key, 3),
        (PARAMS, PROMPTS, KEY),
    ),
    "role_evidence.role_behaviours": (
        lambda params, prompts, places: role_evidence.role_behaviours(CONFIG, params, prompts, places),
        (PARAMS, PROMPTS, array(3, 2, dtype=np.int32)),
    ),
    "published.published_scores": (
        lambda params, names, key: published.published_scores(CONFIG, params, names, 0, key),
        (PARAMS, array(3, dtype=np.int32), KEY),
    ),
    "IOI.sample": (IOI.sample, (NAMES, KEY)),
    "IOI.with_other_io": (IOI.with_other_io, (NAMES, NAMED, KEY)),
    "IOI.with_other_s": (IOI.with_other_s, (NAMES, NAMED, KEY)),
    "IOI.with_orders_swapped": (IOI.with_orders_swapped, (NAMES, NAMED)),
    "IOI.unrelated": (IOI.unrelated, (NAMES, NAMED, KEY)),
    "IOI.halves": (IOI.halves, (NAMES,)),
    "IOI.changed": (lambda task, one, key: task.changed(one, "s_name", key), (NAMES, NAMED, KEY)),
    "Agreement.sample": (Agreement.sample, (NUMBERS, KEY)),
    "Agreement.with_other_number": (Agreement.with_other_number, (NUMBERS, NUMBERED)),
    "Agreement.with_other_attractor": (Agreement.with_other_attractor, (NUMBERS, NUMBERED)),
    "Agreement.with_other_noun": (Agreement.with_other_noun, (NUMBERS, NUMBERED, KEY)),
    "Agreement.halves": (Agreement.halves, (NUMBERS,)),
    "Agreement.changed": (lambda task, one, key: task.changed(one, "noun", key), (NUMBERS, NUMBERED, KEY)),
    "trajectory.behaviour": (
        lambda params, batch, changes: trajectory.behaviour(CONFIG, params, batch, changes),
        (PARAMS, BATCH, CHANGES),
    ),
    "trajectory.weight_signatures": (
        lambda params, queries, n: trajectory.weight_signatures(CONFIG, params, queries, n),
        (PARAMS, QUERIES, array()),
    ),
    "batch.sample_batch": (
        lambda task, key, step: batch.sample_batch(task, key, step, B),
        (SWEPT_TASK, KEY, array(dtype=np.int32)),
    ),
}

# Where a CPU takes its eigenvalues from LAPACK, JAX cannot lower for all platforms in one export, only for each alone.
EIGENVALUES = {
    "LowRank.eigenvalues": (cj.LowRank.eigenvalues, (CIRCUIT,)),
    "LowRank.eigenvectors": (cj.LowRank.eigenvectors, (CIRCUIT,)),
    "TokenCircuit.eigenvalues": (cj.TokenCircuit.eigenvalues, (TOKEN_CIRCUIT,)),
    "eigenvalues": (cj.eigenvalues, (SQUARE,)),
    "eigenvectors": (cj.eigenvectors, (SQUARE,)),
    "spectral_null": (cj.spectral_null, (CIRCUIT, KEY)),
    "summarize": (cj.summarize, (CIRCUIT,)),
    "copying_score": (cj.copying_score, (WEIGHTS,)),
    "matching_score": (cj.matching_score, (WEIGHTS,)),
    "value_scores.value_scores": (value_scores.value_scores, HEAD),
    "structure.structure": (
        lambda weights, queries, key: structure.structure(weights, queries, key, n_draws=3),
        (WEIGHTS, QUERIES, KEY),
    ),
    "type_evidence.ov_evidence": (
        type_evidence.ov_evidence,
        (STRUCTURE.weights, array(L, H, V, 4), RELAYED, SHARE, STRUCTURE.null, SHARE),
    ),
    "realisation.realisation": (
        lambda params, found, queries, key: realisation.realisation(CONFIG, params, found, queries, key, 2),
        (PARAMS, STRUCTURE, QUERIES, KEY),
    ),
    "taxonomy.evidence": (
        lambda params, queries, key: taxonomy.evidence(CONFIG, params, queries, key),
        (PARAMS, QUERIES, KEY),
    ),
    "comparison.scores_of_heads": (
        lambda weights, queries, key: comparison.scores_of_heads(weights, queries, 3.0, key, None),
        (WEIGHTS, QUERIES, KEY),
    ),
    "portraits.portrait": (
        lambda circuit, rows, means: portraits.portrait(
            circuit, *[portraits.Dictionary(rows, {"number": means})] * 2, n=2, k=3
        ),
        (CIRCUIT, ROWS, array(CLASSES, 8)),
    ),
    "evidence.from_spectra": (lambda params: evidence.from_spectra(CONFIG, params), (PARAMS,)),
    "evidence.everything": (
        lambda params, batch, queries, key: evidence.everything(CONFIG, params, batch, queries, 3.0, key),
        (PARAMS, BATCH, QUERIES, KEY),
    ),
}
# Public functions that cannot be jitted, and why.
NOT_JITTABLE = {
    "load_pretrained": "reads files",
    "load_tokenizer": "reads files",
    "position_wise.initializer": "a function of keys, for Linen",
    "outcomes.check_metric": "raises on a config, returns nothing",
    "signatures.usual_distractors": "a Python number",
    "Agreement.validate": "raises on plain numbers, returns nothing",
    "GaussianExemplars.validate": "raises on plain numbers, returns nothing",
    "IOI.validate": "raises on plain numbers, returns nothing",
    "MarkovChains.validate": "raises on plain numbers, returns nothing",
    "ParentGraph.validate": "raises on plain numbers, returns nothing",
    "RepeatedTokens.validate": "raises on plain numbers, returns nothing",
    "Text.validate": "raises on plain numbers, returns nothing",
    "TriggerBigrams.validate": "raises on plain numbers, returns nothing",
    "trigger_bigrams.bigrams_of_text": "counts on the host",
    "agreement.agreement_tokenized": "asks a tokenizer",
    "agreement.agreement_words": "asks a tokenizer",
    "ioi.ioi_tokenized": "asks a tokenizer",
    "ioi.ioi_words": "asks a tokenizer",
    "wording.padded": "NumPy on the host",
    "wording.single_tokens": "asks a tokenizer",
    "wording.slotted_templates": "asks a tokenizer",
    "wording.word_encode": "words",
    "wording.word_vocabulary": "words",
    "text.compact": "NumPy on the host",
    "text.installed_documentation": "reads files",
    "text.read_files": "reads files",
    "text.split": "NumPy on the host",
    "setting.columns": "a list of settings to NumPy arrays",
    "setting.grid": "settings to a list of settings",
    "composition.over_layer_pairs": "takes functions; composition_scores and relays lower it",
    "planted_recipes.recipes": "takes names, returns recipes of plain numbers",
    "classify_heads": "makes reports on the host; taxonomy.evidence is what runs on a device",
    "classify_weights": "makes reports on the host; structure.structure is what runs on a device",
    "agreement": "correlations on the host",
    "Circuit.heads": "names",
    "Circuit.nodes": "names",
    "circuit_of": "NumPy on the host",
    "cut": "names to NumPy on the host",
    "discover": "asks edge by edge from the host; edge_sets.value_of is what runs on a device",
    "discover_by_attribution": "asks sizes from the host; attribute_edges and edge_sets.value_of run on a device",
    "discover_greedy": "repeats discovery._prune from the host; test_discovery lowers that",
    "edge_names": "names",
    "edge_sets.as_sets": "checks NumPy arrays",
    "edge_sets.ends": "NumPy on the host",
    "edge_sets.flat": "NumPy on the host",
    "edge_sets.shares": "NumPy on the host",
    "edge_sets.values_of": "one program for each chunk, from the host; edge_sets.value_of is what runs on a device",
    "faithfulness": "one program for each chunk, from the host; edge_sets.value_of is what runs on a device",
    "graph.existing": "NumPy on the host",
    "graph.full": "NumPy on the host",
    "graph.head_senders": "NumPy on the host",
    "graph.index_of": "names",
    "graph.n_read": "plain Python on a config",
    "graph.receivers": "names",
    "graph.senders": "names",
    "outcomes.check_chunk": "raises on a plain number, returns nothing",
    "interventions.batch_axes": "checks shapes, returns the axes of vmap",
    "interventions.check": "raises on shapes, returns nothing",
    "interventions.n_senders": "plain Python on a config",
    "keep_only": "names to NumPy on the host",
    "quality": "asks sets of edges from the host; edge_sets.value_of is what runs on a device",
    "Recipe.reads": "plain Python on a recipe",
    "Recipe.works": "plain Python on a recipe",
    "claim_verdicts.behaviour": "NumPy on the host",
    "claim_verdicts.clearest": "NumPy on the host",
    "claim_verdicts.falls": "NumPy on the host",
    "claim_verdicts.half_evidence": "picks from NumPy arrays",
    "claim_verdicts.interval": "NumPy on the host",
    "claim_verdicts.joins": "a Python bool",
    "claim_verdicts.judge": "NumPy on the host",
    "claim_verdicts.least": "a Python number",
    "claim_verdicts.least_p_against": "NumPy on the host",
    "claim_verdicts.lost": "NumPy on the host",
    "claim_verdicts.moved": "NumPy on the host",
    "claim_verdicts.of_role": "picks from NumPy arrays",
    "claim_verdicts.summed_up": "names",
    "claim_verdicts.truth": "NumPy on the host",
    "claims.load_claim": "reads files",
    "claims.places_in": "checks a tuple",
    "claims.shipped": "names of files",
    "published.compared": "NumPy on the host",
    "role_edges.edge_evidence": "makes a list on the host, pair by pair; alignment.of_classes runs on a device",
    "role_evidence.check_model": "raises on a config and tokens, returns nothing",
    "taxonomy.judge": "NumPy on the host",
    "taxonomy.judge_stacked": "NumPy on the host",
    "taxonomy.reports": "makes reports on the host",
    "taxonomy.sides": "picks thresholds, plain numbers, on the host",
}


def export(entry, platforms):
    function, arguments = entry
    return jax.export.export(jax.jit(function), platforms=platforms)(*arguments)


@pytest.mark.parametrize("name", TABLE)
def test_lowers_for_every_platform(name):
    assert export(TABLE[name], ALL).platforms == ALL


@pytest.mark.parametrize("platform", ALL)
@pytest.mark.parametrize("name", EIGENVALUES)
def test_eigenvalues_lower_for(name, platform):
    assert export(EIGENVALUES[name], (platform,)).platforms == (platform,)


def functions_of(owner):
    """Public functions that a module or class itself defines, also jitted and static ones."""
    members = {name: inspect.unwrap(getattr(owner, name)) for name in vars(owner) if not name.startswith("_")}
    inside = owner.__name__ if inspect.isclass(owner) else ""
    return {
        name
        for name, value in members.items()
        if inspect.isroutine(value) and value.__qualname__ == f"{inside}.{name}".lstrip(".")
        if value.__module__ == (owner.__module__ if inside else owner.__name__)
    }


def test_every_public_function_is_in_the_table():
    public = {name for name in cj.__all__ if not inspect.isclass(getattr(cj, name))}
    classes = [getattr(cj, name) for name in cj.__all__ if inspect.isclass(getattr(cj, name))]
    modules = [
        agreement, alignment, attention, attribution, batch, circuit_quality, claim_verdicts, claims,
        comparison, composition, composition_evidence, designed, direct_effects, directions, discovery,
        edge_effects, edge_sets, effects, eigenvalues, eigenvectors, evidence, gaussian_exemplars, graph,
        ideal_inputs, interventions, ioi, loss_drop, low_rank, markov_chains, nulls, orthonormalisation,
        outcomes, parent_graph, patching, paths, patterns, planted, planted_recipes, portraits, position_wise,
        published, reading, realisation, recall, residual, role_edges, role_effects, role_evidence, role_rows,
        role_structure, rotary, setting, signatures, spectra, structure, taxonomy, text, token_space,
        trajectory, trigger_bigrams, type_evidence, value_scores, wording,
    ]  # fmt: skip
    tasks = (Agreement, GaussianExemplars, IOI, MarkovChains, ParentGraph, RepeatedTokens, Text, TriggerBigrams)
    for owner in (*classes, *tasks, *modules):
        short = owner.__name__.rsplit(".", 1)[-1]
        public |= {f"{short}.{name}" for name in functions_of(owner) if name not in cj.__all__}
    assert {"LowRank.svd", "CircuitWeights.from_params", "patterns.induction", "forward"} <= public
    covered = TABLE.keys() | EIGENVALUES.keys() | NOT_JITTABLE.keys()
    assert public - covered == set()
    assert NOT_JITTABLE.keys() - public == set()
