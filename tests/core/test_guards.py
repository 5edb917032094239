"""Every guard passes on what is sound, and finds its own fault in what is not."""

import json
import math
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mens_core.chat.open_chat import ChatML
from mens_core.errors import TrainingError
from mens_core.exchange import TrainingState
from mens_core.hf.keymap import linear_shapes
from mens_core.hf.layout import GRAPHS, read_layout
from mens_core.sections import AdapterSpec
from mens_core.text import tokens
from mens_core.text.encode import Encoder
from mens_core.text.lab import TURN_END_ID, lab_tokenizer
from mens_core.text.tokens import TokenRow, TokenRows
from mens_core.training.guards import after, before
from mens_core.training.guards.during import StepGuards, finite_steps, loss_spike, zero_gradient
from mens_core.training.guards.verdict import Judge, Verdict
from mens_core.training.progress import Progress
from mens_core.training.schedule import learning_rate

A, B = "m.lora_A.weight", "m.lora_B.weight"
STEADY = [2.0] * 30


def _state(b=0.0, **changes):
    adapter = {A: np.ones((2, 3), np.float32), B: np.full((4, 2), b, np.float32), **changes}
    return TrainingState(adapter=adapter, optimizer={}, step=0)


def _rows(*rows):
    return TokenRows.of(TokenRow(np.asarray(ids, np.int32), np.asarray(mask, np.bool_)) for ids, mask in rows)


def _layout(folder):
    return read_layout(folder)


@pytest.fixture(params=GRAPHS)
def layout(request, model_dirs):
    return _layout(model_dirs[request.param])


def _shapes(linears, rank):
    shapes = {f"{path}.lora_A.weight": (rank, into) for path, (_, into) in linears.items()}
    return shapes | {f"{path}.lora_B.weight": (out, rank) for path, (out, _) in linears.items()}


def test_what_the_contract_asks_for_is_trained(layout):
    spec = AdapterSpec(rank=4)
    asked = _shapes(linear_shapes(layout), 4)
    assert before.trainable_set(asked, layout, spec).passed
    assert not before.trainable_set({}, layout, spec).passed
    first = next(iter(asked))
    for wrong in (
        {name: shape for name, shape in asked.items() if name != first},
        asked | {"lm_head.lora_A.weight": (4, 9), "lm_head.lora_B.weight": (9, 4)},
        asked | {first: (asked[first][0], asked[first][1] + 1)},
        _shapes(linear_shapes(layout), 2),
    ):
        assert not before.trainable_set(wrong, layout, spec).passed


def test_only_the_targets_are_trained(model_dirs):
    layout, spec = _layout(model_dirs["llama"]), AdapterSpec(rank=4, targets=("q_proj",))
    linears = linear_shapes(layout)
    chosen = {path: shape for path, shape in linears.items() if path.endswith("q_proj")}
    assert before.trainable_set(_shapes(chosen, 4), layout, spec).passed
    assert not before.trainable_set(_shapes(linears, 4), layout, spec).passed


def test_of_an_unknown_family_names_and_ranks_are_judged(model_dirs):
    layout = attrs.evolve(_layout(model_dirs["llama"]), family=None)
    spec = AdapterSpec(rank=4, targets=("query",))
    sound = _shapes({"x.0.query": (5, 6)}, 4)
    assert before.trainable_set(sound, layout, spec).passed
    assert not before.trainable_set(sound | _shapes({"x.0.value": (5, 6)}, 4), layout, spec).passed
    assert not before.trainable_set(_shapes({"x.0.query": (5, 6)}, 3), layout, spec).passed
    assert not before.trainable_set({}, layout, spec).passed


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(2, 30), st.integers(0, 1))
def test_a_rate_of_zero_at_an_end_is_no_fault(schedule, total, warmup):
    fields = {"schedule": schedule, "peak": 1e-4, "warmup_steps": warmup, "total_steps": total}
    assert before.zero_rate(learning_rate(step, **fields) for step in range(total)).passed


def test_a_rate_of_zero_everywhere_is_one():
    assert not before.zero_rate([0.0, 0.0]).passed
    # No number of float32.
    assert not before.zero_rate([1e-60]).passed


def test_every_window_is_supervised():
    assert before.every_window_supervised(_rows(([1, 2], [0, 1]), ([3, 4, 5], [0, 0, 1]))).passed
    # A row's first token is predicted by nothing.
    assert not before.every_window_supervised(_rows(([1, 2], [0, 1]), ([3, 4, 5], [1, 0, 0]))).passed
    assert not before.every_window_supervised(_rows()).passed


def test_the_end_of_a_turn_is_supervised():
    encoder = Encoder(lab_tokenizer(), ChatML(lab_tokenizer()))
    end = TURN_END_ID
    one = before.end_of_turn_supervised(_rows(([7, 8, end], [0, 1, 1]), ([7, 8, 9], [0, 1, 1])), encoder)
    assert one.passed
    assert one.numbers == {"rows": 2, "rows_with_end": 1, "share": 0.5}
    for wrong in (
        _rows(([7, 8, end], [0, 1, 0])),
        _rows(([7, 8, 9], [0, 1, 1])),
        _rows(([end, 8, 9], [1, 1, 1])),
        # The end of a row that was cut off lies in the table still, and is no part of the row.
        _rows(([7, 8, end], [0, 1, 1])).cut(np.array([0]), np.array([2])),
    ):
        assert not before.end_of_turn_supervised(wrong, encoder).passed


def test_an_end_of_several_tokens_is_read_off_the_text():
    # A byte is a token, and the tags are none.
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    encoder = Encoder(tokenizer, ChatML(tokenizer))
    assert not encoder.stop_tokens()

    def row(text, trained):
        ids = tokenizer.encode(text).ids
        return ids, [place >= len(ids) - trained for place in range(len(ids))]

    sound = before.end_of_turn_supervised(_rows(row("abc<|im_end|>", 12), row("abc", 2)), encoder)
    assert sound.passed
    assert sound.numbers["rows_with_end"] == 1
    # The tag's first letters are the prompt's, or its last ones are cut off.
    assert not before.end_of_turn_supervised(_rows(row("abc<|im_end|>", 5)), encoder).passed
    assert not before.end_of_turn_supervised(_rows(row("abc<|im_en", 8)), encoder).passed


def test_ids_are_inside_the_vocabulary():
    rows = _rows(([1, 2], [0, 1]), ([3, 9], [0, 1]))
    assert before.ids_in_vocabulary(rows, 10).passed
    found = before.ids_in_vocabulary(rows, 9)
    assert not found.passed
    assert found.numbers["rows_outside"] == 1
    assert not before.ids_in_vocabulary(_rows(([-1, 2], [0, 1])), 9).passed


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_tables_are_read_piece_by_piece_as_in_one(rows, at_once, rows_at_a_time):
    laid = _rows(*((ids, [True] * len(ids)) for ids in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(before, "_AT_ONCE", at_once)
        patch.setattr(tokens, "_ROWS_AT_A_TIME", rows_at_a_time)
        found = before.ids_in_vocabulary(laid, 4).numbers["rows_outside"]
        backwards = before.ids_in_vocabulary(laid.take(np.arange(len(rows))[::-1]), 4).numbers["rows_outside"]
    assert found == backwards == sum(max(ids) >= 4 for ids in rows)


def test_a_new_adapter_is_the_identity():
    assert before.adapter_identity(_state(), _state(), new=True).passed
    assert not before.adapter_identity(_state(1), _state(1), new=True).passed
    assert before.adapter_identity(_state(1), _state(1), new=False).passed
    for held in (_state(2), _state(1, other=np.ones(1, np.float32)), TrainingState(adapter={}, optimizer={}, step=0)):
        assert not before.adapter_identity(_state(1), held, new=False).passed


@pytest.mark.parametrize(
    ("loss", "words"),
    [(6.2, "near ln 512"), (1.0, "far below ln 512"), (4.5, "knows a little"), (9.0, "is the tokenizer the base's")],
)
def test_the_first_loss_is_a_number_and_told_beside_that_of_guessing(loss, words):
    found = before.first_loss(loss, 512)
    assert found.passed
    assert words in found.message


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_first_loss_that_is_no_number_fails(loss):
    found = before.first_loss(loss, 512, "because")
    assert not found.passed
    assert "because" in found.message
    assert found.numbers["loss"] is None


def test_every_step_is_finite_or_few_windows_are_skipped():
    nan = math.nan
    assert finite_steps(STEADY, 30, "stop").passed
    assert not finite_steps([2.0, nan], 100, "stop").passed
    few = [2.0] * 5 + [nan] * 9 + [2.0]
    assert finite_steps(few, 100, "skip-window").passed
    assert finite_steps(few, 100, "skip-window").numbers["windows_skipped"] == 9
    assert not finite_steps(few, 89, "skip-window").passed
    assert finite_steps([nan] * 9, 1000, "skip-window").passed
    assert not finite_steps([nan] * 10, 1000, "skip-window").passed


def test_a_gradient_is_not_always_zero():
    assert zero_gradient(0, 3).passed
    assert zero_gradient(2, 3).passed
    assert not zero_gradient(3, 3).passed


def test_a_loss_that_leaps_is_told():
    assert loss_spike(STEADY).passed
    assert loss_spike([*STEADY, 6.0]).passed
    found = loss_spike([*STEADY, 6.1, math.nan, 8.0])
    assert not found.passed
    assert found.severity == "warning"
    assert found.numbers == {"spikes": 2, "worst_step": 33, "worst_loss": 8.0}
    # Of the first steps there is nothing to compare with.
    assert loss_spike([2.0] * 19 + [9.0]).passed


def test_the_adapter_has_changed_and_is_finite():
    assert after.adapter_changed(_state(), _state(1)).passed
    assert not after.adapter_changed(_state(), _state()).passed
    assert not after.adapter_changed(_state(), _state(math.nan)).passed


def test_the_base_has_not_changed():
    assert after.base_unchanged(3.25, 3.25).passed
    assert not after.base_unchanged(3.25, np.nextafter(3.25, 4)).passed


def test_the_model_differs_from_the_base():
    assert after.differs_from_base(3.25, 3.0).passed
    assert not after.differs_from_base(3.25, 3.25).passed


def test_a_held_out_loss_that_rose_is_told():
    assert after.eval_loss_not_worse(2.0, 1.0).passed
    assert after.eval_loss_not_worse(2.0, 2.0).passed
    assert after.eval_loss_not_worse(None, None).passed
    found = after.eval_loss_not_worse(1.0, 2.0)
    assert not found.passed
    assert found.severity == "warning"
    assert found.numbers == {"before": 1.0, "after": 2.0}


def test_what_is_read_is_what_was_written():
    assert after.reload_gives_the_same(_state(1).adapter, _state(1).adapter, 2.0, 2.0).passed
    assert not after.reload_gives_the_same(_state(1).adapter, _state(2).adapter, 2.0, 2.0).passed
    assert not after.reload_gives_the_same(_state(1).adapter, {}, 2.0, 2.0).passed
    assert not after.reload_gives_the_same(_state(1).adapter, _state(1).adapter, 2.0, 2.5).passed


class _Manifest:
    def __init__(self, guards=()):
        self.fields = {"guards": list(guards)}

    def update(self, **fields):
        # As it is written: no NaN, nothing that JSON does not know.
        self.fields |= json.loads(json.dumps(fields, allow_nan=False))


def _judge(guards=()):
    manifest, told = _Manifest(guards), []
    return Judge(manifest, SimpleNamespace(emit=lambda *event: told.append(event))), manifest, told


def test_a_failed_verdict_is_written_down_before_it_fails_the_run():
    judge, manifest, told = _judge()
    sound = Verdict(code="one", passed=True, message="all is well")
    broken = Verdict(code="two", passed=False, message="all is lost", fix="begin again")
    with pytest.raises(TrainingError, match=r"two: all is lost[\s\S]*begin again"):
        judge.record(sound, broken)
    assert [(entry["code"], entry["passed"]) for entry in manifest.fields["guards"]] == [("one", True), ("two", False)]
    assert told == [("guard", {"code": "two", "severity": "error", "message": "all is lost"})]


def test_a_warning_fails_nothing_and_is_told():
    judge, manifest, told = _judge()
    judge.record(Verdict(code="one", passed=False, message="hm", severity="warning"))
    assert [entry["passed"] for entry in manifest.fields["guards"]] == [False]
    assert len(told) == 1


def test_earlier_verdicts_stay_until_they_are_judged_anew_but_for_what_failed():
    entries = [attrs.asdict(Verdict(code=code, passed=code != "c", message="then")) for code in "abc"]
    judge, manifest, _ = _judge(entries)
    judge.record(Verdict(code="a", passed=True, message="now"))
    assert [(entry["code"], entry["message"]) for entry in manifest.fields["guards"]] == [("b", "then"), ("a", "now")]


def _steps(policy, total, losses=()):
    judge, manifest, _ = _judge()
    progress = Progress(losses=list(losses))
    return StepGuards(progress, policy, total, judge), progress, manifest


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_finite_stops_the_run_or_is_skipped(loss, norm):
    guards, _, manifest = _steps("stop", 100)
    assert not guards.skips(1, 1.0, 1.0)
    with pytest.raises(TrainingError, match=f"finite_steps: step 2 gave loss {loss} and gradient norm {norm}"):
        guards.skips(2, loss, norm)
    assert [entry["code"] for entry in manifest.fields["guards"]] == ["finite_steps"]
    guards, _, manifest = _steps("skip-window", 100)
    assert guards.skips(2, loss, norm)
    assert not manifest.fields["guards"]


def test_skipped_windows_of_the_processes_before_count():
    assert _steps("skip-window", 20, [1.0, math.nan, 1.0])[0].skips(4, math.nan, 1.0)
    with pytest.raises(TrainingError, match="3 of 20 windows"):
        _steps("skip-window", 20, [math.nan, math.nan, 1.0])[0].skips(4, math.nan, 1.0)


@pytest.mark.parametrize(("total", "zeros", "fails"), [(9, 3, True), (9, 2, False), (2, 2, True), (9, 0, False)])
def test_a_gradient_of_zero_in_all_first_steps_stops_the_run(total, zeros, fails):
    guards, progress, _ = _steps("stop", total)

    def go():
        for step in range(min(3, total)):
            progress.losses.append(1.0)
            progress.zero_gradients += step < zeros
            guards.told()

    if fails:
        with pytest.raises(TrainingError, match="zero_gradient"):
            go()
    else:
        go()
        guards.close()
    assert progress.steps_taken == min(3, total)
