"""From scores to confidence, and how good scores and labels are.

Everything here is NumPy on the host, over arrays with the runs S in front.
"""

from collections.abc import Callable

import numpy as np
from scipy import optimize, stats


def fit_logistic(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Logistic regression of truth on score: P(true) = 1 / (1 + exp(-slope (score - middle))).

    Args:
        scores: any shape, finite.
        truth: bool, the same shape.

    Returns:
        (middle, slope), slope > 0: larger scores are taken to speak for it. Of classes that do not overlap, about the
        middle between them. Middle infinity where nothing is true; just below the smallest score where everything is.
    """
    x, y = np.ravel(scores).astype(float), np.ravel(truth)
    scale = x.std() or 1.0
    if not y.any():
        return np.inf, 1 / scale
    if y.all():
        return float(np.nextafter(x.min(), -np.inf)), 1 / scale
    sign = np.where(y, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> float:
        log_slope, middle = parameters
        margin = sign * np.exp(log_slope) * (x - middle) / scale
        return float(np.logaddexp(0.0, -margin).mean() + 1e-4 * log_slope**2)

    between = (x[y].mean() + x[~y].mean()) / 2
    log_slope, middle = optimize.minimize(loss, [1.0, between], method="Nelder-Mead").x
    return float(middle), float(np.exp(log_slope) / scale)


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Chance in [0, 1] that a true case scores above a false one, ties half; NaN when either is missing."""
    x, y = np.ravel(scores), np.ravel(truth)
    if y.all() or not y.any():
        return float("nan")
    n_true = int(y.sum())
    wins = stats.rankdata(x)[y].sum() - n_true * (n_true + 1) / 2
    return float(wins / (n_true * (y.size - n_true)))


def precision(labels: np.ndarray, truth: np.ndarray) -> float:
    """Share of the labelled that is true; NaN when nothing is labelled."""
    return float((labels & truth).sum() / labels.sum()) if labels.any() else float("nan")


def recall(labels: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true that is labelled; NaN when nothing is true."""
    return float((labels & truth).sum() / truth.sum()) if truth.any() else float("nan")


def f1(labels: np.ndarray, truth: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall; NaN when nothing is true or labelled."""
    either = labels.sum() + truth.sum()
    return float(2 * (labels & truth).sum() / either) if either else float("nan")


def proportion_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    statistic: Callable[..., float], *arrays: np.ndarray, n_resamples: int = 500, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of statistic(*arrays) when whole runs are drawn again.

    Args:
        statistic: of arrays [S,...]; resamples where it is NaN are left out.
        arrays: with the same S in front.
    """
    random = np.random.default_rng(seed)
    n = len(arrays[0])
    draws = [random.integers(0, n, n) for _ in range(n_resamples)]
    values = np.asarray([statistic(*(a[draw] for a in arrays)) for draw in draws])
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))
