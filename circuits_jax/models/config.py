"""Shape and style of a transformer: TransformerConfig, checked when it is made."""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

Norm = Literal["none", "layer", "rms"]
NormPosition = Literal["pre", "post"]
Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]
Positions = Literal["none", "learned", "shortformer", "rotary"]
RotaryPairs = Literal["half", "interleaved"]

ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How rotary positions turn q and k: pair i of the first dim components by position * frequency_i; hashable.

    Attributes:
        dim: even; 0 for all of K. The components after the first dim stay as they are.
        pairs: which components are pair i: (i, i + dim/2) for "half", as in GPT-NeoX and in Hugging Face's Llama,
            (2i, 2i + 1) for "interleaved", as in GPT-J.
        base: frequency_i = base^(-2i/dim), in radians a position.
        frequencies: those of all dim/2 pairs, where they are not that: models stretched to longer contexts (linear,
            YaRN, Llama 3, ...) differ in nothing else.
        scale: factor on the turned components of q and of k (YaRN's attention factor).
    """

    dim: int = 0
    pairs: RotaryPairs = "half"
    base: float = ROTARY_BASE
    frequencies: tuple[float, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", _require_int("rotary_dim", self.dim, at_least=0))
        if self.dim % 2:
            raise ValueError(f"rotary_dim must be even; got {self.dim}")
        _require_choice("rotary_pairs", self.pairs, get_args(RotaryPairs))
        object.__setattr__(self, "base", _require_positive("rotary_base", self.base))
        object.__setattr__(self, "scale", _require_positive("rotary_scale", self.scale))
        frequencies = tuple(_require_positive("rotary_frequencies", x) for x in self.frequencies)
        object.__setattr__(self, "frequencies", frequencies)
        if frequencies and self.dim and len(frequencies) != self.dim // 2:
            raise ValueError(f"rotary_frequencies must hold {self.dim // 2}, one a pair; got {len(frequencies)}")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and style of a transformer; hashable, so it can be a static jit argument.

    Attributes:
        n_vocab: V, number of token ids.
        n_context: longest sequence the model accepts.
        n_layers, n_heads, d_model: L, H, D.
        d_head: K; d_model / n_heads when left out.
        d_mlp: M, hidden width of the MLP after each attention layer; 0 builds an attention-only model.
        norm: of what reads the residual stream: "none", "layer" (LayerNorm) or "rms" (RMSNorm).
        positions: "learned" adds W_P to the residual stream; "shortformer" adds W_P to the inputs of q and k only
            (Press et al. 2012.15832), so that values and residual carry no positions; "rotary" rotates q and k
            (Su et al. 2104.09864); "none".
        bias: whether attention, MLP and unembedding have biases.
        tied: whether the unembedding is W_E^T.
        init_std: standard deviation of the initial weights; 1/sqrt(fan-in) when left out.
        n_kv_heads: G, a divisor of H, or 0 for H. Query head h reads the keys and values of head h // (H/G)
            (grouped-query attention, Ainslie et al. 2305.13245).
        rotary_dim, rotary_pairs, rotary_base, rotary_frequencies, rotary_scale: as in Rotary; of no effect unless
            positions are "rotary".
        embedding_scale: the residual stream starts at embedding_scale * W_E[token] (sqrt(D) in Gemma); a tied
            unembedding is not scaled.
        causal: whether a query sees no later key; False in encoders.
        norm_epsilon: added to the mean square that a norm divides by.
        norm_position: "pre": x + f(norm(x)). "post", as in BERT: norm(x) + f(norm(x)), so that the residual stream is
            the normed one.
        parallel: whether the MLP reads what the attention layer beside it reads, as in GPT-NeoX.
        activation: of the MLP: GELU in its tanh form or exactly, SiLU, ReLU.
        gated: whether the MLP is (activation(x W_gate) * (x W_in)) W_out, as in Llama.
        qk_norm: whether every q and k is divided by its root mean square, with a gain, in front of the rotation, as in
            Qwen3.
        n_segments: number of segment embeddings W_S, 0 for none; every token is of segment 0 unless a batch says
            otherwise (transformer.segment_inputs).
        unembed_transform: whether norm(activation(x W + b)) is unembedded in place of x, as in BERT.
    """

    n_vocab: int
    n_context: int
    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 64
    d_head: int = 0
    d_mlp: int = 0
    norm: Norm = "none"
    positions: Positions = "learned"
    bias: bool = False
    tied: bool = False
    init_std: float | None = None
    n_kv_heads: int = 0
    rotary_dim: int = 0
    rotary_pairs: RotaryPairs = "half"
    rotary_base: float = ROTARY_BASE
    embedding_scale: float = 1.0
    rotary_frequencies: tuple[float, ...] = ()
    rotary_scale: float = 1.0
    causal: bool = True
    norm_epsilon: float = 1e-5
    norm_position: NormPosition = "pre"
    parallel: bool = False
    activation: Activation = "gelu_tanh"
    gated: bool = False
    qk_norm: bool = False
    n_segments: int = 0
    unembed_transform: bool = False

    def __post_init__(self) -> None:
        for name in ("n_vocab", "n_context", "n_layers", "n_heads", "d_model"):
            object.__setattr__(self, name, _require_int(name, getattr(self, name), at_least=1))
        for name in ("d_head", "d_mlp", "n_kv_heads", "n_segments"):
            object.__setattr__(self, name, _require_int(name, getattr(self, name), at_least=0))
        _require_choice("norm", self.norm, get_args(Norm))
        _require_choice("norm_position", self.norm_position, get_args(NormPosition))
        _require_choice("positions", self.positions, get_args(Positions))
        _require_choice("activation", self.activation, get_args(Activation))
        if not self.d_head:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"d_model must be a multiple of n_heads when d_head is left out; got d_model={self.d_model}, "
                    f"n_heads={self.n_heads}: change one of them or give d_head"
                )
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.n_heads % self.n_groups:
            raise ValueError(
                f"n_kv_heads must divide n_heads; got n_kv_heads={self.n_kv_heads}, n_heads={self.n_heads}"
            )
        for name in ("dim", "base", "frequencies", "scale"):
            object.__setattr__(self, f"rotary_{name}", getattr(self.rotary, name))
        if self.rotary_dim > self.d_head:
            raise ValueError(f"rotary_dim must be at most d_head={self.d_head}; got {self.rotary_dim}")
        if self.positions == "rotary" and not self.rotary_dim and self.d_head % 2:
            raise ValueError(f"d_head must be even with rotary positions; got {self.d_head}")
        n_pairs = (self.rotary_dim or self.d_head) // 2
        if len(self.rotary_frequencies) not in (0, n_pairs):
            raise ValueError(f"rotary_frequencies must hold {n_pairs}, one a pair; got {len(self.rotary_frequencies)}")
        for name in ("embedding_scale", "norm_epsilon"):
            object.__setattr__(self, name, _require_positive(name, getattr(self, name)))
        if self.n_segments and self.positions != "learned":
            raise ValueError(f"n_segments needs positions 'learned'; got positions={self.positions!r}")
        if self.norm_position == "post" and (self.norm == "none" or self.parallel or self.positions == "shortformer"):
            raise ValueError(
                "norm_position 'post' needs a norm, and neither a parallel MLP nor shortformer positions; got "
                f"norm={self.norm!r}, parallel={self.parallel}, positions={self.positions!r}"
            )
        if self.init_std is not None:
            object.__setattr__(self, "init_std", _require_positive("init_std", self.init_std))

    @property
    def n_groups(self) -> int:
        """G, the number of key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def rotary(self) -> Rotary:
        """The rotary fields as one."""
        return Rotary(self.rotary_dim, self.rotary_pairs, self.rotary_base, self.rotary_frequencies, self.rotary_scale)


def _require_int(name: str, value: object, at_least: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}; got {value!r}")
    return int(value)


def _require_positive(name: str, value: object) -> float:
    numbers = int | float | np.integer | np.floating
    if not isinstance(value, numbers) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number; got {value!r}")
    return float(value)


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
