"""Transformer parameters with circuits built in by hand, and the truth about each head: plant.

The residual stream is cut into orthogonal subspaces (Recipe.sizes) of a random basis that is orthogonal to the all-ones
vector, so that LayerNorm's centring takes nothing away. W_E[t] = token_t + const, W_U[:, t] = token_t + output_t, and a
head reads one subspace and writes another one. Heads are first written down in the coordinates of that basis:

    factors [2,2,L,H,N,K]: side (QK, OV); what x_i or x_j is read with (W_Q, W_V), then W_K and W_O^T; N coordinates

so that W_QK and W_OV are both factors[side, 0] factors[side, 1]^T. Then they get the random basis, noise, a random
gauge and a random order of the heads.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.planted_circuits import (
    Matrix,
    factors_of,
    offset_of,
    position_vectors,
    rotary_waves,
    rotary_weights,
    spaces_of,
    touches,
)
from circuits_jax.models.planted_recipes import OV_MOVES, ROTARY_DIM, SENDERS, PlantedHead, Recipe
from circuits_jax.models.rotary import turn_pairs
from circuits_jax.models.transformer import Params

JUNK_NORM = 30.0
N_REFLECTIONS = 3
# Where noise counts for a side of one dimension: with it, or the noise of one component would be that of a whole head.
ROOMS = {"const": ("token", "const"), "feature": ("output", "feature")}

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truth:
    """What was planted in each head, in the order of the heads of the parameters.

    Attributes:
        qk: [L,H,8] bool in the order of QK_TYPES, by structure, that is in the weights. None for rotated and junk
            heads; dormant ones are diffuse.
        ov: [L,H,5] bool in the order of OV_TYPES. None for rotated heads; dormant ones are inactive; what sends is
            transforming; receive_virtual copies (in a chain); erase suppresses.
        realised_qk, realised_ov: the same for what activations show. They differ from qk and ov only where a head
            reads tokens that an earlier layer has erased: diffuse and inactive.
        offset: [L,H] int of fixed_offset heads, 0 for all others.
        place: [L,H] int, which head of its layer in recipe.heads each one is.
        edges: [3,L,H,L,H] bool, Q-, K- and V-composition: the first head writes a subspace that the query, key or
            value side of the second, later one reads. Dormant, rotated and junk heads have none. The eraser has some.
        scores: closed-form values for noise 0 as [L,H] floats, NaN where there is none.
            "attention": of positional heads, mean over queries t >= 1 that have a target of the softmax attention
            to it, from the planted score alone: e^b / (e^b + t) with one-hot positions. Without a norm it is exact.
            "copying": Re sum lambda / sum |lambda| of W_E W_OV W_U, not centred: 1, -1 or 0.
        token_maps: [L,H,V]; "content": the key token of each query token; "transforming": the token written for each
            token; both -1 where there is none. "extracting": f(t) = +-1, 0 elsewhere.
    """

    qk: Array
    ov: Array
    realised_qk: Array
    realised_ov: Array
    offset: Array
    place: Array
    edges: Array
    scores: dict[str, Array]
    token_maps: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planted:
    """Parameters for forward(recipe.config, params, tokens), and the truth about them."""

    params: Params
    truth: Truth


@partial(jax.jit, static_argnums=0)
def plant(recipe: Recipe, key: Array, noise: Array | float = 0.0) -> Planted:
    """The model of a recipe in a random basis, gauge and order of heads; vmap over keys and noise.

    Args:
        recipe: what to plant.
        key: everything random. The same key with other noise: the same model with the same noise, scaled.
        noise: at least 0, the ratio of noise to signal energy within the subspace that a head uses: with
            orthonormal bases B_q [D,r_q] and B_k of what its two sides read, E|B_q^T (W_QK - signal) B_k|^2 =
            noise * |signal|^2, and the same for W_OV (see ROOMS for sides of one dimension). The noise itself is
            Gaussian on all entries of W_Q, W_K and W_V of each head that has a signal, and on what W_O writes to the
            head's own subspace: noise elsewhere would be that of other heads, by their number. Rotary heads: energies
            averaged over offsets.

    Returns:
        Planted; its arrays have the run axis in front under vmap.
    """
    names = ("basis", "content", "transforming", "extracting", "junk", "noise", "gauge", "order")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    n_layers, n_heads, d_model = len(recipe.heads), len(recipe.heads[0]), recipe.config.d_model

    maps = _token_maps(recipe, keys)
    core = _with_maps(recipe, jnp.asarray(factors_of(recipe)), maps)
    # Rotated sides have bases of their own, one for each of their two factors.
    side, *head = np.nonzero(_where(recipe, qk="rotated", ov="rotated"))
    rotated = side, slice(None), *head
    bases = _bases(keys["basis"], 1 + 2 * len(side), d_model, core.shape[-2])
    own = bases[1:].reshape(len(side), 2, *bases.shape[1:])
    factors = einsum("dn,abhlnk->abhldk", bases[0], core)
    factors = factors.at[rotated].set(einsum("rfdn,rfnk->rfdk", own, core[rotated]))
    factors = factors + _junk_std(recipe)[..., None, None] * jax.random.normal(keys["junk"], factors.shape)
    factors = factors + _noise_std(recipe, noise)[..., None, None] * _noise(recipe, keys["noise"], bases[0])
    factors = _regauge(recipe, keys["gauge"], factors)

    order = jax.vmap(lambda k: jax.random.permutation(k, n_heads))(jax.random.split(keys["order"], n_layers))
    at_heads = np.arange(n_layers)[:, None], order
    truth = jax.tree.map(
        # Edges are the only field of five dimensions: heads twice.
        lambda x: x[:, *at_heads][..., *at_heads] if x.ndim == 5 else x[at_heads],
        _truth(recipe, maps),
    )
    return Planted(_params(recipe, bases[0], factors[:, :, *at_heads]), truth)


def _params(recipe: Recipe, basis: Array, factors: Array) -> Params:
    """The dict that forward takes, from the basis [D,N] and factors [2,2,L,H,D,K] of the heads in their order."""
    spaces = spaces_of(recipe)
    token, output = basis[:, spaces["token"]], basis[:, spaces["output"]]
    params: dict[str, Any] = {"W_E": token.T + basis[:, spaces["const"]].T, "W_U": token + output}
    if recipe.positions != "rotary":
        params["W_P"] = einsum("tp,dp->td", position_vectors(recipe), basis[:, spaces["position"]])
    for layer in range(len(recipe.heads)):
        (w_q, w_k), (w_v, w_o) = factors[:, :, layer]
        attention = {"W_Q": w_q, "W_K": w_k, "W_V": w_v, "W_O": w_o.swapaxes(-1, -2)}
        params[f"layer_{layer}"] = {"attention": attention}
        if recipe.norm != "none":
            params[f"layer_{layer}"]["attention_norm"] = _norm(recipe, layer, len(basis))
    if recipe.norm != "none":
        params["final_norm"] = _norm(recipe, len(recipe.heads), len(basis))
    return params


def _norm(recipe: Recipe, layer: int, d_model: int) -> dict[str, Array]:
    """A norm whose gain undoes it: the root mean square of the residual stream that is expected there.

    A gain, and not larger W_Q and W_K, because shortformer positions are added after the norm.
    """
    energy = 2.0 + (recipe.positions in ("learned", "sinusoidal"))
    for number in range(layer):
        for kind in {head.ov for head in recipe.heads[number] if head.moves and all(recipe.works(number, head))}:
            energy += {"erase": -1.0}.get(kind, 1.0) if kind in SENDERS else 0.0
    norm = {"scale": jnp.full(d_model, math.sqrt(energy / d_model))}
    return norm | {"bias": jnp.zeros(d_model)} if recipe.norm == "layer" else norm


def _bases(key: Array, number: int, d_model: int, n: int) -> Array:
    """[number,D,N] random orthonormal columns, orthogonal to the all-ones vector."""
    ones = jnp.ones((number, d_model, 1))
    # One matrix after the other, under vmap too: batched LAPACK calls can wait for each other forever on few cores.
    qr = jax.vmap(jax.custom_batching.sequential_vmap(lambda matrix: tuple(jnp.linalg.qr(matrix))))
    return qr(jnp.concatenate([ones, jax.random.normal(key, (number, d_model, n))], -1))[0][..., 1:]


def _where(recipe: Recipe, qk: str, ov: str) -> NDArray[np.bool_]:
    """[2,L,H]: whether the QK side is of the kind qk, and the OV side of the kind ov."""
    return np.array(
        [[[head.qk == qk for head in layer] for layer in recipe.heads],
         [[head.ov == ov for head in layer] for layer in recipe.heads]]
    )  # fmt: skip


def _token_maps(recipe: Recipe, keys: dict[str, Array]) -> dict[str, Array]:
    """Truth.token_maps, the heads still in the order of the recipe."""
    v, heads = recipe.n_vocab, (len(recipe.heads), len(recipe.heads[0]))
    n_heads = heads[0] * heads[1]
    (content, _), (_, transforming) = _where(recipe, "content", ""), _where(recipe, "", "transforming")
    extracting = _where(recipe, "", "extracting")[1]

    def per_head(name: str, draw: Any) -> Array:
        return jax.vmap(draw)(jax.random.split(keys[name], n_heads)).reshape(*heads, v)

    def ordinary(key: Array) -> Array:
        return jnp.append(_cycle(key, v - 1), -1)  # [BOS] neither asks nor answers

    signs = np.where(np.arange(v) % 2, 1, -1)
    return {
        "content": jnp.where(content[..., None], per_head("content", ordinary), -1),
        "transforming": jnp.where(transforming[..., None], per_head("transforming", lambda k: _cycle(k, v)), -1),
        "extracting": jnp.where(
            extracting[..., None], per_head("extracting", lambda k: jax.random.permutation(k, signs)), 0
        ),
    }


def _cycle(key: Array, n: int) -> Array:
    """[n]: a random permutation that is one cycle, so that no token is its own image."""
    order = jax.random.permutation(key, n)
    return jnp.zeros_like(order).at[order].set(jnp.roll(order, -1))


def _with_maps(recipe: Recipe, core: Array, maps: dict[str, Array]) -> Array:
    """The core with the token maps in it: rows of W_K and of W_O^T in another order, rows of W_V with signs."""
    spaces, own = spaces_of(recipe), np.arange(recipe.n_vocab)
    for name, side, space in (("content", 0, "token"), ("transforming", 1, "output")):
        rows = jnp.argsort(jnp.where(maps[name] < 0, own, maps[name]), -1)  # the inverse map
        at = (side, 1, slice(None), slice(None), spaces[space])
        core = core.at[at].set(jnp.take_along_axis(core[at], rows[..., None], -2))
    signs = jnp.where(maps["extracting"] == 0, 1, maps["extracting"])
    return core.at[1, 0, :, :, spaces["token"]].multiply(signs[..., None])


def _junk_std(recipe: Recipe) -> Array:
    """[2,2,L,H]: of the entries of W_Q and W_K of junk heads, |W_QK| = D sqrt(K) std^2; 0 elsewhere."""
    gain = np.array([[head.qk_gain * (head.qk == "junk") for head in layer] for layer in recipe.heads])
    std = np.sqrt(JUNK_NORM * recipe.strength * gain * math.sqrt(recipe.n_vocab) / recipe.config.d_model)
    return jnp.asarray(np.stack([[std, std], [0.0 * std, 0.0 * std]]))


def _noise_std(recipe: Recipe, noise: Array | float) -> Array:
    """[2,2,L,H]: of the noise on the entries of each factor; 0 for heads without signal.

    With variances alpha |A|^2 / r_A and alpha |B|^2 / r_B the noise energy of A B^T in the subspaces is
    (2 alpha + K alpha^2) |A|^2 |B|^2, to be noise |A B^T|^2: a quadratic equation for alpha.
    """
    core, k = factors_of(recipe), recipe.d_head
    ranks = np.ones((2, 2, *core.shape[2:4]))
    for layer, head in np.ndindex(*core.shape[2:4]):
        for side, names in enumerate(touches(recipe, recipe.heads[layer][head])):
            if names is not None:
                ranks[side, :, layer, head] = [
                    sum(recipe.sizes[part] for part in ROOMS.get(name, (name,))) for name in names
                ]
    energy = (core**2).sum((-2, -1))
    signal = _signal_energy(recipe, core)
    ratio = noise * signal / np.where(signal > 0, energy[:, 0] * energy[:, 1], 1.0)
    alpha = ratio / (1.0 + jnp.sqrt(1.0 + k * ratio))
    return jnp.sqrt(alpha[:, None] * energy / ranks)


def _noise(recipe: Recipe, key: Array, basis: Array) -> Array:
    """Standard Gaussian factors [2,2,L,H,D,K]; those of W_O lie in the subspace that the head writes."""
    writes = np.ones((len(recipe.heads), len(recipe.heads[0]), basis.shape[1], 1))
    spaces = spaces_of(recipe)
    for layer, head in np.ndindex(*writes.shape[:2]):
        _, ov = touches(recipe, recipe.heads[layer][head])
        if ov is not None:
            writes[layer, head] = 0.0
            for part in ROOMS.get(ov[1], (ov[1],)):
                writes[layer, head, spaces[part]] = 1.0
    everywhere_key, written_key = jax.random.split(key)
    shape = (2, 2, *writes.shape[:2], len(basis), recipe.d_head)
    written = writes * jax.random.normal(written_key, (*writes.shape[:3], recipe.d_head))
    everywhere = jax.random.normal(everywhere_key, shape)
    return everywhere.at[1, 1].set(einsum("dn,lhnk->lhdk", basis, written))


def _signal_energy(recipe: Recipe, core: Matrix) -> Matrix:
    """[2,L,H]: |W_QK|^2 and |W_OV|^2; where components are rotated, its mean over all offsets."""
    left, right = core[:, 0], core[:, 1]
    energy = ((left @ right.swapaxes(-1, -2)) ** 2).sum((-2, -1))
    if recipe.positions == "rotary":
        # A pair of rank 1 gives |q|^2 |k|^2 cos^2(w d + phase): half of it on average, and pairs do not interfere.
        turned, rest = core[0, ..., :ROTARY_DIM], core[0, ..., ROTARY_DIM:]
        axes = (2, ROTARY_DIM // 2) if recipe.rotary_pairs == "half" else (ROTARY_DIM // 2, 2)
        pairs = (turned**2).sum(-2).reshape(*turned.shape[:3], *axes).sum(-2 if recipe.rotary_pairs == "half" else -1)
        energy[0] = ((rest[0] @ rest[1].swapaxes(-1, -2)) ** 2).sum((-2, -1)) + 0.5 * (pairs[0] * pairs[1]).sum(-1)
    return energy


def _regauge(recipe: Recipe, key: Array, factors: Array) -> Array:
    """Factors [2,2,L,H,D,K] with a random G: A G and B G^-T, so that A B^T stays as it is.

    Rotary positions: G turns and scales each pair, which commutes with the rotation, and is free on the rest.
    """
    turned = ROTARY_DIM if recipe.positions == "rotary" else 0
    qk_key, ov_key, turn_key, scale_key = jax.random.split(key, 4)
    qk, ov = factors[0], _mix(ov_key, factors[1])
    qk = jnp.concatenate([qk[..., :turned], _mix(qk_key, qk[..., turned:])], -1)
    if turned:
        shape = (*qk.shape[1:3], 1, turned // 2)
        angle = jax.random.uniform(turn_key, shape, maxval=2 * math.pi)
        scale = _both(jax.random.uniform(scale_key, shape, minval=-0.5, maxval=0.5))
        qk = turn_pairs(qk, scale * jnp.cos(angle), scale * jnp.sin(angle), recipe.config.rotary)
    return jnp.stack([qk, ov])


def _mix(key: Array, factors: Array) -> Array:
    """Factors [2,L,H,D,K] times G = R diag(s) R' and G^-T = R diag(1/s) R', s in [e^-1/2, e^1/2], R reflections."""
    mirror_key, stretch_key = jax.random.split(key)
    _, n_layers, n_heads, _, k = factors.shape
    mirrors = jax.random.normal(mirror_key, (2 * N_REFLECTIONS, n_layers, n_heads, 1, k))
    mirrors = mirrors / jnp.linalg.norm(mirrors, axis=-1, keepdims=True)
    stretch = _both(jax.random.uniform(stretch_key, (n_layers, n_heads, 1, k), minval=-0.5, maxval=0.5))
    for number, mirror in enumerate(mirrors):
        factors = factors - 2.0 * (factors * mirror).sum(-1, keepdims=True) * mirror
        factors = factors * stretch if number == N_REFLECTIONS - 1 else factors
    return factors


def _both(log_scale: Array) -> Array:
    """[2,...]: a scale for one factor and its inverse for the other one."""
    return jnp.exp(jnp.stack([log_scale, -log_scale]))


def _truth(recipe: Recipe, token_maps: dict[str, Array]) -> Truth:
    """The truth, the heads still in the order of the recipe."""
    layers = [[(number, head) for head in layer] for number, layer in enumerate(recipe.heads)]

    def table(of_head: Any) -> Array:
        return jnp.asarray([[of_head(number, head) for number, head in layer] for layer in layers])

    def named(label: str | None, names: tuple[str, ...]) -> list[bool]:
        return [name == label for name in names]

    def realised(side: int, idle: str) -> Any:
        # A side without a label, a rotated one say, stays without.
        label = (_qk_label, _ov_label)[side]
        return lambda number, head: label(head) if recipe.works(number, head)[side] else idle

    qk_realised, ov_realised = realised(0, "diffuse"), realised(1, "inactive")
    return Truth(
        qk=table(lambda _, head: named(_qk_label(head), QK_TYPES)),
        ov=table(lambda _, head: named(_ov_label(head), OV_TYPES)),
        realised_qk=table(lambda number, head: named(qk_realised(number, head), QK_TYPES)),
        realised_ov=table(lambda number, head: named(ov_realised(number, head), OV_TYPES)),
        offset=table(lambda _, head: head.offset if _qk_label(head) == "fixed_offset" else 0),
        place=jnp.tile(jnp.arange(len(recipe.heads[0])), (len(recipe.heads), 1)),
        edges=_edges(recipe),
        scores={
            "attention": table(lambda _, head: _attention(recipe, head)),
            "copying": table(lambda _, head: _copying(head)),
        },
        token_maps=token_maps,
    )


def _qk_label(head: PlantedHead) -> str | None:
    if not head.looks:
        return "diffuse"
    return None if head.qk in ("rotated", "junk") else head.qk


def _ov_label(head: PlantedHead) -> str | None:
    if not head.moves:
        return "inactive"
    names = {"rotated": None, "receive_virtual": "copying", "erase": "suppressing"}
    return names.get(head.ov, "transforming" if head.ov in SENDERS else head.ov)


def _copying(head: PlantedHead) -> float:
    return {"copying": 1.0, "suppressing": -1.0, "erase": -1.0, "transforming": 0.0}.get(head.ov, math.nan)


def _attention(recipe: Recipe, head: PlantedHead) -> float:
    """Truth.scores["attention"] of one head."""
    if not head.looks or head.qk not in ("previous_token", "fixed_offset", "first_token", "same_position"):
        return math.nan
    # Its target is as far ahead of all other keys as that of a head which looks at itself.
    offset = 0 if head.qk == "first_token" else offset_of(head)
    profile = np.eye(recipe.n_context)[offset]
    if recipe.positions == "rotary" and head.qk != "first_token":
        profile = rotary_waves(recipe) @ rotary_weights(recipe, offset)
    weights = np.exp(recipe.strength * head.qk_gain * (profile - profile[offset]))
    return float((1.0 / np.cumsum(weights))[max(1, offset) :].mean())


def _edges(recipe: Recipe) -> Array:
    """Truth.edges in the order of the recipe's heads."""
    n_layers, n_heads = len(recipe.heads), len(recipe.heads[0])
    edges = np.zeros((3, n_layers, n_heads, n_layers, n_heads), bool)
    for first, a, second, b in np.ndindex(*edges.shape[1:]):
        if first >= second:
            continue
        sender, receiver = recipe.heads[first][a], recipe.heads[second][b]
        written = OV_MOVES.get(sender.ov, ("", ""))[1] if sender.moves else ""
        q, k = (receiver.looks and recipe.reads(receiver)) or ("", "")
        v = OV_MOVES.get(receiver.ov, ("", ""))[0] if receiver.moves else ""
        edges[:, first, a, second, b] = [written != "" and written == read for read in (q, k, v)]
    return jnp.asarray(edges)
