"""The rotary settings of a config.json as a Rotary, with whatever stretches them to long contexts made explicit.

Every scaling is a change of the frequencies f_i = base^(-2i/dim), and in YaRN and LongRoPE a factor on q and k; the
result is what Hugging Face's models compute for sequences of up to n_context tokens.
"""

import math
from typing import Any

import numpy as np

from circuits_jax.models.config import ROTARY_BASE, Rotary

Settings = dict[str, Any]


def rotary_settings(raw: Settings) -> Settings:
    """What a config.json says of rotary positions, in any spelling, as one dict with rope_type and rope_theta.

    `rope_scaling` wins over `rope_parameters`, and what stands in either over the same name beside it.

    Raises:
        ValueError: for settings that differ between kinds of layer, and for a scaling without its type.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    inner = raw.get(name) or {}
    if not isinstance(inner, dict) or any(isinstance(value, dict) for value in inner.values()):
        raise ValueError(f"config.json: {name} must be one set of rotary settings for all layers; got {inner!r}")
    settings = {key: value for key, value in inner.items() if value is not None}
    kind = settings.get("rope_type") or settings.get("type")
    if kind is None and "factor" in settings:
        raise ValueError(f"config.json: {name} must name its rope_type; got {inner!r}")
    if kind not in (None, "dynamic") and raw.get("original_max_position_embeddings") is not None:
        settings["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    outer = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None}
    return {"rope_theta": ROTARY_BASE, **outer, **settings, "rope_type": kind or "default"}


def rotary_from_settings(settings: Settings, d_head: int, n_positions: int, n_context: int) -> Rotary:
    """The Rotary of a model.

    Args:
        settings: of rotary_settings.
        d_head: K. int(K * partial_rotary_factor) of its components are turned.
        n_positions: the checkpoint's longest sequence (max_position_embeddings).
        n_context: the longest sequence that it will see here.

    Raises:
        ValueError: for an unknown type, a missing number, and a type whose frequencies change with the length of the
            sequence (dynamic, longrope) within n_context.
    """
    share = _number(settings, "partial_rotary_factor", 1.0)
    dim, base, kind = int(d_head * share), _number(settings, "rope_theta"), settings["rope_type"]
    if not 0 < dim <= d_head:
        raise ValueError(f"config.json: the rotary share of d_head={d_head} must be in (0, 1]; got {share}")
    if base <= 1:
        raise ValueError(f"config.json: rope_theta must be above 1; got {base}")
    plain = base ** (-np.arange(0, dim, 2) / dim)
    original = settings.get("original_max_position_embeddings", n_positions)
    if kind not in ("default", "linear") and (type(original) is not int or original < 2):
        raise ValueError(f"config.json: original_max_position_embeddings must be an integer above 1; got {original!r}")
    frequencies, scale = None, 1.0
    match kind:
        case "default":
            pass
        case "linear":
            frequencies = plain / _number(settings, "factor")
        case "dynamic":  # as trained up to the original length
            _require_within(kind, original, n_context)
        case "yarn":
            frequencies = _yarn(settings, plain, base, original, n_positions)
            scale = _yarn_scale(settings, _number(settings, "factor", n_positions / original))
        case "llama3":
            frequencies = _llama3(settings, plain, original)
        case "longrope":
            _require_within(kind, original, n_context)
            frequencies = plain / _short_factors(settings, len(plain))
            factor = _number(settings, "factor", n_positions / original)
            stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            scale = _number(settings, "attention_factor", stretched)
        case _:
            known = "default, linear, dynamic, yarn, llama3, longrope"
            raise ValueError(f"config.json: rope_type must be one of {known}; got {kind!r}")
    return Rotary(dim, "half", base, () if frequencies is None else tuple(frequencies.tolist()), scale)


def _llama3(settings: Settings, plain: np.ndarray, original: int) -> np.ndarray:
    """Slow pairs are slowed by the factor, fast ones are not; in between, by how often they turn in training."""
    low, high = _number(settings, "low_freq_factor"), _number(settings, "high_freq_factor")
    if low >= high:
        raise ValueError(f"config.json: low_freq_factor must be below high_freq_factor; got {low} and {high}")
    turns = original * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / _number(settings, "factor"))


def _yarn(settings: Settings, plain: np.ndarray, base: float, original: int, n_positions: int) -> np.ndarray:
    """As Llama 3, but linear in the index of the pair (Peng et al. 2309.00071)."""
    dim = 2 * len(plain)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(_number(settings, "beta_fast", 32.0))
    high = pair_that_turns(_number(settings, "beta_slow", 1.0))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain * (1 - slowed + slowed / _number(settings, "factor", n_positions / original))


def _yarn_scale(settings: Settings, factor: float) -> float:
    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    both = settings.get("mscale") and settings.get("mscale_all_dim")
    usual = of(_number(settings, "mscale")) / of(_number(settings, "mscale_all_dim")) if both else of(1.0)
    return _number(settings, "attention_factor", usual)


def _short_factors(settings: Settings, n_pairs: int) -> np.ndarray:
    factors = settings.get("short_factor")
    if not isinstance(factors, list) or len(factors) != n_pairs:
        raise ValueError(f"config.json: short_factor must hold {n_pairs} numbers, one a pair; got {factors!r}")
    return np.array([_number({"short_factor": x}, "short_factor") for x in factors])


def _require_within(kind: str, original: int, n_context: int) -> None:
    if n_context > original:
        raise ValueError(
            f"config.json: rope_type {kind!r} changes with the length of the sequence beyond {original} tokens, which "
            f"is not supported: give n_context={original} or less; got {n_context}"
        )


def _number(settings: Settings, name: str, default: float | None = None) -> float:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        kind = settings.get("rope_type")
        raise ValueError(f"config.json: {name} of rope_type {kind!r} must be a positive number; got {value!r}")
    return float(value)
