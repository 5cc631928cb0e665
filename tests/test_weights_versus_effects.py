"""Weights against effects as a user runs it: smoke, resume, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from circuits_jax.reports import results

SCRIPT = Path(__file__).parent.parent / "experiments" / "weights_versus_effects.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = run("--smoke", "--runs-dir", str(runs))
    assert done.returncode == 0, done.stderr
    return done, runs / "weights_versus_effects_smoke"


@pytest.mark.slow
def test_smoke_leaves_everything_behind(smoke):
    done, folder = smoke
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "parts", "checkpoints", "results.zarr", "summary.json", "report.html",
    }  # fmt: skip
    assert "Warning" not in done.stderr + done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trained_models"]["value"] == 2
    # Two recipes at two noise levels, where K-edges were planted by hand.
    assert summary["planted_models"]["value"] == 4
    assert summary["planted_k_predicted_auroc"]["value"] > 0.99
    page = (folder / "report.html").read_text()
    for heading in ("Figures", "K-edges: predicted and measured", "Why they disagree", "Every score, every effect"):
        assert f"<h2>{heading}" in page
    pairs = results.load(folder / "results.zarr", "pairs")
    assert {"heads", "q", "k", "v"} == set(pairs.unit.values.tolist())
    edges = results.load(folder / "results.zarr", "k_planted")
    assert edges.scores.sizes == {"model": 4, "unit": 64, "score": 7}


@pytest.mark.slow
def test_what_was_looked_at_is_not_looked_at_again(smoke):
    _, folder = smoke
    before = {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
    done = run("--smoke", "--runs-dir", str(folder.parent))
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--n-evaluation", "0"], "--n-evaluation must be at least 1; got 0"),
        (["--noise", "-1"], "--noise must be numbers of at least 0"),
        (["--first-seed", "2147483646"], "--first-seed and the seeds after it must be in"),
        (["--name", "a/b"], "--name must be a plain folder name"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, refuse):
    printed = refuse("weights_versus_effects", "--smoke", "--runs-dir", str(tmp_path), *arguments)
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
