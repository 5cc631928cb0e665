"""Sentences with slots as rows of token ids, by words for toy models or by any tokenizer.

A template is a sentence whose slots stand in brackets, "Today[S] met[IO].": a slot takes a word and the space in front
of it, so that the words that fill it are tokens " Anna", " Ben". A slotted row has the ids of the text between slots
and a negative code at every slot; a task fills it with arrays, no strings needed.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Encode = Callable[[str], Sequence[int]]
"""Text -> token ids, no special tokens added."""

BOS, PAD = "<bos>", "<pad>"
_SLOT = re.compile(r"\[(\w+)\]")
_WORD = re.compile(r"\w+|[^\w\s]")


class Wording(NamedTuple):
    """What the ids of a task say, and what its tokenizer could not say.

    Attributes:
        vocabulary: the word of every id; None where a tokenizer has it.
        dropped: (word or template, why) of each that was left out.
    """

    vocabulary: tuple[str, ...] | None
    dropped: tuple[tuple[str, str], ...]


def word_vocabulary(texts: Iterable[str]) -> tuple[str, ...]:
    """<bos>, <pad>, then the distinct words and punctuation signs of texts or templates, sorted, slots left out."""
    words = {word for text in texts for word in _WORD.findall(_SLOT.sub(" ", text))}
    return (BOS, PAD, *sorted(words))


def word_encode(vocabulary: Sequence[str]) -> Encode:
    """An encoder whose tokens are words and punctuation signs; ids are places in vocabulary.

    It raises ValueError for words that are not in the vocabulary.
    """
    ids = {word: i for i, word in enumerate(vocabulary)}

    def encode(text: str) -> list[int]:
        words = _WORD.findall(text)
        unknown = [word for word in words if word not in ids]
        if unknown:
            raise ValueError(f"text must consist of words in the vocabulary; got {unknown}")
        return [ids[word] for word in words]

    return encode


def single_tokens(encode: Encode, words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The words that are one token each where they follow a word, no two the same token.

    Returns:
        The id of every word kept, in the order given, and (word, why) of every other.
    """
    kept: dict[str, int] = {}
    dropped = []
    for word in words:
        # Behind itself, not behind a bare space: tokenizers that mark the start of a text would count that space twice.
        ids = encode(f"{word} {word}")[len(encode(word)) :]
        if len(ids) != 1:
            dropped.append((word, f"{len(ids)} tokens"))
        elif ids[0] in kept.values():
            dropped.append((word, "the token of an earlier word"))
        else:
            kept[word] = ids[0]
    return kept, dropped


def slotted_templates(
    encode: Encode, templates: Iterable[str], slots: Mapping[str, int], words: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, list[int]], list[tuple[str, str]]]:
    """The slotted rows of templates: a row whose codes are replaced by ids of words is the sentence as it is encoded.

    Every word is tried in every slot of its kind.

    Args:
        encode: the tokenizer.
        templates: sentences, for example "Today[S] met[IO] at the[PLACE].".
        slots: the negative code of each slot by name.
        words: for each slot by name, the words that fill it with their ids, as from single_tokens.

    Returns:
        The row of every template kept, in the order given, and (template, why) of every other.

    Raises:
        ValueError: for a slot that has no code, or no words.
    """
    kept, dropped = {}, []
    for template in templates:
        for slot in _SLOT.findall(template):
            if slot not in slots or not words.get(slot):
                raise ValueError(f"templates must have slots among {list(slots)}, with words; got [{slot}]: {template}")
        fillings = _fillings(template, words)
        row = _slotted(encode, template, slots, fillings[0])
        for filling in fillings:
            text = _filled(template, filling)
            id_of = {slots[slot]: words[slot][word] for slot, word in filling.items()}
            if list(encode(text)) != [id_of.get(token, token) for token in row]:
                dropped.append((template, f"other tokens in {text!r}"))
                break
        else:
            kept[template] = row
    return kept, dropped


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Rows of different lengths as one int32 [N,T], T the longest, fill behind the others."""
    table = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return table


def _fillings(template: str, words: Mapping[str, Mapping[str, int]]) -> list[dict[str, str]]:
    """Words for the slots of a template, as often as it takes to have every word in its place."""
    choices = {slot: list(words[slot]) for slot in _SLOT.findall(template)}
    longest = max(map(len, choices.values()), default=1)
    return [{slot: choice[i % len(choice)] for slot, choice in choices.items()} for i in range(longest)]


def _slotted(encode: Encode, template: str, slots: Mapping[str, int], filling: Mapping[str, str]) -> list[int]:
    row: list[int] = []
    for slot in _SLOT.finditer(template):
        row += encode(_filled(template[: slot.start()], filling))[len(row) :]
        row.append(slots[slot[1]])
    return row + list(encode(_filled(template, filling))[len(row) :])


def _filled(template: str, filling: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda slot: f" {filling[slot[1]]}", template)
