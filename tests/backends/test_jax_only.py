"""What only the JAX backend has: compilation, rotary and other options of its own graph, two attentions."""

import subprocess
import sys

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import tiny
import tolerances
from mens_jax import attention, decode, step
from mens_jax._packing import Rows, fill, stack
from mens_jax._sizes import Buckets, Size

from mens_core.contract import FineTuneContract
from mens_core.exchange import BatchShape, GenerateSettings, TrainingState
from mens_core.hf.layout import read_layout
from mens_core.plugins import load_backend

LONG = BatchShape(rows=6, tokens=600, longest_row=60, supervised=400, batches=2)
LLAMA = tiny.CONFIGS["llama"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
QWEN3, GPT2 = tiny.CONFIGS["qwen3"], tiny.CONFIGS["gpt2"]


@pytest.fixture(scope="module")
def backend():
    return load_backend("jax")


@pytest.fixture
def compilations():
    """A list that grows by one name with each function XLA compiles."""
    seen = []

    def listen(event, _seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def model_of(folder, model_type, config, **changes):
    tiny.write_model(folder, model_type, config | changes)
    return folder


# --- compilation ------------------------------------------------------------------------------------------------


def test_a_run_compiles_its_step_at_most_three_times_whatever_the_lengths(backend, folders, compilations):
    session = backend.open(tiny.plan_for(backend, folders["llama"], rank=3), LONG)
    random = np.random.default_rng(0)
    for number in range(12):
        lengths = [random.integers(2, 61, random.integers(1, 7)) for _ in range(random.integers(1, 3))]
        window = [tiny.batch_of(*row, seed=number, supervised=1.0) for row in lengths]
        backend.step(session, window, learning_rate=1e-3 * number)
    assert len([name for name in compilations if name == "_step"]) <= 3


def test_another_run_of_the_same_shape_compiles_nothing(backend, folders, compilations):
    counts = []
    for seed in (1, 2):
        plan = tiny.plan_for(backend, folders["qwen2"], rank=2, seed=seed, weight_decay=0.1 * seed, max_grad_norm=seed)
        session = backend.open(plan, tiny.SHAPE)
        backend.step(session, [tiny.batch_of(9, 5)], learning_rate=1e-3 * seed)
        counts.append(len(compilations))
    assert counts[0] == counts[1]


def test_the_compiled_program_does_not_grow_with_the_layers(backend, tmp_path):
    lines = []
    for layers in (2, 6):
        folder = model_of(tmp_path / str(layers), "llama", LLAMA, num_hidden_layers=layers)
        session = backend.open(tiny.plan_for(backend, folder, method="qlora"), tiny.SHAPE)
        batch = tiny.batch_of(9, 5)
        window = stack([fill(batch, session.buckets.fit([batch]))], 1)
        arguments = (session.structure, session.frozen, session.trained, window)
        program = step._step.lower(*arguments, np.int32(1), np.ones(4, np.float32)).as_text()
        lines.append(program.count("\n"))
    assert lines[0] == lines[1]


def test_every_batch_fits_its_size_and_large_ones_share_theirs():
    buckets = Buckets(LONG)
    sizes = set()
    for tokens in range(1, 601, 7):
        lengths = [60] * (tokens // 60) + [tokens % 60] * (tokens % 60 > 0)
        batch = tiny.batch_of(*lengths[:6])
        size = buckets.fit([batch])
        assert size.holds(Size.of(batch))
        sizes.add(size)
    assert len(sizes) <= 3
    beyond = {buckets.fit([tiny.batch_of(*[100] * 9, length)]) for length in range(40, 100)}
    assert len(beyond) <= 3


def test_filling_up_changes_nothing(backend, folders):
    """The same batch in a size of its own and in one several times as large."""
    batch = tiny.batch_of(7, 12, 3)
    exact = BatchShape(rows=3, tokens=22, longest_row=12, supervised=batch.supervised_tokens, batches=1)
    answers = []
    for shape in (exact, LONG):
        session = backend.open(tiny.plan_for(backend, folders["qwen3"]), shape)
        adapter = tiny.random_adapter(backend.state(session).adapter)
        backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
        logits = backend.forward(session, batch)
        metrics = backend.step(session, [batch], learning_rate=1e-3)
        answers.append((logits, float(metrics.loss_sum), float(metrics.grad_norm)))
    scale = np.abs(answers[0][0]).max()
    assert np.abs(answers[0][0] - answers[1][0]).max() <= tolerances.PACKING * scale
    np.testing.assert_allclose(answers[0][1:], answers[1][1:], rtol=tolerances.GRADIENT)


# --- imports ----------------------------------------------------------------------------------------------------


def test_a_whole_step_imports_no_torch(folders):
    script = f"""
import sys
from pathlib import Path
sys.modules["torch"] = None  # whoever imports it now fails
from mens_core.plugins import load_backend
from mens_core.contract import FineTuneContract
from mens_core.exchange import BatchShape, GenerateSettings
from mens_core.plan import BaseWeights, ExecutionPlan
from mens_core.hf.inventory import middle_coverage
from mens_core.hf.layout import read_layout
import numpy as np
folder = Path({str(folders["gpt2"])!r})
backend = load_backend("jax")
contract = FineTuneContract.from_fields(trains=False, model=str(folder), method="qlora", device="cpu")
layout = read_layout(folder)
plan = ExecutionPlan(contract=contract, layout=layout, backend="jax", execution_kernel="jax_qlora",
    weights=BaseWeights(parameters=1, stored_bytes=1, linears={{}}), limit_bytes=1,
    coverage=middle_coverage(layout, (), ""),
    runbook_kernel="candle_qlora", candle_compat_mode=True, contract_digest="", model_name="m", model_dir=folder,
    tokenizer="hf", device="cpu", dtype="float32", contents={{}}, offers=())
session = backend.open(plan, BatchShape(rows=1, tokens=8, longest_row=8, supervised=8, batches=1))
assert backend.generate(session, [3, 4], GenerateSettings(max_new_tokens=2, stop_tokens=()))
assert not {{"transformers", "bitsandbytes", "safetensors"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- the graph's options ----------------------------------------------------------------------------------------


def check_logits(backend, folder):
    batch = tiny.batch_of(17, 5, 24, 1, seed=3)
    session = backend.open(tiny.plan_for(backend, folder), tiny.SHAPE)
    found, expected = backend.forward(session, batch), references.logits_of(references.open_model(folder), batch)
    assert np.abs(found - expected.detach().numpy()).max() <= tolerances.LOGITS


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
        {"rope_parameters": tiny.CONFIGS["llama"]["rope_parameters"]},
        # as files before transformers 5 have it
        {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    ],
)
def test_rotary_positions_are_those_of_transformers(backend, tmp_path, spelling):
    check_logits(backend, model_of(tmp_path / "model", "llama", LLAMA, **spelling))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": 70}),
        ("gpt2", {"activation_function": "gelu", "reorder_and_upcast_attn": True, "tie_word_embeddings": False}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    ],
)
def test_options_of_the_graph_are_those_of_transformers(backend, tmp_path, model_type, changes):
    config = {"qwen3": QWEN3, "gpt2": GPT2, "llama": LLAMA}[model_type]
    check_logits(backend, model_of(tmp_path / "model", model_type, config, **changes))


def test_a_forgotten_window_would_show(backend, tmp_path):
    """The twin: the same weights without their window are another model."""
    folder = model_of(tmp_path, "qwen3", QWEN3, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    plan, batch = tiny.plan_for(backend, folder), tiny.batch_of(24)
    config = {**plan.layout.config, "use_sliding_window": False}
    forgetful = attrs.evolve(plan, layout=attrs.evolve(plan.layout, config=config))
    found, mistaken = (backend.forward(backend.open(each, tiny.SHAPE), batch) for each in (plan, forgetful))
    np.testing.assert_allclose(found[:6], mistaken[:6], atol=tolerances.LOGITS)
    assert np.abs(found[6:] - mistaken[6:]).max() > 100 * tolerances.LOGITS


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("llama", {"model_type": "mistral"}, "mistral"),
        ("llama", {"hidden_act": "mish"}, "mish"),
        ("gpt2", {"activation_function": "quick_gelu"}, "quick_gelu"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked"),
        ("qwen2", {"layer_types": ["full_attention"]}, "1 layers"),
    ],
)
def test_what_the_graph_cannot_do_is_refused_with_its_reason(backend, folders, family, changes, word):
    layout = read_layout(folders[family])
    config = {**layout.config, **changes}
    known = config["model_type"] == layout.model_type
    layout = attrs.evolve(
        layout, config=config, model_type=config["model_type"], family=layout.family if known else None
    )
    contract = FineTuneContract.from_fields(trains=False, model="m", device="cpu")
    offer = backend.plan(contract, layout, tiny.MACHINE, tiny.WEIGHTS, None)
    assert not offer.feasible
    assert word in offer.reason


# --- the two attentions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
def test_the_attention_of_accelerators_is_that_of_the_cpu(heads, window):
    random = np.random.default_rng(0)
    lengths = jnp.asarray([70, 1, 33, 0], jnp.int32)
    rows, total, real = Rows(lengths, 80), 120, np.arange(120) < 104
    query, key, value, pull = (
        jnp.asarray(random.standard_normal((total, count, 8)), jnp.float32)
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    pull = pull * real[:, None, None]
    window = None if window is None else jnp.int32(window)
    answers = []
    for function in (attention._row_by_row, attention._padded):

        @jax.jit
        def answer(query, key, value, pull, f=function):
            output, back = jax.vjp(lambda *parts: f(*parts, rows, window, 0.3), query, key, value)
            return output, *back(pull)

        output, *gradients = map(np.asarray, answer(query, key, value, pull))
        answers.append([output[real], *gradients])
    for found, expected in zip(*answers, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # What belongs to no row gets no gradient, or it would reach the adapter.
    assert all(not np.any(gradient[~real]) for gradient in answers[0][1:])


# --- ranks of their own -----------------------------------------------------------------------------------------


def test_what_fills_a_stack_up_to_its_largest_rank_stays_zero(backend, folders):
    plan = tiny.plan_for(backend, folders["qwen2"], rank_pattern={"layers.1.self_attn.q_proj": 7}, weight_decay=0.1)
    session = backend.open(plan, tiny.SHAPE)
    state = backend.state(session)
    start = TrainingState(adapter=tiny.random_adapter(state.adapter), optimizer={}, step=0)
    session = backend.restore(session, start)
    for _ in range(3):
        backend.step(session, [tiny.batch_of(9, 5, seed=1)], 1e-2)
    for numbers in (session.trained.adapter, session.trained.exp_avg, session.trained.exp_avg_sq):
        stacks = session.structure.unravel(numbers.vector).model.layers.self_attn.q_proj
        lora_a, lora_b = np.asarray(stacks.lora_a.get_value()), np.asarray(stacks.lora_b.get_value())
        assert (lora_a.shape[:2], lora_b.shape[::2]) == ((2, 7), (2, 7))
        assert not lora_a[0, 4:].any()
        assert not lora_b[0, :, 4:].any()
        assert lora_a[0, :4].all()
        assert lora_a[1].all()


# --- decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_layers_apart_and_the_scan_of_accelerators_decode_the_same_tokens(backend, folders, method, monkeypatch):
    session = backend.open(tiny.plan_for(backend, folders["qwen2"], method=method), tiny.SHAPE)
    adapter = tiny.random_adapter(backend.state(session).adapter)
    session = backend.restore(session, TrainingState(adapter=adapter, optimizer={}, step=0))
    settings = GenerateSettings(max_new_tokens=12, stop_tokens=())
    apart = backend.generate(session, [5, 17, 80], settings)
    monkeypatch.setattr(decode, "_layers_apart", lambda _: None)
    assert backend.generate(session, [5, 17, 80], settings) == apart


def test_layers_apart_lie_where_their_stack_does(backend, folders):
    session = backend.open(tiny.plan_for(backend, folders["qwen2"]), tiny.SHAPE)
    model = session.structure.model(session.frozen, session.trained.adapter)
    stack = np.asarray(model.decoder.blocks.mlp.up_proj.weight.get_value())
    layers = decode._layers_apart(model)
    assert len(layers) == len(stack)
    for layer, weight in zip(layers, stack, strict=True):
        assert np.shares_memory(np.asarray(layer.mlp.up_proj.weight.get_value()), weight)
