"""What IOI promises of every sentence, its counterfactuals token by token, and what a tokenizer leaves of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.heads.outcomes import logit_difference
from circuits_jax.tasks.batch import next_token_loss, sample_batch
from circuits_jax.tasks.ioi import IO, NAMES, OBJECTS, PLACES, TEMPLATES, S, ioi_tokenized, ioi_words
from circuits_jax.tasks.wording import word_encode, word_vocabulary

MANY = 3000
TASK, WORDING = ioi_words(names=NAMES[:8], places=PLACES[:4], objects=OBJECTS[:4])
VOCABULARY = WORDING.vocabulary
V, T = TASK.n_vocab, TASK.n_context
KEY, OTHER_KEY = jax.random.key(5), jax.random.key(6)
draw = jax.jit(sample_batch, static_argnums=3)
KEYED = ("with_other_io", "with_other_s", "unrelated")


def drawn(**changes):
    return jax.tree.map(np.asarray, draw(dataclasses.replace(TASK, **changes), KEY, 0, MANY))


@pytest.fixture(scope="module")
def batch():
    return drawn()


def counterfactual(name, batch):
    keys = (jax.random.split(OTHER_KEY, len(batch.tokens)),) if name in KEYED else ()
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(getattr(TASK, name)))(batch, *keys))


def sentence(io, s, place, object, template):
    """The tokens, in words, of the sentence written out."""
    text = TEMPLATES[template // 2]
    if template % 2:
        text = text.replace("[S]", "[first]", 1).replace("[IO]", "[S]", 1).replace("[first]", "[IO]", 1)
    for slot, word in (("[IO]", io), ("[S]", s), ("[PLACE]", place), ("[OBJECT]", object)):
        text = text.replace(slot, " " + word)
    words = ["<bos>", *re.sub(r"([,.])", r" \1", text).split()]
    return words + ["<pad>"] * (T - len(words))


def rows(batch):
    """Tokens in words, mask, and positions as integers, of one sentence after the other."""
    positions = {name: values.tolist() for name, values in batch.positions.items()}
    for i, (tokens, mask) in enumerate(zip(batch.tokens.tolist(), batch.mask, strict=True)):
        yield [VOCABULARY[token] for token in tokens], mask, {name: values[i] for name, values in positions.items()}


def assert_is_the_task(words, mask, at):
    """All that positions say, looked up in the sentence."""
    named = [i for i, word in enumerate(words) if word in NAMES]
    first, second, s2, answer = named
    s1, io = (first, second) if words[first] == words[s2] else (second, first)
    assert words[s1] == words[s2] == NAMES[at["s_name"]] == VOCABULARY[at["wrong"]]
    assert words[io] == words[answer] == NAMES[at["io_name"]] == VOCABULARY[at["right"]]
    assert words[io] != words[s1]
    assert (at["io"], at["s1"], at["s1_next"], at["s2"]) == (io, s1, s1 + 1, s2)
    assert at["end"] == at["at"] == answer - 1
    assert at["order"] == (io < s1) == at["template"] % 2
    assert words[answer - 1] in ("to", "for")
    np.testing.assert_array_equal(mask, np.arange(T) == answer - 1)


def within_five_sigma(count, n, p):
    """Whether counts are within five standard deviations of a binomial(n, p); the key is fixed, so no flicker."""
    return np.all(np.abs(np.asarray(count) - n * p) <= 5 * np.sqrt(n * p * (1 - p)))


# Sentences -------------------------------------------------------------------------------------------------------


def test_every_template_is_filled_and_its_positions_are_those_a_search_finds(batch):
    assert batch.tokens.shape == (MANY, T)
    assert batch.tokens.dtype == np.int32
    assert set(batch.positions["template"]) == set(range(2 * len(TEMPLATES)))
    for words, mask, at in rows(batch):
        names = (NAMES[at["io_name"]], NAMES[at["s_name"]])
        assert words == sentence(*names, PLACES[at["place"]], OBJECTS[at["object"]], at["template"])
        assert_is_the_task(words, mask, at)


def test_draws_are_uniform_and_independent(batch):
    at = batch.positions
    n, p, o = 8, 4, 4
    pairs = np.zeros((n, n), int)
    np.add.at(pairs, (at["io_name"], at["s_name"]), 1)
    assert (np.diag(pairs) == 0).all()
    assert within_five_sigma(pairs[~np.eye(n, dtype=bool)], MANY, 1 / (n * (n - 1)))
    rest = np.zeros((2 * len(TEMPLATES), p, o), int)
    np.add.at(rest, (at["template"], at["place"], at["object"]), 1)
    assert within_five_sigma(rest, MANY, 1 / rest.size)
    by_order = np.zeros((2, n), int)
    np.add.at(by_order, (at["order"], at["io_name"]), 1)
    assert within_five_sigma(by_order, MANY, 1 / (2 * n))


def test_a_model_that_names_io_has_no_loss_and_the_logit_difference_it_says(batch):
    """A model that is right about IO by 7 and S by 4 over all others."""
    at = batch.positions
    logits = np.zeros((MANY, T, V), np.float32)
    logits[np.arange(MANY), at["end"], at["right"]] = 7
    logits[np.arange(MANY), at["end"], at["wrong"]] = 4
    batch = jax.tree.map(jnp.asarray, batch)
    expected = np.log(np.exp(7.0) + np.exp(4.0) + V - 2) - 7
    np.testing.assert_allclose(next_token_loss(jnp.asarray(logits), batch), expected, rtol=1e-4)
    np.testing.assert_allclose(logit_difference(jnp.asarray(logits), None, batch), 3, rtol=1e-6)


@pytest.mark.parametrize("noise", [0.4, 1.0])
def test_noise_draws_the_answer_anew_from_all_names_and_changes_nothing_else(batch, noise):
    noisy = drawn(noise=noise)
    at = noisy.positions
    jax.tree.map(np.testing.assert_array_equal, at, batch.positions)
    behind = np.arange(T) == at["end"][:, None] + 1
    np.testing.assert_array_equal(noisy.tokens[~behind], batch.tokens[~behind])
    answers = noisy.tokens[behind]
    others = np.asarray(TASK.names)[:, None] == answers  # [n,B]
    right, wrong = answers == at["right"], answers == at["wrong"]
    assert others.any(0).all()
    assert within_five_sigma(others.sum(1), MANY, 1 / 8)
    assert within_five_sigma(right.sum(), MANY, 1 - noise * 7 / 8)
    assert within_five_sigma(wrong.sum(), MANY, noise / 8)


def test_a_sentence_alone_is_that_of_the_batch(batch):
    key = jax.random.split(jax.random.fold_in(KEY, 0), MANY)[7]
    alone = jax.jit(TASK.sample)(key)
    jax.tree.map(lambda one, many: np.testing.assert_array_equal(one, many[7]), alone, batch)


def test_noise_can_be_swept():
    swept = dataclasses.replace(TASK, noise=jnp.array([0.0, 1.0]))
    swept.validate()
    axes = dataclasses.replace(jax.tree.map(lambda _: None, TASK), noise=0)
    keys = jax.random.split(KEY, 200)
    batches = jax.vmap(lambda task: jax.vmap(task.sample)(keys), in_axes=(axes,))(swept)
    right = np.asarray(jnp.take_along_axis(batches.tokens, batches.positions["end"][..., None] + 1, -1)[..., 0])
    share = (right == np.asarray(batches.positions["right"])).mean(1)
    assert share[0] == 1
    assert share[1] < 0.3


# Counterfactuals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with_other_io", "with_other_s", "with_orders_swapped"])
def test_a_counterfactual_changes_only_what_it_says_and_is_the_task_again(batch, name):
    changed = counterfactual(name, batch)
    chosen = {"with_other_io": "io_name", "with_other_s": "s_name", "with_orders_swapped": None}[name]
    for (words, mask, at), (before, _, was) in zip(rows(changed), rows(batch), strict=True):
        assert_is_the_task(words, mask, at)
        io, s, answer = was["io"], was["s1"], was["end"] + 1
        expected = list(before)
        if name == "with_other_io":
            expected[io] = expected[answer] = NAMES[at["io_name"]]
        elif name == "with_other_s":
            expected[s] = expected[was["s2"]] = NAMES[at["s_name"]]
        else:
            expected[io], expected[s] = before[s], before[io]
            assert at["order"] == 1 - was["order"]
        assert words == expected
        if chosen:
            assert at[chosen] not in (was["io_name"], was["s_name"])
            assert {key for key in at if at[key] != was[key]} == {chosen, {"io": "right", "s_": "wrong"}[chosen[:2]]}


@pytest.mark.parametrize("name", ["with_other_io", "with_other_s"])
def test_the_other_name_is_uniform_over_those_not_in_the_sentence(batch, name):
    changed = counterfactual(name, batch).positions["io_name" if name == "with_other_io" else "s_name"]
    was = batch.positions
    asked = (was["io_name"] == 0) & (was["s_name"] != 1) | (was["s_name"] == 0) & (was["io_name"] != 1)
    assert within_five_sigma((changed[asked] == 1).sum(), asked.sum(), 1 / 6)
    assert not (changed[asked] == 0).any()


def test_p_abc_has_three_other_names_and_nothing_else_changes(batch):
    abc = counterfactual("unrelated", batch)
    for (words, mask, at), (before, mask_before, was) in zip(rows(abc), rows(batch), strict=True):
        places = (was["io"], was["s1"], was["s2"])
        a, b, c = names = [words[i] for i in places]
        assert len({*names, before[was["io"]], before[was["s1"]]}) == 5
        assert set(names) <= set(NAMES)
        expected = list(before)
        for i, word in zip((*places, was["end"] + 1), (a, b, c, a), strict=True):
            expected[i] = word
        assert words == expected
        np.testing.assert_array_equal(mask, mask_before)
        new = {"io_name": NAMES.index(a), "s_name": NAMES.index(b)}
        new |= {"right": VOCABULARY.index(a), "wrong": VOCABULARY.index(b)}
        assert at == was | new


def test_a_counterfactual_has_the_answer_that_goes_with_it_whatever_the_noise():
    noisy = drawn(noise=1.0)
    swapped = counterfactual("with_orders_swapped", noisy)
    answers = np.take_along_axis(swapped.tokens, noisy.positions["end"][:, None] + 1, 1)[:, 0]
    np.testing.assert_array_equal(answers, noisy.positions["right"])


# Builders --------------------------------------------------------------------------------------------------------


def test_the_shipped_task_is_fifteen_sentences_in_two_orders_and_short():
    task, (vocabulary, dropped) = ioi_words()
    assert len(set(TEMPLATES)) == 15
    assert task.templates.shape == (30, 17)
    assert len(np.unique(task.templates, axis=0)) == 30
    assert [len(ids) for ids in (task.names, task.places, task.objects)] == [len(NAMES), len(PLACES), len(OBJECTS)]
    assert dropped == ()
    used = {*np.asarray(task.templates).flat, *task.names.tolist(), *task.places.tolist(), *task.objects.tolist()}
    assert {token for token in used if token >= 0} == set(range(len(vocabulary)))
    assert len(vocabulary) == task.n_vocab == 113


def without(*words, others=()):
    """An encoder as of a pretrained model, in which these words are two tokens, and those one and the same."""
    vocabulary = word_vocabulary([*TEMPLATES, *NAMES, *PLACES, *OBJECTS, "half"])
    encode = word_encode(vocabulary)

    def cut(text):
        for word in words:
            text = re.sub(rf"\b{word}\b", "half half", text)
        for word in others[1:]:
            text = re.sub(rf"\b{word}\b", others[0], text)
        return encode(text)

    return cut, len(vocabulary)


def test_what_is_not_a_token_of_its_own_is_dropped_and_reported():
    encode, n_vocab = without("Amy", "museum", "key", others=("Ben", "Carl"))
    task, wording = ioi_tokenized(encode, n_vocab, bos=None)
    assert wording.vocabulary is None
    assert wording.dropped == (
        ("Amy", "2 tokens"), ("Carl", "the token of an earlier word"), ("museum", "2 tokens"), ("key", "2 tokens"),
    )  # fmt: skip
    assert (len(task.names), len(task.places), len(task.objects)) == (38, 13, 13)
    assert task.templates.shape == (30, 16)


def test_bos_and_fill_are_those_asked_for():
    encode, n_vocab = without()
    task, _ = ioi_tokenized(encode, n_vocab + 2, bos=n_vocab + 1, fill=n_vocab)
    templates = np.asarray(task.templates)
    assert (templates[:, 0] == n_vocab + 1).all()
    behind = np.cumsum(templates == IO, 1) - (templates == IO) == 2
    assert (templates[behind] == n_vocab).all()
    assert behind.any()


def test_a_template_that_a_name_breaks_is_dropped_in_both_orders():
    plain = word_vocabulary([*TEMPLATES, *NAMES, *PLACES, *OBJECTS, "Rose_met"])
    encode = word_encode(plain)
    task, (_, dropped) = ioi_tokenized(lambda text: encode(text.replace("Rose met", "Rose_met")), len(plain), bos=0)
    met = [text for text in TEMPLATES if "] met" in text]
    assert [template for template, _ in dropped] == met
    assert all("Rose met" in why for _, why in dropped)
    assert len(task.templates) == 2 * (len(TEMPLATES) - len(met)) < 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            NAMES[5:],
            r"names must have at least 6 words of a token of their own; got \['Adam', 'Alice', 'Amy', 'Anna', 'B",
        ),
        (
            PLACES[1:],
            r"places must have at least 2 words of a token of their own; got \['park'\], dropped: \[\('market",
        ),
        (OBJECTS[1:], r"objects must have at least 2 words of a token of their own; got \['book'\]"),
    ],
)
def test_too_few_words_are_refused(words, message):
    encode, n_vocab = without(*words)
    with pytest.raises(ValueError, match=f"^{message}"):
        ioi_tokenized(encode, n_vocab, bos=None)


def test_no_template_left_is_refused():
    encode, n_vocab = without()

    def starting(text):
        return [0] * (len(text) > 30) + encode(text)

    with pytest.raises(ValueError, match=r"^templates must have at least one that encode leaves whole; got none, drop"):
        ioi_tokenized(starting, n_vocab, bos=None)


@pytest.mark.parametrize("text", ["As[IO] met[S],[S] waved to[IO]", "[S] met[IO].[IO] waved to[S]", "[S] met[IO]"])
def test_templates_in_another_order_are_refused(text):
    with pytest.raises(ValueError, match=r"^templates must be pairs with names as S IO S IO \(-2, -1, -2, -1\), then"):
        ioi_words(templates=[text])


ROW = [8, S, 9, IO, 8, S, 9, IO]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": jnp.array([ROW])}, r"templates must be integers \[N, T\] with N even and at least 2; got int32"),
        ({"templates": jnp.zeros((2, 8))}, r"templates must be integers .* got float32 \[2, 8\]"),
        ({"templates": jnp.array([ROW, ROW])}, r"templates must be pairs .* in rows 0 and 1"),
        ({"templates": jnp.array([[V, *ROW]] * 2)}, rf"templates must be slots from -4 or ids below n_vocab {V}; got"),
        ({"templates": jnp.array([[-5, *ROW]] * 2)}, r"templates must be slots from -4 .* got -5 to 9"),
        ({"names": jnp.arange(5)}, r"names must be at least 6 distinct ids in one row; got \[0, 1, 2, 3, 4\]"),
        ({"names": jnp.array([2, 3, 4, 5, 6, 6])}, r"names must be at least 6 distinct ids"),
        ({"names": jnp.arange(-1, 6)}, rf"names must be ids in \[0, {V}\); got \[-1"),
        ({"names": TASK.names.at[0].set(TASK.places[1])}, r"names must stand in IO and S alone; got \[\d+\] elsewhere"),
        ({"places": jnp.array([3])}, r"places must be at least 2 distinct ids"),
        ({"objects": jnp.array([3, V])}, rf"objects must be ids in \[0, {V}\); got \[3, {V}\]"),
        ({"noise": 1.5}, r"noise must be in \[0, 1\]; got 1.5"),
        ({"noise": float("nan")}, r"noise must be in \[0, 1\]; got nan"),
    ],
)
def test_settings_that_describe_no_sentence_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(TASK, **changes).validate()
