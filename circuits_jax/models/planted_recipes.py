"""Which circuits to plant: PlantedHead, Recipe and the benchmark recipes; plant (planted.py) builds the parameters."""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

from circuits_jax.models.config import Norm, RotaryPairs, TransformerConfig
from circuits_jax.models.head_types import OVType, QKType

PlantedPositions = Literal["learned", "sinusoidal", "shortformer", "rotary"]
PlantedQK = Literal[QKType, "rotated", "junk"]
PlantedOV = Literal[
    OVType, "rotated", "send_previous", "send_pointer", "send_virtual", "receive_virtual", "erase"
]  # fmt: skip

ROTARY_DIM = 16
ROTARY_BASE = 10.0
# A gain of at most this leaves a head without effect: scores of 0.1 logits, writes of a hundredth of a token.
DORMANT = 0.01

# What the two sides of a head read, and what it writes. Heads that are not listed touch no subspace on purpose.
QK_READS: dict[str, tuple[str, str]] = {
    "previous_token": ("position", "position"),
    "fixed_offset": ("position", "position"),
    "first_token": ("const", "position"),
    "same_position": ("position", "position"),
    "duplicate_token": ("token", "token"),
    "content": ("token", "token"),
}
INDUCTION_READS = {"k": ("token", "previous"), "q": ("pointer", "position")}
OV_MOVES: dict[str, tuple[str, str]] = {
    "copying": ("token", "output"),
    "suppressing": ("token", "output"),
    "transforming": ("token", "output"),
    "extracting": ("token", "feature"),
    "send_previous": ("token", "previous"),
    "send_pointer": ("position", "pointer"),
    "send_virtual": ("token", "virtual"),
    "receive_virtual": ("virtual", "output"),
    "erase": ("token", "token"),
}
SENDERS = ("send_previous", "send_pointer", "send_virtual", "erase")
# Which heads have to stand in an earlier layer for another one to work: (qk, ov) of the sender.
NEEDS = {
    "induction_k": ("previous_token", "send_previous"),
    "induction_q": ("duplicate_token", "send_pointer"),
    "receive_virtual": (None, "send_virtual"),
}


@dataclasses.dataclass(frozen=True)
class PlantedHead:
    """One head to plant; hashable.

    Attributes:
        qk: where it looks. One of QK_TYPES; "rotated": the singular values of a duplicate_token head in random bases;
            "junk": a Gaussian W_QK of about 30 times the norm of a duplicate_token head.
        ov: what it moves. "copying": token -> +output. "suppressing": token -> -output. "transforming": token t ->
            output of pi(t), pi a random cycle through all tokens. "extracting": token t -> f(t) * feature, f a random
            balanced +-1. "inactive": nothing. "rotated": the singular values of a copying head in random bases.
            "send_previous", "send_virtual": token -> previous, virtual. "send_pointer": position -> pointer.
            "receive_virtual": virtual -> output. "erase": token -> -token.
        mechanism: of induction, the composition that it rests on: "k" or "q".
        offset: of fixed_offset, how many positions back.
        qk_gain: times the strength of the recipe. ov_gain: times the length that is written. DORMANT or less: the
            head counts as diffuse, or as inactive.
    """

    qk: PlantedQK = "diffuse"
    ov: PlantedOV = "inactive"
    mechanism: Literal["k", "q"] = "k"
    offset: int = 3
    qk_gain: float = 1.0
    ov_gain: float = 1.0

    def __post_init__(self) -> None:
        choices = {
            "qk": (*get_args(QKType), "rotated", "junk"),
            "ov": (*get_args(OVType), "rotated", *SENDERS, "receive_virtual"),
            "mechanism": ("k", "q"),
        }
        for name, allowed in choices.items():
            _require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(self, name))
        _require(_is_int(self.offset, 2), "offset", "an integer of at least 2", self.offset)
        for name in ("qk_gain", "ov_gain"):
            _require(_is_positive(getattr(self, name)), name, "a positive finite number", getattr(self, name))
        if self.ov == "erase":
            whole = self.qk == "same_position" and self.qk_gain == 1 and self.ov_gain == 1
            _require(whole, "an erase head", "same_position with gains of 1", self)

    @property
    def looks(self) -> bool:
        """Whether its attention differs from the uniform one by design."""
        return self.qk != "diffuse" and self.qk_gain > DORMANT

    @property
    def moves(self) -> bool:
        """Whether it writes anything that counts."""
        return self.ov != "inactive" and self.ov_gain > DORMANT

    @property
    def needs(self) -> tuple[str | None, str] | None:
        """(qk, ov) of the head that an earlier layer must hold; None where it works alone."""
        name = f"induction_{self.mechanism}" if self.qk == "induction" else self.ov
        return NEEDS.get(name)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An attention-only model to plant; hashable, so it can be a static jit argument.

    Attributes:
        heads: of each layer, equally many in all.
        positions: "learned" one-hot position vectors; "sinusoidal" ones, (cos w_f i, sin w_f i) / sqrt(F) with
            w_f = pi (f + 1/2) / F and F = n_context / 2, rounded up: orthonormal, a shift is a rotation of each pair;
            "shortformer" one-hot ones that only q and k see; "rotary": the first 16 components of each head are
            rotated, positions act on a constant direction there, tokens use the other components.
        norm: of the transformer. The expected size of the residual stream is its gain, so that the strength stays
            about right.
        rotary_pairs: as in TransformerConfig.
        n_vocab: V. The last token is [BOS]: put it at position 0 and nowhere else.
        n_context: T. d_head: K, of at least V and T (rotary: V + 16).
        strength: beta, by how many logits a head prefers its target over every other position.
    """

    heads: tuple[tuple[PlantedHead, ...], ...]
    positions: PlantedPositions = "learned"
    norm: Norm = "none"
    rotary_pairs: RotaryPairs = "half"
    n_vocab: int = 24
    n_context: int = 24
    d_head: int = 40
    strength: float = 14.0

    def __post_init__(self) -> None:
        for name, value, least in (("n_vocab", self.n_vocab, 3), ("n_context", self.n_context, 2)):
            _require(_is_int(value, least), name, f"an integer of at least {least}", value)
        allowed = get_args(PlantedPositions)
        _require(self.positions in allowed, "positions", f"one of {', '.join(allowed)}", self.positions)
        _require(_is_positive(self.strength), "strength", "a positive finite number", self.strength)
        widest = max(self.sizes.values()) + (ROTARY_DIM if self.positions == "rotary" else 0)
        _require(_is_int(self.d_head, widest), "d_head", f"an integer of at least {widest}", self.d_head)
        self._check_heads()
        # The config checks norm and rotary_pairs.
        _ = self.config

    def _check_heads(self) -> None:
        layers = self.heads
        nested = isinstance(layers, tuple) and layers and all(isinstance(layer, tuple) and layer for layer in layers)
        nested = nested and all(isinstance(head, PlantedHead) for layer in layers for head in layer)
        _require(nested, "heads", "a tuple of layers, each a tuple of PlantedHead", layers)
        numbers = [len(layer) for layer in layers]
        _require(len(set(numbers)) == 1, "heads", "equally many in each layer", numbers)
        for number, layer in enumerate(layers):
            for head in layer:
                if head.qk == "fixed_offset":
                    _require(head.offset < self.n_context, "offset", f"less than {self.n_context}", head.offset)
                pointers = head.ov == "send_pointer" or (head.qk, head.mechanism) == ("induction", "q")
                _require(
                    not pointers or self.positions in ("learned", "sinusoidal"),
                    "positions", "learned or sinusoidal for heads that move pointers", self.positions,
                )  # fmt: skip
                if head.needs:
                    _require(self._sent(number, *head.needs), f"a head in front of layer {number}", head.needs, None)

    def _sent(self, layer: int, qk: str | None, ov: str) -> bool:
        """Whether a working head of this kind stands before the layer, and read its tokens before they were erased."""
        return any(
            head.ov == ov and head.moves and self.works(number, head)[1] and (not qk or (head.qk == qk and head.looks))
            for number in range(layer)
            for head in self.heads[number]
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Dimensions of each subspace of the residual stream, in their order."""
        v, t = self.n_vocab, self.n_context
        position = {"learned": t, "shortformer": t, "sinusoidal": 2 * math.ceil(t / 2), "rotary": 0}[self.positions]
        pointer = position if self.positions in ("learned", "sinusoidal") else 0
        return {
            "token": v, "position": position, "const": 1, "previous": v, "pointer": pointer, "virtual": v,
            "output": v, "feature": 1,
        }  # fmt: skip

    @property
    def config(self) -> TransformerConfig:
        """Of the transformer; D is the smallest multiple of 8 that holds all subspaces and the all-ones direction."""
        # rotary_dim is checked against d_head whatever the positions.
        return TransformerConfig(
            n_vocab=self.n_vocab, n_context=self.n_context, n_layers=len(self.heads), n_heads=len(self.heads[0]),
            d_model=8 * math.ceil((sum(self.sizes.values()) + 1) / 8), d_head=self.d_head, norm=self.norm,
            positions="learned" if self.positions == "sinusoidal" else self.positions,
            rotary_dim=ROTARY_DIM if self.positions == "rotary" else 0, rotary_pairs=self.rotary_pairs,
            rotary_base=ROTARY_BASE,
        )  # fmt: skip

    def reads(self, head: PlantedHead) -> tuple[str, str] | None:
        """The subspaces that the query and the key side of a head read; None for diffuse, rotated and junk ones."""
        if head.qk == "induction":
            return INDUCTION_READS[head.mechanism]
        reads = QK_READS.get(head.qk)
        if self.positions != "rotary" or reads is None or "position" not in reads:
            return reads
        return ("const", "token") if head.qk == "first_token" else ("const", "const")

    def works(self, layer: int, head: PlantedHead) -> tuple[bool, bool]:
        """Whether the QK and the OV side of a head in this layer get what they read: tokens may be erased before."""
        erased = any(other.ov == "erase" for earlier in self.heads[:layer] for other in earlier)
        moved = OV_MOVES.get(head.ov, ("", ""))[0]
        return not erased or "token" not in (self.reads(head) or ()), not erased or moved != "token"


def _require(met: object, name: str, wanted: object, given: object) -> None:
    if not met:
        raise ValueError(f"{name} must be {wanted}; got {given!r}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def recipes(positions: PlantedPositions, norm: Norm = "none") -> dict[str, Recipe]:
    """The benchmark models, two layers of eight heads each.

    "basic": every QK type that works alone in both layers, OV types in turn. "k_induction": previous-token senders
    (one of them a backup) and induction heads by K-composition. "q_induction": duplicate-token senders of pointers and
    induction by Q-composition; only where values carry positions (learned, sinusoidal). "virtual": copying by
    V-composition, and huge-norm junk. "decoys": heads whose inputs were erased, dormant and rotated heads.
    """
    models = {"basic": _basic(), "k_induction": _k_induction(), "virtual": _virtual(), "decoys": _decoys()}
    if positions in ("learned", "sinusoidal"):
        models["q_induction"] = _q_induction()
    return {name: Recipe(heads, positions, norm) for name, heads in models.items()}


Layers = tuple[tuple[PlantedHead, ...], ...]


def _basic() -> Layers:
    qk: tuple[PlantedQK, ...] = (
        "previous_token", "fixed_offset", "first_token", "same_position", "duplicate_token", "content", "diffuse",
        "fixed_offset",
    )  # fmt: skip
    # Five OV types over eight heads: the second layer goes on where the first one stops.
    ov: tuple[OVType, ...] = ("copying", "suppressing", "transforming", "extracting", "inactive")
    offsets = {(0, 1): 2, (0, 7): 3, (1, 1): 5, (1, 7): 2}
    return tuple(
        tuple(
            PlantedHead(kind, ov[(len(qk) * layer + i) % len(ov)], offset=offsets.get((layer, i), 3))
            for i, kind in enumerate(qk)
        )
        for layer in range(2)
    )


def _k_induction() -> Layers:
    first = (
        PlantedHead("previous_token", "send_previous"),
        PlantedHead("previous_token", "send_previous"),
        PlantedHead("previous_token", "extracting"),
        PlantedHead("duplicate_token", "copying"),
        PlantedHead("content", "transforming"),
        PlantedHead("first_token", "inactive"),
        PlantedHead("fixed_offset", "suppressing"),
        PlantedHead("diffuse", "copying"),
    )
    second = (
        PlantedHead("induction", "copying"),
        PlantedHead("induction", "copying"),
        PlantedHead("induction", "suppressing"),
        PlantedHead("induction", "rotated"),
        PlantedHead("duplicate_token", "copying"),
        PlantedHead("previous_token", "extracting"),
        PlantedHead("first_token", "inactive"),
        PlantedHead("same_position", "transforming"),
    )
    return first, second


def _q_induction() -> Layers:
    first = (
        PlantedHead("duplicate_token", "send_pointer"),
        PlantedHead("duplicate_token", "copying"),
        PlantedHead("previous_token", "copying"),
        PlantedHead("content", "suppressing"),
        PlantedHead("first_token", "inactive"),
        PlantedHead("fixed_offset", "extracting", offset=2),
        PlantedHead("same_position", "transforming"),
        PlantedHead("diffuse", "transforming"),
    )
    second = (
        PlantedHead("induction", "copying", mechanism="q"),
        PlantedHead("induction", "copying", mechanism="q"),
        PlantedHead("induction", "suppressing", mechanism="q"),
        PlantedHead("induction", "rotated", mechanism="q"),
        PlantedHead("duplicate_token", "transforming"),
        PlantedHead("previous_token", "extracting"),
        PlantedHead("first_token", "inactive"),
        PlantedHead("diffuse", "copying"),
    )
    return first, second


def _virtual() -> Layers:
    first = (
        PlantedHead("previous_token", "send_virtual"),
        PlantedHead("previous_token", "transforming"),
        PlantedHead("fixed_offset", "copying", offset=2),
        PlantedHead("duplicate_token", "suppressing"),
        PlantedHead("content", "extracting"),
        PlantedHead("first_token", "inactive"),
        PlantedHead("same_position", "copying"),
        PlantedHead("diffuse", "suppressing"),
    )
    second = (
        PlantedHead("previous_token", "receive_virtual"),
        PlantedHead("fixed_offset", "receive_virtual", offset=2),
        PlantedHead("same_position", "receive_virtual"),
        PlantedHead("previous_token", "rotated"),
        PlantedHead("duplicate_token", "copying"),
        PlantedHead("content", "transforming"),
        PlantedHead("junk", "inactive"),
        PlantedHead("junk", "rotated"),
    )
    return first, second


def _decoys() -> Layers:
    asleep = 1e-3
    first = (
        PlantedHead("same_position", "erase"),
        PlantedHead("previous_token", "copying", qk_gain=asleep, ov_gain=asleep),
        PlantedHead("duplicate_token", "suppressing", qk_gain=asleep, ov_gain=asleep),
        PlantedHead("rotated", "inactive"),
        PlantedHead("previous_token", "transforming"),
        PlantedHead("diffuse", "copying"),
        PlantedHead("rotated", "copying"),
        PlantedHead("content", "transforming"),
    )
    second = (
        PlantedHead("duplicate_token", "copying"),
        PlantedHead("content", "transforming"),
        PlantedHead("duplicate_token", "extracting"),
        PlantedHead("previous_token", "suppressing"),
        PlantedHead("previous_token", "rotated"),
        PlantedHead("first_token", "extracting"),
        PlantedHead("content", "suppressing"),
        PlantedHead("first_token", "copying", qk_gain=asleep, ov_gain=asleep),
    )
    return first, second
