"""Subject-verb agreement: the verb takes the number of its subject, whatever other noun stands between or before.

    simple           The authors            -> see
    adverb           The authors often      -> see
    prepositional    The authors near the guard              -> see
    across_relative  The authors that the guard likes        -> see
    within_relative  The guard that the authors              -> see

The noun that does not agree is the attractor; its number is a variable of its own. A minimal pair is two sentences of
the same length that differ in the number of the subject and so in the answer, and in no other token: what a model does
differently between them, it does for the number. Constructions as in Linzen et al. 2016, arXiv 1611.01368, and
Marvin & Linzen 2018, arXiv 1808.09031.
"""

import dataclasses
from collections.abc import Iterable, Mapping

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

SUBJECT, ATTRACTOR, ANSWER, INNER, ADVERB = -1, -2, -3, -4, -5  # INNER is a verb that agrees with the attractor
SLOTS = {"SUBJECT": SUBJECT, "ATTRACTOR": ATTRACTOR, "ANSWER": ANSWER, "INNER": INNER, "ADVERB": ADVERB}

# Relative clauses without INNER have a verb in the past tense, which shows no number.
FRAMES = {
    "simple": (
        "The[SUBJECT][ANSWER]",
        "Today the[SUBJECT][ANSWER]",
        "I think the[SUBJECT][ANSWER]",
        "I think that the[SUBJECT][ANSWER]",
    ),
    "adverb": (
        "The[SUBJECT][ADVERB][ANSWER]",
        "Today the[SUBJECT][ADVERB][ANSWER]",
        "I think the[SUBJECT][ADVERB][ANSWER]",
        "I think that the[SUBJECT][ADVERB][ANSWER]",
    ),
    "prepositional": (
        "The[SUBJECT] near the[ATTRACTOR][ANSWER]",
        "The[SUBJECT] behind the[ATTRACTOR][ANSWER]",
        "Today the[SUBJECT] beside the[ATTRACTOR][ANSWER]",
        "I think the[SUBJECT] next to the[ATTRACTOR][ANSWER]",
    ),
    "across_relative": (
        "The[SUBJECT] that the[ATTRACTOR][INNER][ANSWER]",
        "The[SUBJECT] who saw the[ATTRACTOR][ANSWER]",
        "Today the[SUBJECT] who the[ATTRACTOR][INNER][ANSWER]",
        "I think the[SUBJECT] that met the[ATTRACTOR][ANSWER]",
    ),
    "within_relative": (
        "The[ATTRACTOR] that the[SUBJECT][ANSWER]",
        "The[ATTRACTOR] who the[SUBJECT][ANSWER]",
        "Today the[ATTRACTOR] who the[SUBJECT][ANSWER]",
        "I think the[ATTRACTOR] that the[SUBJECT][ANSWER]",
    ),
}
CONSTRUCTIONS = tuple(FRAMES)

NOUNS = {
    "author": "authors", "doctor": "doctors", "teacher": "teachers", "driver": "drivers", "lawyer": "lawyers",
    "player": "players", "student": "students", "guard": "guards", "artist": "artists", "farmer": "farmers",
    "king": "kings", "boy": "boys", "girl": "girls", "man": "men", "woman": "women", "child": "children",
}  # fmt: skip
VERBS = {
    "likes": "like", "knows": "know", "sees": "see", "needs": "need", "wants": "want", "helps": "help",
    "calls": "call", "follows": "follow", "leaves": "leave", "remembers": "remember", "watches": "watch", "has": "have",
}  # fmt: skip
ADVERBS = ("often", "always", "never", "rarely", "usually", "clearly", "sometimes", "still")
_WORDS = (*NOUNS, *NOUNS.values(), *VERBS, *VERBS.values(), *ADVERBS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Agreement:
    """The task and its control; all but n_vocab are arrays to jax and can be swept with vmap.

    Attributes:
        templates: [N,T], token ids and the slots SUBJECT, ATTRACTOR, ANSWER, INNER, ADVERB.
        construction: [N], index of each template's construction in CONSTRUCTIONS.
        nouns: [n,2], the token ids of singular and plural; at least 3.
        verbs: [v,2], the same; at least 2.
        adverbs: [a].
        n_vocab: V.
        noise: chance that the number of the answer is drawn anew. 1 is the control: nothing predicts it.
        congruent: chance that the attractor has the subject's number. With 0.5 the attractor says nothing about it.
    """

    templates: Array
    construction: Array
    nouns: Array
    verbs: Array
    adverbs: Array
    n_vocab: int = dataclasses.field(metadata={"static": True})
    noise: float | Array = 0.0
    congruent: float | Array = 0.5

    @property
    def n_context(self) -> int:
        """T."""
        return self.templates.shape[-1]

    def validate(self) -> None:
        """Raises ValueError for settings, single or swept, that describe no such sentence."""
        for name, fewest in (("nouns", 3), ("verbs", 2)):
            shape = getattr(self, name).shape
            if len(shape) < 2 or shape[-2] < fewest or shape[-1] != 2:
                raise ValueError(f"{name} must be [n, 2] with n at least {fewest}; got shape {shape}")
        if not self.adverbs.size:
            raise ValueError(f"adverbs must be [a] with a at least 1; got shape {self.adverbs.shape}")
        for name in ("nouns", "verbs", "adverbs"):
            ids = np.asarray(getattr(self, name))
            words = np.sort(ids if name == "adverbs" else ids.reshape(*ids.shape[:-2], -1))
            if words.min() < 0 or words.max() >= self.n_vocab or (np.diff(words) == 0).any():
                raise ValueError(f"{name} must be distinct ids in [0, {self.n_vocab}); got {ids.tolist()}")
        templates, construction = np.asarray(self.templates), np.asarray(self.construction)
        if templates.ndim < 2 or templates.min() < ADVERB or templates.max() >= self.n_vocab:
            raise ValueError(f"templates must be [N, T], slots or ids below {self.n_vocab}; got {templates.tolist()}")
        n_subject, n_attractor, n_inner = ((templates == slot).sum(-1) for slot in (SUBJECT, ATTRACTOR, INNER))
        slots_from_answer_on = (np.logical_or.accumulate(templates == ANSWER, -1) & (templates < 0)).sum(-1)
        agreeing = (n_subject == 1) & (n_inner <= n_attractor) & (n_attractor <= 1)
        if not np.all(agreeing & (slots_from_answer_on == 1)):
            raise ValueError(
                "templates must have one SUBJECT, at most one ATTRACTOR, INNER at most once and not without it, and "
                f"one ANSWER behind them all; got {templates.tolist()}"
            )
        if construction.shape != templates.shape[:-1] or not np.isin(construction, range(len(CONSTRUCTIONS))).all():
            raise ValueError(f"construction must be [N] in [0, {len(CONSTRUCTIONS)}); got {construction.tolist()}")
        for name in ("noise", "congruent"):
            chance = getattr(self, name)
            if not np.all(np.less_equal(0, chance) & np.less_equal(chance, 1)):
                raise ValueError(f"{name} must be in [0, 1]; got {chance}")

    def sample(self, key: Array) -> Batch:
        """One sentence: template, number, two different nouns, two different verbs and adverb are uniform.

        Returns:
            Batch with mask true at "end" alone, and positions, all int []:
            "subject", "attractor", "inner" where they are, -1 where there is none. "subject" is the noun that the
                answer agrees with: in within_relative the one inside the clause;
            "end" and "at", the position before the answer;
            "right" and "wrong", the tokens of the drawn verb in the subject's number and in the other, noise or not;
            "number", "attractor_number": 0 singular, 1 plural;
            "noun", "attractor_noun", "verb", "inner_verb", "adverb": indices into nouns, verbs, adverbs;
            "construction", "template": index into CONSTRUCTIONS, row of templates.
            What the template has no slot for is drawn too; it does not show in the sentence.
        """
        names = ("template", "number", "attractor", "nouns", "verbs", "adverb", "noise", "answer")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        number = jax.random.randint(keys["number"], (), 0, 2)
        alike = jax.random.bernoulli(keys["attractor"], jnp.asarray(self.congruent, float))
        noun, attractor_noun = _two_of(keys["nouns"], len(self.nouns))
        verb, inner_verb = _two_of(keys["verbs"], len(self.verbs))
        batch = self._worded(
            {
                "template": jax.random.randint(keys["template"], (), 0, len(self.templates)),
                "number": number,
                "attractor_number": jnp.where(alike, number, 1 - number),
                "noun": noun,
                "attractor_noun": attractor_noun,
                "verb": verb,
                "inner_verb": inner_verb,
                "adverb": jax.random.randint(keys["adverb"], (), 0, len(self.adverbs)),
            }
        )
        anew = jax.random.randint(keys["answer"], (), 0, 2)
        shown = jnp.where(jax.random.bernoulli(keys["noise"], jnp.asarray(self.noise, float)), anew, number)
        tokens = batch.tokens.at[batch.positions["end"] + 1].set(self.verbs[verb, shown])
        return dataclasses.replace(batch, tokens=tokens)

    # Of one sentence, made anew from its variables: the answer is the right one, with noise too.

    def with_other_number(self, batch: Batch) -> Batch:
        """The other sentence of the minimal pair: the subject's number is flipped, and with it the answer."""
        return self._worded({**batch.positions, "number": 1 - batch.positions["number"]})

    def with_other_attractor(self, batch: Batch) -> Batch:
        """The attractor's number is flipped, and the inner verb's, where the sentence has them; the answer stays."""
        return self._worded({**batch.positions, "attractor_number": 1 - batch.positions["attractor_number"]})

    def with_other_noun(self, batch: Batch, key: Array) -> Batch:
        """Another subject of the same number, uniform over the nouns that are not in the sentence; the answer stays."""
        taken = jnp.array([batch.positions["noun"], batch.positions["attractor_noun"]])
        free = jnp.zeros(len(self.nouns)).at[taken].set(-jnp.inf)
        return self._worded({**batch.positions, "noun": jax.random.categorical(key, free)})

    # What a claim about heads can ask of the task: see heads/claims.py.

    @property
    def answers(self) -> dict[str, Array]:
        """The tokens that stand for each class of a variable, by the variable's name: [C,m]."""
        return dict.fromkeys(("number", "attractor_number"), self.verbs.T)

    @property
    def word_classes(self) -> dict[str, int]:
        """The variables whose classes are words, which two halves of the words do not share, and how many there are."""
        return dict.fromkeys(("noun", "attractor_noun"), len(self.nouns))

    def halves(self) -> tuple["Agreement", "Agreement"]:
        """The same task with the first and with the last half of the nouns."""
        middle = len(self.nouns) // 2
        first, last = (dataclasses.replace(self, nouns=nouns) for nouns in (self.nouns[:middle], self.nouns[middle:]))
        return first, last

    def changed(self, batch: Batch, variable: str, key: Array) -> Batch:
        """One sentence with another class of a variable and all else the same."""
        if variable == "noun":
            return self.with_other_noun(batch, key)
        return {"number": self.with_other_number, "attractor_number": self.with_other_attractor}[variable](batch)

    def _worded(self, variables: Mapping[str, Array]) -> Batch:
        """The sentence of these variables."""
        of = dict(variables)
        template = self.templates[of["template"]]
        right, wrong = self.verbs[of["verb"], of["number"]], self.verbs[of["verb"], 1 - of["number"]]
        words = jnp.stack(  # in the order of the slots' codes
            [
                self.nouns[of["noun"], of["number"]],
                self.nouns[of["attractor_noun"], of["attractor_number"]],
                right,
                self.verbs[of["inner_verb"], of["attractor_number"]],
                self.adverbs[of["adverb"]],
            ]
        )
        tokens = jnp.where(template < 0, words[jnp.maximum(-1 - template, 0)], template)
        end = _place(template, ANSWER) - 1
        found = {
            "subject": _place(template, SUBJECT),
            "attractor": _place(template, ATTRACTOR),
            "inner": _place(template, INNER),
            "end": end,
            "at": end,
            "right": right,
            "wrong": wrong,
            "construction": self.construction[of["template"]],
        }
        return Batch(tokens=tokens, mask=jnp.arange(self.n_context) == end, positions=of | found)


def agreement_words(constructions: Iterable[str] = CONSTRUCTIONS) -> tuple[Agreement, Wording]:
    """The task in words, V those of its frames and lists, for toy models; see agreement_tokenized."""
    constructions = tuple(constructions)
    vocabulary = word_vocabulary([*_frames_of(constructions), *_WORDS])
    bos, fill = vocabulary.index(BOS), vocabulary.index(PAD)
    task, wording = agreement_tokenized(word_encode(vocabulary), len(vocabulary), bos, fill, constructions)
    return task, wording._replace(vocabulary=vocabulary)


def agreement_tokenized(
    encode: Encode, n_vocab: int, bos: int | None, fill: int = 0, constructions: Iterable[str] = CONSTRUCTIONS
) -> tuple[Agreement, Wording]:
    """The task in the tokens of any tokenizer; what would break a minimal pair is dropped and reported.

    A noun or verb stays if both its forms, with a space in front, are one token each: the two sentences of a pair are
    then equally long, and an answer is one token. A frame stays if the tokenizer cuts filled sentences at the slots.

    Args:
        encode: text -> ids, no special tokens added.
        n_vocab: V.
        bos: the id in front of every sentence; None for none.
        fill: the id behind the answer in sentences shorter than T.
        constructions: some of CONSTRUCTIONS.

    Raises:
        ValueError: for no construction or an unknown one, ids outside [0, V), and where fewer than 3 nouns, 2 verbs,
            1 adverb or 1 frame of each construction are left.
    """
    frames = _frames_of(constructions)
    for name, special in (("bos", bos), ("fill", fill)):
        if special is not None and not 0 <= special < n_vocab:
            raise ValueError(f"{name} must be an id in [0, {n_vocab}); got {special}")
    ids, dropped = single_tokens(encode, _WORDS)
    for pair in (NOUNS | VERBS).items():
        if len(one_left := [word for word in pair if word in ids]) == 1:
            dropped.append((one_left[0], f"the other of {pair} is dropped"))
    nouns, verbs = ([pair for pair in forms.items() if set(pair) <= ids.keys()] for forms in (NOUNS, VERBS))
    adverbs = [word for word in ADVERBS if word in ids]
    for name, kept, fewest in (("nouns", nouns, 3), ("verbs", verbs, 2), ("adverbs", adverbs, 1)):
        if len(kept) < fewest:
            raise ValueError(f"encode must leave at least {fewest} {name} of single tokens; got {kept}, {dropped}")
    of_nouns, of_verbs = ({word: ids[word] for pair in pairs for word in pair} for pairs in (nouns, verbs))
    fillings = {"SUBJECT": of_nouns, "ATTRACTOR": of_nouns, "ANSWER": of_verbs, "INNER": of_verbs}
    fillings["ADVERB"] = {word: ids[word] for word in adverbs}
    rows, broken = slotted_templates(encode, frames, SLOTS, fillings)
    if missing := set(frames.values()) - {frames[frame] for frame in rows}:
        raise ValueError(f"encode must leave a frame of each construction; got none of {sorted(missing)}: {broken}")
    start = [] if bos is None else [bos]
    task = Agreement(
        templates=jnp.asarray(padded([start + row for row in rows.values()], fill)),
        construction=jnp.array([CONSTRUCTIONS.index(frames[frame]) for frame in rows]),
        nouns=jnp.array([[ids[word] for word in pair] for pair in nouns]),
        verbs=jnp.array([[ids[word] for word in pair] for pair in verbs]),
        adverbs=jnp.array([ids[word] for word in adverbs]),
        n_vocab=n_vocab,
    )
    task.validate()
    return task, Wording(None, (*dropped, *broken))


def _frames_of(constructions: Iterable[str]) -> dict[str, str]:
    """The construction of every frame of these."""
    asked = tuple(constructions)
    if not asked or not set(asked) <= set(CONSTRUCTIONS):
        raise ValueError(f"constructions must be some of {CONSTRUCTIONS}; got {asked}")
    return {frame: construction for construction in asked for frame in FRAMES[construction]}


def _two_of(key: Array, n: int) -> Array:
    """Two different integers in [0, n), [2], uniform over ordered pairs."""
    first, step = jax.random.randint(key, (2,), 0, jnp.array([n, n - 1]))
    return jnp.stack([first, (first + 1 + step) % n])


def _place(template: Array, slot: int) -> Array:
    """Where a slot is in a template [T], -1 where it is not."""
    hit = template == slot
    return jnp.where(hit.any(), jnp.argmax(hit), -1)
