"""Evidence from weights alone for every type of head, all heads at once: scores, each against its null.

No data and no forward pass: heads are asked about ideal inputs, and so are the same heads rotated at random in the
residual stream (as nulls.random_rotation does), which keeps their spectra and loses all that ties them to the model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import reading
from circuits_jax.circuits.attention import visible_offsets
from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.orthonormalisation import triangle
from circuits_jax.circuits.weights import CircuitWeights, per_query_head
from circuits_jax.heads import ideal_inputs as ideal
from circuits_jax.heads import nulls, patterns, signatures
from circuits_jax.heads.ideal_inputs import IdealInputs
from circuits_jax.heads.type_evidence import (
    Evidence,
    Scores,
    above_chance_profiles,
    against,
    ov_evidence,
    positional_scores,
    relay_scores,
    written_length,
)
from circuits_jax.heads.value_scores import (
    concentration,
    logit_circuit,
    map_sharpness,
    token_match,
)
from circuits_jax.models.transformer import attend

SOURCE_MARGIN = 1.25  # by which what a sender brings has to exceed what the embedding does
N_OFFSETS = 4  # of rotary positions, at which tokens are scored to see what tokens and positions decide together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Structure:
    """What weights say, and what evidence from activations takes from it.

    Attributes:
        evidence: from weights.
        ids: [n] the tokens that were asked about.
        weights: with W_E and W_U cut down to them.
        inputs: that the heads were asked about.
        null: {score: [N,L,H]} of rotated heads.
    """

    evidence: Evidence
    ids: Array
    weights: CircuitWeights
    inputs: IdealInputs
    null: Scores


def structure(
    weights: CircuitWeights, queries: Array, key: Array, n_tokens: int = 64, n_draws: int = 256, bos: int | None = None
) -> Structure:
    """Asks every head about every type.

    Args:
        weights: of the model.
        queries: [T] bool, the positions that count for positional types; T is the length to ask about.
        key: draws tokens and nulls.
        n_tokens: of the vocabulary, at random, through which it is seen; all of a smaller one.
        n_draws: rotations of the null.
        bos: start token, if sequences begin with one.
    """
    token_key, row_key, null_key = jax.random.split(key, 3)
    start = None if bos is None else weights.W_E[bos]
    ids = sample_tokens(token_key, len(weights.W_E), n_tokens, bos)
    weights = cut_to_tokens(weights, ids)
    inputs = _inputs(weights, queries, start, row_key)
    null = _null(weights, inputs, queries, null_key, n_draws)
    evidence = qk_evidence(weights, inputs, queries, null) | _ov_structure(weights, inputs, null)
    return Structure(evidence, ids, weights, inputs, null)


def sample_tokens(key: Array, n_vocab: int, n_tokens: int, bos: int | None) -> Array:
    """n distinct token ids other than bos; all of them, in order, where there are no more than n."""
    ids = jnp.asarray([i for i in range(n_vocab) if i != bos])
    return ids if len(ids) <= n_tokens else jax.random.choice(key, ids, (n_tokens,), replace=False)


def cut_to_tokens(weights: CircuitWeights, ids: Array) -> CircuitWeights:
    """The same heads with n tokens of the vocabulary."""
    b_u = None if weights.b_U is None else weights.b_U[ids]
    return dataclasses.replace(weights, W_E=weights.W_E[ids], W_U=weights.W_U[:, ids], b_U=b_u)


def _inputs(weights: CircuitWeights, queries: Array, start: Array | None, key: Array) -> IdealInputs:
    """Ideal inputs; what earlier heads would write is counted by how much they look back or for copies."""
    length = len(queries)
    rows = ideal.position_inputs(weights, length, start)
    tokens = ideal.token_inputs(weights, length)
    profile, _ = _profiles(weights, reading.position_scores(weights, rows, rows), queries)
    by_token = reading.token_scores(weights, tokens, tokens, visible_offsets(length, weights.causal))
    copies = _matching(by_token, signatures.usual_distractors(weights, length), 2)
    return ideal.ideal_inputs(weights, length, jnp.clip(profile[..., 1], 0.0), jnp.clip(copies, 0.0), start, key)


# --- query-key side ---


def qk_evidence(weights: CircuitWeights, inputs: IdealInputs, queries: Array, null: Scores) -> Evidence:
    """Of all QK types.

    Details: offset of fixed_offset; by_k: induction by K-composition, else by a pointer; token_energy, position_energy:
    mean squares of double-centred scores in logits between tokens, and between positions.
    """
    length = len(queries)
    offsets, n_distractors = visible_offsets(length, weights.causal), signatures.usual_distractors(weights, length)
    by_token = reading.token_scores(weights, inputs.tokens, inputs.tokens, offsets)
    of_parts = ideal.at_size_of(weights, inputs.mixed)
    by_sent = reading.token_scores(of_parts, inputs.tokens, inputs.sent, offsets)
    # A pointer at j asks for the key at j + 1.
    by_pointer = reading.token_scores(of_parts, inputs.pointers[:, :-1], inputs.places[1:], offsets)
    through_k, through_q = (_matching(x, n_distractors, 1) for x in (by_sent, by_pointer))
    by_k = through_k >= through_q
    mixed = attend(reading.position_scores(weights, inputs.mixed, inputs.mixed), weights.causal)
    scores, offset = _positional_and_content(weights, queries, inputs, inputs)
    z = {name: against(score, null[name]) for name, score in scores.items()}
    scores["content"] = scores["content"] - null["content"].mean(0)
    # Whatever the tokens: among mean tokens all queries of a token head share one favourite key, by chance the first.
    among_all = above_chance_profiles(mixed, queries, weights.causal)[1]
    scores["first_token"] = jnp.minimum(scores["first_token"], among_all)
    everywhere = jnp.ones(length, bool)
    entropy = jax.vmap(jax.vmap(lambda pattern: patterns.entropy(pattern, everywhere, weights.causal)))(mixed)
    scores |= {
        "duplicate_token": _matching(by_token, n_distractors, 2),
        "induction": jnp.maximum(through_k, through_q),
        "diffuse": entropy,
    }
    z |= {
        "duplicate_token": nulls.diagonal_z(by_token),
        "induction": jnp.where(by_k, nulls.diagonal_z(by_sent), nulls.diagonal_z(by_pointer)),
        "diffuse": jnp.full_like(entropy, jnp.inf),
    }
    energy = lambda table: jnp.square(signatures.double_centred(table)).mean((-2, -1))  # noqa: E731
    by_position = reading.position_scores(weights, inputs.positions, inputs.positions)
    split = {"token_energy": energy(by_token), "position_energy": energy(by_position)}
    return Evidence(scores, z, {"offset": offset, "by_k": by_k, **split})


def _profiles(weights: CircuitWeights, scores: Array, queries: Array) -> tuple[Array, Array]:
    """Above-chance offset profile [L,H,T] and first-token attention [L,H] of softmax(scores [L,H,T,T])."""
    return above_chance_profiles(attend(scores, weights.causal), queries, weights.causal)


def _positional_and_content(
    weights: CircuitWeights, queries: Array, asking: IdealInputs, asked: IdealInputs
) -> tuple[Scores, Array]:
    """Of query rows against key rows, which are the same inputs unless heads are rotated."""
    by_position = reading.position_scores(weights, asking.positions, asked.positions)
    offsets = visible_offsets(len(queries), weights.causal)
    by_token = reading.token_scores(weights, asking.tokens, asked.tokens, offsets)
    scores, offset = positional_scores(*_profiles(weights, by_position, queries))
    share = jax.vmap(jax.vmap(signatures.content))
    scores["content"] = share(by_token, by_position, _cross_energy(weights, by_token, asking, asked))
    return scores, offset


def _cross_energy(weights: CircuitWeights, by_token: Array, asking: IdealInputs, asked: IdealInputs) -> Array:
    """What tokens and positions decide together, [L,H]; with rotary positions, how token scores change with offset."""
    length = asking.positions.shape[-2]
    between = jax.vmap(jax.vmap(signatures.energy_between_different))
    if weights.positions == "rotary":
        at = lambda offset: between(reading.token_scores(weights, asking.tokens, asked.tokens, offset[None]))  # noqa: E731
        offsets = visible_offsets(length, weights.causal)
        energy = jax.lax.map(at, offsets[jnp.arange(N_OFFSETS) * len(offsets) // N_OFFSETS]).mean(0)
        return jnp.maximum(energy - between(by_token), 0.0)
    pairs = ((asking.tokens, asked.positions), (asking.positions, asked.tokens))
    nowhere = jnp.zeros(1, int)
    tables = (reading.token_scores(weights, x, y, nowhere) for x, y in pairs)
    return sum((jnp.square(signatures.double_centred(x)).mean((-2, -1)) for x in tables), jnp.zeros(()))


def _matching(scores: Array, n_distractors: float, n_matches: int) -> Array:
    """signatures.matching of [L,H,n,n]: [L,H]."""
    return jax.vmap(jax.vmap(lambda x: signatures.matching(x, n_distractors, n_matches)))(scores)


# --- output-value side ---


def _ov_structure(weights: CircuitWeights, inputs: IdealInputs, null: Scores) -> Evidence:
    token_values = reading.values(weights, inputs.tokens)
    sent_on = relay_scores(weights, inputs, token_values, reading.values(weights, inputs.places))
    source = _source(sent_on.v.norm / inputs.embedded_size, token_match(token_values, weights.W_O, weights.W_U).norm)
    moved = _through(weights, inputs, token_values, source)
    lengths = written_length(reading.values(weights, inputs.mixed_values), weights.W_O)
    size = jnp.sqrt(jnp.square(lengths).mean(-1)) / inputs.raw_size[:, None]
    evidence = ov_evidence(weights, moved, sent_on, size, null, jnp.ones_like(size))
    return dataclasses.replace(evidence, details=evidence.details | {"source": source})


def _source(through: Array, direct: Array) -> Array:
    """Flat place of the earlier head through which a head gets the tokens that it moves; -1: from the embedding.

    Whichever makes the larger logit table, with a margin, because a head that turns what it copies around makes a
    virtual head as strong as the direct one.

    Args:
        through: [L,H,L,H] norm of the table of a virtual head.
        direct: [L,H] of the head's own.
    """
    n_layers, n_heads = direct.shape
    through = through.reshape(n_layers * n_heads, n_layers, n_heads)
    return jnp.where(through.max(0) > SOURCE_MARGIN * direct, through.argmax(0), -1)


def _through(weights: CircuitWeights, inputs: IdealInputs, token_values: Array, source: Array) -> Array:
    """Value vectors of tokens [L,H,n,K], those with a source as the source sends them."""
    sent = matmul(token_values, weights.W_O).reshape(-1, *inputs.tokens.shape)[jnp.maximum(source, 0)]
    size = inputs.embedded_size
    arrived = matmul(sent / size, per_query_head(weights, weights.W_V))
    return jnp.where(source[..., None, None] < 0, token_values, arrived)


# --- null ---


def _null(weights: CircuitWeights, inputs: IdealInputs, queries: Array, key: Array, n_draws: int) -> Scores:
    """Scores of rotated heads, [N,L,H] each.

    W = Q R becomes F R with a random frame F [D,K] (see nulls.random_rotation), and rows are turned instead of heads:
    x (F R) = (x F) R. So a draw costs K x K matrices, whatever D.
    """
    sides = (weights.W_Q, weights.W_K, weights.W_V, weights.W_O.mT)
    core_q, core_k, core_v, core_o = (triangle(side) for side in sides)
    heads = dataclasses.replace(weights, W_Q=core_q, W_K=core_k, W_V=core_v, W_O=core_o.mT)
    d_model, d_head = weights.W_Q.shape[-2:]

    def draw(key: Array) -> Scores:
        shape = (4, d_model, min(d_model, d_head))
        frame_key, gaussian_key = jax.random.split(key)
        for_q, for_k, for_v, for_o = nulls.random_frames(frame_key, shape, weights.W_Q.dtype)
        asking, asked = (
            dataclasses.replace(inputs, tokens=matmul(inputs.tokens, frame), positions=matmul(inputs.positions, frame))
            for frame in (for_q, for_k)
        )
        turned = dataclasses.replace(heads, W_U=matmul(for_o.mT, weights.W_U))
        moved = reading.values(turned, matmul(inputs.tokens, for_v))
        table = logit_circuit(moved, turned.W_O, turned.W_U)
        return {
            **_positional_and_content(turned, queries, asking, asked)[0],
            "mapping": map_sharpness(matmul(table.left, table.right)),
            "extracting": _concentration_of_random_head(weights, inputs, gaussian_key),
        }

    return jax.lax.map(draw, jax.random.split(key, n_draws))


def _concentration_of_random_head(weights: CircuitWeights, inputs: IdealInputs, key: Array) -> Array:
    """value_scores.concentration of a Gaussian head, []: rotation keeps the spectrum that extracting is about."""
    value_key, output_key = jax.random.split(key)
    d_model, d_head = weights.W_Q.shape[-2:]
    w_v, w_o = jax.random.normal(value_key, (d_model, d_head)), jax.random.normal(output_key, (d_head, d_model))
    return concentration(matmul(inputs.tokens, w_v), w_o)
