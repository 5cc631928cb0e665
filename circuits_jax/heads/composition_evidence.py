"""Composition scores held against what they would be if the heads had nothing to do with each other."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.composition import CompositionScores, composition_scores, same_layer_scores
from circuits_jax.circuits.spectra import participation_ratio
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads.nulls import norm_matched


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompositionEvidence:
    """Each field has q, k, v [L,H,L,H], the sending head first, NaN where the sender is not in an earlier layer.

    Attributes:
        score: composition_scores.
        excess: score - 1/sqrt(D), the score of unrelated heads of flat spectra.
        z_rotation: (score^2 - 1/D) / its standard deviation when the residual space between these very two heads is
            turned at random; exact, and the only null that keeps both spectra. See rotation_deviation.
        z_random: score against all pairs of norm-matched Gaussian heads in such layers.
        z_same_layer: score against all pairs of different heads in one layer of this model, which cannot compose;
            NaN with one head a layer.
    """

    score: CompositionScores
    excess: CompositionScores
    z_rotation: CompositionScores
    z_random: CompositionScores
    z_same_layer: CompositionScores


def composition_evidence(weights: CircuitWeights, key: Array, n_draws: int = 8) -> CompositionEvidence:
    """Composition scores of all pairs of heads with three nulls.

    Args:
        weights: of the model.
        key: for the random heads.
        n_draws: models of norm-matched random heads.

    What it establishes: that a pair shares more of the residual stream than unrelated heads would. A large z is neither
    a large score nor an effect on the model: two heads of one trained model share its few strong directions anyway,
    which is what z_same_layer takes off and z_rotation does not.
    """
    n_layers, n_heads, d_model, _ = weights.W_Q.shape
    earlier = jnp.tri(n_layers, k=-1, dtype=bool).T[:, None, :, None]
    scores = jax.tree.map(lambda x: jnp.where(earlier, x, jnp.nan), composition_scores(weights))
    draws = jax.lax.map(lambda draw: composition_scores(norm_matched(weights, draw)), jax.random.split(key, n_draws))
    different = ~jnp.eye(n_heads, dtype=bool)

    def standardised(score: Array, null: Array, counts: Array) -> Array:
        counts = jnp.broadcast_to(counts, null.shape)
        return (score - null.mean(where=counts)) / null.std(where=counts)

    sent = participation_ratio(ov(weights).singular_values())
    wants = participation_ratio(qk(weights).singular_values())
    deviation = CompositionScores(
        *(rotation_deviation(sent[:, :, None, None], reads, d_model) for reads in (wants, wants, sent))
    )
    return CompositionEvidence(
        score=scores,
        excess=jax.tree.map(lambda x: x - d_model**-0.5, scores),
        z_rotation=jax.tree.map(lambda x, std: (x * x - 1 / d_model) / std, scores, deviation),
        z_random=jax.tree.map(lambda x, null: standardised(x, null, earlier), scores, draws),
        z_same_layer=jax.tree.map(lambda x, null: standardised(x, null, different), scores, same_layer_scores(weights)),
    )


def rotation_deviation(ratio_a: Array, ratio_b: Array, d_model: int) -> Array:
    """Standard deviation of (||A O B|| / (||A|| ||B||))^2 over random rotations O of D >= 2 dimensions.

    With the participation ratios p = (sum sigma^2)^2 / sum sigma^4 of A and B, its mean is 1/D and its variance

        2 (D/p_a - 1) (D/p_b - 1) / (D^2 (D - 1) (D + 2)),

    from the second moments of the squared entries of a random orthogonal matrix (3, 1 and (D + 1)/(D - 1) over
    D (D + 2) for the same entry, the same row or column, and neither; Collins & Sniady math-ph/0402073).
    """
    variance = 2 * (d_model / ratio_a - 1) * (d_model / ratio_b - 1) / float(d_model**2 * (d_model - 1) * (d_model + 2))
    return jnp.sqrt(jnp.maximum(variance, 0.0))
