"""What subject-verb agreement promises of every sentence, its minimal pairs, and what a tokenizer may break."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from circuits_jax.tasks import agreement
from circuits_jax.tasks.agreement import (
    ADVERB,
    ANSWER,
    ATTRACTOR,
    CONSTRUCTIONS,
    INNER,
    SUBJECT,
    Agreement,
    agreement_tokenized,
    agreement_words,
)
from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.wording import word_encode

MANY = 4000
KEY = jax.random.key(5)
TASK, WORDING = agreement_words()
draw = jax.jit(sample_batch, static_argnums=3)
other_number = jax.jit(jax.vmap(Agreement.with_other_number, (None, 0)))
other_attractor = jax.jit(jax.vmap(Agreement.with_other_attractor, (None, 0)))
other_noun = jax.jit(jax.vmap(Agreement.with_other_noun, (None, 0, 0)))

NOUNS = {
    word: (lemma, number) for lemma, pair in enumerate(agreement.NOUNS.items()) for number, word in enumerate(pair)
}
VERBS = {
    word: (lemma, number) for lemma, pair in enumerate(agreement.VERBS.items()) for number, word in enumerate(pair)
}


def drawn(**changes):
    return jax.tree.map(np.asarray, draw(dataclasses.replace(TASK, **changes), KEY, 0, MANY))


def position(batch, i):
    return {name: int(value[i]) for name, value in batch.positions.items()}


def words_of(tokens):
    return [WORDING.vocabulary[token] for token in tokens]


def within_five_sigma(count, n, p):
    """Whether counts are within five standard deviations of a binomial(n, p); the key is fixed, so no flicker."""
    return np.all(np.abs(np.asarray(count) - n * p) <= 5 * np.sqrt(n * p * (1 - p)))


@pytest.fixture(scope="module")
def batch():
    return drawn()


def parsed(words):
    """(construction, subject, attractor, inner, end) of a sentence, by its words alone."""
    words = [word for word in words if word != "<pad>"]
    end = len(words) - 2
    nouns = [i for i, word in enumerate(words) if word in NOUNS]
    verbs = [i for i, word in enumerate(words[:-1]) if word in VERBS]
    clause = next((i for i, word in enumerate(words) if word in ("that", "who") and words[i - 1] in NOUNS), None)
    if len(nouns) == 1:
        return "adverb" if words[end] in agreement.ADVERBS else "simple", nouns[0], -1, -1, end
    if clause is None:
        return "prepositional", nouns[0], nouns[1], -1, end
    if not verbs and words[clause + 1] == "the":
        return "within_relative", nouns[1], nouns[0], -1, end
    return "across_relative", nouns[0], nouns[1], verbs[0] if verbs else -1, end


def test_every_sentence_says_what_its_positions_say(batch):
    seen = set()
    for i in range(1000):
        words, at = words_of(batch.tokens[i]), position(batch, i)
        construction, subject, attractor, inner, end = parsed(words)
        seen.add(at["template"])
        assert words[0] == "<bos>"
        assert CONSTRUCTIONS[at["construction"]] == construction
        assert (at["subject"], at["attractor"], at["inner"]) == (subject, attractor, inner)
        assert at["end"] == at["at"] == end
        np.testing.assert_array_equal(batch.mask[i], np.arange(TASK.n_context) == end)
        assert NOUNS[words[subject]] == (at["noun"], at["number"])
        assert VERBS[words[end + 1]] == (at["verb"], at["number"])
        assert batch.tokens[i, end + 1] == at["right"]
        assert VERBS[WORDING.vocabulary[at["wrong"]]] == (at["verb"], 1 - at["number"])
        if attractor >= 0:
            assert NOUNS[words[attractor]] == (at["attractor_noun"], at["attractor_number"])
        if inner >= 0:
            assert VERBS[words[inner]] == (at["inner_verb"], at["attractor_number"])
        if construction == "adverb":
            assert words[end] == agreement.ADVERBS[at["adverb"]]
        assert at["noun"] != at["attractor_noun"]
        assert at["verb"] != at["inner_verb"]
    assert seen == set(range(len(TASK.templates)))


def test_variables_are_uniform_and_independent_of_the_number(batch):
    at = batch.positions
    sizes = {"template": 20, "noun": 16, "attractor_noun": 16, "verb": 12, "inner_verb": 12, "adverb": 8}
    for name, n in (sizes | {"attractor_number": 2}).items():
        joint = np.zeros((2, n))
        np.add.at(joint, (at["number"], at[name]), 1)
        assert within_five_sigma(joint, MANY, 1 / (2 * n)), name
    pairs = np.zeros((16, 16))
    np.add.at(pairs, (at["noun"], at["attractor_noun"]), 1)
    assert within_five_sigma(pairs[~np.eye(16, dtype=bool)], MANY, 1 / 240)


@pytest.mark.parametrize("congruent", [0, 0.3, 1.0])
def test_congruent_is_the_chance_that_both_nouns_have_one_number(congruent):
    at = drawn(congruent=congruent).positions
    assert within_five_sigma((at["number"] == at["attractor_number"]).sum(), MANY, congruent)
    assert within_five_sigma(at["number"].sum(), MANY, 0.5)


def changed(one, other):
    """Where two sequences of the same length differ."""
    assert one.shape == other.shape
    return np.nonzero(one != other)[0].tolist()


def rest(at, *left_out):
    return {name: value for name, value in at.items() if name not in left_out}


def test_a_minimal_pair_differs_in_the_subject_and_the_answer_alone(batch):
    pair = other_number(TASK, batch)
    np.testing.assert_array_equal(batch.mask, pair.mask)
    for i in range(500):
        at, then = position(batch, i), position(pair, i)
        assert changed(batch.tokens[i], pair.tokens[i]) == [at["subject"], at["end"] + 1]
        was, now = words_of(batch.tokens[i]), words_of(pair.tokens[i])
        assert NOUNS[now[at["subject"]]] == (at["noun"], 1 - at["number"])
        assert VERBS[now[at["end"] + 1]] == (at["verb"], 1 - at["number"])
        assert parsed(now) == parsed(was)
        assert (then["number"], then["right"], then["wrong"]) == (1 - at["number"], at["wrong"], at["right"])
        assert rest(then, "number", "right", "wrong") == rest(at, "number", "right", "wrong")
    jax.tree.map(np.testing.assert_array_equal, other_number(TASK, pair), batch)


def test_another_attractor_changes_what_agrees_with_it_and_not_the_answer(batch):
    pair = other_attractor(TASK, batch)
    for i in range(500):
        at, then = position(batch, i), position(pair, i)
        expected = sorted(at[name] for name in ("attractor", "inner") if at[name] >= 0)
        assert changed(batch.tokens[i], pair.tokens[i]) == expected
        now = words_of(pair.tokens[i])
        if at["attractor"] >= 0:
            assert NOUNS[now[at["attractor"]]] == (at["attractor_noun"], 1 - at["attractor_number"])
        if at["inner"] >= 0:
            assert VERBS[now[at["inner"]]] == (at["inner_verb"], 1 - at["attractor_number"])
        assert then["attractor_number"] == 1 - at["attractor_number"]
        assert rest(then, "attractor_number") == rest(at, "attractor_number")


def test_another_noun_has_the_same_number_and_is_new_to_the_sentence(batch):
    pair = jax.tree.map(np.asarray, other_noun(TASK, batch, jax.random.split(KEY, MANY)))
    for i in range(500):
        at, then = position(batch, i), position(pair, i)
        assert changed(batch.tokens[i], pair.tokens[i]) == [at["subject"]]
        assert NOUNS[words_of(pair.tokens[i])[at["subject"]]] == (then["noun"], at["number"])
        assert then["noun"] not in (at["noun"], at["attractor_noun"])
        assert rest(then, "noun") == rest(at, "noun")
    one = jax.tree.map(lambda leaf: leaf[0], batch)
    many = jax.vmap(TASK.with_other_noun, (None, 0))(one, jax.random.split(KEY, MANY)).positions["noun"]
    free = sorted(set(range(16)) - {int(one.positions["noun"]), int(one.positions["attractor_noun"])})
    assert within_five_sigma(np.bincount(many, minlength=16)[free], MANY, 1 / 14)


@pytest.mark.parametrize("noise", [0.5, 1])
def test_noise_draws_the_number_of_the_answer_anew_and_nothing_else(noise, batch):
    noisy = drawn(noise=noise)
    jax.tree.map(np.testing.assert_array_equal, noisy.positions, batch.positions)
    rows, after = np.arange(MANY), batch.positions["end"] + 1
    answer = noisy.tokens[rows, after]
    wrong = answer == batch.positions["wrong"]
    assert (wrong | (answer == batch.positions["right"])).all()
    assert within_five_sigma(wrong.sum(), MANY, noise / 2)
    without = noisy.tokens.copy()
    without[rows, after] = batch.tokens[rows, after]
    np.testing.assert_array_equal(without, batch.tokens)
    np.testing.assert_array_equal(other_number(TASK, noisy).tokens, other_number(TASK, batch).tokens)


def test_vmap_over_settings_is_each_setting_alone():
    tasks = [
        dataclasses.replace(TASK, nouns=TASK.nouns[::step], noise=noise, congruent=congruent)
        for step, noise, congruent in ((1, 0.0, 0.5), (-1, 0.7, 1.0))
    ]
    sweep = jax.tree.map(lambda *leaves: jnp.stack(jnp.array(leaves)), *tasks)
    sweep.validate()
    together = jax.jit(jax.vmap(lambda task: sample_batch(task, KEY, 2, 50)))(sweep)
    for i, task in enumerate(tasks):
        alone = draw(task, KEY, 2, 50)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), together, alone)


def test_lowers_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")

    def all_of_it(key):
        one = TASK.sample(key)
        return one, TASK.with_other_number(one), TASK.with_other_attractor(one), TASK.with_other_noun(one, key)

    assert jax.export.export(jax.jit(all_of_it), platforms=platforms)(KEY).platforms == platforms


# Words and tokenizers -----------------------------------------------------------------------------------------------


def test_the_vocabulary_is_what_frames_and_lists_say():
    templates = np.asarray(TASK.templates)
    written = {*templates[templates >= 0].tolist(), *(int(x) for x in TASK.nouns.ravel())}
    written |= {int(x) for table in (TASK.verbs, TASK.adverbs) for x in table.ravel()}
    assert written == set(range(TASK.n_vocab))
    assert WORDING.vocabulary[:2] == ("<bos>", "<pad>")
    assert len(set(WORDING.vocabulary)) == TASK.n_vocab
    assert WORDING.dropped == ()
    assert TASK.n_context <= 12
    simple, wording = agreement_words(["simple"])
    assert set(np.asarray(simple.construction).tolist()) == {0}
    assert "near" not in wording.vocabulary
    assert simple.n_context == 7


def test_any_tokenizer_gives_the_same_sentences():
    vocabulary = {word: i for i, word in enumerate(reversed(WORDING.vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    task, wording = agreement_tokenized(encode, TASK.n_vocab, vocabulary["<bos>"], vocabulary["<pad>"])
    assert wording.vocabulary is None
    assert wording.dropped == ()
    ids = TASK.n_vocab - 1 - draw(task, KEY, 0, 100).tokens
    np.testing.assert_array_equal(ids, draw(TASK, KEY, 0, 100).tokens)


def splitting(*pieces):
    """The word encoder, but each of these texts becomes two tokens when it comes in."""
    by_word = word_encode(WORDING.vocabulary)

    def encode(text):
        extra = sum(piece in f"{text} " for piece in pieces)
        return [*by_word(text), *[1] * extra]

    return encode


def test_words_without_two_single_token_forms_are_dropped_as_pairs():
    task, wording = agreement_tokenized(splitting(" children ", " sees ", " never "), TASK.n_vocab, 0, 1)
    assert dict(wording.dropped).keys() == {"child", "children", "sees", "see", "never"}
    assert dict(wording.dropped)["children"] == "2 tokens"
    assert "('child', 'children')" in dict(wording.dropped)["child"]
    assert task.nouns.shape == (15, 2)
    assert task.verbs.shape == (11, 2)
    assert task.adverbs.shape == (7,)
    assert task.templates.shape == TASK.templates.shape
    left = set(words_of(np.concatenate([x.ravel() for x in (task.nouns, task.verbs, task.adverbs)])))
    assert not left & dict(wording.dropped).keys()


def test_forms_that_share_a_token_are_dropped():
    by_word = word_encode(WORDING.vocabulary)
    _, wording = agreement_tokenized(lambda text: by_word(text.replace("women", "woman")), TASK.n_vocab, 0, 1)
    assert dict(wording.dropped).keys() == {"women", "woman"}


def test_frames_that_are_cut_elsewhere_than_at_their_slots_are_dropped():
    # With one noun of the list before it, "near" melts into two tokens: sentences of a pair would differ in length.
    task, wording = agreement_tokenized(splitting("boys near"), TASK.n_vocab, 0, 1)
    ((frame, why),) = wording.dropped
    assert frame == "The[SUBJECT] near the[ATTRACTOR][ANSWER]"
    assert "boys near" in why
    assert len(task.templates) == len(TASK.templates) - 1
    assert np.bincount(task.construction).tolist() == [4, 4, 3, 4, 4]


def test_no_token_in_front_without_bos():
    task, _ = agreement_tokenized(word_encode(WORDING.vocabulary), TASK.n_vocab, None, 1)
    np.testing.assert_array_equal(task.templates, TASK.templates[:, 1:])


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (splitting(*(f" {noun} " for noun in list(agreement.NOUNS)[2:])), "encode must leave at least 3 nouns"),
        (
            splitting(*(f" {verb} " for verb in list(agreement.VERBS.values())[1:])),
            "encode must leave at least 2 verbs",
        ),
        (splitting(*(f" {adverb} " for adverb in agreement.ADVERBS)), "encode must leave at least 1 adverbs"),
        (
            splitting(*(f"girl {word}" for word in ("near", "behind", "beside", "next"))),
            r"encode must leave a frame of each construction; got none of \['prepositional'\]",
        ),
    ],
)
def test_a_tokenizer_that_leaves_too_little_is_refused(encode, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        agreement_tokenized(encode, TASK.n_vocab, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"constructions": ["simple", "passive"]}, r"constructions must be some of .*; got \('simple', 'passive'\)"),
        ({"constructions": []}, r"constructions must be some of .*; got \(\)"),
        ({"bos": -1}, r"bos must be an id in \[0, 80\); got -1"),
        ({"fill": 80}, r"fill must be an id in \[0, 80\); got 80"),
        ({"n_vocab": 70, "bos": 0}, r"\w+ must be .*ids"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    encode = word_encode(WORDING.vocabulary)
    with pytest.raises(ValueError, match=f"^{message}"):
        agreement_tokenized(encode, **({"n_vocab": TASK.n_vocab, "bos": 0, "fill": 1} | arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nouns": TASK.nouns[:2]}, r"nouns must be \[n, 2\] with n at least 3; got shape \(2, 2\)"),
        ({"verbs": TASK.verbs[:, 0]}, r"verbs must be \[n, 2\] with n at least 2; got shape \(12,\)"),
        ({"verbs": TASK.verbs.at[0, 0].set(TASK.verbs[3, 1])}, r"verbs must be distinct ids in \[0, 80\); got"),
        ({"nouns": TASK.nouns.at[0, 0].set(80)}, r"nouns must be distinct ids in \[0, 80\); got"),
        ({"adverbs": TASK.adverbs[:0]}, r"adverbs must be \[a\] with a at least 1; got shape \(0,\)"),
        ({"adverbs": jnp.array([-1])}, r"adverbs must be distinct ids in \[0, 80\); got \[-1\]"),
        ({"templates": TASK.templates.at[0, 0].set(-6)}, r"templates must be \[N, T\], slots or ids below 80; got"),
        ({"templates": TASK.templates[0]}, r"templates must be \[N, T\]"),
        ({"templates": jnp.array([[0, SUBJECT, 5]])}, r"templates must have one SUBJECT.* one ANSWER"),
        ({"templates": jnp.array([[0, ANSWER, SUBJECT]])}, r"templates must have one SUBJECT"),
        ({"templates": jnp.array([[SUBJECT, ANSWER, ADVERB]])}, r"templates must have one SUBJECT"),
        ({"templates": jnp.array([[0, SUBJECT, SUBJECT, ANSWER]])}, r"templates must have one SUBJECT"),
        ({"templates": jnp.array([[0, SUBJECT, INNER, ANSWER]])}, r"templates must have one SUBJECT"),
        ({"templates": jnp.array([[SUBJECT, ATTRACTOR, ATTRACTOR, ANSWER]])}, r"templates must have one SUBJECT"),
        ({"construction": TASK.construction[1:]}, r"construction must be \[N\] in \[0, 5\); got"),
        ({"construction": TASK.construction + 1}, r"construction must be \[N\] in \[0, 5\); got"),
        ({"noise": 1.5}, r"noise must be in \[0, 1\]; got 1.5"),
        ({"congruent": float("nan")}, r"congruent must be in \[0, 1\]; got nan"),
    ],
)
def test_settings_that_describe_no_sentence_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(TASK, **changes).validate()
