"""telemetry.jsonl of a run that goes on: every step once, nothing half-written, what else was told kept."""

import json

from hypothesis import given
from hypothesis import strategies as st

from mens_core.training.telemetry import rewind, told_losses

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["step", "evaluation", "checkpoint_saved", "train_interrupted", "train_resume", "train_start"]),
        st.integers(0, 9),
    ),
    max_size=12,
)


def _line(event, step):
    return json.dumps({"ts_ms": 0, "event": event, "payload": {"step": step, "loss": step / 7}}).encode() + b"\n"


@given(EVENTS, st.integers(0, 9), st.integers(0, 40))
def test_what_was_told_of_later_steps_is_taken_back(tmp_path_factory, events, step, cut):
    path = tmp_path_factory.mktemp("telemetry") / "telemetry.jsonl"
    half = _line("step", 1)[:cut]
    path.write_bytes(b"".join(_line(*event) for event in events) + half)
    taken = rewind(path, step)
    kept = [
        (event, at) for event, at in events if event not in {"step", "evaluation", "checkpoint_saved"} or at <= step
    ]
    assert path.read_bytes() == b"".join(_line(*event) for event in kept)
    assert taken == len(events) - len(kept) + bool(half)
    assert rewind(path, step) == 0
    assert told_losses(path) == tuple(at / 7 for event, at in kept if event == "step")


def test_a_run_without_telemetry_has_nothing_to_take_back(tmp_path):
    assert rewind(tmp_path / "telemetry.jsonl", 3) == 0
    assert not list(tmp_path.iterdir())
