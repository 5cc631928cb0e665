"""The entries of a Hugging Face config.json: what a missing one means, and which the transformer has no answer to."""

from typing import Any

from circuits_jax.models.config import Activation

Settings = dict[str, Any]

# What transformers takes for a missing entry; None stands for what follows from the others.
LLAMA_DEFAULTS: Settings = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_DEFAULTS: Settings = LLAMA_DEFAULTS | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
BERT_DEFAULTS: Settings = {
    "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "tie_word_embeddings": True,
}  # fmt: skip
DEFAULTS: dict[str, Settings] = {
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    },
    "gpt_neox": {
        "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
        "num_attention_heads": 64, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True, "rotary_pct": 0.25,
        "rotary_emb_base": 10_000.0,
    },
    "llama": LLAMA_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    "mistral": LLAMA_DEFAULTS | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072
    },
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    "gemma": LLAMA_DEFAULTS | {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False,
    },
    "bert": BERT_DEFAULTS,
    "roberta": BERT_DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1},
}  # fmt: skip
GPT2_OTHER_NAMES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "silu": "silu",
    "swish": "silu", "relu": "relu",
}  # fmt: skip

# Whatever else these entries say changes what a model computes; auto_map names code of the checkpoint's own.
NEUTRAL: dict[str, Any] = {
    "quantization_config": {}, "add_cross_attention": False, "is_encoder_decoder": False, "pruned_heads": {},
    "position_embedding_type": "absolute", "use_bidirectional_attention": False, "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0, "num_experts": 0, "num_local_experts": 0, "n_routed_experts": 0,
    "auto_map": {},
}  # fmt: skip


def entries(raw: Settings) -> tuple[Settings, Settings]:
    """A config.json under the names of its family, and each entry in DEFAULTS as it says, or as transformers takes it.

    Raises:
        ValueError: that names an unknown model_type, what is not supported, and an entry of the wrong type.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in DEFAULTS:
        raise ValueError(f"config.json: model_type must be one of {', '.join(DEFAULTS)}; got {family!r}")
    if family == "gpt2":
        raw = {GPT2_OTHER_NAMES.get(name, name): value for name, value in raw.items()}
    for name, neutral in NEUTRAL.items():
        if raw.get(name) is not None and raw[name] != neutral:
            raise ValueError(f"config.json: {name} is not supported; got {raw[name]!r}")
    if family not in ("bert", "roberta") and raw.get("is_causal", True) is not True:  # null too is no
        raise ValueError(f"config.json: is_causal of {family} must be true; got {raw['is_causal']!r}")
    return raw, {name: _entry(raw, name, default) for name, default in DEFAULTS[family].items()}


def activation(name: str, value: str) -> Activation:
    """Our name of the activation that the entry `name` gives."""
    if value not in ACTIVATIONS:
        raise ValueError(f"config.json: {name} must be one of {', '.join(ACTIVATIONS)}; got {value!r}")
    return ACTIVATIONS[value]


def _entry(raw: Settings, name: str, default: Any) -> Any:
    """null is the default, but null itself where the value follows from other entries."""
    follows = name in ("n_inner", "num_key_value_heads", "head_dim")
    value = raw.get(name, default)
    if value is None:
        return None if follows else default
    kind = int if follows else type(default)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is int and value < (name not in ("pad_token_id", "max_window_layers"))):
        wanted = "a positive integer" if kind is int else f"a {kind.__name__}"
        raise ValueError(f"config.json: {name} must be {wanted}; got {value!r}")
    return value
