"""torch's float32 products by oneDNN: the same numbers as by PyTorch's own way, wherever they are taken."""

import numpy as np
import pytest
import tiny
import torch
from mens_torch import _processor, _products, _widened
from mens_torch._products import linear, products
from torch.nn import functional

from mens_core.exchange import TrainingState
from mens_core.plugins import load_backend

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def taken(monkeypatch):
    """Every product of float32 goes to oneDNN, by pieces of 8, 4, 2 and 1 rows; they are counted."""
    calls, own = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(_products, "_held_back", lambda: True)
    monkeypatch.setattr(_products, "_MANY", 1)
    monkeypatch.setattr(_products, "_ROWS", (8, 4, 2, 1))
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: calls.append(given) or own(*given))
    return calls


@pytest.fixture
def processor_is(monkeypatch, tmp_path):
    """Lets Linux tell this of the processor, or nothing."""

    def tell(text):
        told = tmp_path / "cpuinfo"
        told.unlink(missing_ok=True)
        if text is not None:
            told.write_text(text, encoding="utf-8")
        for function in (_processor.is_amd, _processor.multiplies_bfloat16):
            function.cache_clear()

    monkeypatch.setattr(_processor, "_CPUINFO", tmp_path / "cpuinfo")
    yield tell
    monkeypatch.undo()
    tell(None)


def _drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _near(found, left, right):
    """Within what sums of float32 may lose: k · 2⁻²⁴ of the sum of the absolute values (Higham 2002, section 3.1)."""
    assert found.dtype == torch.float32
    bound = (left.shape[-1] + 1) * 2**-24 * (left.double().abs() @ right.double().abs())
    return bool(((found.double() - left.double() @ right.double()).abs() <= bound).all())


def test_products_are_exact_to_float32(taken):
    x, weight, bias = _drawn(9, 33), _drawn(20, 33, seed=1), _drawn(20, seed=2)
    assert _near(linear(x, weight), x, weight.t())
    assert _near(products(x).product(x, weight.t()), x, weight.t())
    torch.testing.assert_close(linear(x, weight, bias), linear(x, weight) + bias, rtol=0, atol=1e-5)
    assert len(taken) == 8, "a piece of 8 rows and one of 1, four times"
    assert not _near(linear(x.bfloat16().float(), weight), x, weight.t()), "the twin: rounded to bfloat16"


def test_views_and_leading_axes_are_what_they_stand_for(taken):
    x, weight = _drawn(2, 5, 33), _drawn(33, 20, seed=1)
    torch.testing.assert_close(linear(x, weight.t()), x @ weight, rtol=0, atol=1e-5)
    assert linear(x, weight.t()).shape == (2, 5, 20)
    across = _drawn(33, 9).t()
    torch.testing.assert_close(products(across).product(across, weight), across @ weight, rtol=0, atol=1e-5)
    assert [len(rows) for rows, *_ in taken] == [8, 2, 8, 2, 8, 1]


def test_onednn_sees_few_shapes_whatever_the_lengths(taken, monkeypatch):
    """It keeps memory for each shape: half a megabyte, by which a run of ninety lengths grew to thrice its plan."""
    monkeypatch.setattr(_products, "_ROWS", (16, 8, 4))
    weight, bias = _drawn(20, 33, seed=1), _drawn(20, seed=2)
    for rows in range(1, 70):
        x = _drawn(rows, 33, seed=rows)
        assert _near(linear(x, weight), x, weight.t()), rows
        torch.testing.assert_close(linear(x, weight, bias), linear(x, weight) + bias, rtol=0, atol=1e-5)
    assert {len(rows) for rows, *_ in taken} == {16, 8, 4}
    assert sum(len(rows) for rows, *_ in taken) == 3 * sum(rows // 4 * 4 for rows in range(1, 70))


def test_pieces_too_small_for_it_are_left_to_pytorch(taken, monkeypatch):
    monkeypatch.setattr(_products, "_MANY", 4 * 33 * 20)
    x, weight = _drawn(15, 33), _drawn(20, 33, seed=1)
    assert _near(linear(x, weight), x, weight.t())
    assert [len(rows) for rows, *_ in taken] == [8, 4]


def test_a_product_is_added_where_that_is_asked_for(taken, monkeypatch):
    monkeypatch.setattr(_products, "_COLUMNS", 8)
    left, right, room = _drawn(13, 33), _drawn(33, 20, seed=1), _drawn(13, 20, seed=2)
    for rows in ((8, 4, 2, 1), (8,)):
        monkeypatch.setattr(_products, "_ROWS", rows)
        out = room.clone()
        assert products(left).product(left, right, out) is out
        torch.testing.assert_close(out, room + left @ right, rtol=0, atol=1e-5)
    assert {len(rows) for rows, *_ in taken} == {8, 4, 1}
    monkeypatch.setattr(_products, "_held_back", lambda: False)
    assert torch.equal(products(left).product(left, right, room.clone()), torch.addmm(room, left, right))


def test_what_has_its_place_is_written_there(taken, monkeypatch):
    monkeypatch.setattr(_products, "_COLUMNS", 8)
    x, weight, room = _drawn(9, 33), _drawn(20, 33, seed=1), torch.full((12, 20), 7.0)
    assert products(x).linear_into(room[:9], x, weight).data_ptr() == room.data_ptr()
    assert _near(room[:9], x, weight.t())
    assert bool((room[9:] == 7.0).all())
    assert len(taken) == 6, "two pieces, by three of the columns"


def test_small_ones_and_bfloat16_go_pytorchs_own_way(taken, monkeypatch):
    x, weight = _drawn(9, 33), _drawn(20, 33, seed=1)
    monkeypatch.setattr(_widened, "_has_bfloat16", lambda: True)
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), functional.linear(x.bfloat16(), weight.bfloat16()))
    monkeypatch.setattr(_products, "_MANY", 9 * 33 * 20 + 1)
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
    assert torch.equal(products(x).linear_into(torch.empty(9, 20), x, weight), x @ weight.t())
    assert torch.equal(products(x).product(x, weight.t()), x @ weight.t())
    assert not taken


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_it_is_the_processor_that_decides(monkeypatch, processor_is, vendor, capability, expected):
    processor_is(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert _products._held_back.__wrapped__() is expected
    processor_is(None)
    assert _products._held_back.__wrapped__() is False


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512vl avx512dq\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", False),
        ("flags\t\t: fpu avx2 avx_vnni avx_ne_convert\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        (None, False),
    ],
)
def test_what_is_told_of_a_processor_decides_about_bfloat16(processor_is, told, expected):
    processor_is(told)
    assert _processor.multiplies_bfloat16() is expected


def test_what_is_told_of_this_processor_is_what_pytorch_finds():
    assert _processor.multiplies_bfloat16() is torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    "fields",
    [{}, {"dropout": 0.3}, {"method": "qlora"}, {"targets": ("q_proj",)}],
    ids=["lora", "dropout", "qlora", "few of its linears"],
)
def test_a_step_has_the_slopes_of_pytorchs_own_products(folders, taken, monkeypatch, fields):
    def moments():
        backend = load_backend("torch")
        session = backend.open(tiny.plan_for(backend, folders["llama"], **fields), tiny.SHAPE)
        adapter = tiny.random_adapter(backend.state(session).adapter)
        session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
        backend.step(session, [tiny.batch_of(9, 5), tiny.batch_of(12, 3, 4, seed=2)], 0.0)
        return backend.state(session).optimizer

    found = moments()
    assert len(taken) > 50
    monkeypatch.setattr(_products, "_held_back", lambda: False)
    for name, expected in moments().items():
        # Sums in another order through two layers: 2e-6 of the largest was seen.
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name)
