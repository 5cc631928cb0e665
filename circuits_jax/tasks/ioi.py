"""Indirect object identification: of two names, the one that does not come again is the one that is given something.

    Today, Anna and Ben met at the park. Anna handed a book to -> Ben
           S1       IO                   S2                 END

The answer is IO, the indirect object; S, the subject, is named twice. With S named first the pattern is BABA, with IO
first ABBA. A model must find the name that is repeated, keep away from it, and copy the other: previous-token,
duplicate-token, induction, S-inhibition and name-mover heads in GPT-2 small. Wang et al. 2022, arXiv 2211.00593; the
sentences here are our own.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.tasks.batch import Batch
from circuits_jax.tasks.wording import (
    BOS,
    PAD,
    Encode,
    Wording,
    padded,
    single_tokens,
    slotted_templates,
    word_encode,
    word_vocabulary,
)

IO, S, PLACE, OBJECT = -1, -2, -3, -4
SLOTS = {"IO": IO, "S": S, "PLACE": PLACE, "OBJECT": OBJECT}

TEMPLATES = (
    "Today,[S] and[IO] met at the[PLACE].[S] handed a[OBJECT] to[IO]",
    "Later,[S] and[IO] walked to the[PLACE].[S] passed the[OBJECT] to[IO]",
    "As[S] and[IO] left the[PLACE],[S] showed a[OBJECT] to[IO]",
    "Since[S] met[IO] at the[PLACE],[S] brought a[OBJECT] to[IO]",
    "Once[S] and[IO] reached the[PLACE],[S] offered the[OBJECT] to[IO]",
    "At the[PLACE],[S] saw[IO], so[S] sold a[OBJECT] to[IO]",
    "In the[PLACE],[S] and[IO] saw a[OBJECT].[S] bought it for[IO]",
    "Before[S] and[IO] left,[S] showed the[OBJECT] to[IO]",
    "Today[S] and[IO] found a[OBJECT] near the[PLACE].[S] handed it to[IO]",
    "The[OBJECT] that[S] and[IO] found was old, so[S] offered it to[IO]",
    "Later[S] met[IO] near the[PLACE].[S] waved to[IO]",
    "Near the[PLACE] lived[S] and[IO].[S] sold the[OBJECT] to[IO]",
    "As[S] saw[IO] with a[OBJECT] at the[PLACE],[S] waved to[IO]",
    "Once[S] and[IO] sat in the[PLACE],[S] passed a[OBJECT] to[IO]",
    "Today[S] and[IO] left the[PLACE] with a[OBJECT].[S] kept it for[IO]",
)
NAMES = (
    "Adam", "Alice", "Amy", "Anna", "Ben", "Brian", "Carl", "Claire", "Daniel", "David", "Emily", "Emma", "Eric",
    "Frank", "George", "Grace", "Helen", "Henry", "Jack", "Jane", "Julia", "Kate", "Kevin", "Laura", "Leo", "Lisa",
    "Mark", "Martin", "Nick", "Oliver", "Paul", "Peter", "Rachel", "Rose", "Ruth", "Sam", "Sarah", "Simon", "Tom",
    "Victoria",
)  # fmt: skip
PLACES = (
    "park", "market", "library", "museum", "garden", "station", "kitchen", "office", "hotel", "church", "theater",
    "bank", "school", "store",
)  # fmt: skip
OBJECTS = (
    "book", "letter", "ticket", "key", "lamp", "ring", "coat", "map", "drink", "cake", "coin", "phone", "basket", "hat",
)  # fmt: skip
LEAST = {"names": 6, "places": 2, "objects": 2}  # p_ABC takes three names beside IO and S, and some choice of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IOI:
    """The task and its control; all but n_vocab are arrays to jax and can be swept with vmap.

    Attributes:
        templates: [N,T] token ids, IO, S, PLACE, OBJECT where words go. The last IO is the answer. Rows 2i and 2i+1
            are one sentence, S first (BABA) and IO first (ABBA).
        names: [n] token ids, n at least 6.
        places: [p] token ids.
        objects: [o] token ids.
        noise: chance that the answer is drawn anew from all names. 1 is the control: nothing predicts the answer.
        n_vocab: V.
    """

    templates: Array
    names: Array
    places: Array
    objects: Array
    noise: float | Array = 0.0
    n_vocab: int = dataclasses.field(default=50257, metadata={"static": True})

    @property
    def n_context(self) -> int:
        """T."""
        return self.templates.shape[-1]

    def validate(self) -> None:
        """Raises ValueError for settings that describe no such sentences; noise may be single or swept."""
        templates = np.asarray(self.templates)
        if templates.ndim != 2 or templates.dtype.kind != "i" or len(templates) < 2 or len(templates) % 2:
            got = f"{templates.dtype} {list(templates.shape)}"
            raise ValueError(f"templates must be integers [N, T] with N even and at least 2; got {got}")
        if templates.min() < OBJECT or templates.max() >= self.n_vocab:
            limits = f"{templates.min()} to {templates.max()}"
            raise ValueError(f"templates must be slots from {OBJECT} or ids below n_vocab {self.n_vocab}; got {limits}")
        for i, (baba, abba) in enumerate(zip(templates[::2].tolist(), templates[1::2].tolist(), strict=True)):
            order = [token for token in baba if token in (IO, S)]
            if order != [S, IO, S, IO] or abba != _abba(baba):
                raise ValueError(
                    f"templates must be pairs with names as S IO S IO {S, IO, S, IO}, then with the first two swapped; "
                    f"got {baba} and {abba} in rows {2 * i} and {2 * i + 1}"
                )
        for name, least in LEAST.items():
            ids = np.asarray(getattr(self, name))
            if ids.ndim != 1 or len(np.unique(ids)) != len(ids) or len(ids) < least:
                raise ValueError(f"{name} must be at least {least} distinct ids in one row; got {ids.tolist()}")
            if ids.min() < 0 or ids.max() >= self.n_vocab:
                raise ValueError(f"{name} must be ids in [0, {self.n_vocab}); got {ids.tolist()}")
        others = np.concatenate([templates.ravel(), self.places, self.objects])
        if np.isin(self.names, others).any():
            raise ValueError(f"names must stand in IO and S alone; got {np.intersect1d(self.names, others)} elsewhere")
        if not np.all(np.less_equal(0, self.noise) & np.less_equal(self.noise, 1)):
            raise ValueError(f"noise must be in [0, 1]; got {self.noise}")

    def sample(self, key: Array) -> Batch:
        """One sentence: template, names (two different ones), place and object are uniform and independent.

        Returns:
            Batch with mask true at "end" alone, and positions, each a scalar:
            "io", "s1", "s1_next", "s2", "end": IO, the first S and the position after it, the second S, and the
                position whose next token is the answer;
            "at", "right", "wrong": end, and the tokens of IO and of S, whatever the noise, for logit_difference;
            "io_name", "s_name", "place", "object": which of names, places and objects; place and object are drawn
                also where the sentence has none;
            "template": its row; "order": 0 where S comes first (BABA), 1 where IO does (ABBA).
        """
        template_key, name_key, place_key, object_key, noisy_key, anew_key = jax.random.split(key, 6)
        io, s = self._draw_names(name_key, 2)
        batch = self._filled(
            jax.random.randint(template_key, (), 0, len(self.templates)),
            io,
            s,
            jax.random.randint(place_key, (), 0, len(self.places)),
            jax.random.randint(object_key, (), 0, len(self.objects)),
        )
        noisy = jax.random.bernoulli(noisy_key, jnp.asarray(self.noise, float))
        answer = jnp.where(noisy, jax.random.choice(anew_key, self.names), self.names[io])
        return dataclasses.replace(batch, tokens=batch.tokens.at[batch.positions["end"] + 1].set(answer))

    def with_other_io(self, batch: Batch, key: Array) -> Batch:
        """The sentence with another name for IO, neither IO nor S, and the answer that goes with it."""
        was = batch.positions
        (io,) = self._draw_names(key, 1, was["io_name"], was["s_name"])
        return self._filled(was["template"], io, was["s_name"], was["place"], was["object"])

    def with_other_s(self, batch: Batch, key: Array) -> Batch:
        """The sentence with another name for S, neither IO nor S, both times."""
        was = batch.positions
        (s,) = self._draw_names(key, 1, was["io_name"], was["s_name"])
        return self._filled(was["template"], was["io_name"], s, was["place"], was["object"])

    def with_orders_swapped(self, batch: Batch) -> Batch:
        """The sentence with IO and the first S in each other's place: BABA becomes ABBA, and back."""
        was = batch.positions
        return self._filled(was["template"] ^ 1, was["io_name"], was["s_name"], was["place"], was["object"])

    def unrelated(self, batch: Batch, key: Array) -> Batch:
        """p_ABC: other names at IO, S1 and S2, all three different, so that no name comes twice.

        "io_name" and "s_name" are those at IO and S1, and so are "right", "wrong" and the answer, though nothing in
        the sentence tells them apart.
        """
        was = batch.positions
        io, s1, s2 = self._draw_names(key, 3, was["io_name"], was["s_name"])
        abc = self._filled(was["template"], io, s1, was["place"], was["object"])
        return dataclasses.replace(abc, tokens=abc.tokens.at[was["s2"]].set(self.names[s2]))

    # What a claim about heads can ask of the task: see heads/claims.py.

    @property
    def answers(self) -> dict[str, Array]:
        """The tokens that stand for each class of a variable, by the variable's name: [C,m]."""
        return dict.fromkeys(("io_name", "s_name"), self.names[:, None])

    @property
    def word_classes(self) -> dict[str, int]:
        """The variables whose classes are words, which two halves of the words do not share, and how many there are."""
        return dict.fromkeys(("io_name", "s_name"), len(self.names))

    def halves(self) -> tuple["IOI", "IOI"]:
        """The same task with the first and with the last half of the names."""
        middle = len(self.names) // 2
        first, last = (dataclasses.replace(self, names=names) for names in (self.names[:middle], self.names[middle:]))
        return first, last

    def changed(self, batch: Batch, variable: str, key: Array) -> Batch:
        """One sentence with another class of a variable and all else the same."""
        return {"io_name": self.with_other_io, "s_name": self.with_other_s}[variable](batch, key)

    def _draw_names(self, key: Array, n: int, *taken: Array) -> Array:
        """n different names, [n] indices, uniform over those that are not taken."""
        lot = jax.random.uniform(key, self.names.shape)
        for name in taken:
            lot = lot.at[name].set(-1)
        return jax.lax.top_k(lot, n)[1]

    def _filled(self, row: Array, io: Array, s: Array, place: Array, object: Array) -> Batch:
        """The sentence that these indices stand for, answer IO."""
        template = self.templates[row]
        words = jnp.stack([self.names[io], self.names[s], self.places[place], self.objects[object]])
        tokens = jnp.where(template < 0, words[jnp.maximum(-1 - template, 0)], template)
        first_io, s1 = jnp.argmax(template == IO), jnp.argmax(template == S)
        s2, answer = (self.n_context - 1 - jnp.argmax(template[::-1] == code) for code in (S, IO))
        end = answer - 1
        positions = {
            "io": first_io,
            "s1": s1,
            "s1_next": s1 + 1,
            "s2": s2,
            "end": end,
            "at": end,
            "right": self.names[io],
            "wrong": self.names[s],
            "io_name": io,
            "s_name": s,
            "place": place,
            "object": object,
            "template": row,
            "order": (first_io < s1).astype(int),
        }
        return Batch(tokens=tokens, mask=jnp.arange(self.n_context) == end, positions=positions)


def ioi_words(
    names: Iterable[str] = NAMES,
    places: Iterable[str] = PLACES,
    objects: Iterable[str] = OBJECTS,
    templates: Iterable[str] = TEMPLATES,
) -> tuple[IOI, Wording]:
    """The task for toy models: a token is a word or a punctuation sign, and V is as small as that allows.

    Args:
        names, places, objects: words, at least 6, 2 and 2.
        templates: sentences in the order S, IO, S, IO, in brackets as in TEMPLATES; ABBA is made of them.

    Returns:
        The task, <bos> in front of every sentence and <pad> behind; and the word of every id.

    Raises:
        ValueError: for fewer words, no template, or one in another order.
    """
    lists = [tuple(words) for words in (names, places, objects, templates)]
    vocabulary = word_vocabulary(text for texts in lists for text in texts)
    bos, pad = vocabulary.index(BOS), vocabulary.index(PAD)
    task, wording = ioi_tokenized(word_encode(vocabulary), len(vocabulary), bos, pad, *lists)
    return task, wording._replace(vocabulary=vocabulary)


def ioi_tokenized(
    encode: Encode,
    n_vocab: int,
    bos: int | None,
    fill: int = 0,
    names: Iterable[str] = NAMES,
    places: Iterable[str] = PLACES,
    objects: Iterable[str] = OBJECTS,
    templates: Iterable[str] = TEMPLATES,
) -> tuple[IOI, Wording]:
    """The task in the tokens of a pretrained model.

    A word that is not one token is dropped, and so is a template whose text does not keep its tokens whatever the
    words; both are reported.

    Args:
        encode: text -> ids, no special tokens, for example lambda text: tokenizer.encode(text,
            add_special_tokens=False).ids of the tokenizers library.
        n_vocab: V.
        bos: the id in front of every sentence; None for none.
        fill: the id behind the answer, which no model may see before it answers.
        names, places, objects, templates: as for ioi_words.

    Returns:
        The task, and what was dropped.

    Raises:
        ValueError: for fewer than 6 names, 2 places, 2 objects or 1 template left, or a template in another order.
    """
    lists = {"names": names, "places": places, "objects": objects}
    ids, dropped = {}, []
    for what, words in lists.items():
        ids[what], violators = single_tokens(encode, words)
        if len(ids[what]) < LEAST[what]:
            left = f"{list(ids[what])}, dropped: {violators}"
            raise ValueError(f"{what} must have at least {LEAST[what]} words of a token of their own; got {left}")
        dropped += violators
    fillings = {"IO": ids["names"], "S": ids["names"], "PLACE": ids["places"], "OBJECT": ids["objects"]}
    rows, violators = slotted_templates(encode, templates, SLOTS, fillings)
    if not rows:
        raise ValueError(f"templates must have at least one that encode leaves whole; got none, dropped: {violators}")
    start = [] if bos is None else [bos]
    pairs = [start + row for baba in rows.values() for row in (baba, _abba(baba))]
    words = {what: jnp.array(list(kept.values()), int) for what, kept in ids.items()}
    task = IOI(jnp.array(padded(pairs, fill)), **words, n_vocab=n_vocab)
    task.validate()
    return task, Wording(None, (*dropped, *violators))


def _abba(baba: list[int]) -> list[int]:
    """A row with the first two names in each other's place."""
    first_two = [i for i, token in enumerate(baba) if token in (IO, S)][:2]
    return [IO + S - token if i in first_two else token for i, token in enumerate(baba)]
