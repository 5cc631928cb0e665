"""CircuitWeights: the one adapter between a model's parameters and the analysis of its circuits."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.models.config import Norm, NormPosition, Positions, Rotary, TransformerConfig
from circuits_jax.models.transformer import Params, init_params, repeat_groups

# What each array is made of, in the order in which a contradiction is looked for.
SHAPES = {
    "W_E": "VD", "W_Q": "LHDK", "W_K": "LGDK", "W_V": "LGDK", "W_O": "LHKD", "W_U": "DV", "W_P": "TD",
    "b_Q": "LHK", "b_K": "LGK", "b_V": "LGK", "b_O": "LD", "b_U": "V", "q_gain": "LK", "k_gain": "LK",
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CircuitWeights:
    """Everything that attention heads read and write, for all heads at once, in the row-vector convention.

    Norm gains and biases are folded into what reads the residual stream, so that for a LayerNorm or RMSNorm model
    these weights act on the residual after it was normalised without gain. With LayerNorm the mean direction is
    projected out of what reads (and of what is embedded and written), because no reader sees it.

    In a post-norm model (BERT) gains of norms stand between what one layer writes and what the next one reads: QK and
    OV circuits of a head are exact, but a product of the W_O of one head with weights of another, composition, is not
    one of the model's, and is refused. W_U is what unembeds; in front of it BERT has a transform that, like MLPs, is
    left out.

    Attributes:
        W_E: [V,D], embedding_scale in it: what enters the residual stream. W_U: [D,V], free of that scale.
        W_Q: [L,H,D,K]. W_O: [L,H,K,D].
        W_K, W_V: [L,G,D,K], G a divisor of H. Query head h reads the keys and values of head h // (H/G); see
            per_query_head.
        W_P: [T,D] position vectors (the embedding of segment 0 in them), or None for "none" and "rotary". [L,T,D] for
            "shortformer" with a norm, where the gain folded into W_Q and W_K has to be taken out of the positions
            again, layer by layer; a gain of exactly zero cannot be taken out and gives NaN.
        q_gain, k_gain: [L,K], None without qk-norm, which divides q = x W_Q + b_Q by the root mean square of q / q_gain
            (scores.queries), and k alike. They are folded into W_Q and W_K, so that qk is the circuit up to these two
            sizes; a gain of exactly zero gives NaN.
        b_Q: [L,H,K]. b_K, b_V: [L,G,K]. b_O: [L,D]. b_U: [V]. None means zero.
        n_context: longest sequence; needed with "none" and "rotary" positions, where no W_P tells it.
        positions: how positions enter, as in TransformerConfig.
        norm, norm_epsilon: the norm, now without gain and bias, between the residual stream and these weights.
        norm_position: "pre" or "post", as in TransformerConfig.
        causal: whether a query sees no later key.
        rotary: how "rotary" positions turn q and k.
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
    q_gain: Array | None = None
    k_gain: Array | None = None
    n_context: int = dataclasses.field(default=0, metadata={"static": True})
    positions: Positions = dataclasses.field(default="learned", metadata={"static": True})
    norm: Norm = dataclasses.field(default="none", metadata={"static": True})
    rotary: Rotary = dataclasses.field(default=Rotary(), metadata={"static": True})
    norm_epsilon: float = dataclasses.field(default=1e-5, metadata={"static": True})
    norm_position: NormPosition = dataclasses.field(default="pre", metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def context_length(self) -> int:
        """Longest sequence, which W_P tells as well as n_context does; 0 when neither is given."""
        return self.n_context if self.W_P is None else self.W_P.shape[-2]

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
            weights["W_P"] = params["W_P"] + params["W_S"][0] if config.n_segments else params["W_P"]

        if config.norm != "none":
            gain = jnp.stack([p["attention_norm"]["scale"] for p in layers])
            final = params["unembed_transform"]["norm"] if config.unembed_transform else params["final_norm"]
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
        if config.qk_norm:
            for name in ("q", "k"):
                gain = weights[f"{name}_gain"] = stack(f"{name}_gain")
                weights[f"W_{name.upper()}"] = weights[f"W_{name.upper()}"] * gain[:, None, None]
                if f"b_{name.upper()}" in weights:
                    weights[f"b_{name.upper()}"] = weights[f"b_{name.upper()}"] * gain[:, None]
        return CircuitWeights(
            W_E=centre(config.embedding_scale * params["W_E"], -1),
            **weights,
            n_context=config.n_context,
            positions=config.positions,
            norm=config.norm,
            rotary=config.rotary,
            norm_epsilon=config.norm_epsilon,
            norm_position=config.norm_position,
            causal=config.causal,
        )


def per_query_head(weights: CircuitWeights, x: Array) -> Array:
    """What belongs to each key/value head, once for each query head: [L,G,...] -> [L,H,...], h from h // (H/G).

    For W_K, W_V, b_K, b_V and what is made of them; x itself where no heads share keys and values (G = H). Small
    things first: repeat a product of W_K, not W_K.
    """
    return repeat_groups(x, weights.W_Q.shape[1], axis=1)


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


def check_composes(weights: CircuitWeights) -> None:
    """Raises ValueError where what one head writes does not reach another through these weights alone."""
    if weights.norm_position == "post":
        raise ValueError(
            "composition needs norm_position 'pre': in a post-norm model gains of norms stand between what one layer "
            "writes and what the next one reads. Use causal effects (ablate_heads)"
        )


def check_shapes(weights: CircuitWeights) -> None:
    """Raises ValueError that names the first array whose shape contradicts W_E [V,D], W_Q [L,H,D,K] or W_K [L,G,D,K].

    W_P has to be [T,D]; q_gain and k_gain come together.
    """
    given = {name: list(jnp.shape(getattr(weights, name))) for name in SHAPES if getattr(weights, name) is not None}
    for name in ("W_E", "W_Q", "W_K", "W_P"):
        if name in given and len(given[name]) != len(SHAPES[name]):
            raise ValueError(f"{name} must have shape [{','.join(SHAPES[name])}]; got {given[name]}")
    sizes = {
        letter: size for name in ("W_K", "W_Q", "W_E") for letter, size in zip(SHAPES[name], given[name], strict=True)
    }
    sizes["T"] = weights.context_length
    for name, shape in given.items():
        expected = [sizes[letter] for letter in SHAPES[name]]
        if shape != expected:
            raise ValueError(
                f"{name} does not fit W_E {given['W_E']}, W_Q {given['W_Q']} and W_K {given['W_K']}: "
                f"expected [{','.join(SHAPES[name])}] = {expected}, got {shape}"
            )
    if ("q_gain" in given) != ("k_gain" in given):
        one, other = ("q_gain", "k_gain") if "q_gain" in given else ("k_gain", "q_gain")
        raise ValueError(f"q_gain and k_gain must be given both or neither; got {one} without {other}")
    if not sizes["G"] or sizes["H"] % sizes["G"]:
        raise ValueError(f"the {sizes['G']} heads of W_K and W_V must divide the {sizes['H']} heads of W_Q and W_O")


def params_from_weights(weights: CircuitWeights) -> tuple[TransformerConfig, Params]:
    """The attention-only model with these weights: the way in for arrays of one's own.

    Args:
        weights: W_P [T,D], or n_context where there is none, fixes the context; positions "shortformer" with a norm,
            and post-norm models, cannot go back.

    Returns:
        A config and params whose forward pass uses exactly these weights; norms get gain 1 and bias 0, the
        unembedding is untied and the embedding scale 1.

    Raises:
        ValueError: W_P, the positions and n_context, or the shapes of the arrays, contradict each other.

    Example, a head on one-hot tokens that looks for copies of the query and moves what it finds:

        one = np.eye(4, dtype=np.float32)
        head = one[None, None]  # [L,H,D,K] of one layer and one head
        weights = cj.CircuitWeights(
            W_E=one, W_Q=20 * head, W_K=head, W_V=head, W_O=head, W_U=one, positions="none", n_context=8
        )
        config, params = cj.params_from_weights(weights)
        logits, seen = cj.forward(config, params, np.array([2, 1, 2]))
        seen.patterns[0, 0, 2]  # [0.5, 0, 0.5]: from the last 2 to both, and logits[2] is largest for token 2

    The same arrays in an .npz file are a --model of experiments/head_atlas.py. Of a model with MLPs they tell its
    heads, not its logits.
    """
    check_positions(weights)
    if weights.W_P is not None and weights.W_P.ndim == 3:
        raise ValueError("W_P must be [T,D]: a shortformer model with norm gains folded in cannot go back")
    if weights.norm_position == "post":
        raise ValueError("norm_position must be 'pre': a post-norm model with norm gains folded in cannot go back")
    check_shapes(weights)
    if not weights.context_length:
        raise ValueError("n_context must be given when the weights have no W_P")
    n_layers, n_heads, d_model, d_head = weights.W_Q.shape
    n_groups, rotary = weights.W_K.shape[1], weights.rotary
    qk_norm = weights.q_gain is not None

    biases = {name: getattr(weights, name) for name in ("b_Q", "b_K", "b_V", "b_O", "b_U")}
    bias = any(value is not None for value in biases.values())
    config = TransformerConfig(
        n_vocab=len(weights.W_E), n_context=weights.context_length, n_layers=n_layers, n_heads=n_heads,
        d_model=d_model, d_head=d_head, n_kv_heads=n_groups if n_groups != n_heads else 0, norm=weights.norm,
        positions=weights.positions, rotary_dim=rotary.dim, rotary_pairs=rotary.pairs, rotary_base=rotary.base,
        rotary_frequencies=rotary.frequencies, rotary_scale=rotary.scale, bias=bias, causal=weights.causal,
        norm_epsilon=weights.norm_epsilon, qk_norm=qk_norm,
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
        for name in ("Q", "K") if qk_norm else ():
            gain = attention[f"{name.lower()}_gain"]
            attention |= {key: attention[key] / gain for key in (f"W_{name}", f"b_{name}") if key in attention}
    if config.norm != "none":
        for module in (params["final_norm"], *(params[f"layer_{i}"]["attention_norm"] for i in range(n_layers))):
            module["scale"] = jnp.ones(d_model, weights.W_E.dtype)
    return config, params
