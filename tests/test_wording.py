"""What rows with slots promise: filled, they are what the tokenizer makes of the sentence; what fails is reported."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from circuits_jax.tasks.wording import padded, single_tokens, slotted_templates, word_encode, word_vocabulary

NAMES, PLACES = ("Anna", "Ben", "Carl", "Zed"), ("park", "zoo")
SLOTS = {"S": -1, "IO": -2, "PLACE": -7}
TEMPLATES = (
    "Today,[S] met[IO] at the[PLACE].[S] waved to[IO]",
    "Then[IO],[S] and the others left.",
    "No slots, no words.",
)


def fill(template, words):
    for slot, word in words.items():
        template = template.replace(f"[{slot}]", " " + word)
    return template


def trained(pre_tokenizer, normalizer=None):
    """A tokenizer of pieces of words in which every word of the sentences is one token, and others are several."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "▁"]
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    fillings = [{"S": s, "IO": io, "PLACE": place} for s in NAMES for io in NAMES for place in PLACES]
    tokenizer.train_from_iterator([fill(text, words) for text in TEMPLATES for words in fillings], trainer)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


ENCODERS = {
    "words": word_encode(word_vocabulary([*TEMPLATES, *NAMES, *PLACES, "Zebulon"])),
    "bytes, as GPT-2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "start marked, as Llama": trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation()]),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
}
encoders = pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)


def words_of(encode):
    names, places = single_tokens(encode, NAMES)[0], single_tokens(encode, PLACES)[0]
    return {"S": names, "IO": names, "PLACE": places}


# Rows of ids -----------------------------------------------------------------------------------------------------


@encoders
def test_a_filled_row_is_the_encoded_sentence(encode):
    words = words_of(encode)
    rows, dropped = slotted_templates(encode, TEMPLATES, SLOTS, words)
    assert list(rows) == list(TEMPLATES)
    assert dropped == []
    for template, row in rows.items():
        assert [token for token in row if token < 0] == [SLOTS[part.split("]")[0]] for part in template.split("[")[1:]]
        for s, io, place in itertools.product(NAMES, NAMES, PLACES):
            id_of = {-1: words["S"][s], -2: words["IO"][io], -7: words["PLACE"][place]}
            whole = encode(fill(template, {"S": s, "IO": io, "PLACE": place}))
            assert [id_of.get(token, token) for token in row] == list(whole)


@pytest.mark.parametrize("merged", ["Anna met", "Zed met", "the zoo", "zoo."])
def test_a_template_that_one_word_breaks_is_dropped_and_reported(merged):
    """A tokenizer with a token across the border of a slot, for the first, the last or any word."""
    glued = merged.replace(" ", "_").replace(".", "_")
    plain = word_vocabulary([*TEMPLATES, *NAMES, *PLACES, glued])

    def encode(text):
        return word_encode(plain)(text.replace(merged, glued))

    rows, dropped = slotted_templates(encode, TEMPLATES, SLOTS, words_of(encode))
    assert list(rows) == list(TEMPLATES[1:])
    ((template, why),) = dropped
    assert template == TEMPLATES[0]
    assert why.startswith("other tokens in 'Today, ")
    assert merged in why


@pytest.mark.parametrize("template", ["Today[S] met[WHO].", "At the[PLACE]."])
def test_a_slot_without_a_code_or_words_is_refused(template):
    words = {"S": {"Anna": 3}, "WHO": {"Anna": 3}, "PLACE": {}}
    with pytest.raises(
        ValueError, match=r"^templates must have slots among \['S', 'IO', 'PLACE'\], with words; got \["
    ):
        slotted_templates(ENCODERS["words"], [template], SLOTS, words)


def test_padded_rows_are_as_long_as_the_longest():
    rows = [[1, -2, 3], [4], []]
    table = padded(rows, 9)
    assert table.dtype == np.int32
    np.testing.assert_array_equal(table, [[1, -2, 3], [4, 9, 9], [9, 9, 9]])


# Words -----------------------------------------------------------------------------------------------------------


@encoders
def test_single_tokens_are_those_in_the_middle_of_a_sentence(encode):
    kept, dropped = single_tokens(encode, NAMES)
    assert list(kept) == list(NAMES)
    assert dropped == []
    for name in NAMES:
        assert list(encode(f"Today, Ben met {name}"))[-1] == kept[name]


@pytest.mark.parametrize("name", list(ENCODERS)[1:])
def test_words_of_several_tokens_and_words_again_are_reported(name):
    kept, dropped = single_tokens(ENCODERS[name], ("Ben", "Zebulon", "Ben"))
    assert list(kept) == ["Ben"]
    (long, why), (again, why_again) = dropped
    assert (long, again) == ("Zebulon", "Ben")
    assert int(why.removesuffix(" tokens")) > 1
    assert why_again == "the token of an earlier word"


def test_a_vocabulary_has_every_word_and_sign_once_and_no_slots():
    vocabulary = word_vocabulary(["Today,[S] met[IO], so[S].", "the zoo. the"])
    assert vocabulary == ("<bos>", "<pad>", ",", ".", "Today", "met", "so", "the", "zoo")
    assert word_vocabulary([]) == ("<bos>", "<pad>")


def test_words_are_encoded_as_their_places_and_unknown_ones_are_named():
    encode = word_encode(("<bos>", "<pad>", ".", "met", "Ben"))
    assert list(encode(" Ben met Ben.")) == [4, 3, 4, 2]
    assert list(encode("")) == []
    with pytest.raises(ValueError, match=r"^text must .* in the vocabulary; got \['saw', '!'\]"):
        encode("Ben saw Ben!")
