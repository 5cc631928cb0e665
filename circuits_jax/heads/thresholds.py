"""From what score on a head is of a type: the one place where thresholds stand. What made them:

    python experiments/recover_planted.py --calibrate --models 1 --random-heads 2000 --trained-heads 256

(at 16 designed sequences instead of today's 64, and before rotated heads left the first layer of the decoys).

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
    "previous_token": (Threshold(0.506, 20.9), Threshold(0.205, 51)),
    "fixed_offset": (Threshold(0.535, 20.6), Threshold(0.223, 46)),
    "first_token": (Threshold(0.57, 19.4), Threshold(0.562, 20)),
    "same_position": (Threshold(0.555, 20.3), Threshold(0.383, 45.9)),
    "duplicate_token": (Threshold(0.253, 43.2), Threshold(0.135, 76.4)),
    "induction": (Threshold(0.39, 27.3), Threshold(0.0867, 68.3)),
    "content": (Threshold(0.183, 58.1), Threshold(0.146, 37.3)),
    "diffuse": (Threshold(0.896, 73.6), Threshold(0.888, 68.9)),
    "copying": (Threshold(0.482, 21.8), Threshold(0.453, 23)),
    "suppressing": (Threshold(0.531, 20.9), Threshold(0.509, 21.7)),
    "transforming": (Threshold(0.309, 47.4), Threshold(0.243, 45.7)),
    "extracting": (Threshold(0.579, 37.5), Threshold(0.566, 25.1)),
    "inactive": (Threshold(2.82, 5.93), Threshold(2.82, 5.91)),
}
