"""Null heads have the norms of the real ones and nothing else of them."""

import jax
import numpy as np
import pytest

from circuits_jax.circuits.spectra import copying_score
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import nulls
from circuits_jax.models.transformer import TransformerConfig, init_params

CONFIG = TransformerConfig(n_vocab=12, n_context=8, n_layers=2, n_heads=2, d_model=16)


@pytest.fixture(scope="module")
def weights():
    return CircuitWeights.from_params(CONFIG, init_params(CONFIG, jax.random.key(0)))


def test_norms_are_kept_and_directions_are_not(weights):
    null = nulls.norm_matched(weights, jax.random.key(1))
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        real, random = np.asarray(getattr(weights, name)), np.asarray(getattr(null, name))
        axes = (-2, -1)
        np.testing.assert_allclose(np.linalg.norm(random, axis=axes), np.linalg.norm(real, axis=axes), rtol=1e-5)
        cosine = (real * random).sum(axes) / np.linalg.norm(real, axis=axes) ** 2
        assert (np.abs(cosine) < 0.4).all()
    assert null.W_E is weights.W_E


def test_copying_threshold_is_the_quantile_of_null_copying(weights):
    threshold = jax.jit(lambda w: nulls.copying_threshold(w, jax.random.key(2), n_draws=16, quantile=0.9))(weights)
    keys = jax.random.split(jax.random.key(2), 16)
    scores = jax.jit(lambda w: jax.lax.map(lambda k: copying_score(nulls.norm_matched(w, k)), keys))(weights)
    assert np.mean(np.asarray(scores) <= threshold) == pytest.approx(0.9, abs=0.02)
    assert 0 < threshold < 1
