"""Rotary positions: queries and keys turned by an angle that grows with their position."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.models.config import Rotary


def rotate(x: Array, positions: ArrayLike, rotary: Rotary) -> Array:
    """Rotary embedding of x [...,T,K] at positions [T], or all rows at one; negative ones turn back."""
    angles = rotary_angles(x, positions, rotary)
    return turn_pairs(x, rotary.scale * jnp.cos(angles), rotary.scale * jnp.sin(angles), rotary)


def relative(x: Array, offsets: Array, rotary: Rotary) -> Array:
    """Queries [...,K] that score with keys as they are what both, rotated, score at offsets [N], on average.

    mean over offsets of x R_offset, times scale^2 where it turns: scale acts on q and on k.
    """
    angles = rotary_angles(x, offsets, rotary)
    scale = rotary.scale**2
    return turn_pairs(x, scale * jnp.cos(angles).mean(0), scale * jnp.sin(angles).mean(0), rotary)


def rotary_angles(x: Array, positions: ArrayLike, rotary: Rotary) -> Array:
    """position * frequency_i for each pair i of x [...,K] at positions [...]: [...,dim/2]."""
    d_head = x.shape[-1]
    dim = rotary.dim or d_head
    if dim % 2 or dim > d_head:
        raise ValueError(f"rotary_dim must be even and at most d_head={d_head}; got {dim}")
    if len(rotary.frequencies) not in (0, dim // 2):
        raise ValueError(f"rotary_frequencies must hold {dim // 2}, one a pair; got {len(rotary.frequencies)}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # bfloat16 cannot tell long positions apart
    frequencies = (
        jnp.asarray(rotary.frequencies, dtype)
        if rotary.frequencies
        else rotary.base ** (-jnp.arange(0, dim, 2, dtype=dtype) / dim)
    )
    return jnp.asarray(positions, dtype)[..., None] * frequencies


def turn_pairs(x: Array, cos: Array, sin: Array, rotary: Rotary) -> Array:
    """(a, b) -> (a cos - b sin, a sin + b cos) for each pair of x [...,K], cos and sin [...,dim/2]."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    shape, axis = ((2, half), -2) if rotary.pairs == "half" else ((half, 2), -1)
    a, b = jnp.moveaxis(turned.reshape(*x.shape[:-1], *shape), axis, 0)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis).reshape(turned.shape)
    return jnp.concatenate([turned, rest], -1)
