"""How large updates are and how far apart: what the formed matrices say, without forming them."""

import json

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import NORM

from mens_core.artifacts.lora import LoraPair
from mens_core.artifacts.norms import distance, update_norm
from mens_core.artifacts.tensors import write_tensors
from mens_core.cli import main

SIDES = st.integers(1, 9)


def pair_of(seed, out, into, rank, scale=1.5):
    draw = np.random.default_rng(seed).standard_normal
    return LoraPair(a=draw((rank, into), np.float32), b=draw((out, rank), np.float32), scale=scale)


def formed(pair):
    return pair.scale * pair.b.astype(np.float64) @ pair.a.astype(np.float64)


@given(seed=st.integers(0, 9), out=SIDES, into=SIDES, ranks=st.tuples(SIDES, SIDES), scale=st.floats(-4, 4))
def test_norm_and_difference_are_those_of_the_formed_matrices(seed, out, into, ranks, scale):
    left, right = pair_of(seed, out, into, ranks[0]), pair_of(seed + 1, out, into, ranks[1], scale)
    found = distance(left, right)
    size = np.linalg.norm(formed(left)) + np.linalg.norm(formed(right))
    for number, matrix in (
        (found.left, formed(left)),
        (found.right, formed(right)),
        (found.difference, formed(left) - formed(right)),
    ):
        assert abs(number - np.linalg.norm(matrix)) <= NORM * size
    # the scale has a say
    assert update_norm(attrs.evolve(left, scale=3.0)) == pytest.approx(2 * found.left)


def test_the_same_update_is_0_apart_and_its_opposite_2():
    pair = pair_of(0, 30, 20, 4)
    assert distance(pair, pair).difference == 0
    assert distance(pair, attrs.evolve(pair, scale=-pair.scale)).relative == pytest.approx(2)
    zero = attrs.evolve(pair, scale=0.0)
    assert distance(zero, zero).relative == 0


def test_other_factors_of_the_same_product_are_no_difference():
    pair = pair_of(0, 30, 20, 4)
    # powers of two and another order change no bit of the product
    power = np.array([0.5, 2, 4, 1], np.float32)
    other = LoraPair(a=(pair.a / power[:, None])[::-1], b=(pair.b * power)[:, ::-1], scale=pair.scale)
    assert distance(pair, other).relative < NORM
    assert distance(pair, attrs.evolve(other, a=other.a[::-1])).relative > 0.5


def test_a_difference_far_below_half_the_digits_is_found_where_gram_matrices_lose_it():
    pair = pair_of(0, 300, 200, 8)
    other = attrs.evolve(pair, scale=pair.scale * (1 + 1e-11))
    assert distance(pair, other).relative == pytest.approx(1e-11, rel=1e-3)
    b = np.concatenate([pair.scale * pair.b.astype(float), -other.scale * other.b.astype(float)], axis=1)
    a = np.concatenate([pair.a, other.a]).astype(float)
    by_gram = np.sqrt(abs(((b.T @ b) * (a @ a.T)).sum())) / update_norm(pair)
    assert abs(by_gram - 1e-11) > 1e-12


def _write(folder, pairs, **changes):
    folder.mkdir()
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b
    write_tensors(folder / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [*pairs]} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_adapter_info_says_what_is_in_it(tmp_path, capsys):
    pairs = {f"model.layers.{n}.self_attn.{name}": pair_of(n, 5, 3, 4) for n in (0, 1) for name in ("q_proj", "v_proj")}
    path = _write(tmp_path / "one", pairs, base_model_name_or_path="somebody/a-base")
    assert main(["adapter", "info", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["targets"] == {"self_attn.q_proj": 2, "self_attn.v_proj": 2}
    assert (found["format"], found["method"], found["base_model"]) == ("peft", None, "somebody/a-base")
    assert (found["modules"], found["parameters"], found["ranks"], found["scales"]) == (4, 128, [4], [1.5])
    norms = {module: np.linalg.norm(formed(pair)) for module, pair in pairs.items()}
    for module, norm in norms.items():
        assert found["updates"][module] == {"rank": 4, "scale": 1.5, "shape": [5, 3], "norm": pytest.approx(norm)}
    assert found["norm"] == pytest.approx(np.hypot.reduce([*norms.values()]))
    assert main(["adapter", "info", path]) == 0
    assert "self_attn.q_proj" in capsys.readouterr().out
    assert main(["adapter", "info", str(tmp_path / "none")]) == 2
    assert "there is no such adapter" in capsys.readouterr().err


def test_adapter_diff_says_what_is_in_one_alone_and_how_far_the_rest_is_apart(tmp_path, capsys):
    pairs = {name: pair_of(number, 5, 3, 4) for number, name in enumerate(("l.0.q", "l.0.k", "l.0.v"))}
    left = _write(tmp_path / "left", {name: pairs[name] for name in ("l.0.q", "l.0.k")})
    moved = attrs.evolve(pairs["l.0.k"], b=pairs["l.0.k"].b * np.float32(1.25))
    right = _write(tmp_path / "right", {"l.0.k": moved, "l.0.v": pairs["l.0.v"]})
    assert main(["adapter", "diff", left, right, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["only_left"], found["only_right"], [*found["modules"]]) == (["l.0.q"], ["l.0.v"], ["l.0.k"])
    assert found["modules"]["l.0.k"]["relative"] == pytest.approx(0.2)
    matrices = {name: formed(pair) for name, pair in pairs.items()}
    apart = np.linalg.norm([matrices["l.0.q"], matrices["l.0.v"], 0.25 * matrices["l.0.k"]])
    larger = max(
        np.linalg.norm([matrices["l.0.q"], matrices["l.0.k"]]),
        np.linalg.norm([matrices["l.0.v"], 1.25 * matrices["l.0.k"]]),
    )
    assert found["relative_difference"] == pytest.approx(apart / larger)
    assert main(["adapter", "diff", left, left]) == 0
    assert "0 apart" in capsys.readouterr().out
    other = _write(tmp_path / "other", {"l.0.k": pair_of(0, 6, 3, 4)})
    assert main(["adapter", "diff", left, other]) == 2
    assert "l.0.k has shape (5, 3) in one and (6, 3) in the other" in capsys.readouterr().err
