"""``mens_generate``."""

from __future__ import annotations

import numpy as np
import pytest

from mens_core.exchange import GenerateSettings
from mens_core.testing import tiny
from mens_core.testing.conformance.promises import promise
from mens_core.testing.conformance.workbench import Workbench, same_state

__all__ = [
    "test_a_stop_token_ends_the_answer_and_is_in_it",
    "test_every_token_is_the_likeliest_of_forward",
    "test_training_goes_on_after_an_answer_as_if_there_was_none",
    "test_who_listens_is_told_every_token_in_order",
]


@pytest.mark.parametrize("prompt", [[7], [5, 17, 80, 3, 42]], ids=["one token", "five tokens"])
def test_every_token_is_the_likeliest_of_forward(workbench: Workbench, prompt: list[int]) -> None:
    workbench.needs("generate")
    session, _ = workbench.adapted(workbench.any_family)
    given = list(prompt)
    answer = workbench.backend.generate(session, given, GenerateSettings(max_new_tokens=6, stop_tokens=()))
    promise(given == prompt, "mens_generate", "The new tokens only", "the prompt it was given was changed")
    promise(len(answer) == 6, "mens_generate", "length and stop tokens", f"6 tokens were asked for, {len(answer)} came")
    tokens = np.array([*prompt, *answer], np.int32)
    logits = workbench.backend.forward(session, tiny.with_tokens(tiny.batch_of(len(tokens)), tokens))
    expected = logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()
    promise(answer == expected, "mens_generate", "greedily", f"{answer}, but the likeliest are {expected}")


def test_a_stop_token_ends_the_answer_and_is_in_it(workbench: Workbench) -> None:
    workbench.needs("generate")
    session, _ = workbench.adapted(workbench.any_family)
    free = workbench.backend.generate(session, [5, 17], GenerateSettings(max_new_tokens=6, stop_tokens=()))
    settings = GenerateSettings(max_new_tokens=6, stop_tokens=(free[2], tiny.VOCABULARY - 1))
    found, expected = workbench.backend.generate(session, [5, 17], settings), free[: free.index(free[2]) + 1]
    promise(found == expected, "mens_generate", "a stop token ends them", f"{found}, expected {expected}")


def test_who_listens_is_told_every_token_in_order(workbench: Workbench) -> None:
    workbench.needs("generate")
    session, _ = workbench.adapted(workbench.any_family)
    told: list[int] = []
    settings = GenerateSettings(max_new_tokens=6, stop_tokens=())
    answer = workbench.backend.generate(session, [5, 17], settings, told.append)
    promise(told == answer, "mens_generate", "on_token", f"{told} were told, {answer} answered")
    alone = workbench.backend.generate(session, [5, 17], settings)
    promise(answer == alone, "mens_generate", "on_token", f"{answer} with a listener, {alone} without")


def test_training_goes_on_after_an_answer_as_if_there_was_none(workbench: Workbench) -> None:
    workbench.needs("generate")
    found = []
    for talks in (False, True):
        session, _ = workbench.adapted(workbench.any_family)
        if talks:
            workbench.backend.generate(session, [5, 17], GenerateSettings(max_new_tokens=3, stop_tokens=()))
        workbench.backend.step(session, [tiny.batch_of(9, 5)], 1e-2)
        found.append(workbench.backend.state(session))
    promise(same_state(*found), "mens_generate", "Continue a prompt", "an answer changed the steps after it")
