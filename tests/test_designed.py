"""Each kind of sequence has what it is made for, checked slowly, and nothing that another kind is made for."""

import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.tasks.designed import designed_inputs

IDS = np.random.default_rng(0).permutation(50)[:20] + 3
BOS, T, B = 1, 24, 200
CASES = {"no-bos": (IDS, T, None), "bos": (IDS, T, BOS), "few-ids": (IDS[:5], T, BOS), "shortest": (IDS, 4, None)}
draw = jax.jit(designed_inputs, static_argnums=(2, 3), static_argnames="bos")
KINDS = ("random", "repeats", "few_letters", "text", "placed")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(ids, bos or None, sequences without bos)."""
    ids, length, bos = CASES[request.param]
    inputs = jax.tree.map(np.asarray, draw(jax.random.key(0), ids, length, B, bos=bos))
    for kind in KINDS:
        tokens = getattr(inputs, kind)
        assert tokens.dtype == np.int32
        assert tokens.shape == ((B, 2, length) if kind == "placed" else (B, length)), kind
    if bos is not None:
        assert all((getattr(inputs, kind)[..., 0] == bos).all() for kind in KINDS)
        inputs = jax.tree.map(lambda tokens: tokens[..., 1:], inputs)
    return ids, bos, inputs


def within_five_sigma(counts, n, p):
    """Binomial counts of n trials with chance p; the five sigma allow for thousands of counts."""
    return (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


def share_equal(a, b):
    return np.mean(a == b)


def test_only_ids_occur_and_bos_nowhere_but_in_front(case):
    ids, bos, inputs = case
    for kind in KINDS:
        assert np.isin(getattr(inputs, kind), ids).all(), kind
        assert not (getattr(inputs, kind) == bos).any(), kind


def test_random_tokens_are_uniform_and_independent(case):
    ids, _, inputs = case
    counts = (inputs.random[..., None] == ids).sum((0, 1))
    assert within_five_sigma(counts, inputs.random.size, 1 / len(ids))
    for back in (1, 2, 3):
        same = inputs.random[:, back:] == inputs.random[:, :-back]
        assert within_five_sigma(same.sum(), same.size, 1 / len(ids))


def slow_period(tokens):
    """The smallest p with tokens[t] = tokens[t - p] throughout."""
    return next(p for p in range(1, len(tokens)) if all(tokens[t] == tokens[t - p] for t in range(p, len(tokens))))


def test_repeats_are_a_block_of_distinct_tokens_tiled_to_the_length(case):
    ids, _, inputs = case
    length = inputs.repeats.shape[1]
    most = min(length // 2, len(ids))
    least = min(int(np.ceil(length / 4)) + 1, most)
    periods = [slow_period(tokens.tolist()) for tokens in inputs.repeats]
    for tokens, p in zip(inputs.repeats, periods, strict=True):
        assert len(set(tokens[:p].tolist())) == p
    assert set(periods) == set(range(least, most + 1))
    for p in range(least, most + 1):
        assert within_five_sigma(periods.count(p), B, 1 / (most + 1 - least))
    first = Counter(inputs.repeats[:, 0].tolist())
    assert within_five_sigma(np.array([first[token] for token in ids.tolist()]), B, 1 / len(ids))


def test_few_letters_are_three_and_another_three_in_each_sequence(case):
    ids, _, inputs = case
    length = inputs.few_letters.shape[1]
    n_letters = [len(set(tokens.tolist())) for tokens in inputs.few_letters]
    assert max(n_letters) == 3
    if length > 10:
        assert np.mean(np.equal(n_letters, 3)) > 0.95
        sets = {frozenset(tokens.tolist()) for tokens in inputs.few_letters}
        assert len(sets) > (100 if len(ids) == 20 else 9)  # of 1140 and of 10
    for back in (1, 2, 3):
        same = inputs.few_letters[:, back:] == inputs.few_letters[:, :-back]
        assert within_five_sigma(same.sum(), same.size, 1 / 3)


def test_placed_pairs_are_two_orders_of_the_same_tokens(case):
    ids, _, inputs = case
    length = inputs.placed.shape[-1]
    for one, other in inputs.placed:
        times = Counter(one.tolist())
        assert times == Counter(other.tolist())
        assert len(times) == min(length, len(ids))
        assert set(times.values()) <= {length // len(ids), -(-length // len(ids))}
    # Orders are independent: a place holds the same token in both as often as two of the tokens are the same.
    chance = np.mean([sum(n * n for n in Counter(one.tolist()).values()) for one, _ in inputs.placed]) / length**2
    same = inputs.placed[:, 0] == inputs.placed[:, 1]
    assert within_five_sigma(same.sum(), same.size, chance)
    for side in (0, 1):  # and so is each of them of the ids' own order
        assert within_five_sigma((inputs.placed[:, side, 0] == ids[0]).sum(), B, 1 / len(ids))


def test_two_ids_are_enough():
    inputs = jax.tree.map(np.asarray, draw(jax.random.key(0), np.array([7, 5]), 9, 50, bos=0))
    for kind in KINDS:
        assert set(getattr(inputs, kind)[..., 1:].ravel().tolist()) == {5, 7}, kind
    assert {slow_period(tokens.tolist()) for tokens in inputs.repeats[:, 1:]} == {2}


# --- text ---


@pytest.fixture(scope="module")
def text():
    """[B,T'] tokens of one long text, as places in ids."""
    return np.asarray(draw(jax.random.key(3), np.arange(100), 200, 500).text)


def test_frequencies_of_text_fall_as_zipfs(text):
    """Half of all tokens are Zipf's own; successors, themselves drawn so, move single tokens but not the curve."""
    counts = np.sort(np.bincount(text.ravel(), minlength=100))[::-1]
    share = counts / counts.sum()
    zipf = 1 / np.arange(1, 101) / np.sum(1 / np.arange(1, 101))
    assert counts.min() > 0
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(share), 1)[0]
    assert -1.6 < slope < -0.8
    assert np.abs(share - zipf).sum() / 2 < 0.25
    assert share[:10].sum() > 3 * share[-50:].sum() > 0
    first = np.bincount(text[:, 0], minlength=100)
    assert within_five_sigma(np.sort(first)[::-1][0], 500, zipf[0])


def test_text_of_many_languages_has_zipfs_frequencies_on_average():
    """Token of rank r over the keys: ranks are read from the first tokens, which are Zipf's by themselves."""
    texts = np.asarray(jax.vmap(lambda k: draw(k, np.arange(3), 40, 200).text)(jax.random.split(jax.random.key(1), 60)))
    shares = []
    for one in texts:
        rank = np.argsort(-np.bincount(one[:, 0], minlength=3))
        shares.append(np.bincount(one.ravel(), minlength=3)[rank] / one.size)
    np.testing.assert_allclose(np.mean(shares, 0), np.array([6, 3, 2]) / 11, atol=0.06)


def test_every_token_of_text_has_a_few_preferred_successors(text):
    """After a frequent token four successors, or fewer where two are the same, take half of what follows and more."""
    pairs = Counter(zip(text[:, :-1].ravel().tolist(), text[:, 1:].ravel().tolist(), strict=True))
    share = np.bincount(text.ravel(), minlength=100) / text.size
    for token in np.argsort(-share)[:10].tolist():
        after = np.array([pairs[token, other] for other in range(100)]) / sum(pairs[token, o] for o in range(100))
        preferred = np.argsort(-(after - share))[:4]
        gain = (after - 0.5 * share)[preferred].sum()
        assert gain > 0.45
        others = np.delete(after, preferred).sum()
        assert others < 0.55
        assert (np.delete(after, preferred) < 0.5 * share.max() + 0.1).all()


def test_text_remembers_one_token_and_no_more(text):
    """Given the token before, the one before that says nothing: mutual information by counts of the three commonest."""
    common = np.argsort(-np.bincount(text.ravel()))[:3]
    two, one, now = (text[:, i : i - 2 or None].ravel() for i in range(3))
    for middle in common:
        table = np.array([[np.sum((two == a) & (one == middle) & (now == b)) for b in common] for a in common])
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        assert ((table - expected) ** 2 / expected).sum() < 25  # chi-square of 4 degrees: p < 1e-4 beyond


def test_all_sequences_of_a_text_speak_one_language_and_another_key_another(text):
    def table(tokens):
        return np.histogram2d(tokens[:, :-1].ravel(), tokens[:, 1:].ravel(), bins=np.arange(101))[0].ravel()

    other = np.asarray(draw(jax.random.key(4), np.arange(100), 200, 500).text)
    assert np.corrcoef(table(text[:250]), table(text[250:]))[0, 1] > 0.9
    assert np.corrcoef(table(text), table(other))[0, 1] < 0.5


# --- as a function of the key ---


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_key_decides():
    first, again, other = (draw(jax.random.key(k), IDS, T, B, bos=BOS) for k in (0, 0, 1))
    assert_same(first, again)
    for kind in KINDS:
        a, b = (np.asarray(getattr(x, kind)).reshape(-1, T) for x in (first, other))
        assert (a != b).any(1).mean() > 0.99, kind
        if kind != "text":  # two sequences of one call are as different as those of two calls
            assert len({tuple(row) for row in a.tolist()}) > 0.95 * len(a), kind


def test_kinds_do_not_share_their_random_numbers():
    inputs = jax.tree.map(np.asarray, draw(jax.random.key(0), IDS, T, B))
    singles = [inputs.random, inputs.repeats, inputs.few_letters, inputs.text, inputs.placed[:, 0]]
    for i, a in enumerate(singles):
        for b in singles[:i]:
            assert share_equal(a, b) < 0.12


def test_vmap_over_keys_is_each_key_alone():
    keys = jax.random.split(jax.random.key(5), 3)
    together = jax.jit(jax.vmap(lambda k: designed_inputs(k, IDS, T, 7, BOS)))(keys)
    for i in range(3):
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), draw(keys[i], IDS, T, 7, bos=BOS))


def test_ids_may_be_traced_and_bos_only_moves_the_rest():
    key = jax.random.key(0)
    plain = designed_inputs(key, IDS, T - 1, 7)
    swept = jax.jit(jax.vmap(lambda ids: designed_inputs(key, ids, T, 7, BOS)))(jnp.stack([IDS, IDS + 100]))
    assert_same(jax.tree.map(lambda x: x[0, ..., 1:], swept), plain)
    assert_same(jax.tree.map(lambda x: x[1, ..., 1:] - 100, swept), plain)


def test_lowers_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")
    function = jax.jit(partial(designed_inputs, length=T, n_sequences=3, bos=BOS))
    exported = jax.export.export(function, platforms=platforms)(jax.random.key(0), IDS)
    assert exported.platforms == platforms


def test_a_large_vocabulary_needs_no_square_of_it():
    """40,000 ids squared would be 6 GB."""
    ids = np.arange(2, 40_002)
    compiled = draw.lower(jax.random.key(0), ids, T, 2, bos=BOS).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 200 * len(ids)
    inputs = compiled(jax.random.key(0), ids.astype(np.int32))
    for kind in KINDS:
        tokens = np.asarray(getattr(inputs, kind))[..., 1:]
        assert tokens.min() >= 2, kind
        assert tokens.max() < 40_002, kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": IDS[:1]}, "ids must hold at least two token ids; got 1"),
        ({"ids": np.array([3, 4, 3])}, "ids must be distinct; got 2 different ones among 3"),
        ({"length": 3}, "length must leave at least 4 tokens besides bos; got 3"),
        ({"length": 4, "bos": 0}, "length must leave at least 4 tokens besides bos; got 3"),
        ({"n_sequences": 0}, "n_sequences must be at least 1; got 0"),
        ({"bos": int(IDS[2])}, "bos must not be one of the ids it is kept out of; got"),
    ],
)
def test_what_cannot_be_designed_is_refused(changes, message):
    settings = {"ids": IDS, "length": T, "n_sequences": 2} | changes
    with pytest.raises(ValueError, match=f"^{message}"):
        designed_inputs(jax.random.key(0), **settings)


def test_inputs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        draw(jax.random.key(0), IDS, T, 2).random = None
