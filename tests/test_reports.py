"""What an experiment leaves behind: its folder, labelled results, figures and the page."""

import errno
import json

import numpy as np
import pytest

from circuits_jax.reports import page, plots, results, run_folder
from circuits_jax.reports.run_folder import Figure, RunFolderError
from circuits_jax.training.checkpoints import CheckpointError


def test_a_run_is_taken_up_with_the_same_settings_only(tmp_path):
    folder = tmp_path / "a" / "run"
    run_folder.open_run(folder, {"seeds": 8, "steps": (1, 2)})
    run_folder.open_run(folder, {"seeds": 8, "steps": (1, 2)})
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"] == {"seeds": 8, "steps": [1, 2]}
    assert {"jax", "circuits-jax", "python"} <= config["versions"].keys()
    with pytest.raises(RunFolderError, match=r"seeds is 8 there and 32 here.*--name"):
        run_folder.open_run(folder, {"seeds": 32, "steps": (1, 2)})


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.json is not a run's config"):
        run_folder.open_run(tmp_path, {})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        run_folder.open_run(tmp_path / "file" / "run", {})


def test_summary(tmp_path):
    figures = {
        "good": Figure("", 0.99, (0.9, 1.0), (">=", 0.95)),
        "bad": Figure("", 0.5, (0.4, 0.6), ("<=", 0.45)),
        "plain": Figure("", 3.0),
        "missing": Figure("", float("nan"), None, (">=", 1.0)),
    }
    run_folder.write_summary(tmp_path, figures)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["good"] == {"value": 0.99, "interval": [0.9, 1.0], "aim": ">= 0.95", "met": True}
    assert summary["bad"]["met"] is False
    assert summary["plain"] == {"value": 3.0, "interval": None, "aim": None, "met": None}
    assert summary["missing"] == {"value": None, "interval": None, "aim": ">= 1", "met": False}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "run the same command again"),
        (RunFolderError("other settings"), 1, "error: other settings"),
        (CheckpointError("checkpoint x cannot be read"), 1, "error: checkpoint x"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "runs/x cannot be written: No space left"),
    ],
)
def test_failures_become_one_line(capsys, error, code, message):
    def fail(_):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_folder.run_command(lambda: None, fail)
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_bad_settings_exit_with_2_and_bugs_are_not_hidden(capsys):
    def bad():
        raise ValueError("seeds must be at least 1")

    with pytest.raises(SystemExit) as stop:
        run_folder.run_command(bad, lambda _: None)
    assert stop.value.code == 2
    assert "error: seeds" in capsys.readouterr().err
    with pytest.raises(ValueError, match="seeds"):
        run_folder.run_command(lambda: None, lambda _: bad())


def test_results_round_trip(tmp_path):
    arrays = {"loss": np.arange(6.0).reshape(2, 3), "label": np.array([True, False])}
    data = results.dataset(arrays, {"loss": ("run", "step"), "label": ("run",)}, {"run": [5, 7]}, {"seeds": 2})
    results.save(tmp_path / "r.zarr", {"a": data, "b": data})
    results.save(tmp_path / "r.zarr", {"a": data})  # takes the place of the old store
    back = results.load(tmp_path / "r.zarr", "a")
    assert back.loss.sel(run=7).values.tolist() == [3.0, 4.0, 5.0]
    assert json.loads(back.attrs["settings"]) == {"seeds": 2}
    assert "versions" in json.loads(back.attrs["provenance"])
    with pytest.raises(RunFolderError, match="b cannot be read"):
        results.load(tmp_path / "r.zarr", "b")
    with pytest.raises(ValueError, match="loss"):
        results.dataset(arrays, {"loss": ("run",), "label": ("run",)}, {}, {})


def test_page_is_self_contained_and_escapes():
    figure = plots.heat_maps({"a": np.eye(2)}, "title", "key", "query", ["x", "y"], ["x", "y"])
    text = page.page("A & B", [("<first>", [page.paragraph("1 < 2"), page.table(["h", "met"], [["<b>", "no"]])])])
    assert "<h1>A &amp; B</h1>" in text
    assert "&lt;first&gt;" in text
    assert "<p>1 &lt; 2</p>" in text
    assert '<td class="missed">no</td>' in text
    assert '<script src="' not in text + page.figure(figure)
    assert "Plotly.newPlot" in page.figure(figure)


def test_plots_hold_the_data():
    steps, values = np.array([0, 10]), np.array([[0.0, 1.0], [0.0, np.nan]])
    curves = plots.curves(steps, {"loss": {"main": values}, "accuracy": {"main": values}}, "t", ["seed 0", "seed 1"])
    assert len(curves.data) == 6  # two runs and a median in each panel
    np.testing.assert_array_equal(curves.data[2].y, [0.0, 1.0])
    assert sum(trace.showlegend for trace in curves.data) == 1
    plane = plots.complex_plane({"head": np.array([2.0 + 0j, -1j])}, "t")
    np.testing.assert_allclose(plane.data[1].x, [1.0, 0.0])
    np.testing.assert_allclose(plane.data[1].y, [0.0, -0.5])
    zero = plots.complex_plane({"head": np.zeros(2, complex)}, "t")
    np.testing.assert_array_equal(zero.data[1].x, [0.0, 0.0])
    points = plots.scatter(
        {"main": (np.array([0.5]), np.array([0.7])), "none": (np.array([]), np.array([]))}, "", "", ""
    )
    assert points.data[-1].x[1] == 0.7  # the diagonal reaches the farthest point
