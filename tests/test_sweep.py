"""Many runs: each equal to itself alone, whatever the layout, the chunks and the interruptions."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from circuits_jax.models.config import TransformerConfig
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.training import checkpoints, sweep
from circuits_jax.training.train import Optimization

CONFIG = TransformerConfig(n_vocab=12, n_context=12, n_layers=1, n_heads=2, d_model=16, positions="shortformer")
OPTIMIZATION = Optimization(batch_size=8, n_warmup=5)
TASK = RepeatedTokens(min_period=3, max_period=5, n_vocab=12, n_context=12)
STEPS = [0, 5, 10, 20, 30]


def measure(params):
    return {"norm": jax.numpy.linalg.norm(params["W_E"], axis=-1)}


def run_sweep(seeds=(4, 7, 9), **options):
    return sweep.sweep(CONFIG, OPTIMIZATION, options.pop("task", TASK), seeds, STEPS, measure, chunk=2, **options)


@pytest.fixture(scope="module")
def whole():
    return run_sweep()


def assert_same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_shapes(whole):
    assert whole.loss.shape == (3, 5)
    assert whole.measurements["norm"].shape == (3, 5, 12)
    assert whole.steps.tolist() == STEPS
    assert np.ptp(whole.loss[:, 0]) > 0  # other seeds, other runs


def test_seed_alone_equals_seed_in_the_sweep(whole):
    alone = run_sweep(seeds=(9,))
    np.testing.assert_allclose(alone.loss[0], whole.loss[2], rtol=1e-4)
    np.testing.assert_allclose(alone.params["W_E"][0], whole.params["W_E"][2], atol=1e-4)


def test_resumes_from_any_checkpoint(whole, tmp_path):
    seen = []
    first = run_sweep(folder=tmp_path / "c", on_progress=seen.append)
    assert_same(first, whole, rtol=1e-6)
    assert checkpoints.steps(tmp_path / "c") == seen == [5, 20, 30]
    shutil.rmtree(tmp_path / "c" / "30")
    seen.clear()
    assert_same(run_sweep(folder=tmp_path / "c", on_progress=seen.append), whole, rtol=1e-6)
    assert seen == [20, 30]
    seen.clear()
    assert_same(run_sweep(folder=tmp_path / "c", on_progress=seen.append), whole, rtol=1e-6)
    assert seen == [30]


def test_a_checkpoint_that_is_being_written_is_not_taken_up(whole, tmp_path):
    run_sweep(folder=tmp_path / "c")
    half = tmp_path / "c" / "30"
    half.rename(tmp_path / "c" / "30.orbax-checkpoint-tmp")
    assert_same(run_sweep(folder=tmp_path / "c"), whole, rtol=1e-6)


def test_a_damaged_checkpoint_is_named(tmp_path):
    run_sweep(folder=tmp_path / "c")
    for file in (tmp_path / "c" / "30").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoints.CheckpointError, match=r"c/30 cannot be read.*delete that folder"):
        run_sweep(folder=tmp_path / "c")


def test_a_checkpoint_of_another_sweep_is_refused(tmp_path):
    run_sweep(folder=tmp_path / "c")
    with pytest.raises(checkpoints.CheckpointError, match=r"another sweep \(seeds"):
        run_sweep(seeds=(4, 7), folder=tmp_path / "c")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "c").write_text("a file stands where the folder should be")
    with pytest.raises(checkpoints.CheckpointError, match="cannot be written"):
        checkpoints.save(tmp_path / "c", 1, {"x": np.zeros(2)}, {})


def test_noise_is_swept_without_another_compilation(whole):
    import dataclasses

    noisy = run_sweep(task=dataclasses.replace(TASK, noise=1.0))
    assert (noisy.loss[:, -1] > whole.loss[:, -1]).all()


@pytest.mark.parametrize(
    ("seeds", "steps", "message"),
    [
        ((), [1], "seeds"),
        ((1, 1), [1], "distinct"),
        ((-1,), [1], "seeds"),
        ((1,), [], "steps"),
        ((1,), [5, 5], "rising"),
    ],
)
def test_bad_input_is_named(seeds, steps, message):
    with pytest.raises(ValueError, match=message):
        sweep.sweep(CONFIG, OPTIMIZATION, TASK, seeds, steps, measure)


def test_vmap_layout_of_accelerators_gives_the_same_runs(whole, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sweep._programs.cache_clear()
    vmapped = run_sweep()
    sweep._programs.cache_clear()
    np.testing.assert_allclose(vmapped.loss, whole.loss, rtol=2e-3)


def test_a_diverged_seed_leaves_the_others_alone(whole, monkeypatch):
    start = sweep.init_state

    def poisoned(config, optimization, seed):
        state = start(config, optimization, seed)
        blow_up = jax.numpy.where(seed == 7, jax.numpy.inf, 1.0)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x * blow_up if "W_U" in jax.tree_util.keystr(path) and x.dtype == "float32" else x, state
        )

    monkeypatch.setattr(sweep, "init_state", poisoned)
    sweep._programs.cache_clear()
    run = run_sweep()
    sweep._programs.cache_clear()
    assert run.diverged.tolist() == [False, True, False]
    np.testing.assert_allclose(run.loss[[0, 2]], whole.loss[[0, 2]], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n_devices", [1, 3])
def test_number_of_devices_does_not_matter(whole, tmp_path, n_devices):
    """A sweep interrupted here on two devices is finished there on one or three, with the same numbers."""
    run_sweep(folder=tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "30")
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import jax; jax.config.update("jax_num_cpu_devices", {n_devices})
import numpy as np, test_sweep
from pathlib import Path
run = test_sweep.run_sweep(folder=Path({str(tmp_path / "c")!r}))
np.save({str(tmp_path / "loss.npy")!r}, run.loss)
"""
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)
    np.testing.assert_allclose(np.load(tmp_path / "loss.npy"), whole.loss, rtol=1e-4)
