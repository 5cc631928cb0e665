"""Does what a sender moves get through to the input of a receiver? Edges of a claim, asked of composed circuits.

For a sender head s and a receiver head r of a later layer, X the effects of the classes that s moves, as values read
them at its key, and the statistics and nulls of alignment.of_classes:

    q    W_OV^s W_QK^r, and Y what the classes that r moves change at its key, for keys of its layer
    k    W_OV^s (W_QK^r)^T, and Y what the classes that r matches change at its query
    v    W_OV^s W_OV^r, and Y the answers of the classes; the gain of X, where r moves them to others than the logits

Norms and qk-norm between the two are left out, which changes lengths only. Rotary positions: W_QK is that of the mean
offset of the receiver's role.

Establishes that what goes the direct way from s to r keeps the classes joined (apart, for a sign of -1), by weights.
Neither how much of what r reads that is, as the size of the product is divided out, nor that inputs make it happen.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import alignment
from circuits_jax.heads.alignment import Aligned
from circuits_jax.heads.claim_verdicts import RATE
from circuits_jax.heads.claims import Claim, Input
from circuits_jax.heads.nulls import benjamini_hochberg
from circuits_jax.heads.role_evidence import check_model, stream
from circuits_jax.heads.role_rows import Pairs, Prompts, Questions, Rows, at, class_answers, class_effects, read_rows
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params

STATISTICS = ("value", "covariance_p", "label_p", "rotation_p", "z")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ends:
    """What R roles have to offer as senders and as receivers.

    Attributes:
        known: [L,B,T,D] what values read of known prompts.
        moved: [R,L,B,D] what changes at the key, as values read it, between the pairs of what is moved.
        at_key: [R,L,C,D] effects of the classes of what is moved at the key, as keys read them.
        at_query: [R,L,C,D] effects of the classes of what is matched at the query.
        answers: [R,C,D] unembedding of the classes of what is moved.
    """

    known: Array
    moved: Array
    at_key: Array
    at_query: Array
    answers: Array


def edge_evidence(
    config: TransformerConfig, params: Params, claim: Claim, prompts: Prompts, key: Array, n_draws: int = 999
) -> list[dict[str, Any]]:
    """Every pair of heads that an edge of the claim joins, the receiver in a later layer.

    Args:
        config, params: the model: a decoder with pre-norm or without norms.
        claim: whose edges.
        prompts: of the claim's roles, in their order; the known ones and the pairs are looked at.
        key: draws the nulls.
        n_draws: of each null. No p is below 1 / (1 + n_draws): where k of M pairs are to be found, at least 20 M / k.

    Returns:
        For each pair sender and receiver ("7.3"), sender_role and receiver_role, input, sign, and STATISTICS as in
        Aligned; supported, where label_p, and of traces rotation_p too, stand at a false discovery rate of RATE over
        all pairs.

    Raises:
        ValueError: bad tokens, a post-norm model or an encoder, or a head that the model has not.
    """
    check_model(config, prompts)
    pairs = [
        (edge, sender, receiver)
        for edge in claim.edges
        for sender in claim.places(edge.sender, config.n_layers, config.n_heads)
        for receiver in claim.places(edge.receiver, config.n_layers, config.n_heads)
        if receiver[0] > sender[0]
    ]
    if not pairs:
        return []
    weights, questions = CircuitWeights.from_params(config, params), prompts.questions
    ends = _ends(config, params, prompts)
    number = {role: r for r, role in enumerate(claim.roles)}
    of_senders = {(number[edge.sender], sender[0]) for edge, sender, _ in pairs}
    roots = {of: _root(ends.known, questions.known.query, *of) for of in sorted(of_senders)}
    rows = []
    for (edge, sender, receiver), pair_key in zip(pairs, jax.random.split(key, len(pairs)), strict=True):
        s, r = number[edge.sender], number[edge.receiver]
        found = _aligned(
            edge.input, n_draws, weights, ends, questions, (s, *sender), (r, *receiver), roots[s, sender[0]],
            edge.sign, pair_key,
        )  # fmt: skip
        rows.append(
            {
                "sender": f"{sender[0]}.{sender[1]}",
                "sender_role": edge.sender,
                "receiver": f"{receiver[0]}.{receiver[1]}",
                "receiver_role": edge.receiver,
                "input": edge.input,
                "sign": edge.sign,
                **{name: float(getattr(found, name)[0, 0]) for name in STATISTICS},
            }
        )
    joins = [edge.input != "v" or claim.roles[edge.receiver].to == "logits" for edge, *_ in pairs]
    p = [max(row["label_p"], row["rotation_p"] * joined) for row, joined in zip(rows, joins, strict=True)]
    supported = benjamini_hochberg(jnp.array(p), RATE)
    return [row | {"supported": bool(yes)} for row, yes in zip(rows, np.asarray(supported), strict=True)]


@partial(jax.jit, static_argnums=0)
def _ends(config: TransformerConfig, params: Params, prompts: Prompts) -> Ends:
    weights = CircuitWeights.from_params(config, params)

    def rows_of(tokens: Array) -> Rows:
        return read_rows(weights, stream(config, params, tokens))

    def of_role(asked: Questions) -> tuple[Array, ...]:
        def effects(pairs: Pairs, changes: Array) -> Array:
            return class_effects(changes, pairs.was, pairs.becomes, len(asked.answers))

        moved, matched = (
            jax.tree.map(jnp.subtract, rows_of(pairs.after), rows_of(pairs.before))
            for pairs in (asked.moved, asked.matched)
        )
        return (
            at(moved.v, asked.moved.key),
            effects(asked.moved, at(moved.qk, asked.moved.key)),
            effects(asked.matched, at(matched.qk, asked.matched.query)),
            class_answers(weights.W_U, asked.answers),
        )

    return Ends(rows_of(prompts.known.tokens).v, *jax.lax.map(of_role, prompts.questions))


@jax.jit
def _root(rows: Array, query: Array, role: int, layer: int) -> Array:
    """Root of the covariance [1,D,D] of what a layer reads, rows [L,B,T,D], up to the query of a role, [R,B]."""
    return alignment.covariance_root(rows[layer][None], query[role])


@partial(jax.jit, static_argnums=(0, 1))
def _aligned(
    through: Input, n_draws: int, weights: CircuitWeights, ends: Ends, questions: Questions,
    sender: tuple[int, int, int], receiver: tuple[int, int, int], root: Array, sign: int, key: Array,
) -> Aligned:  # fmt: skip
    """Of one pair, [1,1]; sender and receiver are (role, layer, head), not static, so that one program serves all."""
    (s, *sends), (r, *receives) = sender, receiver
    asked = jax.tree.map(lambda x: x[r], questions.known)
    scores = qk(weights, jnp.round((asked.query - asked.key).mean()).astype(int))
    reads = {"q": scores, "k": scores.T, "v": ov(weights)}[through]
    compare = partial(
        alignment.of_classes, ends.moved[s, sends[0]][None], questions.moved.was[s], questions.moved.becomes[s],
        ends.answers.shape[1], root, (ov(weights)[*sends] @ reads[*receives])[None, None], key=key, n_draws=n_draws,
    )  # fmt: skip
    if through == "v":
        return jax.lax.cond(
            questions.to_logits[r],
            lambda: compare(other=ends.answers[r][None], sign=sign),
            lambda: compare(other=None, sign=1),
        )
    other = ends.at_key if through == "q" else ends.at_query
    return compare(other=other[r, receives[0]][None], sign=sign)
