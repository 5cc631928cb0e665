"""The families of Hugging Face checkpoints: config.json -> TransformerConfig, and where each parameter is stored.

A family is a function; what a config.json may say and the transformer does not do is refused by name.
"""

import dataclasses
import math

import numpy as np

from circuits_jax.models.config import Activation, Rotary, TransformerConfig
from circuits_jax.models.config_entries import Settings, activation, entries
from circuits_jax.models.rotary_scaling import rotary_from_settings, rotary_settings
from circuits_jax.models.weight_names import (
    BERT_LAYER,
    GPT2_LAYER,
    GPT_NEOX_LAYER,
    LLAMA_LAYER,
    Stored,
    in_layers,
    layer_norm,
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a config.json says of the weights beside it.

    Attributes:
        config: of the model.
        n_positions: longest sequence, or number of positions that are stored.
        prefix: what may stand before the names of the weights.
        weights: of each parameter ("layer_0/attention/W_Q") where it is stored. Biases that are not here are zero.
        repeated: names of weights that say the same as another, where both are stored at all.
        ignored: a pattern of the names that play no part: masks, frequencies, heads of other tasks.
    """

    config: TransformerConfig
    n_positions: int
    prefix: str
    weights: dict[str, Stored]
    repeated: dict[str, str]
    ignored: str


def read_config(raw: Settings, n_context: int | None = None) -> Checkpoint:
    """What a config.json says, for sequences of up to n_context tokens (None: as long as the checkpoint takes).

    Missing entries are what transformers takes them to be.

    Raises:
        ValueError: that names what is not supported, has a wrong value, or what n_context is too long for.
    """
    raw, settings = entries(raw)
    family = raw["model_type"]
    read = {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "bert": _bert, "roberta": _bert}.get(family, _llama)
    try:
        return read(family, raw, settings, n_context)
    except ValueError as error:
        if str(error).startswith(("config.json: ", "n_context must")):
            raise
        raise ValueError(f"config.json: {error}") from error  # of TransformerConfig, which knows of no file


def stored_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """The size of each letter of a layout."""
    c = checkpoint.config
    sizes = {"v": c.n_vocab, "d": c.d_model, "e": c.d_model, "h": c.n_heads, "g": c.n_groups, "k": c.d_head}
    return sizes | {"m": c.d_mlp, "s": c.n_segments, "p": checkpoint.n_positions}


def _gpt2(family: str, raw: Settings, c: Settings, n_context: int | None) -> Checkpoint:
    n_layers, n_heads, d_model = c["n_layer"], c["n_head"], c["n_embd"]
    config = TransformerConfig(
        n_vocab=c["vocab_size"],
        n_context=_context(n_context, c["n_positions"]),
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=d_model,
        d_mlp=c["n_inner"] or 4 * d_model,
        norm="layer",
        norm_epsilon=c["layer_norm_epsilon"],
        activation=activation("activation_function", c["activation_function"]),
        bias=True,
        tied=c["tie_word_embeddings"],
    )
    weights = in_layers("h", GPT2_LAYER, n_layers)
    for layer in range(n_layers):  # whatever else divides the scores is folded into q
        factor = 1.0 if c["scale_attn_weights"] else math.sqrt(config.d_head)
        if c["scale_attn_by_inverse_layer_idx"]:
            factor /= layer + 1
        for name in ("W_Q", "b_Q"):
            at = f"layer_{layer}/attention/{name}"
            weights[at] = weights[at]._replace(factor=factor)
    weights |= {"W_E": Stored("wte.weight", "vd"), "W_P": Stored("wpe.weight", "pd")} | layer_norm("final_norm", "ln_f")
    repeated = _unembedding(weights, config, "lm_head.weight")
    return Checkpoint(config, c["n_positions"], "transformer.", weights, repeated, r"h\.\d+\.attn\.(bias|masked_bias)")


def _gpt_neox(family: str, raw: Settings, c: Settings, n_context: int | None) -> Checkpoint:
    n_positions, n_heads, d_model = c["max_position_embeddings"], c["num_attention_heads"], c["hidden_size"]
    d_head, length = d_model // n_heads, _context(n_context, n_positions)
    own_names = {"rope_theta": c["rotary_emb_base"], "partial_rotary_factor": c["rotary_pct"]}
    rotary = rotary_from_settings(rotary_settings(raw | own_names), d_head, n_positions, length)
    config = TransformerConfig(
        n_vocab=c["vocab_size"],
        n_context=length,
        n_layers=c["num_hidden_layers"],
        n_heads=n_heads,
        d_model=d_model,
        d_mlp=c["intermediate_size"],
        norm="layer",
        norm_epsilon=c["layer_norm_eps"],
        **_rotary_fields(rotary),
        activation=activation("hidden_act", c["hidden_act"]),
        bias=True,
        parallel=c["use_parallel_residual"],
        tied=c["tie_word_embeddings"],
    )
    absent = () if c["attention_bias"] else ("b_Q", "b_K", "b_V", "b_O")
    weights = in_layers("layers", GPT_NEOX_LAYER, config.n_layers, absent)
    weights |= {"W_E": Stored("embed_in.weight", "vd")} | layer_norm("final_norm", "final_layer_norm")
    repeated = {"lm_head.weight": "embed_out.weight"} | _unembedding(weights, config, "embed_out.weight")
    ignored = r"(layers\.\d+\.attention\.)?(bias|masked_bias|rotary_emb\.inv_freq)"
    return Checkpoint(config, n_positions, "gpt_neox.", weights, repeated, ignored)


def _llama(family: str, raw: Settings, c: Settings, n_context: int | None) -> Checkpoint:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma, which differ in little."""
    n_layers, n_heads, d_model = c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"]
    n_positions = c["max_position_embeddings"]
    length = _context(n_context, n_positions)
    d_head = c["head_dim"] or d_model // n_heads
    _check_window(family, raw, c, length)
    settings = rotary_settings(raw)
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        got = settings["partial_rotary_factor"]
        raise ValueError(f"config.json: partial_rotary_factor of {family} must be 1; got {got!r}")
    rotary = rotary_from_settings(settings, d_head, n_positions, length)

    biases = {"b_Q", "b_K", "b_V"} if family == "qwen2" else set()
    biases |= {"b_Q", "b_K", "b_V", "b_O"} if c.get("attention_bias") else set()
    biases |= {"b_gate", "b_in", "b_out"} if c.get("mlp_bias") else set()
    qk_norm = family == "qwen3"
    config = TransformerConfig(
        n_vocab=c["vocab_size"],
        n_context=length,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=c["num_key_value_heads"] or n_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=c["intermediate_size"],
        norm="rms",
        norm_epsilon=c["rms_norm_eps"],
        **_rotary_fields(rotary),
        embedding_scale=math.sqrt(d_model) if family == "gemma" else 1.0,
        activation=_gemma_activation(raw, c) if family == "gemma" else activation("hidden_act", c["hidden_act"]),
        gated=True,
        bias=bool(biases),
        qk_norm=qk_norm,
        tied=c["tie_word_embeddings"],
    )
    absent = {"b_Q", "b_K", "b_V", "b_O", "b_gate", "b_in", "b_out"} - biases
    absent |= {"attention_norm/bias", "mlp_norm/bias"} | (set() if qk_norm else {"q_gain", "k_gain"})
    weights = in_layers("layers", LLAMA_LAYER, n_layers, absent)
    weights |= {"W_E": Stored("embed_tokens.weight", "vd"), "final_norm/scale": Stored("norm.weight", "d")}
    if family == "gemma":
        weights = {at: w._replace(added=1.0) if at.endswith("scale") else w for at, w in weights.items()}
    repeated = _unembedding(weights, config, "lm_head.weight")
    return Checkpoint(
        config, n_positions, "model.", weights, repeated, r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    )


def _bert(family: str, raw: Settings, c: Settings, n_context: int | None) -> Checkpoint:
    """BERT, and RoBERTa, whose positions are counted from pad_token_id + 1."""
    if raw.get("is_decoder"):
        raise ValueError(f"config.json: is_decoder of {family} is not supported; got {raw['is_decoder']!r}")
    n_stored, n_layers = c["max_position_embeddings"], c["num_hidden_layers"]
    first = c["pad_token_id"] + 1 if family == "roberta" else 0
    config = TransformerConfig(
        n_vocab=c["vocab_size"],
        n_context=_context(n_context, n_stored - first),
        n_layers=n_layers,
        n_heads=c["num_attention_heads"],
        d_model=c["hidden_size"],
        d_mlp=c["intermediate_size"],
        norm="layer",
        norm_position="post",
        norm_epsilon=c["layer_norm_eps"],
        activation=activation("hidden_act", c["hidden_act"]),
        causal=False,
        bias=True,
        n_segments=c["type_vocab_size"],
        unembed_transform=True,
        tied=c["tie_word_embeddings"],
    )
    if family == "roberta" and config.activation != "gelu":  # its unembedding has GELU whatever the rest has
        raise ValueError(f"config.json: hidden_act of roberta must be gelu; got {c['hidden_act']!r}")
    weights = in_layers("encoder.layer", BERT_LAYER, n_layers)
    norms = ["embeddings.LayerNorm", *(f"encoder.layer.{layer}.output.LayerNorm" for layer in range(n_layers))]
    for layer, norm in enumerate(norms[:-1]):
        weights |= layer_norm(f"layer_{layer}/attention_norm", norm)
    weights |= layer_norm("final_norm", norms[-1]) | {
        "W_E": Stored("embeddings.word_embeddings.weight", "vd"),
        "W_P": Stored("embeddings.position_embeddings.weight", "pd", first=first),
        "W_S": Stored("embeddings.token_type_embeddings.weight", "sd"),
    }
    if family == "bert":
        head, dense, norm = "cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"
    else:
        head, dense, norm = "lm_head", "lm_head.dense", "lm_head.layer_norm"
    weights |= layer_norm("unembed_transform/norm", norm) | {
        "unembed_transform/W": Stored(f"{dense}.weight", "ed"),
        "unembed_transform/b": Stored(f"{dense}.bias", "e"),
        "b_U": Stored(f"{head}.bias", "v"),
    }
    repeated = _unembedding(weights, config, f"{head}.decoder.weight") | {f"{head}.decoder.bias": f"{head}.bias"}
    ignored = (
        r"embeddings\.(position_ids|token_type_ids)|pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)"
    )
    return Checkpoint(config, n_stored, f"{family}.", weights, repeated, ignored)


def _unembedding(weights: dict[str, Stored], config: TransformerConfig, name: str) -> dict[str, str]:
    """W_U where it is not W_E^T; where it is, a copy that may be stored too."""
    if config.tied:
        return {name: weights["W_E"].name}
    weights["W_U"] = Stored(name, "vd")
    return {}


def _rotary_fields(rotary: Rotary) -> Settings:
    return {"positions": "rotary"} | {f"rotary_{name}": value for name, value in dataclasses.asdict(rotary).items()}


def _context(n_context: int | None, n_positions: int) -> int:
    if n_context is None:
        return n_positions
    if isinstance(n_context, bool) or not isinstance(n_context, int | np.integer) or not 1 <= n_context <= n_positions:
        raise ValueError(f"n_context must be an integer from 1 to the checkpoint's {n_positions}; got {n_context!r}")
    return int(n_context)


def _gemma_activation(raw: Settings, c: Settings) -> Activation:
    """In Gemma's first configs "gelu" was written and its tanh form meant; hidden_activation came to say so."""
    meant = raw.get("hidden_activation")
    found = activation("hidden_act", "gelu_new" if c["hidden_act"] == "gelu" else c["hidden_act"])
    if meant is not None and (meant not in ("gelu_pytorch_tanh", "gelu_new") or found != "gelu_tanh"):
        raise ValueError(
            "config.json: hidden_activation must be null, or gelu_pytorch_tanh or gelu_new where hidden_act says the "
            f"same; got {meant!r} and {c['hidden_act']!r}"
        )
    return found


def _check_window(family: str, raw: Settings, c: Settings, n_context: int) -> None:
    """Refuses layers of other kinds, and a sliding window shorter than the context where the family reads one."""
    types = raw.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
        raise ValueError(f"config.json: layer_types must be a list of strings or null; got {types!r}")
    window = raw.get("sliding_window", 4096) if family in ("mistral", "qwen2", "qwen3") else None
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"config.json: sliding_window must be a positive integer or null; got {window!r}")
    if family in ("qwen2", "qwen3"):
        slides = "sliding_attention" in types if types else c["num_hidden_layers"] > c["max_window_layers"]
        window = window if c["use_sliding_window"] and slides else None
    others = set(types or []) - {"full_attention"} - ({"sliding_attention"} if window else set())
    if others:
        raise ValueError(f"config.json: layer_types {', '.join(sorted(others))} are not supported")
    if window is not None and window < n_context:
        raise ValueError(
            f"config.json: sliding_window {window} is shorter than the context of {n_context} and is not supported: "
            f"give n_context={window} or less"
        )
