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
    "previous_token": (Threshold(0.511, 20.7), Threshold(0.213, 48.9)),
    "fixed_offset": (Threshold(0.63, 22.9), Threshold(0.187, 54.5)),
    "first_token": (Threshold(0.948, 118), Threshold(0.568, 19.9)),
    "same_position": (Threshold(0.545, 20.5), Threshold(0.375, 42.6)),
    "duplicate_token": (Threshold(0.249, 43.6), Threshold(0.0946, 104)),
    "induction": (Threshold(0.365, 28.7), Threshold(0.0782, 68.4)),
    "content": (Threshold(0.181, 58.4), Threshold(0.139, 38)),
    "diffuse": (Threshold(0.885, 67.5), Threshold(0.888, 69)),
    "copying": (Threshold(0.475, 21.9), Threshold(0.445, 23.3)),
    "suppressing": (Threshold(0.524, 21), Threshold(0.504, 21.6)),
    "transforming": (Threshold(0.305, 48.3), Threshold(0.25, 49.6)),
    "extracting": (Threshold(0.584, 20.5), Threshold(0.564, 25.2)),
    "inactive": (Threshold(2.82, 5.94), Threshold(2.82, 5.91)),
}
