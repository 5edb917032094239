"""What a suite's user may not do: leave a capability undeclared, close one that works, leave out a test."""

from types import SimpleNamespace

import pytest

from mens_core.plugins import load_backend
from mens_core.testing.conformance import OPEN, BackendCapabilities, capabilities, closed, offers, promises, whole
from mens_core.testing.conformance.workbench import Workbench


class Whole(BackendCapabilities):
    """All open."""

    backend = "torch"
    gpt2 = llama = qwen2 = qwen3 = OPEN
    qlora = dropout = patterns = whole = modules_to_save = bfloat16 = generate = merge = OPEN


def _problems(**changes):
    return capabilities.declaration_problems(type("Capabilities", (Whole,), changes))


def test_a_whole_declaration_has_no_problem():
    assert _problems() == []
    assert _problems(qlora=closed("not yet")) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quora": OPEN}, "quora is no capability"),
        ({"qlora": closed(" ")}, "qlora is Closed(reason=' '), neither OPEN nor closed with a reason"),
        ({"qlora": False}, "qlora is False"),
        ({"qlora": None}, "qlora is None"),
        ({"backend": None}, "backend is not the name of one"),
    ],
)
def test_a_declaration_that_says_nothing_is_named(changes, words):
    assert any(words in problem for problem in _problems(**changes))


def test_what_is_not_declared_is_named():
    class Capabilities(BackendCapabilities):
        backend = "torch"
        gpt2 = OPEN

    problems = capabilities.declaration_problems(Capabilities)
    assert [problem.partition(" ")[0] for problem in problems] == [n for n in capabilities.CAPABILITIES if n != "gpt2"]
    assert capabilities.declaration_problems(None)


@pytest.mark.parametrize("name", ["qwen3", "qlora", "dropout", "modules_to_save", "bfloat16", "merge", "generate"])
def test_a_closed_capability_that_works_is_a_failure(name, tmp_path):
    declared = type("Capabilities", (Whole,), {name: closed("so they say")})
    workbench = Workbench(backend=load_backend("torch"), capabilities=declared, root=tmp_path)
    with pytest.raises(pytest.fail.Exception, match=rf"{name} is closed \(so they say\), but works"):
        offers.test_a_capability_is_what_it_is_declared_to_be(workbench, name)


def test_a_suite_with_a_test_left_out_or_replaced_is_not_whole():
    module = SimpleNamespace(**whole.TESTS)
    whole.test_the_suite_is_whole(SimpleNamespace(module=module), None)
    module.test_only_a_step_drops = lambda: None
    del module.test_clipping_really_clips
    with pytest.raises(pytest.fail.Exception, match="test_clipping_really_clips, test_only_a_step_drops"):
        whole.test_the_suite_is_whole(SimpleNamespace(module=module), None)


def test_a_promise_that_nobody_wrote_cannot_be_cited():
    with pytest.raises(LookupError, match="does not say 'a free lunch'"):
        promises.promise(kept=True, hook="mens_step", phrase="a free lunch", broken="")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)mens_state: it moved.*The copy does not change"):
        promises.promise(kept=False, hook="mens_state", phrase="does not change", broken="it moved")
