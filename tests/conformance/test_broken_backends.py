"""Backends that are broken in one way each: every break is caught, by name, and the one that is whole passes."""

import subprocess
import xml.etree.ElementTree as ET

import pytest

SUITE = """
from mens_core.testing.conformance import *

class Capabilities(BackendCapabilities):
    backend = "{name}"
    gpt2 = llama = qwen2 = qwen3 = OPEN
    dropout = patterns = whole = generate = merge = OPEN
    modules_to_save = closed("A and B alone are trained")
    qlora = closed("NumPy has no NF4 base")
    bfloat16 = closed("NumPy computes in float32")
"""

# break → a test of the suite that fails, and what its message says
CAUGHT = {
    "wrong_shape": ("test_logits_are_those_of_the_specification", "mens_forward: answered float32 (26, 97)"),
    "wrong_dtype": ("test_logits_are_those_of_the_specification", "mens_forward: answered float64"),
    "not_a_number": ("test_logits_are_those_of_the_specification", "mens_forward: answered values that are not finite"),
    "live_buffers": ("test_a_copy_stays_as_it_was", "is an array that was handed out before"),
    "live_views": ("test_a_copy_stays_as_it_was", "is an array that was handed out before"),
    "refreshed_copies": ("test_a_copy_stays_as_it_was", "a step changed an earlier copy"),
    "changes_weights": ("test_a_merge_is_that_of_the_specification", "mens_merge: changed what it was given"),
    "changes_batches": ("test_the_cut_of_a_window_does_not_matter", "mens_step: the window was changed"),
    "changes_base": ("test_the_base_never_changes", "after three steps the base gives other logits"),
    "mean_of_means": ("test_the_cut_of_a_window_does_not_matter", "2 batches of 4 rows and one of 8 differ"),
    "never_clips": ("test_clipping_really_clips", "was to be clipped to 0.5 and has norm"),
    "counts_infinite": ("test_a_step_that_is_not_finite_changes_nothing", "changed the state"),
    "restores_half": (
        "test_a_state_that_does_not_fit_is_refused_and_nothing_changes",
        "it was refused, but not unchanged",
    ),
    "keeps_state": ("test_what_was_given_is_not_kept", "mens_restore"),
    "joins_rows": ("test_a_row_does_not_feel_the_other_rows", "when other rows stand beside it"),
    "writes_files": ("test_no_hook_writes_to_disk", ".mens_broken"),
    "changes_its_mind": ("test_the_same_question_gets_the_same_offer", "capacity_bytes=100"),
    "broadcasts": ("test_a_merge_of_what_does_not_fit_is_refused", "were merged"),
    "other_epsilon": ("test_logits_are_those_of_the_specification", "from the specification's, 2e-05 is allowed"),
    "forgets_decay": ("test_the_update_is_adamw", "of the learning rate off AdamW's"),
    "one_rank": ("test_layers_have_ranks_of_their_own[gpt2]", "is (4, 48), not (2, 48)"),
    "one_scale": ("test_layers_have_scales_of_their_own[gpt2]", "from the specification's, 2e-05 is allowed"),
    "keeps_base": (
        "test_what_a_plan_has_whole_takes_the_places_of_the_base[qwen2-head and last norm]",
        "from the specification's",
    ),
    "tells_twice": ("test_who_listens_is_told_every_token_in_order", "mens_generate: told of the tokens"),
    "half_gradient": ("test_gradients_are_those_of_the_specification", "off the specification's"),
}


@pytest.fixture(scope="module")
def failures(empty_environment, tmp_path_factory):
    """Backend → the suite's failures on it: test → message."""
    folder, report = tmp_path_factory.mktemp("broken"), tmp_path_factory.mktemp("report") / "junit.xml"
    for name in ("whole", *CAUGHT):
        (folder / f"test_{name}.py").write_text(SUITE.format(name=name), encoding="utf-8")
    pytest_here = [empty_environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Of a broken one only the test that is to fail: many others fail as well, and a message more proves no more.
    chosen = [f"{folder}/test_{name}.py::{test}" for name, (test, _) in CAUGHT.items()]
    subprocess.run([*pytest_here, folder / "test_whole.py", *chosen], check=False, capture_output=True, cwd=folder)
    found = {name: {} for name in ("whole", *CAUGHT)}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by the line above
        found[case.get("classname").rpartition("test_")[2]] |= {
            case.get("name"): problem.get("message") + (problem.text or "")
            for problem in case
            if problem.tag in {"failure", "error"}
        }
    return found


def test_the_backend_that_is_not_broken_passes(failures):
    assert failures["whole"] == {}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_break_is_caught_and_named(failures, name):
    test, words = CAUGHT[name]
    told = [message for failed, message in failures[name].items() if failed.startswith(test)]
    assert told, f"{test} passes"
    assert any(words in message for message in told), told
    assert any("mens_core" in message for message in told)
