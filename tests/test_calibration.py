"""Confidence from scores, and scores of scores."""

import numpy as np
import pytest

from circuits_jax.heads import calibration


def test_middle_lies_between_separable_classes():
    middle, slope = calibration.fit_logistic(np.array([0.0, 0.1, 0.2, 0.8, 0.9]), np.array([False] * 3 + [True] * 2))
    assert 0.2 < middle < 0.8
    assert slope * 0.3 > 2  # sure of both sides


def test_the_logistic_model_that_made_the_data_is_found():
    random = np.random.default_rng(0)
    scores = random.uniform(-5, 5, 20_000)
    truth = random.random(20_000) < 1 / (1 + np.exp(-3 * (scores - 1.5)))
    assert calibration.fit_logistic(scores, truth) == pytest.approx((1.5, 3.0), abs=0.15)


def test_the_fit_does_not_depend_on_the_unit():
    random = np.random.default_rng(1)
    scores = random.normal(size=200)
    truth = scores + 0.3 * random.normal(size=200) > 0.5
    middle, slope = calibration.fit_logistic(scores, truth)
    assert calibration.fit_logistic(1e4 * scores, truth) == pytest.approx((1e4 * middle, slope / 1e4), rel=1e-2)


def test_the_fit_of_one_class():
    scores = np.array([0.3, 0.7])
    assert not (scores > calibration.fit_logistic(scores, np.array([False, False]))[0]).any()
    assert (scores > calibration.fit_logistic(scores, np.array([True, True]))[0]).all()


def test_auroc_against_counting_pairs():
    random = np.random.default_rng(2)
    scores, truth = random.integers(0, 6, 60), random.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    assert calibration.auroc(scores, truth) == pytest.approx(np.mean(pairs))
    assert np.isnan(calibration.auroc(scores, np.zeros(60, bool)))


def test_precision_and_recall():
    labels, truth = np.array([True, True, False, False]), np.array([True, False, True, True])
    assert calibration.precision(labels, truth) == 0.5
    assert calibration.recall(labels, truth) == pytest.approx(1 / 3)
    assert np.isnan(calibration.precision(np.zeros(2, bool), np.ones(2, bool)))
    assert np.isnan(calibration.recall(np.ones(2, bool), np.zeros(2, bool)))


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    labels, truth = np.array([True, True, False, False]), np.array([True, False, True, True])
    assert calibration.f1(labels, truth) == pytest.approx(2 / (1 / 0.5 + 1 / (1 / 3)))
    assert calibration.f1(labels, ~labels) == 0.0
    assert np.isnan(calibration.f1(np.zeros(2, bool), np.zeros(2, bool)))


def test_wilson_interval_of_a_textbook_case():
    low, high = calibration.proportion_interval(8, 8)
    assert (low, high) == (pytest.approx(0.6756, abs=1e-3), 1.0)
    assert calibration.proportion_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_the_mean_at_its_rate():
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        low, high = calibration.bootstrap_interval(np.mean, random.normal(size=40), n_resamples=200, seed=trial)
        covered += low < 0 < high
    assert 180 <= covered <= 198


def test_bootstrap_draws_whole_runs():
    values = np.repeat(np.arange(4.0)[:, None], 100, axis=1)
    low, high = calibration.bootstrap_interval(np.mean, values)
    assert high - low > 1  # cells drawn on their own would give a tenth of it
