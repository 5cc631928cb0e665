"""What weights say of a claimed role: (A) to (D) and (F) of science.md 28.

Structural: what heads would do with such inputs, not that inputs make them do it. Directions are taken where the heads
read them, on prompts that are not judged, and once more as the embedding alone holds them: a head may be built for what
an earlier one has erased.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.reading import keys, mean_over_offsets, queries
from circuits_jax.circuits.weights import CircuitWeights, per_query_head
from circuits_jax.heads import alignment
from circuits_jax.heads.alignment import Aligned
from circuits_jax.heads.role_effects import query_scores
from circuits_jax.heads.role_rows import Questions, Rows, at, class_answers, class_effects, contrasts, frame_means

TOP = 4  # singular directions that count as the leading ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Structure:
    """Of a role, every head.

    Attributes:
        preference: for the key over what it is held against, in logits.
        matching: (C) trace of W_QK between the classes at the query and at the key; zeros, p 1 for roles without.
        moves: (F) trace of W_OV between the classes at the key and the unembedding of their answers; of roles that do
            not move them to the logits, the gain of W_OV for the classes.
        gain: (A) [L,H] of W_QK for what sets the key apart, read at the key.
        overlap: (B) [L,H] in [0, 1], the share of what sets the key apart within the TOP leading key directions.
        top_share: (D) [L,H] the share of x_q W_QK (x_k - x_other)^T that the TOP leading components give.
    """

    preference: Aligned
    matching: Aligned
    moves: Aligned
    gain: Array
    overlap: Array
    top_share: Array


@dataclasses.dataclass(frozen=True)
class Changes:
    """What changes in what layers read from one sentence of each pair to the other, [L,B,D]: at query, key, value."""

    query: Array
    key: Array
    value: Array


def structure(
    weights: CircuitWeights, known: Rows, matched: Changes, moved: Changes, questions: Questions, n_draws: int,
    key: Array,
) -> Structure:  # fmt: skip
    """Of one role. Rotary positions: W_QK is that of the mean offset from key to query; preferences are exact.

    Args:
        weights: of the model.
        known: what layers read on known prompts.
        matched, moved: what changes between pairs.
        questions: without R.
        n_draws: of each null.
        key: draws the nulls.
    """
    null_keys, asked, n_classes = jax.random.split(key, 3), questions.known, len(questions.answers)
    qk_root, v_root = (alignment.covariance_root(rows, asked.query) for rows in (known.qk, known.v))
    offset = jnp.round((asked.query - asked.key).mean()).astype(int)
    circuits, writes = qk(weights, offset), ov(weights)

    asking = at(known.qk, asked.query)
    q = mean_over_offsets(weights, queries(weights, asking), offset[None]) / weights.W_Q.shape[-1] ** 0.5
    q = q * _key_scale(weights, at(known.qk, asked.key))
    reading = einsum("lhbk,lhdk->lhbd", q, per_query_head(weights, weights.W_K))
    contrast = frame_means(contrasts(known.qk, asked), asked.frame, asked.frame)
    scores = query_scores(weights, asking, asked.query, known.qk)

    classes = questions.matched.was, questions.matched.becomes
    # What varies at the key is what the head moves from there; the classes of the query match it or avoid it.
    at_key = class_effects(moved.key, questions.moved.was, questions.moved.becomes, n_classes)
    answers = jnp.broadcast_to(class_answers(weights.W_U, questions.answers), at_key.shape)
    compare = partial(alignment.of_classes, n_classes=n_classes, n_draws=n_draws)
    match = partial(compare, matched.query, *classes, root=qk_root, circuits=circuits)
    move = partial(compare, moved.value, questions.moved.was, questions.moved.becomes, root=v_root, circuits=writes)

    svd = circuits.svd()
    by_component = einsum("lbd,lhdr->lbhr", asking, svd.U) * svd.S[:, None]
    by_component = (by_component * einsum("lbd,lhrd->lbhr", contrast, svd.Vh)).mean(1)
    whole = by_component.sum(-1)
    return Structure(
        preference=alignment.preference(scores, reading, contrast, qk_root, asked, null_keys[0], n_draws),
        # Each draw of a null costs as much as the statistic: only those that the role asks for are computed.
        matching=jax.lax.cond(
            questions.matches,
            lambda: match(other=at_key, sign=questions.matching_sign, key=null_keys[1]),
            lambda: alignment.nothing(weights.W_Q.shape[:2]),
        ),
        moves=jax.lax.cond(
            questions.to_logits,
            lambda: move(other=answers, sign=questions.sign, key=null_keys[2]),
            lambda: move(other=None, sign=1, key=null_keys[2]),
        ),
        gain=jax.vmap(alignment.gain)(contrast, circuits.T),
        overlap=jax.vmap(alignment.top_overlap)(contrast, svd.Vh[..., :TOP, :].mT),
        top_share=by_component[..., :TOP].sum(-1) / jnp.where(whole == 0, 1.0, whole),
    )


def _key_scale(weights: CircuitWeights, rows: Array) -> Array:
    """What qk-norm multiplies keys of rows [L,B,D] by, at the size that they have: [L,H,B,1]; 1 without qk-norm."""
    if weights.k_gain is None:
        return jnp.ones(())
    with_norm, without = (
        jnp.linalg.norm(keys(w, rows), axis=-1, keepdims=True)
        for w in (weights, dataclasses.replace(weights, k_gain=None))
    )
    return with_norm / jnp.where(without == 0, 1.0, without)
