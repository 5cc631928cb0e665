"""Inputs designed so that no type of head can be taken for another: what one kind leaves open, another decides.

random       i.i.d. tokens: nothing to match, only positions and the tokens themselves
repeats      c a f b d | c a f b d | c a f     earlier copies, and what followed them, at no fixed distance
few_letters  a c a a b c b a ...               copies everywhere: who looks for copies, and who only back by k
text         frequent and rare tokens, some of which often follow each other
placed       d a c b  and  b c d a             the same tokens in two orders: token or position?
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.repeated_tokens import RepeatedTokens

N_LETTERS = 3
N_SUCCESSORS = 4  # that a token of `text` prefers
SHARE_OF_SUCCESSORS = 0.5  # of the tokens of `text`, how many follow from the one before


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DesignedInputs:
    """B sequences of every kind, int32 token ids; position 0 of each holds bos where there is one.

    Attributes:
        random: [B,T], each token uniform over the ids, independent of the others.
        repeats: [B,T], a block of p distinct random tokens tiled to the length, p drawn anew for each sequence,
            uniform over ceil(T'/4) + 1 ... T'//2, T' being T without bos; at most the number of ids.
        few_letters: [B,T], each token uniform over three ids (two where there are two) drawn anew for each sequence.
        text: [B,T], a Markov chain, one for all B: half of the tokens are drawn by the weights 1, 1/2, 1/3, ... of a
            random ranking of the ids (Zipf), half are one of four preferred successors of the token before.
        placed: [B,2,T], two random orders of the same tokens, T' distinct ones; with fewer ids than T' all of them,
            each T'//n times or once more.
    """

    random: Array
    repeats: Array
    few_letters: Array
    text: Array
    placed: Array


def designed_inputs(
    key: Array, ids: ArrayLike, length: int, n_sequences: int, bos: int | None = None
) -> DesignedInputs:
    """Sequences of every kind, a pure function of the key.

    Args:
        key: the same key gives the same places in `ids`, whatever stands there.
        ids: [n] distinct token ids to draw from. With few of them kinds run into each other: for two, `repeats` is
            a b a b ..., which a fixed offset predicts.
        length: T.
        n_sequences: B of every kind.
        bos: token of position 0 of every sequence; it is not in ids and occurs nowhere else.

    Raises:
        ValueError: fewer than two ids, fewer than four tokens besides bos, or no sequence; ids that are not traced
            and hold bos, or one id twice.
    """
    n_tokens = length - (bos is not None)
    _check(ids, n_tokens, n_sequences, bos)
    ids = jnp.asarray(ids, jnp.int32)
    n_ids = len(ids)
    random_key, repeats_key, letters_key, text_key, placed_key = jax.random.split(key, 5)
    repeated = _repeated_tokens(n_ids, n_tokens)
    places = DesignedInputs(
        random=jax.random.randint(random_key, (n_sequences, n_tokens), 0, n_ids),
        repeats=sample_batch(repeated, repeats_key, 0, n_sequences).tokens,
        few_letters=jax.vmap(lambda k: _few_letters(k, n_ids, n_tokens))(jax.random.split(letters_key, n_sequences)),
        text=_text(text_key, n_ids, n_tokens, n_sequences),
        placed=jax.vmap(lambda k: _placed(k, n_ids, n_tokens))(jax.random.split(placed_key, n_sequences)),
    )
    return jax.tree.map(lambda place: _with_bos(ids[place], bos), places)


# --- each kind as places in ids, 0 ... n_ids - 1 ---


def _repeated_tokens(n_ids: int, n_tokens: int) -> RepeatedTokens:
    """Every block comes twice and a bit, at most four times."""
    most = min(n_tokens // 2, n_ids)
    least = min(-(-n_tokens // 4) + 1, most)
    return RepeatedTokens(least, most, n_vocab=n_ids, n_context=n_tokens)


def _few_letters(key: Array, n_ids: int, n_tokens: int) -> Array:
    letters_key, order_key = jax.random.split(key)
    letters = jax.random.choice(letters_key, n_ids, (min(N_LETTERS, n_ids),), replace=False)
    return jax.random.choice(order_key, letters, (n_tokens,))


def _placed(key: Array, n_ids: int, n_tokens: int) -> Array:
    """[2,T']."""
    token_key, *order_keys = jax.random.split(key, 3)
    chosen = jax.random.permutation(token_key, n_ids)[jnp.arange(n_tokens) % n_ids]
    return jnp.stack([jax.random.permutation(order, chosen) for order in order_keys])


def _text(key: Array, n_ids: int, n_tokens: int, n_sequences: int) -> Array:
    """[B,T'] of one chain.

    Successors are drawn by the same weights as tokens, so that on average over chains the frequencies stay Zipf's.
    """
    rank_key, successor_key, fresh_key, follows_key, choice_key = jax.random.split(key, 5)
    successors = _zipf(successor_key, n_ids, (n_ids, N_SUCCESSORS))
    shape = (n_tokens, n_sequences)  # the scan goes along the first axis
    fresh = _zipf(fresh_key, n_ids, shape)
    follows = jax.random.bernoulli(follows_key, SHARE_OF_SUCCESSORS, shape)
    choice = jax.random.randint(choice_key, shape, 0, N_SUCCESSORS)

    def step(last: Array, drawn: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        fresh, follows, choice = drawn
        token = jnp.where(follows, successors[last, choice], fresh)
        return token, token

    _, rest = jax.lax.scan(step, fresh[0], (fresh[1:], follows[1:], choice[1:]))
    ranks = jnp.concatenate([fresh[:1], rest]).T
    return jax.random.permutation(rank_key, n_ids)[ranks]


def _zipf(key: Array, n_ids: int, shape: tuple[int, ...]) -> Array:
    """Ranks 0 ... n - 1 with chances in proportion to 1, 1/2, ..., 1/n."""
    below = jnp.cumsum(1 / jnp.arange(1, n_ids + 1, dtype=jnp.float32))
    drawn = jnp.searchsorted(below / below[-1], jax.random.uniform(key, shape), side="right")
    return jnp.minimum(drawn, n_ids - 1)


def _with_bos(tokens: Array, bos: int | None) -> Array:
    if bos is None:
        return tokens
    return jnp.concatenate([jnp.full((*tokens.shape[:-1], 1), bos, tokens.dtype), tokens], -1)


def _check(ids: ArrayLike, n_tokens: int, n_sequences: int, bos: int | None) -> None:
    chex.assert_rank(ids, 1)
    n_ids = jnp.shape(ids)[0]
    if n_ids < 2:
        raise ValueError(f"ids must hold at least two token ids; got {n_ids}")
    if n_tokens < 4:
        raise ValueError(f"length must leave at least 4 tokens besides bos; got {n_tokens}")
    if n_sequences < 1:
        raise ValueError(f"n_sequences must be at least 1; got {n_sequences}")
    if isinstance(ids, jax.core.Tracer):
        return
    known = np.asarray(ids)
    if len(np.unique(known)) < n_ids:
        raise ValueError(f"ids must be distinct; got {len(np.unique(known))} different ones among {n_ids}")
    if bos is not None and bos in known:
        raise ValueError(f"bos must not be one of the ids it is kept out of; got {bos}, which is in ids")
