"""telemetry.jsonl: written whole or the run ends, read strictly, and a schema that means what it says."""

import copy
import json
import resource
import signal
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mens_core.errors import DataError, ModelError, TrainingError
from mens_core.training.telemetry import ENDINGS, Telemetry
from mens_core.training.telemetry_log import TelemetryTail, read_telemetry
from mens_core.training.telemetry_schema import find_problem, telemetry_schema

VALIDATOR = jsonschema.Draft202012Validator(telemetry_schema())
EVENTS = telemetry_schema()["properties"]["event"]["enum"]

STEP = {
    "ts_ms": 1764000000000,
    "event": "step",
    "payload": {
        "epoch": 0,
        "step": 1,
        "total_steps": 3,
        "loss": 0.5,
        "lr": 1e-4,
        "grad_norm": 0.9,
        "tokens": 100,
        "supervised_tokens": 80,
        "supervised_ratio": 0.8,
        "step_seconds": 0.5,
        "tokens_per_sec": 200.0,
        "eta_seconds": 1.0,
        "peak_memory_bytes": 1 << 20,
    },
}
STOPPED = {"ts_ms": 1, "event": "train_stopped", "payload": {"step": 1, "error": "it was enough"}}


def _evaluation(step):
    return {"step": step, "eval_loss": 1.0, "eval_perplexity": 2.72}


def _run(folder, events, error=None, observers=()):
    """Emit (event, payload) pairs, and end with an error if one is given."""
    with Telemetry(folder / "telemetry.jsonl", observers) as telemetry:
        for event, payload in events:
            telemetry.emit(event, payload)
        if error is not None:
            raise error


def _changed(record, path, value):
    record = copy.deepcopy(record)
    place = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return record


def test_the_schema_is_one_and_closed_everywhere():
    jsonschema.Draft202012Validator.check_schema(telemetry_schema())
    assert set(telemetry_schema()["$defs"]) == set(EVENTS)
    assert set(ENDINGS) <= set(EVENTS)

    def objects(schema):
        if isinstance(schema, dict):
            if "properties" in schema and "const" not in schema["properties"].get("event", {}):
                yield schema
            for part in schema.values():
                yield from objects(part)
        elif isinstance(schema, list):
            for part in schema:
                yield from objects(part)

    for schema in objects(telemetry_schema()):
        assert schema["additionalProperties"] is False
        assert set(schema["required"]) <= set(schema["properties"])
        assert all(field["description"] for field in schema["properties"].values())


TWINS = {
    "a missing field": {**STEP, "payload": {k: v for k, v in STEP["payload"].items() if k != "loss"}},
    "a field too many": _changed(STEP, ("payload", "sps_ema"), 1.0),
    "NaN": _changed(STEP, ("payload", "loss"), float("nan")),
    "infinity": _changed(STEP, ("payload", "grad_norm"), float("inf")),
    "an unknown event": {**STEP, "event": "stepp"},
    "another event's payload": {**STEP, "event": "evaluation"},
    "a text for a number": _changed(STEP, ("payload", "loss"), "0.5"),
    "true for a number": _changed(STEP, ("payload", "step"), True),
    "half a token": _changed(STEP, ("payload", "tokens"), 1.5),
    "a negative time": _changed(STEP, ("payload", "step_seconds"), -1.0),
    "a ratio above one": _changed(STEP, ("payload", "supervised_ratio"), 1.1),
    "no time": {k: v for k, v in STEP.items() if k != "ts_ms"},
    "no object": [STEP],
    "null": None,
}


def test_an_event_holds():
    assert find_problem(STEP) is None
    assert VALIDATOR.is_valid(STEP)


@pytest.mark.parametrize("twin", TWINS)
def test_a_line_that_is_no_event_is_found_out(twin):
    assert find_problem(TWINS[twin])


NO_JSON = {"NaN", "infinity"}  # jsonschema checks values of JSON, and these are none


@pytest.mark.parametrize("twin", sorted(TWINS.keys() - NO_JSON))
def test_the_full_validator_finds_the_same(twin):
    assert not VALIDATOR.is_valid(TWINS[twin])


VALUES = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats(-2, 3) | st.text(max_size=3) | st.just([]) | st.just({})
)


@given(st.sampled_from([STEP, STOPPED]), st.data())
def test_any_change_is_judged_as_the_full_validator_judges_it(record, data):
    paths = [(name,) for name in record] + [("payload", name) for name in record["payload"]] + [("payload", "x")]
    changed = _changed(record, data.draw(st.sampled_from(paths)), data.draw(VALUES))
    assert (find_problem(changed) is None) == VALIDATOR.is_valid(changed)


def test_every_event_is_with_the_system_before_an_observer_hears_of_it(tmp_path):
    seen = []

    def look(event):
        seen.append((event, (tmp_path / "telemetry.jsonl").read_bytes()))

    with Telemetry(tmp_path / "telemetry.jsonl", [look]) as telemetry:
        telemetry.emit("evaluation", _evaluation(0))
    (event, on_disk), *rest = seen
    assert not rest
    assert json.loads(on_disk) == event


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_no_json_ends_the_run(number, tmp_path):
    with pytest.raises(TrainingError, match="telemetry cannot be written"):
        _run(tmp_path, [("evaluation", {"step": 0, "eval_loss": number})])
    assert read_telemetry(tmp_path).events == ()


def test_a_full_disk_ends_the_run(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    (tmp_path / "telemetry.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="No space left") as caught:
        _run(tmp_path, [("evaluation", _evaluation(0))])
    assert "telemetry.jsonl" in str(caught.value)


def test_a_file_that_may_grow_no_further_ends_the_run_and_keeps_what_was_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    written = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(TrainingError, match="File too large"):
            _run(tmp_path, [("evaluation", _evaluation(step)) for step in range(100)], observers=[written.append])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    log = read_telemetry(tmp_path)
    assert list(log.events) == written
    assert log.torn


def test_a_file_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    with pytest.raises(TrainingError, match=r"telemetry\.jsonl"):
        Telemetry(tmp_path / "absent" / "telemetry.jsonl", ())


def test_a_run_that_ends_with_an_error_says_so_once(tmp_path):
    with pytest.raises(RuntimeError, match="lights"):
        _run(tmp_path, [("evaluation", _evaluation(3))], RuntimeError("the lights went out"))
    last = read_telemetry(tmp_path).last("train_stopped")
    assert last == {"step": 3, "error": "RuntimeError: the lights went out"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_has_said_how_it_ended_does_not_say_so_twice(ending, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, [(ending, {})], KeyboardInterrupt())
    assert len((tmp_path / "telemetry.jsonl").read_text().splitlines()) == 1


def test_an_observer_that_fails_ends_the_run_and_the_others_hear_why(tmp_path):
    heard = []

    def fail(_event):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        _run(tmp_path, [("evaluation", _evaluation(0))], observers=[fail, heard.append])
    assert [event["event"] for event in heard] == ["train_stopped"]


def test_half_a_last_line_is_left_out_and_told(tmp_path):
    line = json.dumps(STEP)
    (tmp_path / "telemetry.jsonl").write_text(f"{line}\n{line[:40]}")
    log = read_telemetry(tmp_path)
    assert (list(log.events), log.torn) == ([STEP], True)


@pytest.mark.parametrize(
    "line", ["{}", "[]", "nonsense", '{"a": 1, "a": 1}', json.dumps(TWINS["NaN"]), "[" * 100_000, "\xff", ""]
)
def test_a_line_in_the_middle_that_is_no_event_is_an_error_with_its_number(line, tmp_path):
    text = f"{json.dumps(STEP)}\n{line}\n{json.dumps(STEP)}\n"
    (tmp_path / "telemetry.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="line 2"):
        read_telemetry(tmp_path)


def test_a_line_without_end_is_refused_and_not_held(tmp_path):
    (tmp_path / "telemetry.jsonl").touch()
    with (tmp_path / "telemetry.jsonl").open("ab") as file:
        file.truncate(1 << 34)
    with pytest.raises(DataError, match="longer than"):
        read_telemetry(tmp_path)


def test_no_telemetry_is_none_yet_and_a_link_elsewhere_is_refused(tmp_path):
    assert read_telemetry(tmp_path).events == ()
    (tmp_path / "telemetry.jsonl").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="leads out"):
        read_telemetry(tmp_path)


@given(st.lists(st.integers(1, 400), max_size=30))
def test_a_tail_gives_every_event_once_however_the_file_grows(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("tail")
    records = [_changed(STEP, ("payload", "step"), step) for step in range(1, 8)]
    whole = "".join(json.dumps(record) + "\n" for record in records).encode()
    tail, found = TelemetryTail(folder), []
    with (folder / "telemetry.jsonl").open("ab", buffering=0) as file:
        for cut in cuts:
            file.write(whole[:cut])
            whole = whole[cut:]
            found += tail.read()
        file.write(whole)
    assert found + tail.read() == records
    assert not tail.torn
