"""weight_spectra as a user runs it: small models trained and judged, a model and a claim of one's own, wrong input."""

import contextlib
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from circuits_jax.heads.claim_verdicts import PREDICATES, STRUCTURE
from circuits_jax.heads.claims import load_claim, shipped
from circuits_jax.tasks.agreement import agreement_words
from circuits_jax.tasks.ioi import ioi_words
from circuits_jax.training import devices

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FIXTURES = Path(__file__).parent / "fixtures" / "pretrained"
FEW = ["--prompts", "16", "--estimation", "16", "--draws", "19"]  # of every run, so that programs are shared
SMOKE = ["--smoke", "--tasks", "sva", "--seeds", "1"]
WORDS = tuple(dict.fromkeys((*ioi_words()[1].vocabulary, *agreement_words()[1].vocabulary, "Victor", "ia")))
OF_IOI = {
    "name": "made up",
    "task": "ioi",
    "model": "tiny",
    "source": "nobody",
    "variables": json.loads(shipped()["ioi_words"].read_text())["variables"],
    "roles": {
        "name mover": {"query": "end", "key": "io", "over": "s1", "moves": "IO"},
        "duplicate token": {
            "query": "s2", "key": "s1", "looks": "matching", "matches": "S", "moves": "S", "to": "stream",
        },
    },
    "heads": {"name mover": ["1.1"], "duplicate token": ["1.1"]},
    "published": [{"score": "copying", "heads": "average", "at_most": 0.5, "source": "nobody"}],
}  # fmt: skip
ARMS = {"ioi_one_layer": ("ioi", 1), "ioi_two_layers": ("ioi", 2), "agreement": ("sva", 2)}


@pytest.fixture(scope="module")
def job():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        patch.setattr(devices, "use_all_cores", lambda n_runs: None)
        yield importlib.import_module("weight_spectra")


@pytest.fixture(scope="module")
def run(job):
    """The experiment, as its script runs it, in this process: results, folder and what is printed."""

    def made(runs, *arguments):
        main = [*FEW, "--runs-dir", str(runs), "--name", "run", *map(str, arguments)]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            job.run_folder.run_command(lambda: job.prepare(job.tyro.cli(job.Settings, args=main)), job.main)
        return strict((runs / "run" / "results.json").read_text()), runs / "run", out.getvalue()

    return made


def strict(text):
    """JSON without NaN and infinities, which are none of its values."""

    def no_json(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=no_json)


@pytest.fixture(scope="module")
def smoke(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("smoke"), *SMOKE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random GPT-2 with a tokenizer of whole words, but for one name of two tokens."""
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny", n_positions=32)


def checkpoint(folder, n_positions):
    n, width, draw = len(WORDS), 16, np.random.default_rng(0)
    shapes = {name: x.shape for name, x in load_file(FIXTURES / "gpt2" / "model.safetensors").items()}
    shapes |= {"transformer.wte.weight": (n, width), "transformer.wpe.weight": (n_positions, width)}
    folder.mkdir()
    weights = {name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((FIXTURES / "gpt2" / "config.json").read_text())
    config |= {"vocab_size": n, "n_positions": n_positions, "n_head": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.normalizer = normalizers.Replace("Victoria", "Victor ia")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a claim with some entries changed, and gives its file."""
    folder = tmp_path_factory.mktemp("claims")

    def made(claim, **changes):
        path = folder / f"{len(list(folder.iterdir()))}.json"
        path.write_text(json.dumps(claim | changes))
        return path

    return made


# --- what comes out


@pytest.mark.slow
def test_a_smoke_run_writes_what_it_says(smoke):
    results, folder, printed = smoke
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "results.json", "summary.json", "report.html", "trajectories", "checkpoints",
    }  # fmt: skip
    assert {"settings", "versions", "device"} <= results["provenance"].keys()
    assert results["provenance"]["settings"]["key"] == 0
    summary = strict((folder / "summary.json").read_text())
    aims = {name: figure["aim"] for name, figure in summary.items() if figure["aim"] is not None}
    assert aims == {
        "sva_precision": ">= 0.95", "sva_recall": ">= 0.9",
        "sva_shuffled_supported": "<= 0.05", "sva_untrained_supported": "<= 0.05",
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    (found,) = results["analyses"]
    assert found["model"] == "agreement, seed 0"
    assert {found["model"] in page, found["claim"] in page} == {True}
    assert f"report: {folder / 'report.html'}" in printed


def test_every_head_of_every_model_is_asked_about_every_role(smoke):
    found = smoke[0]
    kinds, roles = ("trained", "shuffled", "untrained"), tuple(load_claim("agreement_words").roles)
    heads = ("0.0", "0.1", "1.0", "1.1")
    assert [(entry["arm"], entry["kind"]) for entry in found["instrument"]] == [("agreement", kind) for kind in kinds]
    assert [(entry["arm"], entry["kind"]) for entry in found["by_task"]] == [("sva", kind) for kind in kinds]
    for entry in found["instrument"] + found["by_task"]:
        assert (entry["models"], entry["candidates"]) == (1, len(roles) * len(heads))
    (analysis,) = found["analyses"]
    assert [(head["role"], head["head"]) for head in analysis["heads"]] == [(r, head) for r in roles for head in heads]
    assert [entry["head"] for entry in analysis["spectra"]] == [*heads]


def test_the_models_are_those_of_the_description(job):
    plan = job.prepare(job.Settings())
    assert {arm.name: (arm.claim.task, arm.config.n_layers) for arm in plan.arms} == ARMS
    assert {arm.config.d_mlp for arm in plan.arms} == {0}
    assert [len(arm.task.templates) for arm in plan.arms] == [2, 30, 20]  # both orders of 1 and of 15; 5 times 4


def test_verdicts_follow_from_their_findings(smoke):
    results, _, _ = smoke

    def summed_up(findings, names):
        outcomes = [findings[name]["outcome"] for name in names]
        if all(outcome == "yes" for outcome in outcomes):
            return "supported"
        return "not supported" if "no" in outcomes else "undetermined"

    heads = [head for found in results["analyses"] for head in found["heads"]]
    for head in heads:
        assert head["findings"].keys() == set(PREDICATES)
        assert head["outcome"] == summed_up(head["findings"], PREDICATES)
        assert head["structural"] == summed_up(head["findings"], STRUCTURE)
        assert len(head["establishes"]) + len(head["does_not_establish"]) == len(PREDICATES)
        for half in ("alignment", "alignment_embedded"):
            for null, least in (("covariance", 1 / 20), ("label", 1 / 20), ("rotation", 0)):
                p = [part[f"{null}_p"] for part in head[half].values() if f"{null}_p" in part]
                assert len(p) == 3
                assert all(least <= value <= 1 for value in np.round(p, 6))
    assert {head["truth"] for head in heads} <= {True, False}


def test_the_same_key_gives_the_same_verdicts_and_another_one_other_prompts(run, smoke, tmp_path):
    same, _, _ = run(tmp_path / "same", *SMOKE)
    assert same == smoke[0]
    resumed, _, _ = run(tmp_path / "same", *SMOKE)
    assert resumed == same

    other, _, _ = run(tmp_path / "other", *SMOKE, "--key", "1")
    (before,), (after,) = same["analyses"], other["analyses"]
    assert [head["findings"] for head in after["heads"]] != [head["findings"] for head in before["heads"]]
    assert singular_values(after) == singular_values(before)  # the same model


def singular_values(analysis):
    return [head["qk"]["singular_values"] for head in analysis["spectra"]]


def test_a_run_folder_is_judged_by_a_claim_of_ones_own(run, smoke, written, tmp_path):
    shipped_one = json.loads(shipped()["agreement_words"].read_text())
    heads = dict(zip(shipped_one["roles"], ("1.1", "0.1", "0.0", "1.0"), strict=True))
    claim = written(shipped_one, name="mine", heads={role: [head] for role, head in heads.items()})
    results, _, _ = run(tmp_path, "--model", smoke[1], "--tasks", "sva", "--claim", claim)
    (found,), (before,) = results["analyses"], smoke[0]["analyses"]
    assert found["claim"] == "mine"
    assert {head["role"]: head["head"] for head in found["heads"]} == heads
    assert {head["truth"] for head in found["heads"]} == {None}
    assert {entry["head"]: entry["claimed_as"] for entry in found["spectra"]} == {
        head: [role] for role, head in heads.items()
    }
    assert singular_values(found) == singular_values(before)


@pytest.mark.slow
def test_a_pretrained_model_is_judged_on_what_its_tokenizer_can_say(run, tiny, written, tmp_path):
    results, folder, printed = run(tmp_path, "--model", tiny, "--claim", written(OF_IOI))
    assert {path.name for path in folder.iterdir()} == {"config.json", "results.json", "summary.json", "report.html"}
    assert results["instrument"] == results["by_task"] == []
    (found,) = results["analyses"]
    assert [(head["role"], head["head"]) for head in found["heads"]] == [
        ("name mover", "1.1"), ("duplicate token", "1.1"),
    ]  # fmt: skip
    claimed = {entry["head"]: entry["claimed_as"] for entry in found["spectra"]}
    assert claimed == {"1.0": [], "1.1": ["name mover", "duplicate token"]}  # 1.0 is a control
    shown = {word for entry in found["spectra"] for word in entry["qk"]["directions"][0]["read"]["top"]}
    assert shown <= {*WORDS}
    (published,) = found["published"]
    assert 0 <= published["value"] <= 1
    assert published["met"] == (published["value"] <= 0.5)
    for text in ("left out of ioi: Victoria (2 tokens)", "published: copying of average"):
        assert text in (folder / "report.html").read_text()
    assert "left out of ioi: Victoria (2 tokens)" in printed
    summary = strict((folder / "summary.json").read_text())
    shares = [summary[f"ioi_{outcome}"]["value"] for outcome in ("supported", "undetermined", "not_supported")]
    assert sum(shares) == 1


# --- what is refused


@pytest.fixture
def refused(refuse, tiny, written, tmp_path):
    """The one line that is printed to bad input; nothing is written."""
    claims = {
        "IOI": OF_IOI,
        "NO HEAD": {**OF_IOI, "heads": {**OF_IOI["heads"], "name mover": ["1.1", "2.0"]}},
        "NO ROLE": {**OF_IOI, "heads": {"name mover": ["1.1"]}},
    }
    models = {"TINY": tiny, "BARE": FIXTURES / "gpt2", "ENCODER": FIXTURES / "bert"}

    def given(argument):
        if argument == "SHORT":
            return checkpoint(tmp_path / "short", n_positions=12)
        return written(claims[argument]) if argument in claims else models.get(argument, argument)

    def said(*arguments):
        line = refuse("weight_spectra", "--runs-dir", str(tmp_path / "runs"), *(str(given(x)) for x in arguments))
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return line

    return said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "--prompts must be at least 8; got 0"),
        (["--estimation", "7"], "--estimation must be at least 8; got 7"),
        (["--draws", "18"], "--draws must be at least 19; got 18"),
        (["--key", "-1"], "--key must be at least 0; got -1"),
        (["--n-names", "11"], "--n-names must be at least 12; got 11"),
        (["--n-names", "99"], "--n-names must be at most 40; got 99"),
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--tasks"], "--tasks must name ioi, sva or both, once; got none"),
        (["--claim", "none.json"], "there is no claim none.json: give a JSON file or one of agreement_words, ioi_gpt2"),
        (["--claim", "NO ROLE"], "heads must say who has the role 'duplicate token'"),
        (["--tasks", "sva", "--claim", "ioi_words"], "at most one claim for each of --tasks; got another for ioi"),
        (["--claim", "ioi_words", "IOI"], "at most one claim for each of --tasks; got another for ioi"),
        (["--claim", "IOI"], "names as name mover head 1.1, but the model has 1 layers of 2 heads"),
        (["--model", "TINY", "--claim", "NO HEAD"], "head 2.0, but the model has 2 layers of 2 heads"),
        (["--model", "TINY", "--tasks", "ioi"], "no claim is shipped for ioi in tiny: give one with --claim"),
        (["--model", "TINY", "--tasks", "sva"], "No claim about agreement heads of pretrained models is shipped"),
        (["--model", "BARE", "--claim", "IOI"], "gpt2 has no tokenizer: there is no telling how it would read"),
        (["--model", "ENCODER", "--claim", "IOI"], "bert is no decoder with pre-norm"),
        (["--model", "SHORT", "--claim", "IOI"], "short holds 12 tokens; the sentences have"),
    ],
)
def test_settings_that_make_no_sense_are_refused(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"roles": {**OF_IOI["roles"], "name mover": {"query": "nowhere", "key": "io", "moves": "IO"}}},
        {"variables": {**OF_IOI["variables"], "IO": {"classes": "io_name", "positions": ["nowhere"]}}},
        {"constructions": ["simple"]},
        {"published": [{**OF_IOI["published"][0], "heads": ["9.9"]}]},
    ],
)
def test_claims_that_do_not_fit_the_task_or_model_are_refused_before_the_run(job, tiny, written, changes):
    with pytest.raises(ValueError, match=r"nowhere|constructions|9\.9"):
        job.prepare(job.Settings(model=str(tiny), claim=(str(written(OF_IOI, **changes)),)))


def test_a_model_that_is_nowhere_is_refused(refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no/such-model is no folder" in refused("--model", "no/such-model")


def test_a_task_is_named_once(job):
    with pytest.raises(ValueError, match="--tasks"):
        job.prepare(job.Settings(tasks=("ioi", "ioi")))
