"""What an offer says of memory and time, held against sessions that are really open."""

import inspect

import attrs
import numpy as np
import pytest
import tiny

from mens_core.contract import FineTuneContract
from mens_core.costs import COSTS
from mens_core.exchange import BatchShape
from mens_core.hf.layout import read_layout
from mens_core.plan import MEMORY_PARTS, Speed, Workload
from mens_core.plugins import load_backend

WORK = Workload(
    shape=BatchShape(rows=2, tokens=512, longest_row=256, supervised=160, batches=1),
    batches=1,
    tokens=512,
    supervised=160,
    pairs=2 * 256**2,
    rows=2,
    row_tokens=3.0,
    steps=1,
    source="a test",
)


@pytest.fixture
def offer_of(backend, folders):
    """The backend's offer for a family."""

    def offer(family, work=WORK, machine=tiny.MACHINE, **fields):
        contract = FineTuneContract.from_fields(
            trains=False, model=str(folders[family]), **{"device": "cpu", "rank": 4} | fields
        )
        return backend.plan(contract, read_layout(folders[family]), machine, tiny.weights_of(folders[family]), work)

    return offer


def _held(backend, session):
    """Bytes of the base as it is held, dense and in NF4."""
    if backend.name == "torch":
        network = session.model.network
        frozen = [(module.frozen, module.bias) for module in network.modules() if hasattr(module, "frozen")]
        trained = {*map(id, session.parameters.values())}
        rest = [tensor for tensor in network.parameters() if id(tensor) not in trained and tensor.numel()]
        tensors = [tensor for pair in frozen for tensor in pair if tensor is not None] + rest
    else:
        from flax import nnx

        leaves = nnx.to_flat_state(session.frozen)
        tensors = [leaf.get_value() for path, leaf in leaves if path[-1] in {"weight", "bias", "frozen"}]
    packed = [tensor for tensor in tensors if hasattr(tensor, "codes")]
    dense = [tensor for tensor in tensors if not hasattr(tensor, "codes")]
    parts = [getattr(weight, name) for weight in packed for name in ("codes", "absmax", "nested_absmax", "offset")]
    return sum(tensor.nbytes for tensor in dense), sum(part.nbytes for part in parts if part is not None)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_base_takes_as_many_bytes_as_were_offered(backend, offer_of, session_of, family, method):
    dense, packed = _held(backend, session_of(family, method=method))
    memory = offer_of(family, method=method).memory
    assert memory["base"] == dense
    assert memory.get("quantised_base", 0) == packed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_takes_as_many_bytes_in_either_number_format(backend, offer_of, session_of, dtype):
    dense, _ = _held(backend, session_of("llama", dtype=dtype))
    assert offer_of("llama", dtype=dtype).memory["base"] == dense


@pytest.mark.parametrize("patterns", [{}, {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 9}])
def test_an_adapter_with_patterns_takes_as_many_bytes_as_were_offered(backend, offer_of, session_of, patterns):
    session = session_of("llama", targets=("q_proj", "down_proj"), rank_pattern=tuple(patterns.items()))
    memory = offer_of("llama", targets=("q_proj", "down_proj"), rank_pattern=patterns).memory
    held = sum(array.nbytes for array in backend.state(session).adapter.values())
    if backend.name == "jax":
        # A stack has its largest rank: 9 in the layer beside the one that has 9, whose own is 4.
        filled = 4 * 5 * (48 + 50) if patterns else 0
        assert session.trained.adapter.vector.nbytes == held + filled
        held += filled
    # JAX holds the gradients of the window and those of the batch.
    gradients = held * (2 if backend.name == "jax" else 1)
    assert (memory["adapter"], memory["optimizer"], memory["gradients"]) == (held, 2 * held, gradients)


WHOLE = {
    "gpt2": ("wte", "ln_f", "ln_1"),
    "llama": ("lm_head", "norm"),
    "qwen2": ("lm_head", "embed_tokens"),
    "qwen3": ("lm_head", "q_norm", "input_layernorm"),
}


@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("qlora", "bfloat16")])
def test_what_is_trained_whole_takes_the_bytes_that_were_offered(backend, offer_of, session_of, family, method, dtype):
    fields = {"method": method, "dtype": dtype, "modules_to_save": WHOLE[family]}
    session, memory = session_of(family, **fields), offer_of(family, **fields).memory
    dense, packed = _held(backend, session)
    assert (memory["base"], memory.get("quantised_base", 0)) == (dense, packed)
    held = {name: array.nbytes for name, array in backend.state(session).adapter.items()}
    adapter, head = sum(held.values()), held.get("lm_head.weight", 0)
    assert (memory["adapter"], memory["optimizer"]) == (adapter, 2 * adapter)
    # JAX holds the gradients of the window and those of the batch, torch beside the window's the batch's of the head.
    assert memory["gradients"] == (2 * adapter if backend.name == "jax" else adapter + head)
    # The start, a checkpoint's copy, and two moments of it.
    whole = sum(size for name, size in held.items() if ".lora_" not in name)
    assert memory["states"] == 4 * whole
    without = offer_of(family, **fields | {"modules_to_save": ()}).memory
    assert memory["logits"] >= without["logits"]
    assert without["states"] == 0


def test_scales_that_are_not_quantised_take_as_many_bytes_as_were_offered(backend, offer_of, session_of):
    _, packed = _held(backend, session_of("llama", method="qlora", double_quant=False, block_size=128))
    offer = offer_of("llama", method="qlora", double_quant=False, block_size=128)
    assert offer.memory["quantised_base"] == packed


def test_the_adapter_takes_as_many_bytes_as_were_offered(backend, offer_of, session_of, family):
    state = backend.state(session_of(family))
    assert offer_of(family).memory["adapter"] == sum(array.nbytes for array in state.adapter.values())


def test_adapter_and_optimizer_of_some_linears_take_as_many_bytes_as_were_offered(backend, offer_of, session_of):
    session = session_of("gpt2", targets=("c_attn",))
    backend.step(session, [tiny.batch_of(9, 12)], 1e-3)
    state, memory = backend.state(session), offer_of("gpt2", targets=("c_attn",)).memory
    assert memory["adapter"] == sum(array.nbytes for array in state.adapter.values())
    assert memory["optimizer"] == sum(array.nbytes for array in state.optimizer.values())


@pytest.mark.parametrize(("dtype", "native"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
def test_the_torch_backend_keeps_what_it_says_for_the_backward_pass(folders, monkeypatch, family, dtype, native):
    import torch
    from mens_torch import _remade, _widened
    from mens_torch.memory import _kept

    from mens_core.plugins import load_backend

    monkeypatch.setattr(_remade, "_MANY", 1)
    monkeypatch.setattr(_widened, "_has_bfloat16", lambda: native)
    backend = load_backend("torch")
    norms = {"gpt2": ("ln_1", "ln_2"), "qwen3": ("q_norm", "k_norm")}.get(family, ("input_layernorm",))
    some = ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")
    for targets, whole in ((("all-linear",), ()), (some, ()), (("all-linear",), norms)):
        plan = tiny.plan_for(backend, folders[family], targets=targets, modules_to_save=whole, dtype=dtype)
        session = backend.open(plan, tiny.SHAPE)
        batch = tiny.batch_of(20, 28)
        own = {tensor.untyped_storage().data_ptr() for tensor in session.model.network.state_dict().values()}
        kept = {}

        def note(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        from mens_torch.step import _loss_sum

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            total = _loss_sum(session, batch)
        said = 48 * _kept(plan.contract, plan.layout, tiny.weights_of(folders[family]), dtype)
        # Besides: a few numbers a row of each norm and attention, the rotary tables, the last norm and the loss.
        beside = 4 * 48 * (plan.layout.num_layers * 8 * plan.layout.num_heads + 4 * plan.layout.hidden_size)
        assert float(total.detach()) > 0
        width = plan.layout.num_heads * plan.layout.head_dim
        # By blocks attention keeps its result only for an adapter behind it, and no sums; a plan takes them for kept.
        spared = 0 if native or (targets != some and not whole) else 48 * 2 * plan.layout.num_layers * width
        assert said - spared <= sum(kept.values()) <= said + beside


def test_what_torch_widens_takes_memory_where_the_processor_does_not_multiply_bfloat16(folders, monkeypatch):
    from mens_torch import memory

    backend = load_backend("torch")

    def offered(dtype, native):
        monkeypatch.setattr(memory, "multiplies_bfloat16", lambda: native)
        contract = FineTuneContract.from_fields(trains=False, model=str(folders["llama"]), device="cpu", dtype=dtype)
        layout = read_layout(folders["llama"])
        return backend.plan(contract, layout, tiny.MACHINE, tiny.weights_of(folders["llama"]), WORK).memory

    native, widened = (offered("bfloat16", native) for native in (True, False))
    assert widened["activations"] > native["activations"]
    assert {**widened, "activations": 0, "loading": 0} == {**native, "activations": 0, "loading": 0}
    assert offered("float32", native=True) == offered("float32", native=False)


def test_the_torch_backend_counts_the_chunk_and_the_piece_that_its_products_use():
    from mens_torch import _widened, loss, memory

    assert _widened._PIECE == memory._PIECE
    assert inspect.signature(loss.supervised_loss).parameters["chunk"].default == memory._CHUNK
    assert loss._IN_CACHE == memory._IN_CACHE


def test_the_torch_backend_counts_the_loops_that_it_compiles(folders):
    backend = load_backend("torch")

    def framework(family, tokens=1 << 20, **fields):
        contract = FineTuneContract.from_fields(
            trains=False, model=str(folders[family]), **{"device": "cpu", "rank": 4} | fields
        )
        work = attrs.evolve(WORK, shape=attrs.evolve(WORK.shape, tokens=tokens))
        offer = backend.plan(
            contract, read_layout(folders[family]), tiny.MACHINE, tiny.weights_of(folders[family]), work
        )
        return offer.memory["framework"]

    without = framework("gpt2", tokens=16)
    assert framework("gpt2") > without
    assert framework("llama") == without
    assert framework("llama", dtype="bfloat16") == framework("gpt2", dtype="bfloat16") == framework("gpt2")
    assert framework("gpt2", method="qlora") == framework("gpt2", method="qlora", tokens=16), "it has them anyway"


@pytest.mark.parametrize("part", ["tokens", "supervised", "longest_row"])
def test_a_larger_batch_is_offered_at_more_memory(offer_of, family, part):
    shape = attrs.evolve(WORK.shape, **{part: 4 * getattr(WORK.shape, part)})
    less, more = offer_of(family), offer_of(family, attrs.evolve(WORK, shape=shape))
    assert set(less.memory) <= set(MEMORY_PARTS)
    assert more.peak_bytes >= less.peak_bytes
    assert more.peak_bytes > less.peak_bytes or part != "tokens"


def test_dropout_is_offered_at_more_memory_for_what_a_layer_makes_and_none_that_stays(offer_of, family):
    without, dropping = (offer_of(family, dropout=p).memory for p in (0.0, 0.1))
    assert dropping["activations"] >= without["activations"]
    assert {**dropping, "activations": 0, "loading": 0} == {**without, "activations": 0, "loading": 0}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_layers_that_are_computed_again_are_offered_at_less_memory_and_more_time(offer_of, family, method):
    kept, again = (offer_of(family, method=method, gradient_checkpointing=again) for again in (False, True))
    assert again.memory["activations"] <= kept.memory["activations"]
    assert {**again.memory, "activations": 0, "loading": 0} == {**kept.memory, "activations": 0, "loading": 0}
    # A forward pass is less than half of a step.
    assert kept.seconds_per_step < again.seconds_per_step < 1.5 * kept.seconds_per_step


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_deep_model_s_layers_computed_again_take_less(part, folders, family, device):
    layout, weights = read_layout(folders[family]), tiny.weights_of(folders[family])
    # six times the two layers, and of each linear as many
    deep = attrs.evolve(layout, num_layers=6 * layout.num_layers)
    linears = {f"{turn}{path}": shape for turn in range(6) for path, shape in weights.linears.items()}
    work = attrs.evolve(WORK, shape=attrs.evolve(WORK.shape, tokens=1 << 13))
    kept, again = (
        part("memory").memory_parts(
            FineTuneContract.from_fields(trains=False, gradient_checkpointing=again, rank=4),
            deep,
            attrs.evolve(weights, linears=linears),
            work,
            device,
            "float32",
        )
        for again in (False, True)
    )
    assert again["activations"] < 0.75 * kept["activations"]
    assert {**again, "activations": 0, "loading": 0} == {**kept, "activations": 0, "loading": 0}


def test_qlora_is_offered_at_less_base_than_lora(offer_of, family):
    lora, qlora = (offer_of(family, method=method).memory for method in ("lora", "qlora"))
    assert qlora["base"] + qlora["quantised_base"] < lora["base"]


def test_without_a_workload_nothing_is_estimated(offer_of):
    offer = offer_of("llama", None)
    assert (offer.memory, offer.seconds_per_step, offer.seconds_source) == ({}, None, "")


def test_a_table_s_seconds_say_so_and_name_the_way_to_measured_ones(offer_of):
    offer = offer_of("llama")
    assert offer.seconds_per_step > 0
    assert "table" in offer.seconds_source
    assert "doctor --measure" in offer.seconds_source


def test_a_measured_speed_is_preferred_to_the_table(backend, offer_of):
    speed = Speed(seconds=dict.fromkeys(COSTS, 0.0) | {"layers": 0.5}, source="measured here")
    machine = attrs.evolve(tiny.MACHINE, speeds={f"{backend.name}_lora cpu float32": speed})
    offer = offer_of("llama", machine=machine)
    assert (offer.seconds_per_step, offer.seconds_source) == (2 * 0.5, "measured here")
    assert "table" in offer_of("llama", machine=machine, method="qlora").seconds_source


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_every_device_and_format_has_a_table_and_memory(part, folders, backend, method, dtype, device):
    offers, memory = part("offer"), part("memory")
    speed = offers._typical(f"{backend.name}_{method}", device, dtype, tiny.MACHINE)
    assert set(speed.seconds) == set(COSTS)
    contract = FineTuneContract.from_fields(trains=False, model=str(folders["qwen3"]), method=method)
    parts = memory.memory_parts(
        contract, read_layout(folders["qwen3"]), tiny.weights_of(folders["qwen3"]), WORK, device, dtype
    )
    assert set(parts) <= set(MEMORY_PARTS)
    assert all(isinstance(size, int) and size >= 0 for size in parts.values())


def test_a_batch_that_xla_fills_up_is_counted_as_it_is_computed():
    from mens_jax.offer import _filled_up

    work = attrs.evolve(WORK, shape=attrs.evolve(WORK.shape, tokens=1000), tokens=600, supervised=90)
    # three quarters of 1000, in sixteens
    assert _filled_up(work).tokens == 752
    assert np.isclose(_filled_up(WORK).tokens, 512)
