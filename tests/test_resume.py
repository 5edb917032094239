"""Runs that are interrupted and go on: with the same bytes, from the newest whole checkpoint, or not at all."""

import json
import shutil

import numpy as np
import pytest
from tolerances import ELSEWHERE

from mens_core import Planner
from mens_core.artifacts.adapters import open_adapter
from mens_core.artifacts.checkpoints import check_checkpoint, checkpoint_folders, read_checkpoint, write_checkpoint
from mens_core.errors import GateError, ResumeError, RunDirectoryError, RunInterrupted, TrainingError

ADAPTER = "adapter_model.safetensors"
SETTINGS = {
    "epochs": 2,
    "batch_size": 2,
    "grad_accum": 2,
    "seq_len": 256,
    "rank": 4,
    "learning_rate": 5e-3,
    "max_grad_norm": 0.5,
    "warmup_steps": 2,
    "checkpoint_every": 2,
    "eval_every": 3,
}


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    """Twenty rows to train on, so that an epoch has five steps, and two held out."""
    folder = tmp_path_factory.mktemp("small")
    rows = [{"prompt": f"p {i}", "response": f"x = {str(i) * (3 + i % 5)}"} for i in range(22)]
    for name, part in (("train", rows[2:]), ("eval", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def asked(model_dirs, small_corpus):
    """A run of ten steps."""
    return {"model": str(model_dirs["llama"]), "data_dir": small_corpus, "backend": "torch", **SETTINGS}


def _stop_after(*steps):
    """Tell a run to stop after the given calls; the first call is before the first step of the process."""
    calls = [0]

    def stop():
        calls[0] += 1
        return "a test" if calls[0] - 1 in steps else None

    return stop


def _interrupt(fields, steps):
    with pytest.raises(RunInterrupted) as caught:
        Planner().run(**fields, stop=_stop_after(steps))
    return caught.value


def _manifest(folder):
    return json.loads((folder / "training_manifest.json").read_text(encoding="utf-8"))


def _events(folder):
    return [json.loads(line) for line in (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()]


def _results(folder):
    timed = ("seconds", "per_sec", "memory")
    return {
        name: value for name, value in _manifest(folder)["results"].items() if not any(word in name for word in timed)
    }


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _names(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory):
    """A complete run on torch."""
    return Planner().run(**asked, output_dir=tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module")
def _stopped(asked, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped") / "run"
    _interrupt({**asked, "output_dir": output}, 5)
    return output


@pytest.fixture
def stopped(_stopped, asked, tmp_path):
    """The fields of a run that was stopped after its fifth step, in a folder of its own."""
    shutil.copytree(_stopped, tmp_path / "run")
    return {**asked, "output_dir": tmp_path / "run"}


@pytest.mark.parametrize(
    ("method", "further"),
    [
        ("lora", {"dropout": 0.1, "packing": "best-fit", "seq_len": 64, "epochs": 3}),
        (
            "qlora",
            {
                "dropout": 0.1,
                "schedule": "linear",
                "weight_decay": 0.1,
                "modules_to_save": ("lm_head", "embed_tokens", "norm", "0.input_layernorm"),
            },
        ),
    ],
)
def test_a_run_that_goes_on_ends_with_the_bytes_of_one_that_was_not_stopped(backend, method, further, asked, tmp_path):
    fields = {**asked, "backend": f"{backend.name}_{method}", **further}
    whole = Planner().run(**fields, output_dir=tmp_path / "whole")
    fields["output_dir"] = tmp_path / "parts"
    assert _interrupt(fields, 1).step == 1
    fields["resume"] = "auto"
    assert _interrupt(fields, 4).step == 5
    parts = Planner().run(**fields)
    # The older system's manifest knows nothing of modules that are trained whole.
    v3 = ["populi_adapter_manifest_v3.json"] if "modules_to_save" not in further else []
    for name in (ADAPTER, "adapter_config.json", *v3):
        assert (parts.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()
    assert parts.losses == whole.losses
    assert _results(parts.output_dir) == _results(whole.output_dir)
    assert parts.interruptions == ("a test", "a test")
    assert parts.resumed_from == parts.output_dir / "checkpoints" / "step-00000005"
    assert _manifest(parts.output_dir)["run_id"] == parts.manifest["run_id"]


def test_without_its_moments_a_run_would_end_otherwise(stopped, undisturbed):
    # The twin of the test above: its bytes see what was not restored.
    home = stopped["output_dir"] / "checkpoints"
    newest = read_checkpoint(home / "step-00000005")
    zeros = {name: np.zeros_like(moment) for name, moment in newest.state.optimizer.items()}
    state = type(newest.state)(adapter=newest.state.adapter, optimizer=zeros, step=5)
    write_checkpoint(home, state, newest.record, newest.curve)
    result = Planner().run(**stopped, resume="auto")
    assert result.losses[:6] == undisturbed.losses[:6]
    assert result.losses[6:] != undisturbed.losses[6:]


@pytest.mark.parametrize(("first", "then"), [("torch", "jax"), ("jax", "torch")])
def test_a_run_may_go_on_on_another_backend(first, then, asked, tmp_path):
    # One layer of a stack has a rank and a scale of its own, which only one of the two fills up.
    asked = {**asked, "rank_pattern": {r"1\.self_attn\.q_proj": 6}, "alpha_pattern": {"v_proj": 4.0}}
    # And of one stack of norms one layer is trained whole.
    asked["modules_to_save"] = ("lm_head", "embed_tokens", "1.input_layernorm")
    whole = Planner().run(**{**asked, "backend": first}, output_dir=tmp_path / "whole")
    fields = {**asked, "output_dir": tmp_path / "run"}
    _interrupt({**fields, "backend": first}, 4)
    with pytest.raises(ResumeError, match=f"backend: {first} then, {then} now"):
        Planner().run(**{**fields, "backend": then}, resume="auto")
    result = Planner().run(**{**fields, "backend": then}, resume="auto", resume_anyway=True)
    assert np.abs(np.subtract(result.losses, whole.losses)).max() < ELSEWHERE
    assert result.losses != whole.losses
    assert result.manifest["execution_kernel"] == f"{then}_lora"
    assert f"backend: {first} then, {then} now" in result.manifest["resumed_from"]["notes"]


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def _turn_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("optimizer.safetensors", _shorten, "COMPLETE says"),
        ("adapter.safetensors", _turn_a_bit, "sha256"),
        ("curve.safetensors", lambda path: path.unlink(), "cannot be read"),
        ("COMPLETE", lambda path: path.unlink(), "no COMPLETE"),
        ("COMPLETE", lambda path: path.write_text('{"files": {'), "COMPLETE cannot be read"),
        ("COMPLETE", lambda path: path.write_text("{}"), "COMPLETE cannot be read"),
        ("state.json", _turn_a_bit, "sha256"),
    ],
)
def test_every_damage_of_a_checkpoint_is_noticed(stopped, name, damage, words):
    folder = stopped["output_dir"] / "checkpoints" / "step-00000005"
    assert check_checkpoint(folder)
    damage(folder / name)
    with pytest.raises(ResumeError, match=words):
        read_checkpoint(folder)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped, undisturbed):
    _turn_a_bit(stopped["output_dir"] / "checkpoints" / "step-00000005" / "optimizer.safetensors")
    result = Planner().run(**stopped, resume="auto")
    (passed_over,) = result.manifest["checkpoints_passed_over"]
    assert passed_over.startswith("step-00000005: optimizer.safetensors is not what its sha256")
    (resumed,) = (event["payload"] for event in _events(result.output_dir) if event["event"] == "train_resume")
    assert (resumed["step"], resumed["passed_over"]) == (4, [passed_over])
    assert (result.output_dir / ADAPTER).read_bytes() == (undisturbed.output_dir / ADAPTER).read_bytes()
    assert _names(result.output_dir) == _names(undisturbed.output_dir)


def test_with_no_whole_checkpoint_a_run_begins_anew(stopped, undisturbed):
    for path in checkpoint_folders(stopped["output_dir"] / "checkpoints").values():
        _turn_a_bit(path / "state.json")
    result = Planner().run(**stopped, resume="auto")
    assert len(result.manifest["checkpoints_passed_over"]) == 3
    assert (result.resumed_from, result.interruptions) == (None, ("a test",))
    assert (result.output_dir / ADAPTER).read_bytes() == (undisturbed.output_dir / ADAPTER).read_bytes()
    assert [event["payload"]["step"] for event in _events(result.output_dir) if event["event"] == "step"] == [
        *range(1, 11)
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate: 0\.005 then, 0\.001 now"),
        ({"seed": 3, "dropout": 0.1}, r"dropout: 0\.0 then, 0\.1 now\n  - seed: 42 then, 3 now"),
        ({"epochs": 3}, "epochs: 2 then, 3 now\n  - total_steps: 10 then, 15 now"),
        ({"batch_size": 1}, "batch_size: 2 then, 1 now"),
        ({"dtype": "bfloat16"}, "dtype: float32 then, bfloat16 now"),
        ({"method": "qlora"}, "method: lora then, qlora now"),
        ({"rank_pattern": {"q_proj": 2, "0.self_attn.q_proj": 3}}, "nothing then, q_proj=2,0.self_attn.q_proj=3 now"),
    ],
)
def test_another_contract_is_refused_by_name_even_anyway_and_nothing_is_touched(stopped, change, words):
    before = _files(stopped["output_dir"])
    with pytest.raises(ResumeError, match=words):
        Planner().run(**{**stopped, **change}, resume="auto", resume_anyway=True)
    assert _files(stopped["output_dir"]) == before


@pytest.mark.parametrize("what", ["train.jsonl", "config.json", "base_shards/model.safetensors", "tokenizer.json"])
def test_other_rows_base_or_tokenizer_are_refused_by_name(stopped, what, tmp_path):
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(stopped["data_dir"], data)
    shutil.copytree(stopped["model"], model)
    path = (data if what == "train.jsonl" else model) / what.rpartition("/")[2]
    if path.suffix == ".safetensors":
        _turn_a_bit(path)
    else:
        path.write_text(path.read_text(encoding="utf-8").replace("{", "{ ", 1), encoding="utf-8")
    with pytest.raises(ResumeError, match=f"sha256 of {what}: "):
        Planner().run(**{**stopped, "data_dir": data, "model": str(model)}, resume="auto", resume_anyway=True)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4, "grad_accum": 1},
        {"eval_every": 4},
        {"gradient_checkpointing": True},
        {"adapter_tag": "mine", "min_rows": 2},
    ],
)
def test_what_leaves_the_steps_the_same_is_allowed_by_name_alone(stopped, undisturbed, change):
    with pytest.raises(ResumeError, match=r"--resume-anyway") as caught:
        Planner().run(**{**stopped, **change}, resume="auto")
    assert all(f"{name}: {stopped.get(name)}" in str(caught.value) for name in change if name in stopped)
    result = Planner().run(**{**stopped, **change}, resume="auto", resume_anyway=True)
    # Half the batch is another order of summation; all else is nothing to the numbers.
    assert np.abs(np.subtract(result.losses, undisturbed.losses)).max() < (1e-5 if "batch_size" in change else 1e-12)


def test_a_constant_rate_may_go_on_for_longer(asked, tmp_path):
    fields = {**asked, "output_dir": tmp_path / "run", "schedule": "constant", "eval_every": None}
    longer = Planner().run(**{**fields, "epochs": 3, "output_dir": tmp_path / "longer"})
    Planner().run(**fields)
    result = Planner().run(**{**fields, "epochs": 3}, resume="auto", resume_anyway=True)
    assert (result.output_dir / ADAPTER).read_bytes() == (longer.output_dir / ADAPTER).read_bytes()
    assert result.interruptions == ("complete",)


@pytest.mark.parametrize("part", ["progress", "fields", "sha256"])
def test_a_state_that_lacks_something_is_refused(stopped, part):
    home = stopped["output_dir"] / "checkpoints"
    newest = read_checkpoint(home / "step-00000005")
    write_checkpoint(home, newest.state, {**newest.record, part: None}, newest.curve)
    with pytest.raises(ResumeError, match=r"state\.json cannot be read"):
        Planner().run(**stopped, resume="auto")


def test_a_complete_run_is_left_as_it_is(asked, undisturbed):
    before = _files(undisturbed.output_dir)
    result = Planner().run(**asked, output_dir=undisturbed.output_dir, resume="auto")
    assert result.losses == undisturbed.losses
    assert result.manifest == undisturbed.manifest
    assert _files(undisturbed.output_dir) == before


def test_a_complete_run_without_checkpoints_is_not_begun_anew(asked, tmp_path):
    fields = {**asked, "output_dir": tmp_path / "run", "checkpoint_every": 0, "eval_every": None}
    Planner().run(**fields)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(RunDirectoryError, match="complete run without a checkpoint"):
        Planner().run(**{**fields, "learning_rate": 1e-3}, resume="auto")
    assert _manifest(tmp_path / "run")["status"] == "complete"


def test_a_run_is_not_gone_on_with_unasked_and_the_error_says_how(stopped):
    with pytest.raises(RunDirectoryError, match="--resume auto"):
        Planner().run(**stopped)
    with pytest.raises(GateError, match="resume_or_overwrite"):
        Planner().run(**stopped, resume="auto", overwrite=True)


def test_a_path_goes_on_from_that_checkpoint(stopped, undisturbed):
    third = stopped["output_dir"] / "checkpoints" / "step-00000003"
    result = Planner().run(**stopped, resume=str(third))
    assert result.resumed_from == third
    assert (result.output_dir / ADAPTER).read_bytes() == (undisturbed.output_dir / ADAPTER).read_bytes()


def test_a_path_of_another_run_is_gone_on_with_in_the_output_folder(stopped, undisturbed, tmp_path):
    before = _files(stopped["output_dir"])
    result = Planner().run(**{**stopped, "output_dir": tmp_path / "other"}, resume=str(stopped["output_dir"]))
    assert result.output_dir == tmp_path / "other"
    assert (result.output_dir / ADAPTER).read_bytes() == (undisturbed.output_dir / ADAPTER).read_bytes()
    assert _files(stopped["output_dir"]) == before


@pytest.mark.parametrize(("place", "words"), [("nowhere", "no such checkpoint"), ("data", "no COMPLETE")])
def test_a_path_that_is_no_checkpoint_is_refused(stopped, place, words, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ResumeError, match=words):
        Planner().run(**{**stopped, "output_dir": tmp_path / "new"}, resume=str(tmp_path / place))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_killed_run_says_running_and_its_successor_says_killed(stopped, undisturbed):
    folder = stopped["output_dir"]
    manifest = _manifest(folder) | {"status": "running", "pid": 2**22 + 1}
    (folder / "training_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    told = (folder / "telemetry.jsonl").read_bytes()
    lines = told.splitlines(keepends=True)
    sixth = json.dumps({"ts_ms": 0, "event": "step", "payload": {"step": 6, "loss": 0.0}}).encode()
    (folder / "telemetry.jsonl").write_bytes(told + sixth + b"\n" + lines[-1][:17])
    # What a process leaves that is killed in the middle of a save and of a rewrite.
    (folder / "checkpoints" / ".step-00000006.abcd").mkdir()
    (folder / ".training_manifest.json.0123abcd.tmp").write_text("{")
    result = Planner().run(**stopped, resume="auto")
    assert result.interruptions == ("killed",)
    events = _events(folder)
    (resumed,) = (event["payload"] for event in events if event["event"] == "train_resume")
    assert resumed["lines_taken_back"] == 2
    steps = [event["payload"] for event in events if event["event"] == "step"]
    assert [step["loss"] for step in steps] == list(undisturbed.losses)
    assert _names(folder) == _names(undisturbed.output_dir)


@pytest.fixture
def rising(asked, tmp_path):
    """A run whose held-out loss has its lowest value after six steps, since other words are held out."""
    shutil.copytree(asked["data_dir"], tmp_path / "rising")
    rows = [{"prompt": "q", "response": words} for words in ("return self", "for item in data")]
    (tmp_path / "rising" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {**asked, "data_dir": tmp_path / "rising", "learning_rate": 0.1, "epochs": 6, "keep_checkpoints": 1}


@pytest.fixture
def early(rising):
    """The same, and it stops when the loss has not fallen for two evaluations."""
    return {**rising, "early_stopping_patience": 2}


def test_the_newest_checkpoints_and_the_best_are_kept(rising, tmp_path):
    result = Planner().run(**rising, output_dir=tmp_path / "run")
    losses = dict(result.manifest["results"]["eval_losses"])
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best < 30
    assert result.best_checkpoint == tmp_path / "run" / "checkpoints" / f"step-{best:08d}"
    assert {*checkpoint_folders(tmp_path / "run" / "checkpoints")} == {best, 30}
    assert result.manifest["results"]["adapter_step"] == 30


def test_early_stopping_ends_a_run_and_gives_the_best_adapter(early, tmp_path):
    result = Planner().run(**early, output_dir=tmp_path / "run")
    results = result.manifest["results"]
    losses = dict(results["eval_losses"])
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert results["stopped_early"]
    assert results["optimizer_steps"] == max(losses) == best + 2 * early["eval_every"]
    assert results["adapter_step"] == results["best_step"] == best
    assert result.eval_loss_after == losses[best]
    kept = read_checkpoint(result.best_checkpoint).state.adapter
    written = open_adapter(result.output_dir).tensors()
    assert all(np.array_equal(written[name], tensor) for name, tensor in kept.items())


def test_early_stopping_counts_on_where_it_was(early, tmp_path):
    whole = Planner().run(**early, output_dir=tmp_path / "whole")
    fields = {**early, "output_dir": tmp_path / "run", "resume": "auto"}
    for steps in (5, whole.manifest["results"]["optimizer_steps"] - 7, 1):
        _interrupt(fields, steps)
    result = Planner().run(**fields)
    assert _results(result.output_dir) == _results(whole.output_dir)
    assert (result.output_dir / ADAPTER).read_bytes() == (whole.output_dir / ADAPTER).read_bytes()


def test_early_stopping_goes_back_before_a_best_checkpoint_that_is_damaged(early, tmp_path):
    whole = Planner().run(**early, output_dir=tmp_path / "whole")
    fields = {**early, "output_dir": tmp_path / "run", "keep_checkpoints": 9}
    best = whole.manifest["results"]["best_step"]
    _interrupt(fields, best + 1)
    _turn_a_bit(tmp_path / "run" / "checkpoints" / f"step-{best:08d}" / "state.json")
    result = Planner().run(**fields, resume="auto")
    assert result.manifest["resumed_from"]["step"] < best
    assert (result.output_dir / ADAPTER).read_bytes() == (whole.output_dir / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"early_stopping_patience": 1, "eval_every": None}, "early_stopping_evaluates"),
        ({"eval_every": 2}, "held_out_file_exists"),
    ],
)
def test_early_stopping_needs_losses_and_losses_need_rows(asked, change, code, tmp_path):
    if code == "held_out_file_exists":
        shutil.copytree(asked["data_dir"], tmp_path / "data")
        (tmp_path / "data" / "eval.jsonl").unlink()
        change = {**change, "data_dir": tmp_path / "data"}
    with pytest.raises(GateError, match=code):
        Planner().plan(**{**asked, **change}, output_dir=tmp_path / "run")


def test_a_run_out_of_time_has_done_a_step_and_goes_on(asked, undisturbed, tmp_path):
    fields = {**asked, "output_dir": tmp_path / "run", "max_time": "0.001s", "resume": "auto"}
    for step in (1, 2, 3):
        with pytest.raises(RunInterrupted, match="max_time") as caught:
            Planner().run(**fields)
        assert caught.value.step == step
        assert check_checkpoint(caught.value.checkpoint)
    manifest = _manifest(tmp_path / "run")
    assert (manifest["status"], manifest["reason"], manifest["step"]) == ("interrupted", "max_time", 3)
    told = [event["payload"]["reason"] for event in _events(tmp_path / "run") if event["event"] == "train_interrupted"]
    assert told == ["max_time"] * 3
    result = Planner().run(**{**fields, "max_time": "2h"})
    assert (result.output_dir / ADAPTER).read_bytes() == (undisturbed.output_dir / ADAPTER).read_bytes()


def test_a_stop_at_the_last_step_is_none(asked, undisturbed, tmp_path):
    result = Planner().run(**asked, output_dir=tmp_path / "run", stop=_stop_after(10))
    assert result.manifest["status"] == "complete"
    assert result.losses == undisturbed.losses


def test_a_best_checkpoint_that_has_gone_is_an_error(early, tmp_path):
    folder = tmp_path / "run"

    def remove(event):
        # The thread that writes and removes them is at rest when it is told of.
        if event["event"] == "checkpoint_saved":
            shutil.rmtree(event["payload"]["path"])

    with pytest.raises(TrainingError, match="of the lowest held-out loss"):
        Planner().run(**early, output_dir=folder, observers=[remove])
    assert _manifest(folder)["status"] == "failed"
