import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from circuits_jax.models import pretrained
from circuits_jax.models.pretrained import load_pretrained, load_tokenizer
from circuits_jax.models.transformer import forward

FIXTURES = Path(__file__).parent / "fixtures" / "pretrained"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
REFUSED = sorted(path.parent.name for path in FIXTURES.glob("refused/*/config.json"))
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
run = quick(forward, static_argnums=0)
# Whose frequencies change beyond the length that they were trained on.
N_CONTEXT = {"llama_longrope": 32}


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a stored case that a test may spoil; tensors are changed by name, None takes one away."""

    def make(case="gpt2", tensors=None, **settings):
        folder = tmp_path / case
        if not folder.exists():
            shutil.copytree(FIXTURES / case, folder)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | settings))
        if tensors is not None:
            stored = load_file(folder / "model.safetensors") | tensors
            stored = {name: np.ascontiguousarray(x) for name, x in stored.items() if x is not None}
            save_file(stored, folder / "model.safetensors")
        return folder

    return make


def stored(case):
    return load_file(FIXTURES / case / "model.safetensors")


def assert_same(loaded, other):
    assert loaded[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, loaded[1], other[1])


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_should_load_silently_is_refused(case):
    with pytest.raises(ValueError, match=r"config\.json: |has no model\.safetensors"):
        load_pretrained(FIXTURES / "refused" / case)


# --- where each number comes from, written out for one weight of each kind


def test_layouts():
    gpt2, params = load_pretrained(FIXTURES / "gpt2")
    fused = stored("gpt2")["transformer.h.1.attn.c_attn.weight"]  # x @ weight, then q, k, v
    bias = stored("gpt2")["transformer.h.1.attn.c_attn.bias"]
    attention = params["layer_1"]["attention"]
    d, h, k = gpt2.d_model, gpt2.n_heads, gpt2.d_head
    for part, name in enumerate("QKV"):
        for head in range(h):
            columns = slice(part * d + head * k, part * d + (head + 1) * k)
            np.testing.assert_array_equal(attention[f"W_{name}"][head], fused[:, columns])
            np.testing.assert_array_equal(attention[f"b_{name}"][head], bias[columns])
    np.testing.assert_array_equal(params["b_U"], np.zeros(gpt2.n_vocab))

    neox, params = load_pretrained(FIXTURES / "gpt_neox")
    fused = stored("gpt_neox")["gpt_neox.layers.1.attention.query_key_value.weight"]  # head by head: q, k, v
    k = neox.d_head
    for head in range(neox.n_heads):
        for part, name in enumerate("QKV"):
            rows = slice((3 * head + part) * k, (3 * head + part + 1) * k)
            np.testing.assert_array_equal(params["layer_1"]["attention"][f"W_{name}"][head], fused[rows].T)

    llama, params = load_pretrained(FIXTURES / "llama_grouped")
    output = stored("llama_grouped")["model.layers.0.self_attn.o_proj.weight"]
    k = llama.d_head
    for head in range(llama.n_heads):
        columns = slice(head * k, (head + 1) * k)
        np.testing.assert_array_equal(params["layer_0"]["attention"]["W_O"][head], output[:, columns].T)

    gemma = stored("gemma")["model.norm.weight"]
    np.testing.assert_array_equal(load_pretrained(FIXTURES / "gemma")[1]["final_norm"]["scale"], np.float32(1) + gemma)
    roberta = stored("roberta")["roberta.embeddings.position_embeddings.weight"]
    np.testing.assert_array_equal(load_pretrained(FIXTURES / "roberta")[1]["W_P"], roberta[2:])


def test_blocks_of_rows_make_the_same_parameters(monkeypatch):
    cases = ("gpt2", "gpt_neox", "llama_grouped", "bert_pretraining", "roberta")
    whole = [load_pretrained(FIXTURES / case) for case in cases]
    monkeypatch.setattr(pretrained, "BLOCK", 100)
    for case, loaded in zip(cases, whole, strict=True):
        assert_same(load_pretrained(FIXTURES / case), loaded)


def test_n_context_cuts_the_positions():
    config, params = load_pretrained(FIXTURES / "gpt2", n_context=5)
    whole = load_pretrained(FIXTURES / "gpt2")[1]
    assert config.n_context == 5
    np.testing.assert_array_equal(params["W_P"], whole["W_P"][:5])
    assert load_pretrained(FIXTURES / "llama", n_context=7)[0].n_context == 7
    with pytest.raises(ValueError, match=r"n_context must be an integer from 1 to the checkpoint's 16; got 17"):
        load_pretrained(FIXTURES / "gpt2", n_context=17)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("case", ["gpt2", "gpt2_float16", "llama_bfloat16", "gemma"])
def test_dtypes(case, dtype):
    exact = load_pretrained(FIXTURES / case)[1]
    params = load_pretrained(FIXTURES / case, dtype=dtype)[1]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(dtype), strict=True), params, exact)


@pytest.mark.parametrize("dtype", ["int8", "float64", "x", 5, None])
def test_dtypes_of_other_kinds_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype must be float32, float16 or bfloat16; got {dtype!r}"):
        load_pretrained(FIXTURES / "gpt2", dtype=dtype)


# --- names


@pytest.mark.parametrize(
    ("plain", "prefix"),
    [("gpt2", "transformer."), ("gpt_neox", "gpt_neox."), ("llama", "model."), ("bert", "bert.")],
)
def test_names_without_their_prefix(plain, prefix, checkpoint):
    tensors = stored(plain)
    bare = dict.fromkeys(tensors) | {name.removeprefix(prefix): x for name, x in tensors.items()}
    assert bare.keys() != tensors.keys()
    assert_same(load_pretrained(checkpoint(plain, bare)), load_pretrained(FIXTURES / plain))


def test_unembedding_of_gpt_neox_under_both_names(checkpoint):
    tensors = stored("gpt_neox")
    old, new = "embed_out.weight", "lm_head.weight"
    there = old if old in tensors else new
    other = {old: new, new: old}[there]
    folder = checkpoint("gpt_neox", {other: tensors[there], there: None})
    assert_same(load_pretrained(folder), load_pretrained(FIXTURES / "gpt_neox"))


def test_tied_unembedding_may_be_stored_and_must_then_be_the_embedding(checkpoint):
    embedding = stored("gpt2")["transformer.wte.weight"]
    folder = checkpoint("gpt2", {"lm_head.weight": embedding})
    assert_same(load_pretrained(folder), load_pretrained(FIXTURES / "gpt2"))
    checkpoint("gpt2", {"lm_head.weight": embedding, "transformer.wte.weight": None})
    assert_same(load_pretrained(folder), load_pretrained(FIXTURES / "gpt2"))
    checkpoint("gpt2", {"lm_head.weight": 2 * embedding, "transformer.wte.weight": embedding})
    with pytest.raises(
        ValueError, match=r"lm_head\.weight and wte\.weight, which must be the same.*tie_word_embeddings"
    ):
        load_pretrained(folder)
    checkpoint("gpt2", tie_word_embeddings=False)
    config, params = load_pretrained(folder)
    assert not config.tied
    np.testing.assert_array_equal(params["W_U"], 2 * embedding.T)


def test_a_weight_that_is_stored_twice_is_refused(checkpoint):
    embedding = stored("gpt2")["transformer.wte.weight"]
    with pytest.raises(ValueError, match=r"holds wte\.weight twice: as (transformer\.)?wte\.weight and as"):
        load_pretrained(checkpoint("gpt2", {"wte.weight": embedding}))


def test_a_weight_that_plays_no_known_part_is_refused(checkpoint):
    folder = checkpoint("llama", {"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)})
    with pytest.raises(ValueError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias$"):
        load_pretrained(folder)
    many = {f"model.layers.2.extra{i}": np.zeros(2, np.float32) for i in range(6)}
    with pytest.raises(ValueError, match=r"extra0, .*extra3 and 2 more"):
        load_pretrained(checkpoint("llama", many))


def test_a_missing_weight_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"the weight transformer\.h\.1\.mlp\.c_proj\.bias .* is missing"):
        load_pretrained(checkpoint("gpt2", {"transformer.h.1.mlp.c_proj.bias": None}))
    with pytest.raises(ValueError, match=r"cls\.predictions\.transform\.dense\.weight .* with its head"):
        load_pretrained(checkpoint("bert", {"cls.predictions.transform.dense.weight": None}))


def test_what_is_missing_is_said_before_a_model_of_that_many_layers_is_traced(checkpoint, monkeypatch):
    monkeypatch.setattr(pretrained, "init_params", lambda *_: pytest.fail("traced"))
    with pytest.raises(ValueError, match=r"the weight transformer\.h\.2\.ln_1\.weight .* is missing"):
        load_pretrained(checkpoint("gpt2", n_layer=1000))


def test_a_wrong_shape_is_named_with_what_was_expected(checkpoint):
    folder = checkpoint("gpt2", {"transformer.ln_f.weight": np.ones(15, np.float32)})
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight must have shape \[16\]; got \[15\]"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match=r"q_proj\.weight must have shape \[8, 16\]; got \[16, 16\]"):
        load_pretrained(checkpoint("llama", head_dim=2))


def test_weights_that_are_no_floats_are_refused(checkpoint):
    folder = checkpoint("gpt2", {"transformer.ln_f.weight": np.ones(16, np.int8)})
    with pytest.raises(ValueError, match=r"ln_f\.weight must be of F64, F32, F16, BF16; got I8"):
        load_pretrained(folder)


# --- folders and files


def test_a_path_that_does_not_exist_and_a_name_that_the_hub_does_not_know(tmp_path, monkeypatch):
    def offline(name, revision, allow_patterns):
        assert {"config.json", "tokenizer.json"} <= set(allow_patterns)
        assert not any("bin" in pattern for pattern in allow_patterns)
        raise ConnectionError(f"no way to {name} at {revision}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for load in (load_pretrained, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"absent is no folder, and could not be reached on the hub: Conn"):
            load(tmp_path / "absent")
        with pytest.raises(
            FileNotFoundError, match=r"some/name is no folder, .* hub at revision v1: .*some/name at v1"
        ):
            load("some/name", revision="v1")


def test_a_path_is_never_asked_of_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent is no folder, and could not be reached on the hub: HFValid"):
        load_pretrained(tmp_path / "absent")


def test_a_name_on_the_hub_is_fetched_and_read(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(FIXTURES / name.split("/")[1]))
    assert_same(load_pretrained("some/gpt2"), load_pretrained(str(FIXTURES / "gpt2")))


def test_a_file_is_no_folder(checkpoint):
    with pytest.raises(ValueError, match="must be a folder or a name on the hub; got the file"):
        load_pretrained(checkpoint() / "model.safetensors")


def test_config_json_must_be_there_and_json(checkpoint):
    file = checkpoint() / "config.json"
    file.write_text('{"model_type": "gp')
    with pytest.raises(ValueError, match=r"config\.json is not JSON: Unterminated string"):
        load_pretrained(file.parent)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object; got list"):
        load_pretrained(file.parent)
    file.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*config\.json: No such file"):
        load_pretrained(file.parent)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_named(kept, checkpoint):
    file = checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file: half of a download"):
        load_pretrained(file.parent)


def test_a_pointer_in_place_of_the_file_is_named(checkpoint):
    file = checkpoint() / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    with pytest.raises(ValueError, match="a pointer of Git LFS"):
        load_pretrained(file.parent)


def test_half_a_download_names_the_missing_shards(checkpoint):
    folder = checkpoint("llama_sharded")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(
        ValueError, match=rf"lacks {shards[1].name}, of {len(shards)} files in model\.safetensors\.index"
    ):
        load_pretrained(folder)


def test_an_index_must_map_weights_to_files(checkpoint):
    folder = checkpoint("llama_sharded")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"index\.json must map weights to files in weight_map; got {}"):
        load_pretrained(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(checkpoint):
    folder = checkpoint("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors\. Where it has pytorch_model\.bin") as error:
        load_pretrained(folder)
    import_line, convert_line = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert import_line == "from transformers import AutoModelForMaskedLM"
    assert convert_line == f"AutoModelForMaskedLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"


# --- tokenizers


def save_tokenizer(folder, vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_tokenizer_from_its_own_file(tmp_path):
    save_tokenizer(tmp_path, {"?": 0, "a": 1, "b": 2})
    assert load_tokenizer(tmp_path).encode("b a c").ids == [2, 1, 0]


def test_tokenizer_from_vocabulary_and_merges(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab aba").ids == [2, 4, 0]
    assert tokenizer.decode([2, 4, 0]) == "ab aba"


@pytest.mark.parametrize(("settings", "ids"), [(None, [2, 4, 5, 3]), ({"do_lower_case": False}, [2, 1, 3])])
def test_tokenizer_from_a_list_of_word_pieces(settings, ids, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##able"]))
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).encode("Unable").ids == ids


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"has neither tokenizer\.json, nor vocab\.json and merges\.txt, nor vocab\.txt"
    ):
        load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, {})
    with pytest.raises(ValueError, match="holds a tokenizer without vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        load_tokenizer(tmp_path)


# --- cost

MEASURE = """
import sys
from pathlib import Path

import jax, jax.numpy as jnp
import circuits_jax
from circuits_jax.models.pretrained import load_pretrained


def memory(name):  # not resource.getrusage: its peak is that of the process this one was forked from, if higher
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


jnp.zeros(1).block_until_ready()
before = memory("VmRSS")
params = jax.block_until_ready(load_pretrained(sys.argv[1], dtype=sys.argv[2])[1])
print((memory("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_memory_stays_near_that_of_the_parameters(dtype, tied, tmp_path):
    n_layers, d, v = 8, 768, 50257
    raw = {"model_type": "gpt2", "n_layer": n_layers, "tie_word_embeddings": tied}
    shapes = {"wte.weight": (v, d), "wpe.weight": (1024, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    shapes |= {} if tied else {"lm_head.weight": (v, d)}
    of_layer = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)}
    for layer in range(n_layers):
        for name, shape in of_layer.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (d,), f"h.{layer}.{name}.bias": (d,)}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors")

    command = [sys.executable, "-W", "error", "-c", MEASURE, str(tmp_path), dtype]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    (tmp_path / "model.safetensors").unlink()
    assert not done.returncode, done.stderr
    print(dtype, done.stdout)
    assert 0.9 < float(done.stdout) < 1.3


def test_neither_safetensors_nor_tokenizers_nor_the_hub_is_imported_before_it_is_needed():
    code = (
        "import sys, circuits_jax.models.pretrained\n"
        "print([name for name in ('safetensors', 'tokenizers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
