"""Dropout of the adapter's input: masks that are counted and not drawn, the same ones forward and backward."""

import attrs
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from torch.nn import functional

from mens_core.contract import FineTuneContract
from mens_core.errors import ContractError
from mens_core.exchange import GenerateSettings, TrainingState

RATE = 1e-2
P = 0.3
SETTINGS = {"dropout": P, "max_grad_norm": 1e9}
KERNELS = [{}, {"method": "qlora", "dtype": "bfloat16"}]
TOKENS, INTO = 200, 50


def _contract(**fields):
    return FineTuneContract.from_fields(trains=False, **{"dropout": P} | fields)


@pytest.fixture
def dropout(part):
    """The backend's dropout for some fields of a contract."""
    return lambda **fields: part("dropout").dropout_of(_contract(**fields))


@pytest.fixture
def mask(dropout, array):
    """A mask of zeros and ones for fields of a contract and what is folded in."""
    x = array(np.ones((TOKENS, INTO), np.float32))
    return lambda *parts, **fields: np.asarray(dropout(**fields).fold(*parts).kept(x))


@pytest.fixture
def linear(part, array):
    """A linear layer whose A is the identity and whose B and s pass it on: y = x Wᵀ + drop(x)."""

    def build(weight, *, half=False):
        weight = array(weight)
        layer = part("lora").LoraLinear(_half(weight) if half else weight, None, INTO, 1.0)
        for name, values in (("lora_a", np.eye(INTO)), ("lora_b", np.eye(INTO))):
            _put(getattr(layer, name), array(values.astype(np.float32)))
        return layer

    return build


def _put(parameter, values):
    """Into a torch parameter, or a flax one."""
    if isinstance(parameter, torch.Tensor):
        parameter.data = values
    else:
        parameter.set_value(values)


def _half(values):
    return values.to(torch.bfloat16) if isinstance(values, torch.Tensor) else values.astype("bfloat16")


def _float(values):
    return values.float() if isinstance(values, torch.Tensor) else values.astype("float32")


def _numpy(values):
    return values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


@pytest.fixture
def window():
    return [tiny.batch_of(9, 5, seed=1), tiny.batch_of(12, 3, 4, seed=2, supervised=0.9)]


def _start(backend, session, step=0):
    adapter = tiny.random_adapter(backend.state(session).adapter)
    return backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=step))


def _metrics(backend, session, window, step=0, rate=0.0):
    """Loss sum and gradient norm of the step after this many."""
    metrics = backend.step(_start(backend, session, step), window, rate)
    return float(metrics.loss_sum), float(metrics.grad_norm)


def _same(left, right):
    for kind in ("adapter", "optimizer"):
        one, other = getattr(left, kind), getattr(right, kind)
        assert set(one) == set(other)
        assert all(array.tobytes() == other[name].tobytes() for name, array in one.items())


# --- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_a_mask_zeroes_its_share_in_every_column_and_row(mask, p):
    kept = np.stack([mask(step, dropout=p) for step in range(20)])
    assert set(np.unique(kept)) == {0.0, 1.0}
    error = np.sqrt(p * (1 - p) / kept.size)
    assert abs(1 - kept.mean() - p) <= 4 * error
    for axis in (1, 2):
        # 5.5 standard errors, because the largest of 50 or 200 columns or rows is looked at
        counts = kept.mean(axis=(0, axis))
        assert np.abs(1 - counts - p).max() <= 5.5 * error * np.sqrt(len(counts))


def test_neighbours_are_dropped_independently(mask):
    kept = np.stack([mask(step) for step in range(20)]) - (1 - P)
    for left, right in (
        (kept[:, :, 1:], kept[:, :, :-1]),
        (kept[:, 1:], kept[:, :-1]),
        (kept[1:], kept[:-1]),
        (kept[:, 1:, 1:], kept[:, :-1, :-1]),
    ):
        product = left * right
        assert abs(product.mean()) <= 4 * P * (1 - P) / np.sqrt(product.size)


def test_the_same_key_draws_the_same_mask_and_any_other_another(mask):
    first = mask(3, 1, "mlp.up_proj")
    np.testing.assert_array_equal(mask(3, 1, "mlp.up_proj"), first)
    others = [mask(4, 1, "mlp.up_proj"), mask(3, 0, "mlp.up_proj"), mask(3, 1, "mlp.gate_proj"), mask(1, 3)]
    others += [mask(3, 1, "mlp.up_proj", seed=43), mask(3, 1, "mlp.up_proj", seed=2**70)]
    for other in others:
        agreement = (other == first).mean()
        expected = P**2 + (1 - P) ** 2
        assert abs(agreement - expected) <= 5 * np.sqrt(expected * (1 - expected) / first.size)


def test_nobody_else_s_generator_is_read_or_advanced(mask):
    torch.manual_seed(1)
    first, state = mask(0), torch.get_rng_state()
    torch.manual_seed(2)
    np.testing.assert_array_equal(mask(0), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_dropout_there_is_nothing_to_draw(dropout):
    assert dropout(dropout=0) is None


# --- one linear -------------------------------------------------------------------------------------------------


def test_what_is_kept_is_divided_by_the_share_that_is_kept(linear, dropout, array):
    x = np.random.default_rng(0).standard_normal((TOKENS, INTO)).astype(np.float32)
    layer = linear(np.zeros((INTO, INTO), np.float32))
    layer.dropout = dropout()
    dropped = _numpy(layer(array(x)))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], x[kept] / (1 - P), rtol=1e-6)
    assert abs(1 - kept.mean() - P) <= 4 * np.sqrt(P * (1 - P) / kept.size)


def test_the_expected_output_is_the_output_without_dropout(linear, dropout, array):
    random = np.random.default_rng(0)
    x = random.standard_normal((20, INTO)).astype(np.float32)
    layer = linear(random.standard_normal((INTO, INTO)).astype(np.float32))
    plain = _numpy(layer(array(x)))
    masks, total = 200, np.zeros_like(plain, np.float64)
    for step in range(masks):
        layer.dropout = dropout().fold(step)
        total += _numpy(layer(array(x)))
    # An entry's deviation is |x| √(p / (1 - p)); its mean over the masks is that, by the root of their number. Of a
    # thousand entries the largest is looked at.
    bound = 5 * np.abs(x) * np.sqrt(P / (1 - P) / masks) + 1e-5
    assert (np.abs(total / masks - plain) <= bound).all()


def test_bfloat16_is_not_biased_by_a_rounded_factor(linear, dropout, array):
    """In bfloat16 1 / 0.95 is 0.2 % off; roundings of ten thousand entries cancel to a hundredth of that."""
    x = _half(array(np.random.default_rng(0).uniform(1, 2, (TOKENS, INTO)).astype(np.float32)))
    layer = linear(np.zeros((INTO, INTO), np.float32), half=True)
    layer.dropout = own = dropout(dropout=0.05)
    np.testing.assert_array_equal(_numpy(_float(own.kept(x))), _numpy(own.kept(_float(x))))
    found, entered = (_numpy(_float(values)).astype(np.float64) for values in (layer(x), x))
    kept = found != 0
    assert found[kept].sum() * 0.95 / entered[kept].sum() == pytest.approx(1, abs=2e-4)


# --- gradients --------------------------------------------------------------------------------------------------


def _gradients(backend, session, window):
    """Of the mean loss at step 0, out of the first moments, and the metrics."""
    metrics = backend.step(_start(backend, session), window, 0.0)
    moments = backend.state(session).optimizer
    found = {name.removesuffix(".exp_avg"): array / 0.1 for name, array in moments.items() if name.endswith("exp_avg")}
    return found, float(metrics.loss_sum)


def _mask_of(backend, part, array, session, path, shape):
    """The mask that a linear sees in the first batch of the first step."""
    place = (path,)
    if backend.name == "jax":
        layer, _, name = path.removeprefix("model.layers.").partition(".")
        place = (int(layer), name)
    own = part("dropout").dropout_of(session.plan.contract).fold(0, 0, *place)
    return torch.tensor(np.asarray(own.kept(array(np.zeros(shape, np.float32)))))


class _Masked(torch.nn.Module):
    """LoRA under a given mask in the fewest words; the backward pass is autograd's."""

    def __init__(self, base, lora_a, lora_b, mask, backward_mask=None):
        super().__init__()
        self.base, self.lora_a, self.lora_b, self.mask = base, lora_a, lora_b, mask
        self.backward_mask = mask if backward_mask is None else backward_mask

    def forward(self, x):
        dropped = _Product.apply(x, self.mask, self.backward_mask) / (1 - P)
        return self.base(x) + 2.0 * functional.linear(functional.linear(dropped, self.lora_a), self.lora_b)


class _Product(torch.autograd.Function):
    """x · mask, whose gradient may be given another mask by mistake."""

    @staticmethod
    def forward(ctx, x, mask, backward_mask):
        ctx.mask = backward_mask
        return x * mask

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.mask, None, None


def _reference(backend, part, array, folders, session, batch, *, forgets=False):
    """Gradients and loss of transformers' model under autograd with the same masks; the batch is one row."""
    adapter = tiny.random_adapter(backend.state(session).adapter)
    model = references.open_model(folders["llama"]).requires_grad_(requires_grad=False)
    parameters = {name: torch.tensor(values, requires_grad=True) for name, values in adapter.items()}
    for path, module in references.linears(model).items():
        lora_a, lora_b = (parameters[f"{path}.lora_{letter}.weight"] for letter in "AB")
        mask = _mask_of(backend, part, array, session, path, (len(batch.input_ids), lora_a.shape[1]))
        wrong = torch.ones_like(mask) if forgets else None
        model.set_submodule(path, _Masked(module, lora_a, lora_b, mask, wrong))
    total = references.loss_sum(model, batch)
    (total / batch.supervised_tokens).backward()
    return {name: parameter.grad.numpy() for name, parameter in parameters.items()}, float(total.detach())


def _relative(found, expected):
    assert set(found) == set(expected)
    return max(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected)


def test_gradients_are_those_of_autograd_under_the_same_masks(backend, part, array, session_of, folders):
    session, batch = session_of("llama", **SETTINGS), tiny.batch_of(16, seed=5)
    found, total = _gradients(backend, session, [batch])
    expected, loss = _reference(backend, part, array, folders, session, batch)
    assert total == pytest.approx(loss, rel=tolerances.LOSS)
    assert _relative(found, expected) <= tolerances.GRADIENT


def test_a_mask_forgotten_in_the_backward_pass_would_show(backend, part, array, session_of, folders):
    session, batch = session_of("llama", **SETTINGS), tiny.batch_of(16, seed=5)
    found, total = _gradients(backend, session, [batch])
    wrong, loss = _reference(backend, part, array, folders, session, batch, forgets=True)
    assert total == pytest.approx(loss, rel=tolerances.LOSS)
    assert _relative(found, wrong) > 100 * tolerances.GRADIENT


# --- steps ------------------------------------------------------------------------------------------------------


def test_the_same_state_and_step_give_the_same_bits(backend, session_of, window):
    session, found = session_of("llama", **SETTINGS), []
    for _ in range(2):
        metrics = backend.step(_start(backend, session, step=3), window, RATE)
        found.append((float(metrics.loss_sum), float(metrics.grad_norm), backend.state(session)))
    assert found[0][:2] == found[1][:2]
    _same(found[0][2], found[1][2])


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_step_seed_or_place_in_the_window_is_another_loss(backend, session_of, window, kernel):
    fields = SETTINGS | kernel
    session, other = session_of("llama", **fields), session_of("llama", seed=7, **fields)
    losses = {_metrics(backend, session, window, step)[0] for step in range(3)}
    losses.add(_metrics(backend, other, window)[0])
    losses.add(_metrics(backend, session, window[::-1])[0])
    assert len(losses) == 5
    # Twice the same rows are dropped differently.
    once, twice = (_metrics(backend, session, [window[0]] * count)[0] for count in (1, 2))
    assert twice != pytest.approx(2 * once, rel=1e-4)


def test_only_a_step_drops(backend, session_of, window):
    answers = []
    for p in (0.0, P):
        session = session_of("llama", dropout=p)
        if p:
            # Whatever a step leaves behind must not reach the others.
            backend.step(_start(backend, session), window, RATE)
        session = _start(backend, session)
        settings = GenerateSettings(max_new_tokens=4, stop_tokens=())
        answers.append(
            (
                backend.forward(session, window[0]).tobytes(),
                backend.loss(session, window[0]),
                backend.generate(session, [3, 4, 5], settings),
            )
        )
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_resumed_run_is_the_uninterrupted_one(backend, session_of, folders, goes_on, window, kernel):
    fields = SETTINGS | kernel
    session = _start(backend, session_of("llama", **fields))
    goes_on(session, lambda: backend.open(tiny.plan_for(backend, folders["llama"], **fields), tiny.SHAPE), window, RATE)


def test_a_step_that_was_not_finite_does_not_count(backend, session_of, window):
    session = session_of("llama", **SETTINGS)
    backend.step(_start(backend, session), window, RATE)
    state = backend.state(session)
    expected = float(backend.step(session, window, 0.0).loss_sum)
    huge = {name: array * np.float32(1e20) for name, array in state.adapter.items()}
    session = backend.restore(session, attrs.evolve(state, adapter=huge))
    backend.step(session, window, RATE)
    assert backend.state(session).step == state.step
    session = backend.restore(session, attrs.evolve(backend.state(session), adapter=state.adapter))
    assert float(backend.step(session, window, 0.0).loss_sum) == expected


def test_probability_zero_is_no_dropout_bit_for_bit(backend, session_of, window):
    found = []
    for fields in ({}, {"dropout": 0.0}, {"dropout": 0}):
        session = session_of("llama", **fields)
        found.append((_metrics(backend, session, window, rate=RATE), backend.state(session)))
    for metrics, state in found[1:]:
        assert metrics == found[0][0]
        _same(state, found[0][1])


def test_a_batch_without_targets_changes_no_mask(backend, session_of, window):
    silent = attrs.evolve(window[0], targets=np.full_like(window[0].targets, -100))
    session = session_of("llama", **SETTINGS)
    assert _metrics(backend, session, [silent, window[1]]) == _metrics(backend, session, [window[1]])


# --- one backend only -------------------------------------------------------------------------------------------


def test_rows_that_run_one_at_a_time_have_masks_of_their_own(tmp_path):
    from mens_core.plugins import load_backend

    backend = load_backend("torch")
    config = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
    tiny.write_model(tmp_path / "falcon", "falcon", config)
    session = backend.open(tiny.plan_for(backend, tmp_path / "falcon", **SETTINGS), tiny.SHAPE)
    row = tiny.batch_of(9, seed=1)
    one, two = (_metrics(backend, session, [tiny.packed([row] * count)])[0] for count in (1, 2))
    assert not session.packed
    assert two != pytest.approx(2 * one, rel=1e-4)


def test_jax_s_own_generator_gives_the_same_words():
    import jax.numpy as jnp
    from jax.extend.random import threefry_2x32
    from mens_jax.dropout import _threefry

    random = np.random.default_rng(0)
    key, left, right = (jnp.asarray(random.integers(0, 1 << 32, size, np.uint32)) for size in (2, 99, 99))
    expected = threefry_2x32(key, jnp.concatenate([left, right]))[:99]
    np.testing.assert_array_equal(_threefry(key, left, right), expected)


def test_filling_up_a_batch_leaves_the_masks_of_its_tokens():
    import jax.numpy as jnp
    from mens_jax.dropout import dropout_of

    own = dropout_of(_contract())
    short, long = (np.asarray(own.kept(jnp.ones((tokens, INTO)))) for tokens in (40, 64))
    np.testing.assert_array_equal(long[:40], short)


def test_neither_step_nor_seed_nor_probability_is_compiled_in(folders):
    from mens_jax import step

    from mens_core.plugins import load_backend

    backend, sizes = load_backend("jax"), []
    for p, seed in ((0.1, 1), (0.2, 2)):
        plan = tiny.plan_for(backend, folders["llama"], dropout=p, seed=seed)
        session = backend.open(plan, tiny.SHAPE)
        for count in (1, 2):
            backend.step(session, [tiny.batch_of(9, 5)] * count, RATE)
        sizes.append(step._step._cache_size())
    assert sizes[0] == sizes[1]


# --- the contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 1.5, -0.1, float("nan"), "much"])
def test_a_probability_that_is_none_is_refused(p):
    with pytest.raises(ContractError, match="dropout must be a finite number of at least 0 and below 1"):
        _contract(dropout=p)
