"""The phase diagram from the command line: any task, grids of runs and of models, kill and resume, wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray

SCRIPT = Path(__file__).parents[1] / "experiments" / "formation_sweep.py"
SMALL = [
    "--smoke", "--n-evaluation", "8", "--d-model", "16", "--n-heads", "2", "--batch-size", "4", "--n-context", "12",
    "--measure-every", "10",
]  # fmt: skip


def run(folder, *options):
    return subprocess.run(
        [sys.executable, SCRIPT, "--runs-dir", folder, *options], capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    grid = ["--grid", "optimization.learning_rate=1e-3,1e-2", "model.n_layers=1,2"]
    done = run(folder, *SMALL, *grid)
    assert done.returncode == 0, done.stderr
    return folder, grid, done


@pytest.mark.slow
def test_every_combination_is_trained_and_kept_with_its_labels(small):
    folder, _, done = small
    of_run = folder / "formation_sweep_smoke"
    for layers in (1, 2):
        data = xarray.open_zarr(of_run / "trajectories" / f"n_layers_{layers}.zarr")
        assert data.sizes["run"] == 4
        np.testing.assert_array_equal(data["learning_rate"], [1e-3, 1e-3, 1e-2, 1e-2])
        np.testing.assert_array_equal(data["seed"], [0, 1, 0, 1])
        np.testing.assert_array_equal(data["n_layers"], [layers] * 4)
        assert f'"n_layers": {layers}' in data.attrs["settings"]
        assert data["induction_attention"].dims == ("run", "step", "layer", "head")
        assert data["induction_attention"].sizes["layer"] == layers
        assert bool(data["done"].all())
        assert np.isfinite(data["evaluation_loss"]).all()
    summary = json.loads((of_run / "summary.json").read_text())
    assert summary["runs"]["value"] == 8
    assert "of 1 aims met" in done.stdout
    page = (of_run / "report.html").read_text()
    # The order of the runs, models first, whatever the order of --grid.
    cells = [f"n_layers {layers}, learning_rate {rate}" for layers in (1, 2) for rate in (0.001, 0.01)]
    places = [page.index(f"<td>{cell}</td>") for cell in cells]
    assert places == sorted(places)


@pytest.mark.slow
def test_a_finished_sweep_is_not_trained_again_and_other_settings_are_refused(small):
    folder, grid, _ = small
    again = run(folder, *SMALL, *grid)
    assert again.returncode == 0, again.stderr
    other = run(folder, *SMALL, *grid, "--first-seed", "7")
    assert other.returncode == 1
    assert "first_seed is 0 there and 7 here" in other.stderr.replace("\n", " ")


@pytest.mark.slow
def test_text_of_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("the cat sat on the mat and the cat sat on the hat. " * 20)
    text = ["--task", "text", "--text", str(tmp_path / "words.txt"), "--event", "accuracy"]
    done = run(tmp_path, *SMALL, *text, "--grid", "optimization.init_scale=1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "learning_rate=1"], "optimization.FIELD"),
        (["--grid", "optimization.rate=1"], "has no field 'rate'"),
        (["--grid", "model.heads=1"], "model.heads is not a field"),
        (["--grid", "model.n_vocab=8"], "model.n_vocab is not a field"),
        (["--grid", "model.n_heads=2,2"], "each value once"),
        (["--grid", "optimization.learning_rate=0"], "learning_rate must be positive"),
        (["--grid", "optimization.learning_rate=high"], "learning_rate must be a number"),
        (["--grid", "optimization.batch_size=4,8"], "settings must agree in all that is static"),
        (["--tokenizer", "t.json"], "one without the other"),
        (
            ["--task", "exemplars", "--grid", "model.d_model=8,16"],
            "model.d_model must be that of the exemplars, 16; got 8",
        ),
        (["--n-context", "4"], "--n-context must be at least 8"),
        (["--threshold", "0"], "--threshold must be in"),
        (["--n-evaluation", "0"], "--n-evaluation"),
        (["--task", "text", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, options, message, refuse):
    printed = refuse("formation_sweep", "--runs-dir", str(tmp_path), *SMALL, *options)
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
