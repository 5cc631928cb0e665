"""Evidence from activations for every type of head: what it does on designed inputs, by the names of structure.py.

A positional type has to show on random tokens, repeats, few letters and text alike: the least of the four counts, so
that neither a small alphabet nor a periodic sequence can fake one.
"""

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.reading import normalized
from circuits_jax.circuits.weights import CircuitWeights, per_query_head
from circuits_jax.heads import patterns
from circuits_jax.heads.ideal_inputs import added_to
from circuits_jax.heads.signatures import additive_diagonal, double_centred
from circuits_jax.heads.structure import Structure
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
from circuits_jax.heads.value_scores import Matches, Relays, centred
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Activations, Params, apply
from circuits_jax.tasks.designed import DesignedInputs, designed_inputs

ATTENDED_AT_LEAST = 1e-3  # what a position counts for that nobody attends to, so that every token has values


def realisation(
    config: TransformerConfig,
    params: Params,
    found: Structure,
    queries: Array,
    key: Array,
    n_sequences: int = 64,
    bos: int | None = None,
) -> Evidence:
    """What every head does on designed inputs.

    Args:
        config, params: the model.
        found: its structure; the tokens asked about are those of the designed inputs.
        queries: [T] bool, the positions that count for positional types.
        key: draws the inputs.
        n_sequences: of each kind.
        bos: start token, if sequences begin with one.
    """
    inputs = designed_inputs(key, found.ids, len(queries), n_sequences, bos)
    weights = CircuitWeights.from_params(config, params)

    def run(tokens: Array) -> Activations:
        with jax.default_matmul_precision("highest"):
            return jax.vmap(lambda sequence: apply(config, params, sequence)[1])(tokens)

    tokens = jnp.stack([inputs.random, inputs.repeats, inputs.few_letters, inputs.text])
    seen = jax.lax.map(lambda batch: _kept(run(batch)), tokens)
    placed = jax.lax.map(lambda batch: run(batch).scores, jnp.moveaxis(inputs.placed, 1, 0))
    qk = _qk_evidence(found, inputs, tokens, seen[0], placed, queries, bos is not None)
    return qk | _ov_evidence(weights, found, tokens, *seen)


def _kept(seen: Activations) -> tuple[Array, Array]:
    return seen.patterns, seen.residual[:, :-1]


def on_own_batch(config: TransformerConfig, params: Params, tokens: Array) -> Scores:
    """Above-chance attention scores [L,H] on sequences of the user's own [B,T], for every type that attention shows.

    A token type counts only queries whose targets no simpler head would hit: none of them directly in front of the
    query or at position 0. NaN where no query is left. Periods of the batch can still fake one type by another, which
    is why labels rest on designed inputs.
    """
    length = tokens.shape[-1]
    everywhere, place = jnp.ones(length, bool), jnp.arange(length)
    simple = (place == place[:, None] - 1) | (place == 0)

    def of_sequence(sequence: Array) -> tuple[tuple[Array, Array, Array], dict[str, tuple[Array, ...]]]:
        with jax.default_matmul_precision("highest"):
            pattern = apply(config, params, sequence)[1].patterns
        even = jax.vmap(jax.vmap(lambda x: patterns.entropy(x, everywhere, config.causal)))(pattern)
        return (*above_chance_profiles(pattern, everywhere, config.causal), even), {
            name: on_targets(pattern, targets_of(sequence)) for name, targets_of in TARGETS.items()
        }

    def on_targets(pattern: Array, targets: Array) -> tuple[Array, ...]:
        """Sums over the queries that count: attention to their targets [L,H], chance, and how many they are."""
        counts = targets.any(-1) & ~(targets & simple).any(-1)
        hit = einsum("lhts,ts->lht", pattern, targets.astype(pattern.dtype))
        chance = targets.sum(-1) / patterns.n_visible(length, config.causal)
        return hit.sum(-1, where=counts), chance.sum(where=counts), counts.sum()

    # One sequence after the other: those of a user may be long.
    (profile, first, even), sums = jax.lax.map(of_sequence, tokens)
    scores, _ = positional_scores(profile.mean(0), first.mean(0))
    for name, of_sequences in sums.items():
        hit, chance, n_queries = (x.sum(0) for x in of_sequences)
        scores[name] = patterns.above_chance(hit / n_queries, chance / n_queries)
    return scores | {"diffuse": even.mean(0)}


# --- query-key side ---


def _qk_evidence(
    found: Structure, inputs: DesignedInputs, tokens: Array, pattern: Array, placed: Array, queries: Array, bos: bool
) -> Evidence:
    """Of all QK types.

    Args:
        found: structure of the model.
        inputs: designed.
        tokens: [4,B,T] random, repeats, few letters, text.
        pattern: [4,B,L,H,T,T] attention on them.
        placed: [2,B,L,H,T,T] scores on the same tokens in two orders.
        queries: [T].
        bos: whether position 0 holds a start token.
    """
    means, causal = pattern.mean(1), found.weights.causal
    profile, first = above_chance_profiles(means, queries, causal)
    scores, offset = positional_scores(profile.min(0), first.min(0))
    z = positional_z(means.mean(0), queries, offset, causal)

    repeats, letters = (pattern[1], inputs.repeats), (pattern[2], inputs.few_letters)
    scores["duplicate_token"] = jnp.minimum(
        _token_score("duplicate_token", *repeats, causal), _token_score("duplicate_token", *letters, causal)
    )
    scores["induction"] = _token_score("induction", *repeats, causal)
    z |= {name: _shuffled_z(name, *repeats) for name in ("duplicate_token", "induction")}

    share = content_share(placed, jnp.moveaxis(inputs.placed, 1, 0), found.ids, int(bos))
    scores["content"] = share - found.null["content"].mean(0)
    z["content"] = against(share, found.null["content"])
    everywhere = jnp.ones(len(queries), bool)
    flat = pattern.reshape(-1, *pattern.shape[-2:])
    entropy = jax.vmap(lambda x: patterns.entropy(x, everywhere, causal))(flat)
    scores["diffuse"] = entropy.reshape(pattern.shape[:-2]).mean(1).min(0)
    z["diffuse"] = jnp.full_like(scores["diffuse"], jnp.inf)
    return Evidence(scores, z, {"offset": offset})


def positional_z(mean_pattern: Array, queries: Array, offset: Array, causal: bool = True) -> Scores:
    """How far attention to the target stands out when the keys of every query are dealt out at random, [...] each.

    Over permutations of the n keys that query t can see, the attention to its target has mean 1/n and the variance of
    the row; rows are independent. Exact for the first two moments. Query 0 does not count.

    Args:
        mean_pattern: [...,T,T] averaged over sequences.
        queries: [T] bool.
        offset: [...] of fixed_offset; its z is not corrected for having been chosen.
        causal: whether a query sees no later key.
    """
    place = jnp.arange(len(queries))
    chance = 1.0 / patterns.n_visible(len(queries), causal)
    variance = jnp.square(mean_pattern).sum(-1) * chance - chance**2

    def z(target: Array) -> Array:
        counts = queries & (target >= 0) & (place > 0)
        hit = jnp.where(place == target[..., None], mean_pattern, 0.0).sum(-1)
        excess = jnp.sum(hit - chance, -1, where=counts)
        spread = jnp.sqrt(jnp.sum(jnp.maximum(variance, 0.0), -1, where=counts))
        return jnp.where(spread < 1e-6, 0.0, excess / jnp.where(spread == 0, 1.0, spread))

    return {
        "previous_token": z(place - 1),
        "fixed_offset": z(place - offset[..., None]),
        "first_token": z(jnp.zeros_like(place)),
        "same_position": z(place),
    }


TARGETS = {"duplicate_token": patterns.earlier_copies, "induction": patterns.after_copies}


def _token_score(name: str, pattern: Array, tokens: Array, causal: bool = True) -> Array:
    """Above-chance score of a type that looks for tokens, on patterns [B,L,H,T,T]: [L,H]."""
    even = patterns.uniform(tokens.shape[-1], causal)
    attention, chance = _on_targets(name, pattern, tokens), _on_targets(name, even, tokens)
    return patterns.above_chance(attention.mean(0), chance.mean())


def _shuffled_z(name: str, pattern: Array, tokens: Array) -> Array:
    """Mean over its standard error of attention to own targets less that to the targets of another sequence, [L,H]."""
    less = _on_targets(name, pattern, tokens) - _on_targets(name, pattern, jnp.roll(tokens, 1, 0))
    error = less.std(0, ddof=1) / jnp.sqrt(len(tokens))
    return less.mean(0) / jnp.maximum(error, 1e-6)


def _on_targets(name: str, pattern: Array, tokens: Array) -> Array:
    """Mean attention to the targets over the queries that have any: patterns [B,...,T,T] -> [B,...]; 0 without any."""
    targets = jax.vmap(TARGETS[name])(tokens)
    asked = targets.any(-1)
    flat = pattern.ndim == 2
    hit = einsum("ts,bts->bt" if flat else "blhts,bts->blht", pattern, targets.astype(pattern.dtype))
    counts = asked if flat else asked[:, None, None]
    return jnp.sum(hit * counts, -1) / jnp.maximum(counts.sum(-1), 1)


def content_share(scores: Array, tokens: Array, ids: Array, first: int) -> Array:
    """signatures.content of real scores, [L,H] in [0, 1).

    The same tokens stand in two orders. Of double-centred scores, what is the same for the same two tokens wherever
    they stand is their own (the mean product of the two orders, unbiased); the rest is of positions, of both, of
    context.

    Args:
        scores: [2,B,L,H,T,T] before softmax.
        tokens: [2,B,T], distinct, or each of the ids where there are fewer than T of them; then one place of each.
        ids: [n] that tokens come from.
        first: the first position that counts.
    """
    scores, tokens = scores[..., first:, first:], tokens[..., first:]
    few = len(ids) < tokens.shape[-1]
    order = jnp.argmax(tokens[..., None] == ids, 2) if few else jnp.argsort(tokens, -1)
    rows = jnp.take_along_axis(scores, order[:, :, None, None, :, None], -2)
    aligned = jnp.take_along_axis(rows, order[:, :, None, None, None, :], -1)
    other = ~jnp.eye(order.shape[-1], dtype=bool)
    one, two = double_centred(additive_diagonal(aligned))
    of_tokens = jnp.mean(one * two, (0, -2, -1), where=other)
    total = jnp.mean((jnp.square(one) + jnp.square(two)) / 2, (0, -2, -1), where=other)
    return jnp.maximum(of_tokens, 0.0) / (total + 1.0)


# --- output-value side ---


def _ov_evidence(weights: CircuitWeights, found: Structure, tokens: Array, pattern: Array, residual: Array) -> Evidence:
    """Of all OV types, from the values that attended positions really had.

    Args:
        weights: of the model.
        found: its structure.
        tokens: [4,B,T].
        pattern: [4,B,L,H,T,T].
        residual: [4,B,L,T,D] in front of each layer.
    """
    tokens, pattern, residual = (x.reshape(-1, *x.shape[2:]) for x in (tokens, pattern, residual))
    read = einsum("bltd,lhdk->blhtk", normalized(weights, residual), weights.W_V)
    values = jnp.moveaxis(per_query_head(weights, jnp.moveaxis(read, 0, 2)), 2, 0)
    attended = pattern.mean(-2) + ATTENDED_AT_LEAST  # [B,L,H,T], of a position as key
    holds = (tokens[..., None] == found.ids).astype(values.dtype)  # [B,T,n]
    content = _content(holds, pattern, found.evidence.details["source"])
    halves = [mean_values(values[half::2], attended[half::2], content[half::2]) for half in (0, 1)]
    moved = (halves[0] + halves[1]) / 2
    own = mean_values(values, attended, jnp.broadcast_to(holds[:, None, None], content.shape))
    at_places = [_at_places(values[half::2], attended[half::2]) for half in (0, 1)]
    place_values = jnp.where(jnp.any(found.inputs.places != 0), (at_places[0] + at_places[1]) / 2, 0.0)

    lengths = written_length(values, weights.W_O)
    written = jnp.sqrt(jnp.sum(jnp.square(lengths) * attended, (0, -1)) / attended.sum((0, -1)))
    size = written / jnp.sqrt(jnp.square(added_to(weights, residual)).sum(-1).mean((0, -1)))[:, None]
    of_tokens, of_places = (agreement(one, two, weights.W_O) for one, two in (halves, at_places))
    sent_on = relay_scores(found.weights, found.inputs, own, place_values)
    sent_on = Relays(_times(sent_on.q, of_places), _times(sent_on.k, of_tokens), _times(sent_on.v, of_tokens))
    return ov_evidence(found.weights, moved, sent_on, size, found.null, of_tokens)


def _content(holds: Array, pattern: Array, source: Array) -> Array:
    """Which token the value at a position is about, [B,L,H,T,n]: its own, or what the head's source attends to."""
    n_layers, n_heads = source.shape
    flat = pattern.reshape(len(pattern), n_layers * n_heads, *pattern.shape[-2:])
    brought = einsum("bhts,bsn->bhtn", flat[:, jnp.maximum(source.ravel(), 0)], holds)
    brought = brought.reshape(len(pattern), n_layers, n_heads, *holds.shape[-2:])
    return jnp.where(source[..., None, None] < 0, holds[:, None, None], brought)


def _times(matches: Matches, reliability: Array) -> Matches:
    return jax.tree.map(lambda x: x * reliability[..., None, None], matches)


def _at_places(values: Array, attended: Array) -> Array:
    """Value vector of each position, [L,H,T,K]: the mean over sequences by attention."""
    return einsum("blhtk,blht->lhtk", values, attended) / attended.sum(0)[..., None]


def agreement(one: Array, two: Array, w_o: Array) -> Array:
    """Cosine, not below 0, of what two sets of value vectors [...,n,K] write, means removed: [...].

    Of two halves of the data: 1 where tokens decide the values, 0 where chance does.
    """
    gram = matmul(w_o, w_o.mT)
    inner = lambda x, y: einsum("...nk,...kj,...nj->...", centred(x), gram, centred(y))  # noqa: E731
    size = jnp.sqrt(inner(one, one) * inner(two, two))
    return jnp.maximum(inner(one, two), 0.0) / jnp.where(size > 0, size, 1.0)


def mean_values(values: Array, attended: Array, content: Array) -> Array:
    """Value vector of each token, [L,H,n,K]: the mean over positions by attention and by how much they are about it.

    Args:
        values: [B,L,H,T,K].
        attended: [B,L,H,T].
        content: [B,L,H,T,n].
    """
    weight = content * attended[..., None]
    total = weight.sum((0, 3))
    overall = einsum("blhtk,blht->lhk", values, attended) / attended.sum((0, 3))[..., None]
    mean = einsum("blhtn,blhtk->lhnk", weight, values) / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.where(total[..., None] == 0, overall[:, :, None], mean)
