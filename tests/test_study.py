"""What studies have in common: settings that are checked, arms that are trained, stored and resumed, and the report."""

import dataclasses
import io
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xarray
from rich.console import Console

from circuits_jax.models.config import TransformerConfig
from circuits_jax.reports import page, results, study
from circuits_jax.reports.run_folder import Figure, RunFolderError
from circuits_jax.reports.study import Arm, StudySettings
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.training.setting import Optimization, Setting, grid

CONFIG = TransformerConfig(n_vocab=8, n_context=8, n_layers=1, n_heads=2, d_model=8, positions="shortformer")
TASK = RepeatedTokens(min_period=2, max_period=3, n_vocab=8, n_context=8)


@dataclasses.dataclass(frozen=True)
class Settings(StudySettings):
    """Of a study in this test."""

    seeds: int = 2
    steps: int = 6
    measure_every: int = 2
    rates: tuple[float, ...] = (0.01,)


def console():
    return Console(file=io.StringIO(), width=100)


# Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(6, 2, [0, 2, 4, 6]), (7, 3, [0, 3, 6, 7]), (3, 10, [0, 3]), (1, 1, [0, 1]), (500, 10, [*range(0, 501, 10)])],
)
def test_measured_steps_start_at_zero_rise_and_hold_the_end(steps, every, expected):
    assert StudySettings(steps=steps, measure_every=every).measured == expected


def test_seeds_follow_each_other():
    assert list(StudySettings(seeds=3, first_seed=5).seed_range) == [5, 6, 7]


@pytest.fixture
def asked(monkeypatch):
    """What prepare asks of jax, without changing it for the other tests."""
    calls = []
    for name in ("join_processes", "use_all_cores", "keep_compilations"):
        monkeypatch.setattr(study.devices, name, lambda *given, name=name: calls.append((name, *given)))
    return calls


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, "mine"), ({"smoke": True}, "mine_smoke"), ({"name": "other"}, "other"),
     ({"name": "other", "smoke": True}, "other")],
)  # fmt: skip
def test_prepare_gives_the_run_folder_and_sets_up_jax(tmp_path, asked, changes, name):
    assert study.prepare(StudySettings(runs_dir=tmp_path, seeds=3, **changes), "mine") == tmp_path / name
    assert list(tmp_path.iterdir()) == []  # nothing is written before all is checked
    assert asked == [("join_processes",), ("use_all_cores", 3), ("keep_compilations",)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, r"--seeds must be at least 1; got 0"),
        ({"steps": 0}, r"--steps must be at least 1; got 0"),
        ({"steps": -5}, r"--steps must be at least 1; got -5"),
        ({"measure_every": 0}, r"--measure-every must be at least 1; got 0"),
        ({"first_seed": -1}, r"--first-seed and the seeds after it must be in \[0, 2\^31 - 2\); got 32 seeds from -1"),
        ({"first_seed": 2**31 - 1, "seeds": 1}, r"--first-seed .*; got 1 seeds from 2147483647"),
        ({"first_seed": 2**31 - 3, "seeds": 2}, r"--first-seed .*; got 2 seeds from 2147483645"),
        ({"name": "a/b"}, r"--name must be a plain folder name; got 'a/b'"),
        ({"name": ".."}, r"--name must be a plain folder name; got '\.\.'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, asked, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        study.prepare(StudySettings(runs_dir=tmp_path, **changes), "mine")
    assert asked == []


def test_the_last_seed_may_be_the_one_before_those_of_tasks_and_evaluation(tmp_path, asked):
    last = StudySettings(first_seed=study.TASK_SEED - 2, seeds=2, runs_dir=tmp_path)
    study.prepare(last, "mine")
    assert max(last.seed_range) + 1 == study.TASK_SEED == study.EVALUATION_SEED - 1
    Setting(study.EVALUATION_SEED, TASK).check_seeds()


def test_recorded_settings_are_json_and_leave_out_where_the_results_are():
    found = study.recorded(Settings(name="here", runs_dir=Path("there"), rates=(0.1, 0.2)))
    assert json.loads(json.dumps(found)) == found
    assert found == {
        "seeds": 2, "first_seed": 0, "steps": 6, "measure_every": 2, "smoke": False, "rates": ["0.1", "0.2"],
    }  # fmt: skip


# Arms -------------------------------------------------------------------------------------------------------------


def measure(params, setting):
    w_q = params["layer_0"]["attention"]["W_Q"]
    return {"norm": jnp.linalg.norm(w_q, axis=(-2, -1))[None], "rate": setting.optimization.learning_rate}


def arms(settings, rate=0.01):
    base = Setting(0, TASK, Optimization(batch_size=4, n_warmup=2))
    seeds = list(settings.seed_range)
    swept = grid(base, {"optimization.learning_rate": [rate, 0.03], "seed": seeds})
    wild = dataclasses.replace(base, optimization=Optimization(batch_size=4, n_warmup=0, learning_rate=1e30))
    fails = [dataclasses.replace(base, seed=seeds[0]), dataclasses.replace(wild, seed=seeds[1])]
    dims = {"norm": ("layer", "head")}
    rates = [setting.optimization.learning_rate for setting in swept]
    return [
        Arm("main", CONFIG, swept, settings.measured, measure, dims, {"learning_rate": rates}, keep=[0, 6]),
        Arm("wild", CONFIG, fails, settings.measured, measure, dims),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, settings, screen = tmp_path_factory.mktemp("study") / "mine", Settings(), console()
    return folder, settings, study.train_arms(screen, folder, arms(settings), settings)


def test_arms_are_trained_under_their_names(trained):
    _, _, runs = trained
    assert list(runs) == ["main", "wild"]
    assert runs["main"].loss.shape == (4, 4)
    assert runs["main"].measurements["norm"].shape == (4, 4, 1, 2)
    assert runs["main"].steps.tolist() == [0, 2, 4, 6]
    assert study.sound(runs["main"]).tolist() == [True] * 4
    assert study.sound(runs["wild"]).tolist() == [True, False]


def test_every_trajectory_opens_with_plain_xarray(trained):
    folder, settings, runs = trained
    assert sorted(path.name for path in (folder / "trajectories").iterdir()) == ["main.zarr", "wild.zarr"]
    for name, run in runs.items():
        data = xarray.open_zarr(folder / "trajectories" / f"{name}.zarr")
        assert data.norm.dims == ("run", "step", "layer", "head")
        assert data.training_loss.dims == data.rate.dims == data.done.dims == ("run", "step")
        assert data.done.all()
        assert data.step.values.tolist() == [0, 2, 4, 6]
        np.testing.assert_array_equal(data.training_loss, run.loss)
        np.testing.assert_array_equal(data.norm, run.measurements["norm"])
        assert data.diverged.dims == ("run",)
        np.testing.assert_array_equal(data.diverged, run.diverged)
        assert json.loads(data.attrs["settings"]) == json.loads(
            json.dumps(study.recorded(settings) | {"model": dataclasses.asdict(CONFIG)})
        )
        assert {"versions", "device"} <= json.loads(data.attrs["provenance"]).keys()
    main = xarray.open_zarr(folder / "trajectories" / "main.zarr")
    assert main.seed.values.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(main.learning_rate, [0.01, 0.01, 0.03, 0.03])
    np.testing.assert_allclose(main.rate[:, -1], main.learning_rate, rtol=1e-6)
    assert data.diverged.values.tolist() == [False, True]


def test_a_folder_holds_its_settings_its_checkpoints_and_the_parameters_to_keep(trained):
    folder, settings, _ = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"] == study.recorded(settings)
    group = folder / "checkpoints" / "main" / "runs_0_to_3"
    assert sorted(path.name for path in (group / "kept").iterdir()) == ["0", "6"]
    wild = folder / "checkpoints" / "wild" / "runs_0_to_1" / "kept"
    assert [path.name for path in wild.iterdir()] == ["6"]  # the last, whatever was asked for


def test_resuming_gives_the_same_numbers(trained):
    """From the end, where nothing is left to train; and with another name of the folder, which decides nothing."""
    folder, settings, runs = trained
    before = results.load(folder / "trajectories" / "main.zarr")
    renamed = dataclasses.replace(settings, name="mine", runs_dir=folder.parent)
    again = study.train_arms(console(), folder, arms(settings), renamed)
    for name, run in runs.items():
        np.testing.assert_array_equal(again[name].loss, run.loss)
        np.testing.assert_array_equal(again[name].measurements["norm"], run.measurements["norm"])
        np.testing.assert_array_equal(again[name].params["W_E"], run.params["W_E"])
    xarray.testing.assert_identical(results.load(folder / "trajectories" / "main.zarr"), before)


def test_a_study_that_was_stopped_goes_on(trained, tmp_path, monkeypatch):
    """Stopped between its arms: the first is loaded, the second trained, and all is as if nothing had happened."""
    _, settings, runs = trained

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.SweepStore, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.train_arms(console(), tmp_path, arms(settings), settings)
    assert not (tmp_path / "trajectories" / "wild.zarr").exists()
    assert "diverged" not in results.load(tmp_path / "trajectories" / "main.zarr")
    again = study.train_arms(console(), tmp_path, arms(settings), settings)
    for name, run in runs.items():
        np.testing.assert_allclose(again[name].loss, run.loss, rtol=1e-6)
        data = xarray.open_zarr(tmp_path / "trajectories" / f"{name}.zarr")
        assert data.done.all()
        np.testing.assert_array_equal(data.diverged, run.diverged)


def test_other_settings_are_refused_and_nothing_is_lost(trained):
    folder, settings, _ = trained
    before = results.load(folder / "trajectories" / "main.zarr")
    other = dataclasses.replace(settings, steps=8, rates=(0.2,))
    with pytest.raises(RunFolderError) as refused:
        study.train_arms(console(), folder, arms(other), other)
    assert str(refused.value) == (
        f"{folder} holds a run with other settings (rates is ['0.01'] there and ['0.2'] here; steps is 6 there and 8 "
        "here): give another --name, or delete that folder to start over"
    )
    xarray.testing.assert_identical(results.load(folder / "trajectories" / "main.zarr"), before)


def test_other_runs_of_an_arm_are_refused(trained):
    """The settings of the study are the same, but an arm of that name has other labels."""
    folder, settings, _ = trained
    with pytest.raises(RunFolderError, match=r"^[^\n]*main\.zarr holds something else .*\(other runs\)"):
        study.train_arms(console(), folder, arms(settings, rate=0.02), settings)


def test_only_the_first_process_writes_more_than_checkpoints(trained, tmp_path, monkeypatch):
    _, settings, _ = trained
    monkeypatch.setattr(study, "writes", lambda: False)
    runs = study.train_arms(console(), tmp_path, arms(settings)[1:], settings)
    assert runs["wild"].loss.shape == (2, 4)
    study.finish(console(), tmp_path, "t", {}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


# The end ----------------------------------------------------------------------------------------------------------

FIGURES = {
    "formed": Figure("runs that form <both>", 0.97, (0.9, 0.99), (">=", 0.9)),
    "loss": Figure("loss in nats", 0.4, None, ("<=", 0.1)),
    "unknown": Figure("correlation", float("nan"), (float("nan"), float("nan")), (">=", 0.5)),
    "aside": Figure("number of runs", 4),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, screen = tmp_path_factory.mktemp("end"), console()
    sections = [("How it went", [page.paragraph("slowly")])]
    study.finish(screen, folder, "Which heads & why", FIGURES, sections, ["one run < two runs"])
    return folder, screen.file.getvalue()


def test_finish_writes_the_summary(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary == {
        "formed": {"value": 0.97, "interval": [0.9, 0.99], "aim": ">= 0.9", "met": True},
        "loss": {"value": 0.4, "interval": None, "aim": "<= 0.1", "met": False},
        "unknown": {"value": None, "interval": [None, None], "aim": ">= 0.5", "met": False},
        "aside": {"value": 4.0, "interval": None, "aim": None, "met": None},
    }


def test_finish_writes_a_page_that_needs_nothing_else(finished):
    text = (finished[0] / "report.html").read_text()
    assert "<h1>Which heads &amp; why</h1>" in text
    assert "<p>1 of 3 aims met; missed: loss in nats; correlation</p>" in text
    assert "<td>runs that form &lt;both&gt;</td>" in text
    assert "<p>one run &lt; two runs</p>" in text
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == ["Figures", "How it went"]
    outside_scripts = re.sub("<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img|iframe)\b|https?://|@import|url\(", outside_scripts)
    assert "<script src" not in text


def test_finish_prints_the_figures_the_verdict_and_the_notes(finished):
    folder, printed = finished
    lines = [line.strip() for line in printed.splitlines()]
    assert lines[0] == "Which heads & why"
    for expected in ("1 of 3 aims met; missed: loss in nats; correlation", "one run < two runs"):
        assert expected in lines
    assert lines[-1] == f"report: {folder / 'report.html'}"


def test_all_aims_met(tmp_path):
    study.finish(console(), tmp_path, "t", {"formed": FIGURES["formed"], "aside": FIGURES["aside"]}, [])
    assert "<p>1 of 1 aims met</p>" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.json"]
