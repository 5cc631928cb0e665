"""When something formed."""

import numpy as np

from circuits_jax.training.formation import formation_step


def test_first_step_at_or_over_the_threshold():
    steps = np.array([0, 10, 20])
    values = np.array([[0.0, 0.5, 0.2], [0.9, 0.1, 0.1], [0.1, 0.2, 0.49], [np.nan, np.nan, 0.6]])
    np.testing.assert_array_equal(formation_step(steps, values, 0.5), [10.0, 0.0, np.nan, 20.0])
