"""Greedy decoding: token for token what transformers generates."""

import numpy as np
import pytest
import references
import tiny
import torch
import transformers

from mens_core.exchange import GenerateSettings

PROMPT = [5, 17, 80, 3, 42]


def _expected(model, prompt, length, stops=()):
    plain = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=length, eos_token_id=list(stops) or None, pad_token_id=0
    )
    model.generation_config = transformers.GenerationConfig()
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_tokens_are_those_of_transformers(backend, adapted, folders, family, method):
    session, adapter = adapted(family, method=method)
    spec = tiny.nf4_spec()

    def merged(path, weight):
        base = backend.dequantize(backend.quantize(weight, spec)) if method == "qlora" else weight
        return backend.merge(base, adapter[f"{path}.lora_A.weight"], adapter[f"{path}.lora_B.weight"], 2.0)

    model = references.with_weights(references.open_model(folders[family]), merged)
    expected = _expected(model, PROMPT, 20)
    assert backend.generate(session, PROMPT, GenerateSettings(max_new_tokens=20, stop_tokens=())) == expected
    # the adapter has a say: without it other tokens come
    assert _expected(references.open_model(folders[family]), PROMPT, 20) != expected


def test_a_stop_token_ends_the_answer_and_is_in_it(backend, session_of, folders, family):
    session = session_of(family)
    free = backend.generate(session, PROMPT, GenerateSettings(max_new_tokens=12, stop_tokens=()))
    stops = (free[4], 96)
    expected = _expected(references.open_model(folders[family]), PROMPT, 12, stops)
    assert expected == free[: free.index(free[4]) + 1]
    assert backend.generate(session, PROMPT, GenerateSettings(max_new_tokens=12, stop_tokens=stops)) == expected


@pytest.mark.parametrize("prompt", [[7], [7] * 11])
def test_every_token_is_the_likeliest_of_forward(backend, session_of, family, prompt):
    session = session_of(family)
    answer = backend.generate(session, prompt, GenerateSettings(max_new_tokens=6, stop_tokens=()))
    tokens = np.array([*prompt, *answer], np.int32)
    row = tiny.batch_of(len(tokens))
    logits = backend.forward(session, tiny.with_tokens(row, tokens))
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == answer


def test_training_goes_on_after_an_answer_as_if_there_was_none(backend, adapted, family):
    found = []
    for talks in (False, True):
        session, _ = adapted(family)
        if talks:
            backend.generate(session, PROMPT, GenerateSettings(max_new_tokens=3, stop_tokens=()))
        metrics = backend.step(session, [tiny.batch_of(9, 5)], 1e-2)
        found.append((float(metrics.loss_sum), float(metrics.grad_norm), backend.state(session).adapter))
    assert found[0][:2] == found[1][:2]
    for name, array in found[0][2].items():
        np.testing.assert_array_equal(array, found[1][2][name])


def test_the_folders_own_sampling_settings_are_left_alone(backend, folders, family, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(folders[family], tmp_path / family)
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 2, "repetition_penalty": 5.0, "max_length": 6}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    session = backend.open(tiny.plan_for(backend, folder), tiny.SHAPE)
    expected = _expected(references.open_model(folders[family]), PROMPT, 12)
    assert backend.generate(session, PROMPT, GenerateSettings(max_new_tokens=12, stop_tokens=())) == expected


def test_who_listens_is_told_the_same_tokens_one_by_one_while_they_are_made(backend, adapted, family):
    session, _ = adapted(family)
    settings = GenerateSettings(max_new_tokens=12, stop_tokens=())
    told = []
    answer = backend.generate(session, PROMPT, settings, told.append)
    assert told == answer == backend.generate(session, PROMPT, settings)

    class EnoughError(Exception):
        pass

    def listen(token):
        told.append(token)
        if len(told) == 3:
            raise EnoughError

    # Who stops listening stops the work: nothing was made ahead.
    told.clear()
    with pytest.raises(EnoughError):
        backend.generate(session, PROMPT, settings, listen)
    assert told == answer[:3]
    stopped = GenerateSettings(max_new_tokens=12, stop_tokens=(answer[2],))
    told.clear()
    assert backend.generate(session, PROMPT, stopped, told.append) == told == answer[: answer.index(answer[2]) + 1]
