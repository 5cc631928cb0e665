"""Scores of single heads as the literature reports them of GPT-2 small: Wang et al. 2022, arXiv 2211.00593.

Copying, of a name n, by weights. With x the residual stream after block 0, its MLP included, at n in [bos, n]:

    z = norm((norm(x) W_V + b_V) W_O) W_U           logits z + b_U, or -z + b_U for the negative score

A head copies n if fewer than TOP other logits are as high as that of n; the score is the share of names. The head
attends to n alone, and what else the model writes is left out.

The trap: x is not the embedding (in GPT-2 the first MLP is part of how a token is represented), and has passed one norm
where the head reads it, whatever the head's layer. Heads of layer 0 never read x; their scores are of no use but to the
mean over heads, of which the literature speaks too.

Previous token, duplicate token, induction: heads/patterns.py on [bos, r, r], r distinct random tokens.

Copying establishes what a head would write if it attended to a name, not that it attends; the three others what it
attends to where nothing but repetition can be seen, not what for.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.reading import normalized, values
from circuits_jax.circuits.token_space import top_share
from circuits_jax.circuits.weights import CircuitWeights, per_query_head
from circuits_jax.heads import patterns
from circuits_jax.heads.claims import AVERAGE, Published, Score, places_in
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Activations, Params, apply, check_tokens

TOP = 5  # logits, of which a copied name's is one
PERIOD = 50  # tokens of r, or as many as the model has room for
N_SEQUENCES = 16


def published_scores(
    config: TransformerConfig, params: Params, names: ArrayLike, bos: int, key: Array
) -> dict[Score, Array]:
    """Every score of every head.

    Args:
        config, params: the model: a decoder with pre-norm or without norms.
        names: int [n] tokens that heads may copy.
        bos: the token in front of every sequence.
        key: draws the random tokens.

    Returns:
        {score: [L,H] in [0, 1]}. "copying" and "negative copying": ties and NaN count against a name, so that a zero
        head without b_U scores 0; by chance TOP / V. "previous token": over queries from the second token of r on;
        "duplicate token" and "induction": over the second r.

    Raises:
        ValueError: another kind of model, one with no room for [bos, r, r], or tokens that it does not have.
    """
    if not config.causal or config.norm_position != "pre" or config.unembed_transform:
        raise ValueError("published scores are of decoders without post-norm, whose heads write straight to the logits")
    if _period(config) < 2:
        raise ValueError(
            "published scores need room for bos and two distinct tokens twice, n_context 5 and n_vocab 3; got "
            f"{config.n_context} and {config.n_vocab}"
        )
    if np.ndim(names) != 1 or not np.size(names):
        raise ValueError(f"names must be token ids [n], at least one; got shape {list(np.shape(names))}")
    tokens = check_tokens(config, jnp.append(jnp.asarray(names), bos)[:, None])[:, 0]
    return _published_scores(config, params, tokens[:-1], tokens[-1], key)


def compared(published: Published, scores: dict[Score, Array]) -> tuple[list[float], bool]:
    """The values of the heads it names, or their one mean for "average", and whether all are within its bounds.

    Raises:
        ValueError: it names a head that the model has not.
    """
    of_heads = np.asarray(scores[published.score])
    named = places_in(f"the published {published.score} score names", published.heads, *of_heads.shape)
    found = [float(of_heads[place]) for place in named]
    if published.heads == AVERAGE:
        found = [float(np.mean(found))]
    return found, all(published.at_least <= value <= published.at_most for value in found)


@partial(jax.jit, static_argnums=0)
def _published_scores(
    config: TransformerConfig, params: Params, names: Array, bos: Array, key: Array
) -> dict[Score, Array]:
    copying, negative = _copying(config, params, names, bos)
    previous, duplicate, induction = _attention(config, params, _repeats(config, bos, key))
    return {
        "copying": copying,
        "negative copying": negative,
        "previous token": previous,
        "duplicate token": duplicate,
        "induction": induction,
    }


def _copying(config: TransformerConfig, params: Params, names: Array, bos: Array) -> tuple[Array, Array]:
    """The score and the negative one, [L,H] each; memory is that of the logits [n,V] of one head."""
    weights = CircuitWeights.from_params(config, params)
    prompts = jnp.stack([jnp.full_like(names, bos), names], axis=1)
    after_block_0 = jax.vmap(partial(_seen, config, params))(prompts).residual[:, 1, 1]
    read = values(weights, normalized(weights, after_block_0))
    if weights.b_V is not None:
        read = read + per_query_head(weights, weights.b_V)[:, :, None]
    bias = 0.0 if weights.b_U is None else weights.b_U

    def share(logits: Array) -> Array:
        own = jnp.take_along_axis(logits, names[:, None], axis=1)
        return top_share(jnp.sum(~(logits < own), axis=1) - 1, k=TOP)

    def of_head(head: tuple[Array, Array]) -> tuple[Array, Array]:
        z = matmul(normalized(weights, matmul(*head)), weights.W_U)
        return share(bias + z), share(bias - z)

    scores: tuple[Array, Array] = jax.lax.map(lambda layer: jax.lax.map(of_head, layer), (read, weights.W_O))
    return scores


def _attention(config: TransformerConfig, params: Params, sequences: Array) -> tuple[Array, Array, Array]:
    """Previous-token, duplicate-token and induction attention, [L,H] each, in sequences [B,T]; one after the other."""
    queries = jnp.arange(sequences.shape[1]) > 1  # in front of the first token of r stands bos, where heads rest

    def of_sequence(tokens: Array) -> tuple[Array, Array, Array]:
        def of_head(pattern: Array) -> tuple[Array, Array, Array]:
            return (
                patterns.previous_token(pattern, queries),
                patterns.duplicate_token(pattern, tokens, queries),
                patterns.induction(pattern, tokens, queries),
            )

        return jax.vmap(jax.vmap(of_head))(_seen(config, params, tokens).patterns)

    means: tuple[Array, Array, Array] = jax.tree.map(lambda x: x.mean(0), jax.lax.map(of_sequence, sequences))
    return means


def _repeats(config: TransformerConfig, bos: Array, key: Array) -> Array:
    """[bos, r, r], bos not among the tokens of r: [B,T]."""
    pick = partial(jax.random.choice, a=config.n_vocab - 1, shape=(_period(config),), replace=False)
    r = jax.vmap(lambda key: pick(key))(jax.random.split(key, N_SEQUENCES))
    r = r + (r >= bos)
    return jnp.concatenate([jnp.full((N_SEQUENCES, 1), bos), r, r], axis=1)


def _period(config: TransformerConfig) -> int:
    return min(PERIOD, (config.n_context - 1) // 2, config.n_vocab - 1)


def _seen(config: TransformerConfig, params: Params, tokens: Array) -> Activations:
    with jax.default_matmul_precision("highest"):
        return apply(config, params, tokens)[1]
