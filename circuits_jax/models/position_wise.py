"""What acts on every position alone: norms, the MLP, and BERT's transform in front of the unembedding."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.models.config import Activation, Norm, TransformerConfig
from circuits_jax.models.residual import Read, times

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu_tanh": nn.gelu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
    "relu": nn.relu,
}


def initializer(config: TransformerConfig, fan_in: int) -> nn.initializers.Initializer:
    """Of weights: normal, with standard deviation 1/sqrt(fan-in) or config.init_std."""
    return nn.initializers.normal(config.init_std or 1.0 / math.sqrt(fan_in))


def unit_rms(x: Array, epsilon: float) -> Array:
    """x / sqrt(mean of x^2 + epsilon) over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon)


def unit_norm(kind: Norm, x: Array, epsilon: float) -> Array:
    """LayerNorm or RMSNorm of x [...,D] without gain and bias; x for "none"."""
    if kind == "none":
        return x
    return unit_rms(x - x.mean(-1, keepdims=True) if kind == "layer" else x, epsilon)


class Normalize(nn.Module):
    """LayerNorm or RMSNorm with gain (LayerNorm also with bias); the identity for "none"."""

    kind: Norm
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[...,D] -> [...,D]."""
        if self.kind == "none":
            return x
        d_model = x.shape[-1]
        x = unit_norm(self.kind, x, self.epsilon) * self.param("scale", nn.initializers.ones, (d_model,))
        return x + self.param("bias", nn.initializers.zeros, (d_model,)) if self.kind == "layer" else x


class MLP(nn.Module):
    """h W_out + b_out with h = activation(x W_in + b_in); gated: h = activation(x W_gate + b_gate) (x W_in + b_in)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, read: Read) -> Array:
        """[T,D] -> [T,D]."""
        config = self.config
        d_model, d_mlp = config.d_model, config.d_mlp
        activation = ACTIVATIONS[config.activation]

        def into(name: str) -> Array:
            x = times(read, self.param(f"W_{name}", initializer(config, fan_in=d_model), (d_model, d_mlp)))
            return x + self.param(f"b_{name}", nn.initializers.zeros, (d_mlp,)) if config.bias else x

        hidden = activation(into("gate")) * into("in") if config.gated else activation(into("in"))
        output = hidden @ self.param("W_out", initializer(config, fan_in=d_mlp), (d_mlp, d_model))
        return output + self.param("b_out", nn.initializers.zeros, (d_model,)) if config.bias else output


class UnembedTransform(nn.Module):
    """norm(activation(x W + b)): what BERT's masked-language head does in front of the unembedding."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[...,D] -> [...,D]."""
        config = self.config
        d_model = config.d_model
        w = self.param("W", initializer(config, fan_in=d_model), (d_model, d_model))
        hidden = x @ w + self.param("b", nn.initializers.zeros, (d_model,))
        return Normalize(config.norm, config.norm_epsilon, name="norm")(ACTIVATIONS[config.activation](hidden))
