"""From what score on a head is of a type: the one place where thresholds stand. What made them:

    python experiments/recover_planted.py --calibrate

A logistic regression of planted truth on score, for each type and each kind of evidence, over planted models whose
keys, and random heads whose seeds, no test or benchmark uses. Scores are comparable between models (attention above
chance, shares, cosines), so these numbers are meant for any model; a null has to be beaten besides.
"""

from typing import NamedTuple


class Threshold(NamedTuple):
    """Confidence that a head is of a type: 1 / (1 + exp(-slope (score - middle)))."""

    middle: float
    slope: float


RATE = 0.001  # of false discoveries (Benjamini & Hochberg), over the heads of a model, for each type
# {type: (from weights, from activations)}
THRESHOLDS: dict[str, tuple[Threshold, Threshold]] = {
    "previous_token": (Threshold(0.4, 20.0), Threshold(0.3, 20.0)),
    "fixed_offset": (Threshold(0.4, 20.0), Threshold(0.3, 20.0)),
    "first_token": (Threshold(0.5, 20.0), Threshold(0.4, 20.0)),
    "same_position": (Threshold(0.5, 20.0), Threshold(0.4, 20.0)),
    "duplicate_token": (Threshold(0.2, 40.0), Threshold(0.2, 40.0)),
    "induction": (Threshold(0.3, 20.0), Threshold(0.15, 40.0)),
    "content": (Threshold(0.4, 20.0), Threshold(0.35, 20.0)),
    "diffuse": (Threshold(0.95, 100.0), Threshold(0.95, 100.0)),
    "copying": (Threshold(0.5, 20.0), Threshold(0.5, 20.0)),
    "suppressing": (Threshold(0.5, 20.0), Threshold(0.5, 20.0)),
    "transforming": (Threshold(0.3, 40.0), Threshold(0.3, 40.0)),
    "extracting": (Threshold(0.35, 30.0), Threshold(0.35, 30.0)),
    "inactive": (Threshold(2.0, 5.0), Threshold(2.0, 5.0)),
}
