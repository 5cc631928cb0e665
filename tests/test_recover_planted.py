"""The benchmark of the taxonomy as a user runs it: smoke, resume, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "recover_planted.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = run("--smoke", "--runs-dir", str(runs))
    assert done.returncode == 0, done.stderr
    return done, runs / "recover_planted_smoke"


@pytest.mark.slow
def test_smoke_recovers_what_was_planted(smoke):
    done, folder = smoke
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "parts", "checkpoints", "results.zarr", "summary.json", "report.html",
    }  # fmt: skip
    assert "Warning" not in done.stderr + done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("clean_precision", "clean_recall", "decoys", "disagreements", "offsets_right"):
        assert summary[name]["value"] == 1.0, name
    assert summary["macro_f1"]["value"] > 0.8
    assert summary["random_false_rate"]["value"] == 0.0
    page = (folder / "report.html").read_text()
    for heading in ("Figures", "Who is taken for whom", "Noise, abstention, calibration", "Decoys"):
        assert f"<h2>{heading}" in page


@pytest.mark.slow
def test_what_was_looked_at_is_not_looked_at_again(smoke):
    _, folder = smoke
    before = {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
    (folder / "parts" / "trained.npz").unlink()
    done = run("--smoke", "--runs-dir", str(folder.parent))
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
    assert after.keys() == before.keys()
    assert [path.name for path in after if after[path] != before[path]] == ["trained.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "0"], "--models must be at least 1; got 0"),
        (["--key", "2"], "--key must be at most 10000 and not 2"),
        (["--noise", "0.5"], "--noise must begin with 0"),
        (["--noise", "0", "2", "1"], "--noise must be rising numbers"),
        (["--name", "a/b"], "--name must be a plain folder name"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, refuse):
    printed = refuse("recover_planted", "--smoke", "--runs-dir", str(tmp_path), *arguments)
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
