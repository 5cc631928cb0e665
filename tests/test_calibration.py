"""Thresholds that never see what they judge, and scores of scores."""

import numpy as np
import pytest

from circuits_jax.heads import calibration


def test_threshold_lies_between_separable_classes():
    threshold = calibration.fit_threshold(np.array([0.0, 0.1, 0.2, 0.8, 0.9]), np.array([False] * 3 + [True] * 2))
    assert 0.2 < threshold < 0.8


def test_threshold_is_where_a_logistic_model_crosses_one_half():
    random = np.random.default_rng(0)
    scores = random.uniform(-5, 5, 20_000)
    truth = random.random(20_000) < 1 / (1 + np.exp(-3 * (scores - 1.5)))
    assert calibration.fit_threshold(scores, truth) == pytest.approx(1.5, abs=0.05)


def test_threshold_does_not_depend_on_the_unit():
    random = np.random.default_rng(1)
    scores = random.normal(size=200)
    truth = scores + 0.3 * random.normal(size=200) > 0.5
    one = calibration.fit_threshold(scores, truth)
    assert calibration.fit_threshold(1e4 * scores, truth) == pytest.approx(1e4 * one, rel=1e-2)


def test_threshold_of_one_class():
    scores = np.array([0.3, 0.7])
    assert not (scores > calibration.fit_threshold(scores, np.array([False, False]))).any()
    assert (scores > calibration.fit_threshold(scores, np.array([True, True]))).all()


def test_halves_never_see_what_they_judge():
    scores = np.array([[0.0, 1.0], [0.0, 10.0], [0.0, 1.0], [0.0, 10.0]])
    truth = scores > 0
    halves = calibration.fit_halves(scores, truth, np.ones(4, bool))
    assert 1 < halves[0] < 10  # even runs are judged by what odd ones taught
    assert 0 < halves[1] < 1
    labels = calibration.exceeds(scores, halves)
    assert labels.tolist() == [[False, False], [False, True]] * 2


def test_unusable_runs_are_not_fitted_on():
    scores = np.array([[0.0, 1.0], [np.nan, np.nan], [0.0, 1.0], [0.0, 2.0]])
    halves = calibration.fit_halves(scores, scores > 0, np.array([True, False, True, True]))
    assert np.isfinite(halves).all()
    assert not calibration.exceeds(scores, halves)[1].any()
    lonely = calibration.fit_halves(scores[:1], scores[:1] > 0, np.array([True]))
    assert np.isposinf(lonely[0])


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
