"""The main job as a user runs it: smoke, resume after a kill, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from circuits_jax.models.transformer import init_params
from circuits_jax.reports import results
from circuits_jax.training.train import Run

SCRIPT = Path(__file__).parent.parent / "experiments" / "grow_induction_heads.py"
SMALL = ["--seeds", "2", "--steps", "60", "--measure-every", "2", "--n-evaluation", "8", "--name", "small"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    runs = tmp_path_factory.mktemp("smoke")
    done = run("--smoke", "--runs-dir", str(runs))
    assert done.returncode == 0, done.stderr
    return done, runs / "grow_induction_heads_smoke"


def test_smoke_leaves_everything_behind(smoke):
    done, folder = smoke
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "checkpoints", "trajectories", "results.zarr", "summary.json", "report.html",
    }  # fmt: skip
    assert "Which heads" in done.stdout
    assert "Warning" not in done.stderr + done.stdout
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["seeds"] == 2
    assert config["device"].endswith("(cpu)")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["iid", "one_layer", "repeats"]


def test_smoke_grows_heads_and_controls_do_not(smoke):
    _, folder = smoke
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["induction_heads"]["value"] >= 1
    assert summary["one_layer_induction_heads"] == {"value": 0, "interval": None, "aim": "<= 0", "met": True}
    assert summary["iid_induction_heads"]["met"]
    assert summary["edge_auroc"]["value"] > 0.9
    assert all(set(figure) == {"value", "interval", "aim", "met"} for figure in summary.values())


def test_smoke_results_are_labelled(smoke):
    _, folder = smoke
    main, one_layer = (results.load(folder / "results.zarr", group) for group in ("repeats", "one_layer"))
    assert main.edge_effect.dims == ("run", "input", "sender_layer", "sender_head", "layer", "head")
    assert main.accuracy_over_training.sel(step=200).shape == (2,)
    assert main.accuracy_over_training.sel(step=200).min() > 0.9
    assert one_layer.induction_attention.shape == (2, 1, 4)
    assert main.ov_eigenvalues.dtype.kind == "c"


def test_smoke_page_is_whole_and_self_contained(smoke):
    _, folder = smoke
    page = (folder / "report.html").read_text()
    assert len(page) < 15e6
    assert not re.search(r'<(script|link|img)[^>]+(src|href)=["\']?http', page)
    for heading in ("Figures", "Verdicts", "Learning and formation", "A recovered pair"):
        assert f"<h2>{heading}" in page
    assert page.count("Plotly.newPlot(") == 6


def test_another_config_in_the_folder_is_refused_and_nothing_is_lost(smoke):
    _, folder = smoke
    before = (folder / "summary.json").read_text()
    refused = run("--smoke", "--runs-dir", str(folder.parent), "--learning-rate", "0.02")
    assert refused.returncode == 1
    assert re.fullmatch(r"error: \S+ holds a run with other settings \(learning_rate.*\n", refused.stderr)
    assert (folder / "summary.json").read_text() == before


def test_a_damaged_checkpoint_is_one_clear_error(smoke, tmp_path):
    _, folder = smoke
    shutil.copytree(folder, tmp_path / folder.name)
    damaged = tmp_path / folder.name / "checkpoints" / "repeats" / "runs_0_to_1" / "resume" / "200"
    for file in damaged.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    refused = run("--smoke", "--runs-dir", str(tmp_path))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr + refused.stdout
    assert f"error: checkpoint {damaged} cannot be read" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--positions", "sideways"], "sideways"),
        (["--d-model", "30"], "d_model must be a multiple of n_heads"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--max-period", "40"], "max_period"),
        (["--learning-rate", "0"], "learning_rate must be positive"),
        (["--name", "a/b"], "--name must be a plain folder name"),
        (["--name", ".."], "--name must be a plain folder name"),
    ],
)
def test_bad_settings_are_named(arguments, message, tmp_path, refuse):
    printed = refuse("grow_induction_heads", *arguments, "--runs-dir", str(tmp_path))
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    refused = run("--smoke", "--runs-dir", str(tmp_path / "runs"))
    assert refused.returncode == 1
    assert re.fullmatch(r"error: \S+ cannot be written: .*\n", refused.stderr)


def test_no_space_for_a_checkpoint_is_one_clear_error(tmp_path):
    """A limit on the size of a file stands in for a full disk: the write fails half way in the same place."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    refused = subprocess.run(
        [sys.executable, "-c", limited, str(SCRIPT), *SMALL, "--runs-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},  # whose entries are cut short
    )
    assert refused.returncode == 1
    assert re.search(r"error: checkpoint \S+ cannot be written \(File too large\): check the space", refused.stderr)
    assert "Traceback" not in refused.stderr + refused.stdout


def test_a_diverged_seed_is_analysed_as_nothing_and_the_others_as_ever(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import grow_induction_heads as job

    plan = job.prepare(job.Settings(seeds=2, n_evaluation=4))
    config = plan.arms[0].config
    params = jax.vmap(lambda key: init_params(config, key))(jax.random.split(jax.random.key(0), 2))
    params = jax.tree.map(np.array, params)
    analysis = job.compile_analysis(plan, config)
    whole = job.analyse(analysis, Run(params, np.array([0]), np.zeros((2, 1)), {}))
    params["W_U"][1, 0, 0] = np.nan
    evidence = job.analyse(analysis, Run(params, np.array([0]), np.zeros((2, 1)), {}))
    for name, value in evidence.items():
        assert np.isnan(value[1]).all(), name
        np.testing.assert_array_equal(value[0], whole[name][0], err_msg=name)
        assert not np.isnan(value[0]).any(), name


def test_help_is_the_manual():
    shown = run("--help")
    assert shown.returncode == 0
    for word in ("--seeds", "--smoke", "--runs-dir", "No threshold sees the runs", "resumes"):
        assert word in shown.stdout


def kill_when(process: subprocess.Popen, ready, how: int) -> None:
    deadline = time.monotonic() + 100
    while not ready():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=200)


@pytest.mark.slow
def test_kill_minus_nine_and_the_same_command_gives_the_same_result(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*SMALL, "--runs-dir", str(whole)).returncode == 0
    at_step = killed / "small" / "checkpoints" / "repeats" / "runs_0_to_1" / "resume"
    process = subprocess.Popen(command(*SMALL, "--runs-dir", str(killed)), stdout=subprocess.DEVNULL)
    kill_when(process, lambda: at_step.is_dir() and any(at_step.iterdir()), signal.SIGKILL)
    assert not (killed / "small" / "summary.json").exists()
    assert run(*SMALL, "--runs-dir", str(killed)).returncode == 0
    for group in ("repeats", "iid", "one_layer"):
        one, other = (results.load(runs / "small" / "results.zarr", group) for runs in (whole, killed))
        for name in one.data_vars:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_control_c_is_one_line_and_keeps_what_is_finished(tmp_path):
    at_step = tmp_path / "small" / "checkpoints" / "repeats" / "runs_0_to_1" / "resume"
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(
            command(*SMALL, "--runs-dir", str(tmp_path)), stdout=subprocess.DEVNULL, stderr=stderr
        )
        kill_when(process, lambda: at_step.is_dir() and any(at_step.iterdir()), signal.SIGINT)
    assert process.returncode == 130
    printed = (tmp_path / "stderr").read_text()
    assert printed == "stopped; what was finished is kept: run the same command again to resume\n"
    assert os.listdir(at_step)
