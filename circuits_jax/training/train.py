"""One training run as a pure function of a seed: a scan over steps, with the measurements taken inside it.

Training runs at the device's default matmul precision (bfloat16 passes on TPU, tf32 on H100); analysis does not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params, apply, init_params
from circuits_jax.tasks.batch import Batch, Task, next_token_loss, sample_batch

Measure = Callable[[Params], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Optimization:
    """AdamW (Loshchilov & Hutter 1711.05101) with a linear warm-up to a constant learning rate; hashable.

    Attributes:
        batch_size: sequences per update.
        learning_rate, weight_decay, b1, b2: of AdamW.
        n_warmup: updates over which the learning rate rises from 0; 0 for none.
    """

    batch_size: int = 32
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    b1: float = 0.9
    b2: float = 0.98
    n_warmup: int = 50

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("n_warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite; got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and not negative; got {self.weight_decay}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"b1 and b2 must be in [0, 1); got {self.b1} and {self.b2}")

    def transformation(self) -> optax.GradientTransformation:
        """The optax optimizer, over the parameters as one flat vector: fewer kernels to compile and to launch."""
        start = 0.0 if self.n_warmup else self.learning_rate
        rate = optax.linear_schedule(start, self.learning_rate, max(self.n_warmup, 1))
        return optax.flatten(optax.adamw(rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on: parameters, optimizer moments and the raw data key."""

    params: Params
    moments: optax.OptState
    data_key: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as jax arrays; from a sweep, as NumPy arrays with S in front of all but steps.

    Attributes:
        params: after the last step.
        steps: [E] numbers of updates after which was measured.
        loss: [E] in nats, on the training batch that comes next, so on sequences not yet trained on.
        measurements: {name: [E,...]}.
    """

    params: Params
    steps: Any
    loss: Any
    measurements: dict[str, Any]

    @property
    def diverged(self) -> np.ndarray:
        """Whether a loss or a final parameter is not finite: bool, [S] for a sweep."""
        values = [np.asarray(self.loss)] + [np.asarray(leaf) for leaf in jax.tree.leaves(self.params)]
        runs = self.loss.shape[:-1]
        return ~np.all([np.isfinite(v).reshape(*runs, -1).all(-1) for v in values], axis=0)


def train(
    config: TransformerConfig, optimization: Optimization, task: Task, seed: int | Array, steps: Array, measure: Measure
) -> Run:
    """One run from its seed: jit it, vmap it over seeds; sweep.sweep adds chunks, checkpoints and devices.

    Args:
        config, optimization: static.
        task: where the sequences come from.
        seed: in [0, 2^31); the initial parameters and the data have keys of their own derived from it.
        steps: [E] rising numbers of updates after which to measure; training ends at the last.
        measure: of the parameters at those steps.
    """
    state, (loss, measurements) = advance(
        config, optimization, measure, task, init_state(config, optimization, seed), 0, steps
    )
    return Run(state.params, jnp.asarray(steps), loss, measurements)


def init_state(config: TransformerConfig, optimization: Optimization, seed: int | Array) -> TrainState:
    """The state before the first update."""
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init_params(config, init_key)
    return TrainState(params, optimization.transformation().init(params), jax.random.key_data(data_key))


def advance(
    config: TransformerConfig,
    optimization: Optimization,
    measure: Measure,
    task: Task,
    state: TrainState,
    start: int | Array,
    stops: Array,
) -> tuple[TrainState, tuple[Array, dict[str, Array]]]:
    """Trains from step `start` to each of `stops` [E] in turn and measures there: (state, (loss, measurements) [E]).

    The data of a step depends on the data key and the step alone, so a run cut in pieces is the same run.
    """
    optimizer = optimization.transformation()
    data_key = jax.random.wrap_key_data(state.data_key)

    def loss_of(params: Params, batch: Batch) -> Array:
        logits = jax.vmap(lambda tokens: apply(config, params, tokens)[0])(batch.tokens)
        return next_token_loss(logits, batch)

    def update(step: Array, carry: tuple[Params, optax.OptState]) -> tuple[Params, optax.OptState]:
        params, moments = carry
        gradient = jax.grad(loss_of)(params, sample_batch(task, data_key, step, optimization.batch_size))
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    def segment(carry: tuple, stop: Array) -> tuple[tuple, tuple[Array, dict[str, Array]]]:
        begin, params, moments = carry
        params, moments = jax.lax.fori_loop(begin, stop, update, (params, moments))
        batch = sample_batch(task, data_key, stop, optimization.batch_size)
        return (stop, params, moments), (loss_of(params, batch), measure(params))

    stops = jnp.asarray(stops)
    carry = (jnp.asarray(start, stops.dtype), state.params, state.moments)
    (_, params, moments), records = jax.lax.scan(segment, carry, stops)
    return TrainState(params, moments, state.data_key), records
