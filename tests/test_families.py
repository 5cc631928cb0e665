import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from circuits_jax.models.families import read_config, stored_sizes
from circuits_jax.models.rotary_scaling import rotary_from_settings, rotary_settings
from circuits_jax.models.transformer import init_params

FIXTURES = Path(__file__).parent / "fixtures" / "pretrained"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
SMALL = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 32}
OF = {family: {"model_type": family, **SMALL} for family in ("gpt_neox", "bert", "roberta")}
OF |= {
    family: {"model_type": family, **SMALL, "num_key_value_heads": 4}
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma")
}
OF["gpt2"] = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}


def read(family, n_context=None, **changes):
    return read_config(OF[family] | changes, n_context)


# --- every parameter has its place


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False, "n_inner": 24}),
        ("gpt_neox", {"rotary_pct": 0.5}),
        ("gpt_neox", {"rotary_pct": 0.5, "attention_bias": False, "tie_word_embeddings": True}),
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"mlp_bias": True, "num_key_value_heads": 2}),
        ("mistral", {"num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "attention_bias": True}),
        ("gemma", {"num_key_value_heads": 1}),
        ("bert", {}),
        ("bert", {"tie_word_embeddings": False}),
        ("roberta", {}),
    ],
)
def test_the_map_names_every_parameter_and_nothing_else(family, changes):
    checkpoint = read(family, **changes)
    tree = jax.eval_shape(lambda: init_params(checkpoint.config, jax.random.key(0)))
    there = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}
    assert checkpoint.weights.keys() <= there
    unnamed = {name.split("/")[-1] for name in there - checkpoint.weights.keys()}
    assert unnamed <= {"b_Q", "b_K", "b_V", "b_O", "b_in", "b_gate", "b_out", "b_U"}
    assert not (unnamed and not checkpoint.config.bias)
    letters = {letter for stored in checkpoint.weights.values() for letter in stored.layout if letter.islower()}
    assert letters <= stored_sizes(checkpoint).keys()


@pytest.mark.parametrize("case", [case for case in CASES if (FIXTURES / case / "config_legacy.json").exists()])
def test_old_spellings_of_a_config_say_the_same(case):
    raw, legacy = (json.loads((FIXTURES / case / f"{name}.json").read_text()) for name in ("config", "config_legacy"))
    assert read_config(legacy, 16) == read_config(raw, 16)


# --- what a config may leave out, and what follows from it


def test_missing_entries_are_those_that_transformers_takes():
    gpt2 = read_config({"model_type": "gpt2"}).config
    assert (gpt2.n_vocab, gpt2.n_context, gpt2.n_layers, gpt2.n_heads, gpt2.d_model) == (50257, 1024, 12, 12, 768)
    assert (gpt2.d_mlp, gpt2.activation, gpt2.tied, gpt2.norm_epsilon) == (3072, "gelu_tanh", True, 1e-5)
    pythia = read_config({"model_type": "gpt_neox"}).config
    assert (pythia.rotary_dim, pythia.parallel, pythia.activation, pythia.tied) == (24, True, "gelu", False)
    llama = read_config({"model_type": "llama"}).config
    assert (llama.n_groups, llama.d_head, llama.norm_epsilon, llama.bias) == (32, 128, 1e-6, False)
    assert (llama.gated, llama.activation, llama.norm, llama.rotary_base) == (True, "silu", "rms", 1e4)
    assert read_config({"model_type": "mistral"}, 4096).config.n_groups == 8
    assert read_config({"model_type": "qwen3"}).config.d_head == 128
    gemma = read_config({"model_type": "gemma"}).config
    assert (gemma.d_head, gemma.tied, gemma.activation) == (256, True, "gelu_tanh")
    assert gemma.embedding_scale == math.sqrt(3072)
    bert = read_config({"model_type": "bert"}).config
    assert (bert.n_segments, bert.causal, bert.norm_position, bert.norm_epsilon) == (2, False, "post", 1e-12)
    assert read_config({"model_type": "roberta"}).config.n_context == 510


def test_null_is_the_default_and_head_dim_follows_from_the_width():
    assert read("llama", rms_norm_eps=None).config.norm_epsilon == 1e-6
    assert read("llama", head_dim=None, num_key_value_heads=None).config == read("llama").config
    assert read("mistral", num_key_value_heads=None, sliding_window=None).config.n_groups == 4
    assert read("gpt2", n_inner=None).config.d_mlp == 64


def test_gpt2_understands_the_names_of_other_families():
    other = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    assert read_config({"model_type": "gpt2", "vocab_size": 20, **other}).config == read("gpt2").config


def test_n_context_cuts_the_context():
    assert read("gpt2", n_context=5).config.n_context == 5
    assert read("gpt2", n_context=5).n_positions == 32
    assert read("roberta", n_context=30).config.n_context == 30
    assert read("gpt2", n_context=np.int64(5)) == read("gpt2", n_context=5)
    assert type(read("gpt2", n_context=np.int32(5)).config.n_context) is int
    for wrong in (0, 33, 2.5, True):
        with pytest.raises(ValueError, match=r"^n_context must be an integer from 1 to the checkpoint's 32; got"):
            read("gpt2", n_context=wrong)


def test_what_changes_nothing_is_allowed():
    harmless = {"reorder_and_upcast_attn": True, "is_decoder": True, "attn_pdrop": 0.5, "torch_dtype": "float16"}
    assert read("gpt2", **harmless) == read("gpt2")
    assert read("llama", pretraining_tp=2, layer_types=["full_attention"] * 2, quantization_config=None) == read(
        "llama"
    )
    assert read("llama", sliding_window=8) == read("llama", is_causal=True) == read("llama")  # a window it never reads
    for changes in ({"hidden_act": "gelu"}, {"hidden_activation": None}, {"hidden_activation": "gelu_new"}):
        assert read("gemma", **changes) == read("gemma")
    unused = {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}
    assert read("qwen2", **unused) == read("qwen2")
    windowed = {"use_sliding_window": True, "sliding_window": 4}
    assert read("qwen2", **windowed, max_window_layers=2) == read("qwen2")
    assert read("qwen2", **windowed, layer_types=["full_attention"] * 2, max_window_layers=0) == read("qwen2")


def test_score_scales_of_gpt2_are_folded_into_queries():
    plain, by_layer = read("gpt2"), read("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert plain.weights["layer_1/attention/W_Q"].factor == 1
    assert [by_layer.weights[f"layer_{i}/attention/{w}"].factor for i in (0, 1) for w in ("W_Q", "b_Q")] == [
        1,
        1,
        0.5,
        0.5,
    ]
    unscaled = read("gpt2", scale_attn_weights=False)
    assert unscaled.weights["layer_1/attention/b_Q"].factor == 2  # sqrt(K), K = 4
    assert unscaled.weights["layer_1/attention/W_K"].factor == 1


# --- what is refused


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type must be one of gpt2, gpt_neox, .*; got 'mamba'"),
        ("llama", {"model_type": None}, "model_type must be one of .*; got None"),
        ("llama", {"model_type": ["llama"]}, r"model_type must be one of .*; got \['llama'\]"),
        ("llama", {"model_type": {}}, "model_type must be one of .*; got {}"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ("llama", {"num_local_experts": 8}, "num_local_experts is not supported; got 8"),
        ("qwen3", {"num_experts": 8}, "num_experts is not supported; got 8"),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported; got 30.0"),
        ("gemma", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported; got 50.0"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma", {"hidden_activation": "silu"}, "hidden_activation must be null, or gelu_pytorch.*; got 'silu"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation must be null.*; got 'gelu' and 'gelu_pytorch_tanh"),
        ("gemma", {"hidden_activation": ["gelu"]}, r"hidden_activation must be null.*; got \['gelu'\]"),
        ("gemma", {"hidden_activation": {}}, "hidden_activation must be null.*; got {}"),
        ("gemma", {"hidden_activation": 0}, "hidden_activation must be null.*; got 0"),
        ("gemma", {"hidden_activation": "gelu_new", "hidden_act": "relu"}, "says the same; got 'gelu_new' and 'relu'"),
        ("llama", {"auto_map": {"AutoModel": "own.Model"}}, "auto_map is not supported; got {'AutoModel'"),
        ("llama", {"is_causal": False}, "is_causal of llama must be true; got False"),
        ("gpt2", {"is_causal": 0}, "is_causal of gpt2 must be true; got 0"),
        ("mistral", {"is_causal": None}, "is_causal of mistral must be true; got None"),
        ("qwen3", {"is_causal": []}, r"is_causal of qwen3 must be true; got \[\]"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is not supported"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function must be one of gelu, .*; got 'tanh'"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads is not supported"),
        ("llama", {"hidden_act": "laplace"}, "hidden_act must be one of gelu, .*; got 'laplace'"),
        ("bert", {"is_decoder": True}, "is_decoder of bert is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is not supported; got 'rel"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act of roberta must be gelu; got 'relu'"),
        ("mistral", {"sliding_window": 8}, "sliding_window 8 is shorter than the context of 32 .*n_context=8 or less"),
        ("mistral", {"max_position_embeddings": 8192}, "sliding_window 4096 is shorter than the context of 8192"),
        ("mistral", {"sliding_window": "x"}, "sliding_window must be a positive integer or null; got 'x'"),
        ("mistral", {"sliding_window": []}, r"sliding_window must be a positive integer or null; got \[\]"),
        ("qwen2", {"sliding_window": {}}, "sliding_window must be a positive integer or null; got {}"),
        ("qwen2", {"sliding_window": True}, "sliding_window must be a positive integer or null; got True"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer or null; got 0"),
        ("llama", {"layer_types": 3}, "layer_types must be a list of strings or null; got 3"),
        ("qwen3", {"layer_types": True}, "layer_types must be a list of strings or null; got True"),
        ("qwen3", {"layer_types": math.nan}, "layer_types must be a list of strings or null; got nan"),
        ("mistral", {"layer_types": [1]}, r"layer_types must be a list of strings or null; got \[1\]"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window 8 is"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention are not"),
        ("llama", {"layer_types": ["linear_attention"] * 2}, "layer_types linear_attention are not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor of llama must be 1; got 0.5"),
        ("gpt_neox", {"rotary_pct": 0.0}, "partial_rotary_factor .* must be a positive number; got 0.0"),
        ("gpt_neox", {"rotary_pct": 0.1}, r"rotary share of d_head=4 must be in \(0, 1\]; got 0.1"),
        ("gpt_neox", {"rotary_pct": 0.25}, "rotary_dim must be even; got 1"),
        ("llama", {"hidden_size": "16"}, "hidden_size must be a positive integer; got '16'"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads must be a positive integer; got 0"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be a bool; got 'yes'"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps must be a float; got 'small'"),
        ("gpt2", {"n_head": 3}, r"config\.json: d_model must be a multiple of n_heads"),
        ("llama", {"num_key_value_heads": 3}, r"config\.json: n_kv_heads must divide n_heads"),
        ("bert", {"layer_norm_eps": 0}, r"config\.json: norm_epsilon must be a positive finite number; got 0"),
        ("llama", {"rope_theta": 1}, "rope_theta must be above 1; got 1"),
        ("llama", {"rope_theta": -1}, "rope_theta of rope_type 'default' must be a positive number; got -1"),
        ("llama", {"rope_scaling": {"type": "mrope"}}, "rope_type must be one of default, linear, .*; got 'mrope'"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling must name its rope_type"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling must be one set of rotary settings"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters must be one set"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor of rope_type 'linear' must be .*; got None"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(family, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read(family, **changes)
    assert str(error.value).count("config.json: ") == 1


def test_a_context_within_the_sliding_window_is_full_attention():
    assert read("mistral", n_context=8, sliding_window=8).config == read("mistral", n_context=8).config
    types = ["full_attention", "sliding_attention"]
    assert read("qwen3", n_context=8, layer_types=types, use_sliding_window=True, sliding_window=8)


# --- rotary positions: the published formulas, pair by pair


def oracle(kind, settings, dim, base, n_positions):
    """(frequencies, scale) in plain floats."""
    original = settings.get("original_max_position_embeddings", n_positions)
    factor = settings.get("factor", n_positions / original)
    frequencies = []
    for i in range(dim // 2):
        f = base ** (-2 * i / dim)
        if kind == "linear":
            f = f / factor
        if kind == "llama3":
            wavelength, low, high = 2 * math.pi / f, settings["low_freq_factor"], settings["high_freq_factor"]
            if wavelength > original / low:
                f = f / factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                f = (1 - smooth) * f / factor + smooth * f
        if kind == "yarn":
            limits = [settings.get("beta_fast") or 32, settings.get("beta_slow") or 1]
            low, high = (dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in limits)
            if settings.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            f = f / factor * ramp + f * (1 - ramp)
        if kind == "longrope":
            f = f / settings["short_factor"][i]
        frequencies.append(f)
    if kind == "yarn":
        usual = 0.1 * math.log(factor) + 1
        if settings.get("mscale"):
            usual = (0.1 * settings["mscale"] * math.log(factor) + 1) / (
                0.1 * settings["mscale_all_dim"] * math.log(factor) + 1
            )
        return frequencies, settings.get("attention_factor") or usual
    if kind == "longrope" and factor > 1:
        return frequencies, settings.get("attention_factor") or math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies, 1.0


ORIGINAL = {"original_max_position_embeddings": 16}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
SCALINGS = [
    ("default", {}),
    ("linear", {"factor": 4.0}),
    ("dynamic", {"factor": 4.0}),
    ("llama3", LLAMA3),
    ("yarn", {"factor": 4.0, **ORIGINAL}),
    ("yarn", ORIGINAL),
    ("yarn", {"factor": 2.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, **ORIGINAL}),
    ("yarn", {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, **ORIGINAL}),
    ("yarn", {"factor": 4.0, "attention_factor": 1.5, "beta_fast": None, **ORIGINAL}),
    ("longrope", {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0] * 4, **ORIGINAL}),
    ("longrope", {"short_factor": [1.0, 1.5, 2.0, 3.0], "factor": 8.0, **ORIGINAL}),
    ("longrope", {"short_factor": [1, 1, 1, 1], "attention_factor": 1.2, **ORIGINAL}),
]


@pytest.mark.parametrize(("kind", "settings"), SCALINGS)
@pytest.mark.parametrize("base", [50.0, 10_000.0])
def test_every_scaling_is_the_published_one_in_every_spelling(kind, settings, base):
    spellings = [
        {"rope_theta": base, "rope_scaling": {"type": kind, **settings}},
        {"rope_theta": base, "rope_scaling": {"rope_type": kind, **settings}},
        {"rope_parameters": {"rope_type": kind, "rope_theta": base, **settings}},
        {
            "rope_theta": 3.0,
            "rope_parameters": {"rope_type": kind, "rope_theta": base, **settings},
            "rope_scaling": None,
        },
        {"rope_theta": base, "rope_scaling": {"type": kind, **settings}, "rope_parameters": {"rope_theta": 3.0}},
    ]
    if kind in ("yarn", "longrope", "llama3"):  # the original length may stand outside, and wins there
        wrong = {**settings, "original_max_position_embeddings": 99}
        spellings.append({"rope_theta": base, "rope_scaling": {"type": kind, **wrong}} | ORIGINAL)
    rotaries = [rotary_from_settings(rotary_settings(raw), 8, 64, 16) for raw in spellings]
    assert len(set(rotaries)) == 1
    frequencies, scale = oracle(kind, settings, 8, base, 64)
    plain = rotaries[0].frequencies or [base ** (-i / 4) for i in range(4)]
    np.testing.assert_allclose(plain, frequencies, rtol=1e-12)
    np.testing.assert_allclose(rotaries[0].scale, scale, rtol=1e-12)
    assert (rotaries[0].dim, rotaries[0].base, rotaries[0].pairs) == (8, base, "half")


def test_a_model_without_any_rotary_settings_has_the_plain_frequencies():
    assert rotary_settings({}) == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert rotary_settings({"rope_scaling": {}, "rope_parameters": None}) == rotary_settings({})
    rotary = rotary_from_settings(rotary_settings({}), 8, 64, 64)
    assert (rotary.dim, rotary.base, rotary.frequencies, rotary.scale) == (8, 10_000.0, (), 1.0)


@pytest.mark.parametrize(
    ("kind", "settings"), [("dynamic", {"factor": 2.0}), ("longrope", {"short_factor": [1.0] * 4})]
)
def test_frequencies_that_change_with_the_length_are_refused_beyond_the_original_one(kind, settings):
    raw = {"rope_scaling": {"type": kind, **settings, **ORIGINAL}}
    assert rotary_from_settings(rotary_settings(raw), 8, 64, 16)
    with pytest.raises(ValueError, match=rf"'{kind}' changes with the length .* give n_context=16 or less; got 17"):
        rotary_from_settings(rotary_settings(raw), 8, 64, 17)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "llama3", **LLAMA3, "low_freq_factor": None}, "low_freq_factor of rope_type 'llama3' must be a pos"),
        ({"type": "longrope", **ORIGINAL}, "short_factor must hold 4 numbers, one a pair; got None"),
        ({"type": "longrope", "short_factor": [1.0], **ORIGINAL}, r"short_factor must hold 4 numbers.*got \[1.0\]"),
        ({"type": "linear", "factor": "2"}, "factor of rope_type 'linear' must be a positive number; got '2'"),
        (
            {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": True},
            "original_max_position_embeddings must be an integer above 1; got True",
        ),
        (
            {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5},
            "original_max_position_embeddings must be an integer above 1; got 0.5",
        ),
        (
            {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "original_max_position_embeddings": 1},
            "original_max_position_embeddings must be an integer above 1; got 1",
        ),
        ({"type": "yarn", "factor": 2.0, "rope_theta": 1, **ORIGINAL}, "rope_theta must be above 1; got 1"),
        ({"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor must be below .*; got 4.0 and 4.0"),
        ({"type": "llama3", **LLAMA3, "low_freq_factor": 5.0}, "low_freq_factor must be below .*; got 5.0 and 4.0"),
    ],
)
def test_a_missing_or_wrong_number_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        rotary_from_settings(rotary_settings({"rope_scaling": settings}), 8, 64, 16)


def test_a_part_of_each_head_is_turned():
    assert read("gpt_neox", rotary_pct=0.5, rotary_emb_base=50).config.rotary_dim == 2
    assert read("gpt_neox", rotary_pct=0.5, rotary_emb_base=50).config.rotary_base == 50
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 50, "partial_rotary_factor": 0.5}}
    assert read("gpt_neox", **inside) == read("gpt_neox", rotary_pct=0.5, rotary_emb_base=50)
    assert read("gpt_neox", rotary_pct=1.0).config.rotary_dim == 4
