"""What heads are shown in the head atlas, besides their weights."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Material:
    """What heads are shown and asked about, besides their weights.

    Attributes:
        token_names: [V] the tokens as text.
        tokens: [B,T] sequences, or None: then all is from weights alone.
        predicted: [B,T] bool, at which of their positions the next token counts for effects.
        about: what the sequences are.
        between: what stands between tokens in a row.
        entries, dictionary: names and directions [N,D] to probe W_OV with; no names, no probes.
    """

    token_names: Sequence[str]
    tokens: np.ndarray | None = None
    predicted: np.ndarray | None = None
    about: str = ""
    between: str = ""
    entries: Sequence[str] = ()
    dictionary: np.ndarray | None = None
