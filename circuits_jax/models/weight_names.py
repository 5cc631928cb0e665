"""Where Hugging Face's checkpoints store the parameters of a layer: one table a family.

A layout says how a weight is stored: one letter an axis, axes stored as one in brackets, and a digit for an axis of 3
of which that part is wanted. So GPT-2's W_Q is the first third of a weight "d(0hk)", and W_O of most is "d(hk)".

    v V   d, e D   h H   g G   k K   m M   s n_segments   p positions of the checkpoint
"""

from collections.abc import Collection
from typing import NamedTuple

# The axes of a parameter by the last part of its name.
AXES = {
    "W_E": "vd", "W_P": "pd", "W_S": "sd", "W_U": "dv", "b_U": "v", "scale": "d", "bias": "d", "W": "de", "b": "e",
    "W_Q": "hdk", "W_K": "gdk", "W_V": "gdk", "W_O": "hkd", "b_Q": "hk", "b_K": "gk", "b_V": "gk", "b_O": "d",
    "q_gain": "k", "k_gain": "k", "W_in": "dm", "W_gate": "dm", "b_in": "m", "b_gate": "m", "W_out": "md", "b_out": "d",
}  # fmt: skip


class Stored(NamedTuple):
    """Where a parameter is stored, and what makes it of that: factor * weight + added.

    Attributes:
        name: of the weight, without the family's prefix.
        layout: of the weight.
        first: first row that is wanted.
        factor, added: numbers.
    """

    name: str
    layout: str
    first: int = 0
    factor: float = 1.0
    added: float = 0.0


LAYER_NORMS = {
    "attention_norm/scale": ("input_layernorm.weight", "d"),
    "attention_norm/bias": ("input_layernorm.bias", "d"),
    "mlp_norm/scale": ("post_attention_layernorm.weight", "d"),
    "mlp_norm/bias": ("post_attention_layernorm.bias", "d"),
}
GPT2_LAYER = {
    "attention_norm/scale": ("ln_1.weight", "d"),
    "attention_norm/bias": ("ln_1.bias", "d"),
    "attention/W_Q": ("attn.c_attn.weight", "d(0hk)"),
    "attention/W_K": ("attn.c_attn.weight", "d(1gk)"),
    "attention/W_V": ("attn.c_attn.weight", "d(2gk)"),
    "attention/b_Q": ("attn.c_attn.bias", "(0hk)"),
    "attention/b_K": ("attn.c_attn.bias", "(1gk)"),
    "attention/b_V": ("attn.c_attn.bias", "(2gk)"),
    "attention/W_O": ("attn.c_proj.weight", "(hk)d"),
    "attention/b_O": ("attn.c_proj.bias", "d"),
    "mlp_norm/scale": ("ln_2.weight", "d"),
    "mlp_norm/bias": ("ln_2.bias", "d"),
    "mlp/W_in": ("mlp.c_fc.weight", "dm"),
    "mlp/b_in": ("mlp.c_fc.bias", "m"),
    "mlp/W_out": ("mlp.c_proj.weight", "md"),
    "mlp/b_out": ("mlp.c_proj.bias", "d"),
}
GPT_NEOX_LAYER = LAYER_NORMS | {
    "attention/W_Q": ("attention.query_key_value.weight", "(h0k)d"),
    "attention/W_K": ("attention.query_key_value.weight", "(g1k)d"),
    "attention/W_V": ("attention.query_key_value.weight", "(g2k)d"),
    "attention/b_Q": ("attention.query_key_value.bias", "(h0k)"),
    "attention/b_K": ("attention.query_key_value.bias", "(g1k)"),
    "attention/b_V": ("attention.query_key_value.bias", "(g2k)"),
    "attention/W_O": ("attention.dense.weight", "d(hk)"),
    "attention/b_O": ("attention.dense.bias", "d"),
    "mlp/W_in": ("mlp.dense_h_to_4h.weight", "md"),
    "mlp/b_in": ("mlp.dense_h_to_4h.bias", "m"),
    "mlp/W_out": ("mlp.dense_4h_to_h.weight", "dm"),
    "mlp/b_out": ("mlp.dense_4h_to_h.bias", "d"),
}
LLAMA_LAYER = LAYER_NORMS | {
    "attention/W_Q": ("self_attn.q_proj.weight", "(hk)d"),
    "attention/W_K": ("self_attn.k_proj.weight", "(gk)d"),
    "attention/W_V": ("self_attn.v_proj.weight", "(gk)d"),
    "attention/W_O": ("self_attn.o_proj.weight", "d(hk)"),
    "attention/b_Q": ("self_attn.q_proj.bias", "(hk)"),
    "attention/b_K": ("self_attn.k_proj.bias", "(gk)"),
    "attention/b_V": ("self_attn.v_proj.bias", "(gk)"),
    "attention/b_O": ("self_attn.o_proj.bias", "d"),
    "attention/q_gain": ("self_attn.q_norm.weight", "k"),
    "attention/k_gain": ("self_attn.k_norm.weight", "k"),
    "mlp/W_gate": ("mlp.gate_proj.weight", "md"),
    "mlp/W_in": ("mlp.up_proj.weight", "md"),
    "mlp/W_out": ("mlp.down_proj.weight", "dm"),
    "mlp/b_gate": ("mlp.gate_proj.bias", "m"),
    "mlp/b_in": ("mlp.up_proj.bias", "m"),
    "mlp/b_out": ("mlp.down_proj.bias", "d"),
}
BERT_LAYER = {
    "attention/W_Q": ("attention.self.query.weight", "(hk)d"),
    "attention/W_K": ("attention.self.key.weight", "(gk)d"),
    "attention/W_V": ("attention.self.value.weight", "(gk)d"),
    "attention/W_O": ("attention.output.dense.weight", "d(hk)"),
    "attention/b_Q": ("attention.self.query.bias", "(hk)"),
    "attention/b_K": ("attention.self.key.bias", "(gk)"),
    "attention/b_V": ("attention.self.value.bias", "(gk)"),
    "attention/b_O": ("attention.output.dense.bias", "d"),
    "mlp_norm/scale": ("attention.output.LayerNorm.weight", "d"),
    "mlp_norm/bias": ("attention.output.LayerNorm.bias", "d"),
    "mlp/W_in": ("intermediate.dense.weight", "md"),
    "mlp/b_in": ("intermediate.dense.bias", "m"),
    "mlp/W_out": ("output.dense.weight", "dm"),
    "mlp/b_out": ("output.dense.bias", "d"),
}


def in_layers(
    path: str, layer: dict[str, tuple[str, str]], n_layers: int, absent: Collection[str] = ()
) -> dict[str, Stored]:
    """The table of one layer for all layers at path.0, path.1, ..., without the rows of absent parameters."""
    return {
        f"layer_{i}/{at}": Stored(f"{path}.{i}.{name}", layout)
        for i in range(n_layers)
        for at, (name, layout) in layer.items()
        if at not in absent and at.split("/")[1] not in absent
    }


def layer_norm(at: str, name: str) -> dict[str, Stored]:
    """Gain and bias of the norm `name`."""
    return {f"{at}/scale": Stored(f"{name}.weight", "d"), f"{at}/bias": Stored(f"{name}.bias", "d")}
