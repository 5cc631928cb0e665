"""Every weight-only score of one model beside every causal effect, for each head and each edge between heads."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.composition import composition_scores, projection_kernel
from circuits_jax.circuits.spectra import copying_score, effective_rank, matching_score, symmetry
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import edge_effects, effects, patterns, signatures
from circuits_jax.heads.attribution import attribute_edges
from circuits_jax.heads.composition_evidence import composition_evidence
from circuits_jax.heads.direct_effects import direct_target_logits
from circuits_jax.heads.outcomes import frozen_patterns, induction_attention, log_likelihood, run
from circuits_jax.heads.structure import structure
from circuits_jax.heads.type_evidence import Scores
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import n_senders
from circuits_jax.models.transformer import Activations, Params
from circuits_jax.tasks.batch import Batch

INTEGRATION_STEPS = 8


def scores_of_heads(
    weights: CircuitWeights, queries: Array, n_distractors: float, key: Array, bos: int | None
) -> Scores:
    """{name: [L,H]} from weights alone: the structural scores of all types, spectra, norms, and K-edges summed up."""
    predicted = signatures.induction(weights, queries, n_distractors)
    heads, circuits = ov(weights), qk(weights)
    types = structure(weights, queries, key, bos=bos).evidence.scores
    return {f"type: {name.replace('_', ' ')}": score for name, score in types.items()} | {
        "eigenvalues: copying": copying_score(weights),
        "eigenvalues: matching": matching_score(weights),
        "OV norm": heads.frobenius_norm(),
        "QK norm": circuits.frobenius_norm(),
        "OV effective rank": effective_rank(heads.singular_values()),
        "QK symmetry": symmetry(circuits),
        "predicted induction attention": predicted.attention,
        "predicted fall, all K-edges cut": predicted.joint_edges,
        "largest predicted fall of a later head": predicted.edges.max((-2, -1)),
    }


def scores_of_edges(weights: CircuitWeights, queries: Array, n_distractors: float, key: Array) -> dict[str, Scores]:
    """{"q", "k", "v": {name: [L,H,L,H]}} from weights alone, sender first; what only K-edges have is under "k".

    "Frobenius product" is the composition score without its denominator, ||W_OV^a W_QK^b|| and so on: what the norms of
    the two heads add.
    """
    frobenius, kernel = composition_scores(weights), projection_kernel(weights)
    against = composition_evidence(weights, key).z_rotation
    sent, scored = ov(weights).frobenius_norm(), qk(weights).frobenius_norm()
    out = {
        name: {
            "Frobenius composition": getattr(frobenius, name),
            "Frobenius product": sent[:, :, None, None] * getattr(frobenius, name) * (sent if name == "v" else scored),
            "Frobenius z": getattr(against, name),
            "projection kernel": getattr(kernel, name),
        }
        for name in graph.INPUTS
    }
    gap = signatures.k_composition(weights)
    looks_back = signatures.previous_token(weights, queries)[:, :, None, None]
    out["k"] |= {
        "diagonal gap": gap,
        "gap x previous token": looks_back * gap,
        "predicted fall": signatures.induction(weights, queries, n_distractors).edges,
    }
    return out


def effects_of_heads(config: TransformerConfig, params: Params, batch: Batch) -> Scores:
    """{name: [L,H]}: what is lost without a head, and for the direct logit what it adds itself.

    "loss, once another head is gone": the most that ablating a second head adds to what ablating a first one costs,
    for the best choice of the first. "induction attention of another head": the largest fall of any.
    """
    _, seen = run(config, params, batch)
    pairs = effects.ablate_pairs(config, params, batch)
    heads, shape = effects.single_heads(config), (config.n_layers, config.n_heads)
    mean = seen.head_outputs.mean(0)
    others = effects.ablate(config, params, batch, heads, induction_attention).reshape(*shape, *shape)
    last = (*shape, -1)
    backed_up = (pairs.joint - pairs.single[:, :, None, None]).reshape(-1, *shape)  # b given that a is gone
    away = ~jnp.eye(len(heads), dtype=bool).reshape(-1, *shape)
    return {
        "loss, zero ablation": pairs.single,
        "loss, mean ablation": effects.ablate(config, params, batch, heads, reference=mean).reshape(shape),
        "loss, patterns frozen": effects.ablate(config, params, batch, heads, within=frozen_patterns(seen)).reshape(
            shape
        ),
        "loss, once another head is gone": jnp.where(away, backed_up, -jnp.inf).max(0),
        "direct logit of the target": direct_target_logits(config, params, batch),
        "induction attention of another head": others.reshape(last).max(-1),
    }


def of_receivers(logits: Array, seen: Activations, batch: Batch) -> Scores:
    """What a cut edge may change in the receiving head itself, {name: [L,H,...]}."""
    front = lambda x: jnp.moveaxis(x, 0, 2)  # noqa: E731
    return {
        "induction": induction_attention(logits, seen, batch),
        "scores": front(seen.scores),
        "patterns": front(seen.patterns),
        "outputs": front(seen.head_outputs),
    }


def effects_of_edges(config: TransformerConfig, params: Params, batch: Batch) -> tuple[dict[str, Scores], Scores]:
    """{"q", "k", "v": {name: [L,H,L,H]}}, sender first, and what all senders together are to a receiver, {name: [L,H]}.

    "loss": rise when the edge is cut. "own induction attention": fall of the receiver's. "own attention": mean total
    variation distance between its patterns. "own output": change of what it writes over what it wrote, root mean
    squares. "own scores": root mean square change of its scores in logits, each query's mean taken off. "attribution",
    "integrated gradients": estimates of "loss".
    """
    n_layers, n_heads, length = config.n_layers, config.n_heads, batch.tokens.shape[1]
    shape = (n_layers, n_heads, n_layers, n_heads)
    one = np.eye(n_senders(config), dtype=bool)[graph.head_senders(config).ravel()]
    sets = np.concatenate([one, one.any(0)[None]])
    cuts = edge_effects.cut_senders(config, params, batch, log_likelihood, sets, own=of_receivers)
    _, whole = run(config, params, batch)
    allowed = jnp.tril(jnp.ones((length, length)))
    n_keys = allowed.sum(-1, keepdims=True)

    def rms(x: Array) -> Array:
        return jnp.sqrt(jnp.square(x).mean((-3, -2, -1)))

    changed = jnp.where(allowed == 1, cuts.own["scores"], 0.0)
    centred = allowed * (changed - changed.sum(-1, keepdims=True) / n_keys)
    written = rms(jnp.moveaxis(whole.head_outputs, 0, 2))
    of_receiver = {
        "own induction attention": cuts.own["induction"],
        "own attention": jnp.abs(cuts.own["patterns"]).sum(-1).mean((-2, -1)) / 2,
        "own output": rms(cuts.own["outputs"]) / jnp.maximum(written, 1e-9),
        "own scores": jnp.sqrt(jnp.square(centred).sum((-3, -2, -1)) / (len(batch.tokens) * n_keys.sum())),
    }
    estimates = {
        name: graph.between_heads(config, attribute_edges(config, params, batch, n_steps=n_steps))
        for name, n_steps in (("attribution", 0), ("integrated gradients", INTEGRATION_STEPS))
    }
    single, joint = {}, {}
    for i, name in enumerate(graph.INPUTS):
        rise = getattr(cuts.total, name)
        single[name] = {"loss": rise[:-1].reshape(shape)}
        single[name] |= {what: value[i, :-1].reshape(shape) for what, value in of_receiver.items()}
        single[name] |= {what: value[i] for what, value in estimates.items()}
        joint[f"all {name} cut: loss"] = rise[-1]
        joint[f"all {name} cut: own induction attention"] = of_receiver["own induction attention"][i, -1]
    return single, joint


def conditions(config: TransformerConfig, params: Params, batch: Batch) -> Scores:
    """What a head does on the batch, {name: [L,H]}: to tell why weights and effects disagree.

    "gain": |o| / (|x| |W_OV| / sqrt(D)), root mean squares of what the head writes and of what its layer reads: 1 for
    inputs of random directions at one position, more for those that the head reads, near 0 for those that it does not.
    "focus": 1 minus its normalised entropy. "induction": its induction attention.
    """
    logits, seen = run(config, params, batch)
    read = jnp.sqrt(jnp.square(seen.residual[:, :-1]).mean((0, 2, 3))) if config.norm == "none" else 1.0
    norms = ov(CircuitWeights.from_params(config, params)).frobenius_norm() / math.sqrt(config.d_model)
    wanted = jnp.broadcast_to(read, config.n_layers)[:, None] * jnp.maximum(norms, 1e-12)
    of_head = partial(patterns.entropy, causal=config.causal)
    entropy = jax.vmap(jax.vmap(jax.vmap(of_head, (0, None)), (0, None)))(seen.patterns, batch.mask)
    return {
        "gain": jnp.sqrt(jnp.square(seen.head_outputs).mean((0, 3, 4))) / wanted,
        "focus": 1.0 - jnp.nanmean(entropy, 0),
        "induction": induction_attention(logits, seen, batch),
    }
