"""The head atlas as a user runs it: a planted model, a checkpoint with text, a run folder; and every wrong input."""

import dataclasses
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from circuits_jax.models.config import TransformerConfig
from circuits_jax.reports import study
from circuits_jax.reports.study import Arm, StudySettings
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.training.setting import Optimization, Setting

SCRIPT = Path(__file__).parent.parent / "experiments" / "head_atlas.py"
FIXTURES = Path(__file__).parent / "fixtures" / "pretrained"
WORDS = [f"w{i}" for i in range(48)]
TEXT = " ".join(WORDS[1 + i % 7] for i in range(15))
LENGTH = 16  # of all sequences, so that programs are compiled once


@pytest.fixture(scope="module")
def job():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module("head_atlas")
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tokenizer of 48 words, which a tester must not change."""
    folder = tmp_path_factory.mktemp("models") / "tiny-1.5"
    copy_of("gpt2", folder)
    return folder


def copy_of(case, folder):
    shutil.copytree(FIXTURES / case, folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w47"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def run(job, tmp_path):
    """The experiment, as its script runs it, in this process: the atlas that it wrote, and the folder."""

    def made(*arguments, runs=tmp_path / "runs"):
        there = set(runs.glob("*"))
        main = ["--runs-dir", str(runs), *map(str, arguments)]
        job.run_folder.run_command(lambda: job.prepare(job.tyro.cli(job.Settings, args=main)), job.main)
        (folder,) = set(runs.glob("*")) - there or there
        assert {"report.html", "atlas.json", "summary.json", "config.json"} <= {path.name for path in folder.iterdir()}
        return json.loads((folder / "atlas.json").read_text()), folder

    return made


# --- what comes out


def test_smoke_finds_what_was_planted(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    folder = tmp_path / "head_atlas_smoke"
    assert {path.name for path in folder.iterdir()} == {
        "planted.npz", "config.json", "atlas.json", "summary.json", "report.html",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["qk_previous_token"]["value"] == 2 / 16
    assert summary["qk_undetermined"]["value"] == summary["ov_undetermined"]["value"] == 0
    atlas = json.loads((folder / "atlas.json").read_text())
    assert dict(atlas["facts"])["shown"] == "random tokens, repeated after 12; effects are on the second half"
    assert all(sample[:12] == sample[12:] for sample in atlas["samples"])
    assert "QK previous token" in done.stdout
    assert f"page: {folder / 'report.html'}" in done.stdout


def test_a_checkpoint_is_looked_at_on_text_and_the_same_command_works_again(run, checkpoint, capsys):
    arguments = ["--model", f"{checkpoint}/", "--text", TEXT, "w0 " + TEXT + " w9 w8"]
    atlas, folder = run(*arguments)
    assert folder.name == "head_atlas_tiny-1.5"
    assert atlas["title"] == "Head atlas: tiny-1.5"
    sample = ["w0", *TEXT.split()]  # token 0 is the one that sequences begin with
    assert atlas["samples"] == [sample, sample]
    assert dict(atlas["facts"])["sequences begin with"] == "w0"
    (state,) = atlas["states"]
    for head in state["heads"]:
        assert head["effects"]
        assert head["contexts"]
        for side in ("qk", "ov"):
            assert all({one, other} <= {*WORDS, "any query"} for one, other, _ in head["pairs"][side])
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["text"] == arguments[3:]
    again, same = run(*arguments)
    assert same == folder
    assert again == atlas
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--seed", 1)
    assert stopped.value.code == 1
    assert one_line(capsys).endswith("give another --name, or delete that folder to start over")


def test_tokens_and_a_dictionary_from_files(run, checkpoint, tmp_path):
    tokens = np.random.default_rng(0).integers(48, size=(2, 20))
    np.save(tmp_path / "tokens.npy", tokens)
    directions = np.random.default_rng(1).normal(size=(3, 16))
    np.savez(tmp_path / "known.npz", directions=directions, names=np.asarray(["a", "b", "c"]))
    files = ["--tokens", tmp_path / "tokens.npy", "--dictionary", tmp_path / "known.npz"]
    atlas, folder = run("--model", checkpoint, *files, "--name", "mine", "--length", LENGTH)
    assert folder.name == "mine"
    assert atlas["samples"] == [[WORDS[token] for token in row[:LENGTH]] for row in tokens]
    assert dict(atlas["facts"])["shown"] == "the first 16 tokens of each in tokens.npy"
    for head in atlas["states"][0]["heads"]:
        assert [probe["name"] for probe in head["probes"]] == ["a", "b", "c"]


CONFIG = TransformerConfig(n_vocab=8, n_context=LENGTH, n_layers=1, n_heads=2, d_model=8)


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "grown"
    task = RepeatedTokens(min_period=2, max_period=3, n_vocab=8, n_context=LENGTH)
    settings = [Setting(seed, task, Optimization(batch_size=4, n_warmup=2)) for seed in (0, 1)]
    arm = Arm("main", CONFIG, settings, [0, 2, 4], lambda params, setting: {"one": jnp.ones(())}, keep=[0, 2])
    study.train_arms(Console(file=io.StringIO()), folder, [arm], StudySettings(seeds=2, steps=4))
    return folder


def test_a_run_folder_has_a_state_for_each_step_and_weights_alone_need_no_text(run, study_folder):
    atlas, folder = run("--model", study_folder, "--run", 1, "--steps", 0, 4, "--weights-only")
    assert folder.name == "head_atlas_grown"
    assert [state["name"] for state in atlas["states"]] == ["step 0", "step 4"]
    assert atlas["title"] == "Head atlas: grown, main, seed 1"
    assert atlas["samples"] == []
    assert "From weights alone" in atlas["notes"][1]
    first, last = (state["heads"][0] for state in atlas["states"])
    assert first["effects"] == []
    assert first["spectra"]["qk"]["sigma"] != last["spectra"]["qk"]["sigma"]


# --- what is refused


def one_line(capsys):
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said.strip()


@pytest.fixture
def refused(job, monkeypatch, capsys, tmp_path):
    """The one line that the experiment prints to bad input; nothing is written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def said(*arguments):
        main = ["--runs-dir", str(tmp_path / "runs"), *map(str, arguments)]
        with pytest.raises(SystemExit) as stopped:
            job.run_folder.run_command(lambda: job.prepare(job.tyro.cli(job.Settings, args=main)), job.main)
        assert stopped.value.code == 2
        assert not (tmp_path / "runs").exists()
        return one_line(capsys)

    return said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model must name a checkpoint folder, a hub name, a run folder or an .npz file"),
        (["--smoke", "--model", "MODEL"], "--smoke brings its own"),
        (["--model", "heads.npz"], "there is no file heads.npz"),
        (["--model", str(SCRIPT)], "must be a folder or a name on the hub; got the file"),
        (["--model", "MODEL", "--length", "7"], "--length must be at least 8; got 7"),
        (["--model", "MODEL", "--n-context", "4"], "heads cannot be told apart with n_context below 8"),
        (["--model", "MODEL", "--n-context", "99"], "n_context must be"),
        (["--model", "MODEL", "--text", "w1 w2 w3"], "--text must hold at least 8 tokens each; got 4"),
        (["--model", "MODEL", "--text", TEXT, "--weights-only"], "--text, --tokens and --weights-only exclude"),
        (["--model", "MODEL", "--text", TEXT, "--tokens", "a.npy"], "--text, --tokens and --weights-only exclude"),
        (["--model", "MODEL", "--tokens", "none.npy"], "--tokens must be an .npy file; none.npy is none"),
        (["--model", "MODEL", "--dictionary", "none.npz"], "there is no file none.npz"),
        (["--model", "MODEL", "--run", "1"], "--arm, --run and --steps are of run folders"),
        (["--model", "MODEL", "--name", "a/b"], "--name must be a plain folder name; got 'a/b'"),
        (["--model", "STUDY", "--steps", "1"], "--steps must be among the kept ones, 0, 2, 4; got 1"),
        (["--model", "STUDY", "--arm", "side"], "--arm must be one of main; got 'side'"),
        (["--model", "STUDY", "--text", TEXT], "--text needs a tokenizer, and grown, main, seed 0 has none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(refused, checkpoint, study_folder, arguments, message):
    given = {"MODEL": checkpoint, "STUDY": study_folder}
    assert message in refused(*(given.get(argument, argument) for argument in arguments))


def half_a_download(folder):
    shutil.rmtree(folder)
    shutil.copytree(FIXTURES / "llama_sharded", folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def changed(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


SPOILED = {
    "half a download": (half_a_download, "lacks model-00002-of-00003.safetensors, of 3 files in"),
    "truncated": (truncated, "model.safetensors is no whole safetensors file"),
    "family": (lambda folder: changed(folder, model_type="mamba"), "mamba"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "holds no tokenizer that can be read"),
    "no vocabulary": (
        lambda folder: Tokenizer(WordLevel({}, unk_token="w0")).save(str(folder / "tokenizer.json")),
        "holds a tokenizer without vocabulary",
    ),
    "other sizes": (lambda folder: changed(folder, n_embd=20), "must have shape"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_broken_checkpoints_are_refused(refused, checkpoint, tmp_path, spoil, message):
    folder = tmp_path / "spoiled"
    shutil.copytree(checkpoint, folder)
    spoil(folder)
    said = refused("--model", folder)
    assert message in said
    assert str(folder) in said or "config.json" in said or "must have shape" in said


def test_pickled_weights_are_refused_with_how_to_convert_them(job, checkpoint, tmp_path, capsys):
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SystemExit) as stopped:
        job.run_folder.run_command(lambda: job.prepare(job.Settings(model=str(folder))), job.main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"error: {folder} has no model.safetensors")
    assert ".save_pretrained(" in said[-1]


def test_a_name_that_is_nowhere_is_refused_at_once(tmp_path):
    command = [sys.executable, str(SCRIPT), "--model", "no/such-model", "--runs-dir", str(tmp_path)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=offline)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no/such-model is no folder, and could not be reached on the hub")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


BAD_TOKENS = {
    "range": (np.full((2, 12), 48), "tokens must be in [0, n_vocab=48); got values from 48 to 48"),
    "negative": (np.full(12, -1), "tokens must be in [0, n_vocab=48); got values from -1 to -1"),
    "floats": (np.zeros((2, 12)), "tokens must be integers [T] or [B,T]; got float64 [2, 12]"),
    "axes": (np.zeros((2, 2, 12), int), "tokens must be integers [T] or [B,T]; got int64 [2, 2, 12]"),
    "short": (np.zeros((2, 7), int), "--tokens must hold sequences of at least 8; got [2, 7]"),
    "none": (np.zeros((0, 12), int), "--tokens must hold sequences of at least 8; got [0, 12]"),
    "nothing": (np.zeros((2, 0), int), "tokens must hold 1 to n_context=16 positions; got 0"),
}


@pytest.mark.parametrize(("tokens", "message"), BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_tokens_that_are_none_are_refused(refused, checkpoint, tmp_path, tokens, message):
    np.save(tmp_path / "tokens.npy", tokens)
    assert message in refused("--model", checkpoint, "--tokens", tmp_path / "tokens.npy")


def test_files_of_another_kind_are_refused(refused, checkpoint, tmp_path):
    np.savez(tmp_path / "both.npz", tokens=np.zeros(12, int))
    said = refused("--model", checkpoint, "--tokens", tmp_path / "both.npz")
    assert f"--tokens must be an .npy file; {tmp_path / 'both.npz'} is none" in said
    (tmp_path / "notes.npz").write_text("not an archive")
    for option in ("--model", "--dictionary"):
        others = [] if option == "--model" else ["--model", checkpoint]
        assert "notes.npz is no .npz file that can be read" in refused(*others, option, tmp_path / "notes.npz")


BAD_DICTIONARIES = {
    "width": (
        {"directions": np.ones((2, 15)), "names": ["a", "b"]},
        "must hold directions [2, 16], one a name; got [2",
    ),
    "names": (
        {"directions": np.ones((2, 16)), "names": ["a"]},
        "must hold directions [1, 16], one a name; got [2, 16]",
    ),
    "none": ({"directions": np.ones((0, 16)), "names": []}, "must hold directions [0, 16], one a name; got [0, 16]"),
    "nan": ({"directions": np.full((1, 16), np.nan), "names": ["a"]}, "must hold finite directions"),
    "integers": ({"directions": np.ones((1, 16), int), "names": ["a"]}, "must hold finite directions; got int64"),
    "other": ({"W": np.ones((1, 16))}, "--dictionary must hold the arrays directions and names; got W"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_DICTIONARIES.values(), ids=BAD_DICTIONARIES.keys())
def test_dictionaries_that_do_not_fit_are_refused(refused, checkpoint, tmp_path, arrays, message):
    np.savez(tmp_path / "known.npz", **arrays)
    assert message in refused("--model", checkpoint, "--dictionary", tmp_path / "known.npz")


def test_another_model_is_not_written_into_the_same_folder(job, checkpoint, tmp_path, capsys):
    settings = job.Settings(model=str(checkpoint), weights_only=True, name="same", runs_dir=tmp_path)
    plan = job.prepare(settings)
    (tmp_path / "same").mkdir()
    other = {"settings": {"model": "another"}}
    (tmp_path / "same" / "config.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit) as stopped:
        job.run_folder.run_command(lambda: dataclasses.replace(plan), job.main)
    assert stopped.value.code == 1
    said = one_line(capsys)
    assert f"model is 'another' there and '{checkpoint}' here" in said
