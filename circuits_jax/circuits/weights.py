"""CircuitWeights: the one adapter between a model's parameters and the analysis of its circuits."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.models.transformer import Norm, Params, Positions, TransformerConfig, init_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CircuitWeights:
    """Everything that attention heads read and write, for all heads at once, in the row-vector convention.

    Norm gains and biases are folded into what reads the residual stream, so that for a LayerNorm or RMSNorm model
    these weights act on the residual after it was normalised without gain. With LayerNorm the mean direction is
    projected out of what reads (and of what is embedded and written), because no reader sees it.

    Attributes:
        W_E: [V,D]. W_U: [D,V].
        W_Q, W_K, W_V: [L,H,D,K]. W_O: [L,H,K,D].
        W_P: [T,D] position vectors, or None for "none" and "rotary". [L,T,D] for "shortformer" with a norm, where
            the gain folded into W_Q and W_K has to be taken out of the positions again, layer by layer; a gain of
            exactly zero cannot be taken out and gives NaN.
        b_Q, b_K, b_V: [L,H,K]. b_O: [L,D]. b_U: [V]. None means zero.
        n_context: longest sequence; needed with "none" and "rotary" positions, where no W_P tells it.
        positions: how positions enter, as in TransformerConfig.
        norm: the norm, now without gain and bias, between the residual stream and these weights.
    """

    W_E: Array
    W_Q: Array
    W_K: Array
    W_V: Array
    W_O: Array
    W_U: Array
    W_P: Array | None = None
    b_Q: Array | None = None
    b_K: Array | None = None
    b_V: Array | None = None
    b_O: Array | None = None
    b_U: Array | None = None
    n_context: int = dataclasses.field(default=0, metadata={"static": True})
    positions: Positions = dataclasses.field(default="learned", metadata={"static": True})
    norm: Norm = dataclasses.field(default="none", metadata={"static": True})

    @staticmethod
    def from_params(config: TransformerConfig, params: Params) -> "CircuitWeights":
        """The weights of a model; for the parameters of many runs, vmap it.

        MLPs are left out: circuits through an MLP are not linear.

        Raises:
            ValueError: the parameters are not those of this config.
        """
        check_params(config, params)
        layers = [params[f"layer_{layer}"] for layer in range(config.n_layers)]
        stack: Callable[[str], Array] = lambda name: jnp.stack([p["attention"][name] for p in layers])  # noqa: E731
        centre = _centre if config.norm == "layer" else lambda x, axis: x

        weights: dict[str, Array] = {name: stack(name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        if config.bias:
            weights |= {name: stack(name) for name in ("b_Q", "b_K", "b_V", "b_O")}
            weights["b_U"] = params["b_U"]
        weights["W_U"] = params["W_E"].T if config.tied else params["W_U"]
        if "W_P" in params:
            weights["W_P"] = params["W_P"]

        if config.norm != "none":
            gain = jnp.stack([p["attention_norm"]["scale"] for p in layers])
            final = params["final_norm"]
            if config.norm == "layer":
                shift = jnp.stack([p["attention_norm"]["bias"] for p in layers])
                for name in ("Q", "K", "V"):
                    bias = einsum("ld,lhdk->lhk", shift, weights[f"W_{name}"])
                    weights[f"b_{name}"] = weights.get(f"b_{name}", 0.0) + bias
                weights["b_U"] = weights.get("b_U", 0.0) + matmul(final["bias"], weights["W_U"])
            for name in ("W_Q", "W_K", "W_V"):
                weights[name] = gain[:, None, :, None] * weights[name]
            weights["W_U"] = final["scale"][:, None] * weights["W_U"]
            if config.positions == "shortformer":
                weights["W_P"] = weights["W_P"] / gain[:, None, :]
            else:
                weights["W_Q"], weights["W_K"] = centre(weights["W_Q"], -2), centre(weights["W_K"], -2)
            if config.positions == "learned":
                weights["W_P"] = centre(weights["W_P"], -1)
            weights["W_V"], weights["W_U"] = centre(weights["W_V"], -2), centre(weights["W_U"], -2)
            weights["W_O"] = centre(weights["W_O"], -1)
            if config.bias:
                weights["b_O"] = centre(weights["b_O"], -1)
        return CircuitWeights(
            W_E=centre(params["W_E"], -1),
            **weights,
            n_context=config.n_context,
            positions=config.positions,
            norm=config.norm,
        )


def _centre(x: Array, axis: int) -> Array:
    return x - x.mean(axis, keepdims=True)


def check_params(config: TransformerConfig, params: Params) -> None:
    """Raises ValueError that names the first parameter which is missing, unexpected or of another shape."""
    expected = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    wanted = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(expected)}
    given = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"params{name} does not fit the config: expected {_shape(wanted.get(name))}, "
                f"got {_shape(given.get(name))}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def check_positions(weights: CircuitWeights) -> None:
    """Raises ValueError where W_P and the kind of positions contradict each other."""
    if (weights.W_P is None) != (weights.positions in ("none", "rotary")):
        raise ValueError(
            f"W_P must be given for learned and shortformer positions and left out for none and rotary; got "
            f"positions={weights.positions!r} with W_P {'missing' if weights.W_P is None else 'given'}"
        )


def params_from_weights(weights: CircuitWeights) -> tuple[TransformerConfig, Params]:
    """The attention-only model with these weights: the way in for arrays of one's own.

    Args:
        weights: W_P [T,D], or n_context where there is none, fixes the context; positions "shortformer" with a norm
            cannot go back.

    Returns:
        A config and params whose forward pass uses exactly these weights; norms get gain 1 and bias 0.
    """
    n_layers, n_heads, d_model, d_head = weights.W_Q.shape
    n_vocab = weights.W_E.shape[0]
    chex.assert_shape([weights.W_Q, weights.W_K, weights.W_V], (n_layers, n_heads, d_model, d_head))
    chex.assert_shape(weights.W_O, (n_layers, n_heads, d_head, d_model))
    chex.assert_shape(weights.W_E, (n_vocab, d_model))
    chex.assert_shape(weights.W_U, (d_model, n_vocab))
    check_positions(weights)
    if weights.W_P is not None and weights.W_P.ndim != 2:
        raise ValueError("W_P must be [T,D]: a shortformer model with norm gains folded in cannot go back")
    n_context = weights.n_context if weights.W_P is None else weights.W_P.shape[0]
    if not n_context:
        raise ValueError("n_context must be given when the weights have no W_P")

    biases = {name: getattr(weights, name) for name in ("b_Q", "b_K", "b_V", "b_O", "b_U")}
    bias = any(value is not None for value in biases.values())
    config = TransformerConfig(
        n_vocab=n_vocab, n_context=n_context, n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_head,
        norm=weights.norm, positions=weights.positions, bias=bias,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, weights.W_E.dtype), shapes)
    params |= {"W_E": weights.W_E, "W_U": weights.W_U}
    if weights.W_P is not None:
        params["W_P"] = weights.W_P
    if biases["b_U"] is not None:
        params["b_U"] = biases["b_U"]
    for layer in range(n_layers):
        attention = params[f"layer_{layer}"]["attention"]
        for name in attention:
            value = getattr(weights, name)
            if value is not None:
                attention[name] = value[layer]
    if config.norm != "none":
        for module in (params["final_norm"], *(params[f"layer_{i}"]["attention_norm"] for i in range(n_layers))):
            module["scale"] = jnp.ones(d_model, weights.W_E.dtype)
    check_params(config, params)
    return config, params
