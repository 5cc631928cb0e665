"""What evidence from weights and evidence from activations share: its form, its nulls, the scores that both take."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import norm

from circuits_jax.circuits import reading
from circuits_jax.circuits.attention import visible_offsets
from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import nulls, patterns
from circuits_jax.heads.ideal_inputs import IdealInputs, at_size_of
from circuits_jax.heads.value_scores import Relays, relays, token_match, value_scores

FEWEST_QUERIES = 4  # that make a rule of an offset and not an accident
Scores = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """Scores of every head for every type, and how they compare with their null.

    Attributes:
        scores: {type: [L,H]}, larger for more of it; what each means stands in signatures, patterns, value_scores.
        z: {type: [L,H]}, against the null; infinite for diffuse and inactive, which mean what they measure.
        details: {name: [L,H]} what else one wants to know of a head: see qk_evidence and ov_evidence.
    """

    scores: Scores
    z: Scores
    details: Scores

    def __or__(self, other: "Evidence") -> "Evidence":
        """Both together."""
        return Evidence(self.scores | other.scores, self.z | other.z, self.details | other.details)


def against(score: Array, draws: Array) -> Array:
    """z of a score against N draws [N,...], by their mean and deviation; by rank where draws reach the score.

    A null with a long tail (all keys are somebody's favourite now and then, position 0 too) has draws far beyond what
    its deviation suggests. Where n of N are at least as large as the score, z is at most that of p = (n + 1) / (N + 2).
    """
    z = nulls.z_score(score, nulls.Null(draws))
    draws = draws.reshape(len(draws), *(1,) * (score.ndim + 1 - draws.ndim), *draws.shape[1:])
    reached = jnp.sum(draws >= score, 0)
    by_rank = norm.isf((reached + 1) / (len(draws) + 2))
    return jnp.where(reached > 0, jnp.minimum(z, by_rank), z)


def positional_scores(profile: Array, first: Array) -> tuple[Scores, Array]:
    """Scores of the positional types, and the offset of the best fixed_offset, [...] each.

    Args:
        profile: [...,T] above-chance patterns.offset_profile.
        first: [...] above-chance patterns.first_token.

    Offsets beyond T // 2 have too few queries to tell a rule from an accident.
    """
    longest = profile.shape[-1] // 2
    further = jnp.where(jnp.isfinite(profile), profile, -1.0)[..., 2 : longest + 1]
    scores = {
        "previous_token": profile[..., 1],
        "fixed_offset": further.max(-1),
        "first_token": first,
        "same_position": profile[..., 0],
    }
    return scores, further.argmax(-1) + 2


def above_chance_profiles(pattern: Array, queries: Array, causal: bool = True) -> tuple[Array, Array]:
    """Above-chance offset profile [...,T] and first-token attention [...] of patterns [...,T,T], causal or not.

    NaN at offsets with fewer than FEWEST_QUERIES queries.
    """
    length = len(queries)
    even = patterns.uniform(length, causal)
    enough = jnp.cumsum(queries[::-1])[::-1] >= FEWEST_QUERIES

    def above(score: Callable[[Array, Array], Array]) -> Array:
        flat = jax.vmap(lambda x: score(x, queries))(pattern.reshape(-1, *pattern.shape[-2:]))
        return patterns.above_chance(flat, score(even, queries)).reshape(*pattern.shape[:-2], *flat.shape[1:])

    return jnp.where(enough, above(patterns.offset_profile), jnp.nan), above(patterns.first_token)


def ov_evidence(
    weights: CircuitWeights, moved: Array, sent_on: Relays, size: Array, null: Scores, reliability: Array
) -> Evidence:
    """Of all OV types.

    Args:
        weights: of the model, cut to n tokens.
        moved: [L,H,n,K] value vectors of the tokens.
        sent_on: what later heads read of what heads write.
        size: [L,H] length of what is written, relative to the residual stream.
        null: of rotated heads.
        reliability: [L,H] in [0, 1] of measured value vectors of tokens; what they say counts by it.

    Returns:
        Evidence with details reader: flat place [0, L H) of the later head that reads most of what the head writes,
        -1 where transforming rests on the head's own logits; reading_path: 0, 1, 2 for its q, k, v; size.
    """
    scored = jax.tree.map(lambda x: x * reliability, value_scores(moved, weights.W_O, weights.W_U))
    match_z = token_match(moved, weights.W_O, weights.W_U).z * reliability
    relay, relay_z, path, reader = _best_relay(sent_on)
    by_relay = relay > scored.mapping
    endless = jnp.full_like(size, jnp.inf)
    return Evidence(
        scores={
            "copying": scored.copying,
            "suppressing": -scored.copying,
            "transforming": jnp.where(by_relay, relay, scored.mapping),
            "extracting": scored.extracting,
            "inactive": -jnp.log10(jnp.maximum(size, 1e-9)),
        },
        z={
            "copying": match_z,
            "suppressing": -match_z,
            "transforming": jnp.where(by_relay, relay_z, against(scored.mapping, null["mapping"])),
            "extracting": against(scored.extracting, null["extracting"]),
            "inactive": endless,
        },
        details={"reader": jnp.where(by_relay, reader, -1), "reading_path": path, "size": size},
    )


def relay_scores(weights: CircuitWeights, inputs: IdealInputs, token_values: Array, place_values: Array) -> Relays:
    """value_scores.relays with what later heads match: token queries and the keys of positions."""
    offsets = visible_offsets(inputs.places.shape[-2], weights.causal)
    of_parts = at_size_of(weights, inputs.mixed)
    token_queries = reading.mean_over_offsets(weights, reading.queries(of_parts, inputs.tokens), offsets)
    return relays(of_parts, token_values, place_values, token_queries, reading.keys(of_parts, inputs.places))


def written_length(values: Array, w_o: Array) -> Array:
    """||v W_O|| of value vectors [...,n,K]: [...,n]."""
    return jnp.sqrt(jnp.maximum(einsum("...nk,...nk->...n", matmul(values, matmul(w_o, w_o.mT)), values), 0.0))


def _best_relay(sent_on: Relays) -> tuple[Array, Array, Array, Array]:
    """Over paths and later heads: cosine [L,H], its z corrected for the number of pairs looked at, path, reader."""
    n_layers, n_heads = sent_on.k.cosine.shape[:2]
    pick = lambda name: jnp.stack([getattr(x, name) for x in (sent_on.q, sent_on.k, sent_on.v)], 2)  # noqa: E731
    flat = (n_layers, n_heads, 3 * n_layers * n_heads)
    cosine, z = (pick(name).reshape(flat) for name in ("cosine", "z"))
    best = cosine.argmax(-1)
    n_pairs = 3 * n_heads * (n_layers - 1 - jnp.arange(n_layers))[:, None]
    one_z = jnp.take_along_axis(z, best[..., None], -1)[..., 0]
    corrected = norm.isf(jnp.minimum(norm.sf(one_z) * n_pairs, 0.5))
    return cosine.max(-1), corrected, best // (n_layers * n_heads), best % (n_layers * n_heads)
