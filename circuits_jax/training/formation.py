"""When something formed."""

import numpy as np


def formation_step(steps: np.ndarray, values: np.ndarray, threshold: float) -> np.ndarray:
    """The first measured step at which a value reaches the threshold, float [S]; NaN for a run that never does.

    Args:
        steps: [E] rising.
        values: [S,E]; NaN reaches nothing.
    """
    reached = values >= threshold
    first = np.asarray(steps, float)[reached.argmax(-1)]
    return np.where(reached.any(-1), first, np.nan)
