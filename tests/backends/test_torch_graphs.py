"""The torch backend runs any graph of transformers: packed where that is proved right, else row by row."""

import ctypes
import itertools
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import attrs
import bitsandbytes.functional as bitsandbytes
import numpy as np
import pytest
import references
import tiny
import tolerances
import torch
from hypothesis import given
from hypothesis import strategies as st
from mens_torch.lora import LoraLinear
from mens_torch.model import _logits_after
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mens_core.exchange import GenerateSettings, NF4Spec
from mens_core.nf4 import CODEBOOKS
from mens_core.plugins import load_backend

COMMON = tiny.CONFIGS["qwen2"] | {"intermediate_size": 64}  # experts are multiplied in groups, in whole 16 bytes
# model type → (config, rows packed?, logits = hidden · headᵀ?)
GRAPHS = {
    "mistral": (COMMON | {"sliding_window": 4}, True, True),
    "gemma2": (COMMON | {"head_dim": 12, "sliding_window": 4, "attn_logit_softcapping": 5.0}, True, False),
    "gpt_oss": (
        COMMON
        | {
            "head_dim": 12,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        True,
        True,
    ),
    "mixtral": (COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}, True, True),
    "cohere": (COMMON | {"logit_scale": 0.5}, True, False),
    "phi": (COMMON, True, False),
    "opt": (
        {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 48, "pad_token_id": 0},
        True,
        True,
    ),
    # positions enter as a bias on the scores
    "falcon": ({"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}, False, True),
    # convolutions run over the ends of rows
    "lfm2": (COMMON | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, False, True),
    # attends within chunks, and has no decoder that could be called by itself
    "llama4_text": (
        COMMON
        | {"head_dim": 12, "num_local_experts": 2, "attention_chunk_size": 4, "intermediate_size_mlp": 50}
        | {"tie_word_embeddings": False},
        False,
        False,
    ),
}
GRAPHS["falcon"][0]["alibi"] = True
ROW = torch.arange(5)


@pytest.fixture(scope="module")
def backend():
    return load_backend("torch")


@pytest.fixture(scope="module", params=GRAPHS)
def graph(request, backend, tmp_path_factory):
    """(model type, its folder, a session on it)."""
    folder = tmp_path_factory.mktemp("graphs") / request.param
    tiny.write_model(folder, request.param, GRAPHS[request.param][0])
    return request.param, folder, backend.open(tiny.plan_for(backend, folder), tiny.SHAPE)


@pytest.fixture
def batch():
    return tiny.batch_of(9, 5, 12, 5)


def test_the_trial_finds_how_a_graph_may_be_run(graph):
    model_type, _, session = graph
    assert (session.packed, session.linear_head) == GRAPHS[model_type][1:]


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("named", ["gpt2", "llama", "qwen3"])
def test_the_trial_reads_every_weight_three_times(backend, folders, monkeypatch, named, method):
    """A row alone and two batches; of a large model, once more is gigabytes."""
    called, own = Counter(), LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda layer, x: called.update([layer]) or own(layer, x))
    session = backend.open(tiny.plan_for(backend, folders[named], method=method), tiny.SHAPE)
    assert [called[layer] for layer in session.model.adapters.values()] == [3] * len(session.model.adapters)
    assert "forward" not in vars(session.model.decoder), "what was known of it goes with the trial"


class _Network(torch.nn.Module):
    """Asks its decoder for a row, and for something more if that is so."""

    def __init__(self, **more):
        super().__init__()
        self.decoder, self.more = torch.nn.Identity(), more
        self.decoder.forward = lambda input_ids, **_: (input_ids * 1.0,)

    def forward(self, input_ids, use_cache):
        (hidden,) = self.decoder(input_ids, use_cache=use_cache, return_dict=True, past_key_values=None, **self.more)
        return SimpleNamespace(logits=hidden)


@pytest.mark.parametrize(("more", "known"), [({}, True), ({"scale": 2.0}, False), ({"input_embeds": ROW}, False)])
def test_what_a_decoder_gave_is_taken_for_the_same_question_alone(more, known):
    network, output = _Network(**more), (torch.zeros(1, len(ROW)),)
    own = network.decoder.forward
    found = _logits_after(SimpleNamespace(network=network, decoder=network.decoder), ROW, output)
    assert torch.equal(found, output[0] if known else ROW[None] * 1.0)
    assert network.decoder.forward is own


def test_logits_are_those_of_transformers(backend, graph, batch):
    _, folder, session = graph
    with torch.no_grad():
        expected = references.logits_of(references.open_model(folder), batch).numpy()
    assert np.abs(backend.forward(session, batch) - expected).max() <= tolerances.LOGITS * max(
        1, np.abs(expected).max() / 10
    )


def test_a_step_is_that_of_plain_autograd(backend, graph, batch):
    _, folder, session = graph
    start = backend.state(session)
    adapter = tiny.random_adapter(start.adapter)
    session = backend.restore(session, type(start)(adapter=adapter, optimizer={}, step=0))
    metrics = backend.step(session, [batch], 0.0)
    model = references.open_model(folder)
    model.requires_grad_(requires_grad=False)
    parameters = {name: torch.tensor(array, requires_grad=True) for name, array in adapter.items()}
    for path, module in references.linears(model).items():
        if f"{path}.lora_A.weight" in parameters:
            model.set_submodule(path, _Adapted(module, *(parameters[f"{path}.lora_{part}.weight"] for part in "AB")))
    expected = references.loss_sum(model, batch)
    expected.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters.values()]) / batch.supervised_tokens
    expected = float(expected.detach())
    assert float(metrics.loss_sum) == pytest.approx(expected, rel=tolerances.LOSS)
    assert float(metrics.grad_norm) == pytest.approx(float(gradients.norm()), rel=tolerances.GRADIENT)
    assert backend.loss(session, batch)[0] == pytest.approx(expected, rel=tolerances.LOSS)


def test_layers_that_are_computed_again_change_no_bit(backend, graph, batch):
    _, folder, session = graph
    start, found = backend.state(session), []
    adapter = tiny.random_adapter(start.adapter)
    for again in (False, True):
        plan = tiny.plan_for(backend, folder, gradient_checkpointing=again, dropout=0.3)
        dropping = backend.restore(backend.open(plan, tiny.SHAPE), type(start)(adapter=adapter, optimizer={}, step=0))
        metrics = backend.step(dropping, [batch], 0.0)
        moments = backend.state(dropping).optimizer
        found.append((float(metrics.loss_sum), {name: array.tobytes() for name, array in moments.items()}))
    assert found[0] == found[1]


class _Adapted(torch.nn.Module):
    """LoRA in the fewest words."""

    def __init__(self, base, lora_a, lora_b):
        super().__init__()
        self.base, self.lora_a, self.lora_b = base, lora_a, lora_b

    def forward(self, x):
        return self.base(x) + 2.0 * x @ self.lora_a.T @ self.lora_b.T


def test_packing_a_graph_that_mixes_rows_would_show(backend, tmp_path, batch):
    from mens_torch._packing import PACKED

    tiny.write_model(tmp_path / "lfm2", "lfm2", GRAPHS["lfm2"][0])
    session = backend.open(tiny.plan_for(backend, tmp_path / "lfm2"), tiny.SHAPE)
    right = backend.forward(session, batch)
    session.model.network.set_attn_implementation(PACKED)
    session.model.packed = True
    assert np.abs(backend.forward(session, batch) - right).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_even_a_weak_leak_rules_packing_out(backend, tmp_path, dtype):
    tiny.write_model(tmp_path / "lfm2", "lfm2", GRAPHS["lfm2"][0])
    model = references.open_model(tmp_path / "lfm2")
    with torch.no_grad():
        # Little of the convolution is left but its last tap, which reads the token itself.
        for name, parameter in model.named_parameters():
            if name.endswith("conv.conv.weight"):
                parameter[..., :-1] *= 0.02
    model.save_pretrained(tmp_path / "lfm2")
    assert not backend.open(tiny.plan_for(backend, tmp_path / "lfm2", dtype=dtype), tiny.SHAPE).packed


def test_an_answer_leaves_the_attention_as_it_was(backend, graph):
    _, _, session = graph
    before = session.model.network.config._attn_implementation
    backend.generate(session, [3, 4, 5], GenerateSettings(max_new_tokens=2, stop_tokens=()))
    assert session.model.network.config._attn_implementation == before
    assert (before == "mens_packed") == session.packed


def test_only_a_linear_without_an_adapter_tells_its_weight(folders):
    """Code that reads a weight past ``forward`` would lose an adapter, and nothing else."""
    backend = load_backend("torch")
    for method in ("lora", "qlora"):
        session = backend.open(tiny.plan_for(backend, folders["llama"], method=method, targets=("q_proj",)), tiny.SHAPE)
        linears = {path: module for path, module in session.model.decoder.named_modules() if hasattr(module, "lora_a")}
        assert len(linears) == 14, "all of two layers"
        for path, linear in linears.items():
            assert (linear.rank > 0) == path.endswith("q_proj")
            assert hasattr(linear, "weight") == (linear.rank == 0 and method == "lora")


def test_nf4_codes_are_made_from_the_files_own_values(backend, folders):
    session = backend.open(tiny.plan_for(backend, folders["gpt2"], method="qlora", dtype="bfloat16"), tiny.SHAPE)
    for path, module in references.linears(references.open_model(folders["gpt2"])).items():
        expected = backend.quantize(module.weight.detach().t().contiguous().numpy(), tiny.nf4_spec())
        np.testing.assert_array_equal(session.model.adapters[path].frozen.codes.numpy(), expected.codes)


def test_running_row_by_row_is_said(backend, graph, caplog):
    model_type, folder, _ = graph
    with caplog.at_level(logging.WARNING, logger="mens_torch"):
        backend.open(tiny.plan_for(backend, folder), tiny.SHAPE)
    said = [record.getMessage() for record in caplog.records if "rows run one at a time" in record.getMessage()]
    assert len(said) == (not GRAPHS[model_type][1])


def test_the_base_holds_the_same_bytes_after_training(backend, graph, batch):
    _, _, session = graph
    before = _base_bytes(session)
    backend.step(session, [batch], 1e-2)
    assert _base_bytes(session) == before


def _base_bytes(session):
    from mens_torch.lora import LoraLinear

    held = {name: tensor for name, tensor in session.model.network.state_dict().items() if ".lora_" not in name}
    held |= {
        path: layer.frozen for path, layer in session.model.network.named_modules() if isinstance(layer, LoraLinear)
    }
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in held.items()}


def test_rotary_frequencies_that_depend_on_the_longest_row_rule_packing_out(backend, tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    tiny.write_model(tmp_path / "llama", "llama", tiny.CONFIGS["llama"] | {"rope_parameters": rope})
    packed = {
        length: backend.open(tiny.plan_for(backend, tmp_path / "llama", seq_len=length), tiny.SHAPE).packed
        for length in (64, 65)
    }
    assert packed == {64: True, 65: False}


def test_a_process_that_lowered_float32_precision_is_refused(backend, folders):
    from mens_core.errors import ContractError

    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ContractError, match="lower precision"):
            backend.open(tiny.plan_for(backend, folders["llama"]), tiny.SHAPE)
        backend.open(tiny.plan_for(backend, folders["llama"], dtype="bfloat16"), tiny.SHAPE)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_adapter_folder_is_no_base(backend, folders, tmp_path):
    import shutil

    from mens_core.errors import ModelError

    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="holds an adapter"):
        backend.open(tiny.plan_for(backend, folder), tiny.SHAPE)


def test_a_conv1d_is_a_linear_layer_the_other_way_round():
    from mens_torch.lora import LoraLinear

    layer = Conv1D(5, 3)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 3)
    ours = LoraLinear(layer.weight.detach().t(), layer.bias.detach(), 2, 1.0)
    torch.testing.assert_close(ours(x), layer(x), rtol=0, atol=0)


def test_even_the_mean_of_the_scales_is_bitsandbytes_own(backend):
    import bitsandbytes.functional as reference

    weight = np.random.default_rng(0).standard_normal((96, 100)).astype(np.float32)
    _, state = reference.quantize_4bit(torch.tensor(weight), blocksize=64, compress_statistics=True, quant_type="nf4")
    assert backend.quantize(weight, tiny.nf4_spec()).offset == float(state.offset)


@pytest.mark.parametrize("grouped", [1, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", [(4, 4), (1, 6, 2), (7,)])
def test_packed_attention_is_the_formula(rows, window, grouped):
    from mens_torch.attention import packed_attention

    generator = torch.Generator().manual_seed(0)
    total = sum(rows)
    query = torch.randn(1, 4, total, 8, generator=generator)
    key, value = (torch.randn(1, 4 // grouped, total, 8, generator=generator) for _ in range(2))
    row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    place = torch.arange(total)
    seen = (row[:, None] == row) & (place[:, None] >= place) & (place[:, None] - place < (window or total))
    scores = torch.einsum("nhqe,nhke->nhqk", query, key.repeat_interleave(grouped, 1)) * 0.3
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("nhqk,nhke->nqhe", weights, value.repeat_interleave(grouped, 1))
    torch.testing.assert_close(packed_attention(query, key, value, rows, 0.3, window), expected, rtol=0, atol=1e-6)


def test_the_hand_made_backward_passes_are_those_of_autograd():
    from mens_torch.lora import LoraLinear
    from mens_torch.loss import supervised_loss

    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)
    layer = LoraLinear(weight, bias, 2, 0.7)
    with torch.no_grad():
        layer.lora_a.copy_(torch.randn(2, 3, generator=generator))
        layer.lora_b.copy_(torch.randn(5, 2, generator=generator))
    x = torch.randn(7, 3, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 4, 3, 3, 1, 2, 0])
    head = torch.randn(5, 5, generator=generator)
    leaves = (x, layer.lora_a, layer.lora_b)
    found = torch.autograd.grad(supervised_loss(layer(x), head, targets, chunk=3), leaves)
    plain = x @ weight.T + bias + 0.7 * x @ layer.lora_a.T @ layer.lora_b.T
    expected = torch.autograd.grad(functional.cross_entropy(plain @ head.T, targets, reduction="sum"), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


_BLOCKS = [(16, 33), (64, 640), (64, 6401), (2048, 5000), (4096, 4096), (8, 100), (24, 97), (2, 70), (64, 1)]


def _by_definition(weight, dtype):
    """The definition in torch: a look-up code by code, times the block's absmax, rounded once."""
    absmax = weight.absmax
    if weight.spec.double_quant:
        nested = weight.nested_absmax.repeat_interleave(256)[: len(absmax)]
        absmax = bitsandbytes.create_dynamic_map()[absmax.long()] * nested + weight.offset
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], dim=1).reshape(-1)[: math.prod(weight.shape)].long()
    values = torch.tensor(CODEBOOKS[weight.spec.codebook])[codes]
    return (values * absmax.repeat_interleave(weight.spec.block_size)[: len(codes)]).to(dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_every_part_of_a_weight_is_brought_back_by_the_definition_and_nothing_beside_it(codebook, dtype, double_quant):
    from mens_torch.quant import quantize

    generator = torch.Generator().manual_seed(0)
    # The last is so small that bfloat16 holds its weights as subnormal numbers.
    for (block_size, numel), size in itertools.product(_BLOCKS, (1.0, 1e-38)):
        spec = NF4Spec(block_size=block_size, codebook=codebook, double_quant=double_quant)
        weight = quantize(size * torch.randn(1, numel, generator=generator), spec)
        found = torch.full((numel + 2,), 7.0, dtype=dtype)
        weight.write(found[1:-1])
        torch.testing.assert_close(found[1:-1], _by_definition(weight, dtype), rtol=0, atol=0)
        assert found[0] == found[-1] == 7.0
        # The twin: another byte of codes shows, wherever it is.
        if size == 1.0:
            other = attrs.evolve(weight, codes=weight.codes.clone())
            other.codes[numel // 4] ^= 0x70
            assert not torch.equal(other.write(found[1:-1]).flatten(), _by_definition(weight, dtype))


def test_scales_without_end_bring_back_infinities_and_no_numbers_in_their_place():
    from mens_torch.quant import quantize

    weight = quantize(torch.eye(8, 64), NF4Spec(double_quant=False))
    for scale, dtype in itertools.product((torch.inf, torch.nan, 3.4e38), (torch.float32, torch.bfloat16)):
        endless = attrs.evolve(weight, absmax=torch.full((8,), scale))
        found, expected = endless.write(torch.empty(512, dtype=dtype)).flatten(), _by_definition(endless, dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_large_weight_is_brought_back_alike_by_any_number_of_threads(monkeypatch):
    from mens_torch.quant import dequantize, quantize

    weight = quantize(torch.randn(1733, 2001, generator=torch.Generator().manual_seed(0)), NF4Spec())
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = dequantize(weight, torch.float32)
        torch.testing.assert_close(found.flatten(), _by_definition(weight, torch.float32), rtol=0, atol=0)


@given(seed=st.integers(0, 1000))
def test_what_is_compiled_is_what_the_look_up_says(seed):
    from mens_torch import _nf4_loop

    random = np.random.default_rng(seed)
    codes, absmax = random.integers(0, 256, 32, np.uint8), random.random(1, np.float32)
    for kind in (np.float32, np.uint16):
        found, expected = np.zeros((2, 64), kind)
        book = CODEBOOKS["nf4"]
        _nf4_loop._loop(_nf4_loop._write_blocks)(codes, absmax, None, None, absmax, book, 64, found, 0, 0, 1)
        _nf4_loop._look_up(codes, 0, book, absmax[0], expected, 0)
        np.testing.assert_array_equal(found, expected)


def _look_up_of(how, triple, features, monkeypatch, width=16):
    """A processor's way to look 64 codes up, as a function in LLVM's language on three places in memory."""
    from llvmlite import binding, ir
    from mens_torch import _nf4_loop

    monkeypatch.setattr(binding, "get_process_triple", lambda: triple)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    module, byte = ir.Module(), ir.IntType(8).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte, byte, byte]), "look_up")
    builder = ir.IRBuilder(function.append_basic_block())

    def at(argument, first, kind):
        return builder.bitcast(builder.gep(argument, [ir.IntType(64)(first)]), kind.as_pointer())

    def codes(first, count):
        return builder.load(at(function.args[1], first, ir.VectorType(ir.IntType(8), count)), align=1)

    table = builder.load(at(function.args[0], 0, ir.VectorType(ir.IntType(32), 16)), align=4)
    place = 0
    for found in getattr(_nf4_loop, how)(builder, table, width, codes):
        builder.store(found, at(function.args[2], place, found.type), align=1)
        place += found.type.count * width // 8
    assert place == 64 * width // 8
    builder.ret_void()
    monkeypatch.undo()
    return binding.parse_assembly(str(module))


def _runs(how):
    """What this processor can run: byte by byte it is always possible."""
    from mens_torch import _nf4_loop

    return how == "_by_bytes" or _nf4_loop._has({"_by_halves": "avx2", "_by_numbers": "avx512bw"}[how])


@pytest.mark.parametrize(
    ("how", "native", "width"),
    [
        ("_by_bytes", False, 16),
        ("_by_bytes", False, 32),
        ("_by_bytes", True, 16),
        ("_by_bytes", True, 32),
        ("_by_halves", True, 32),
        ("_by_numbers", True, 16),
        ("_by_numbers", True, 32),
    ],
)
def test_every_way_to_look_codes_up_finds_the_same(how, native, width, monkeypatch):
    from llvmlite import binding

    if not _runs(how):
        pytest.skip("this processor has no instruction for it")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    told = (binding.get_process_triple(), features) if native else ("riscv64-unknown-linux", {})
    code = _look_up_of(how, *told, monkeypatch, width)
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten()
    )
    engine = binding.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    random = np.random.default_rng(0)
    table, codes = random.integers(0, 1 << 32, 16, np.uint32), random.integers(0, 256, 32, np.uint8)
    found = np.zeros(64, f"u{width // 8}")
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(engine.get_function_address("look_up"))
    run(table.ctypes.data, codes.ctypes.data, found.ctypes.data)
    places = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    np.testing.assert_array_equal(found, table[places] >> (32 - width))


@pytest.mark.parametrize(
    ("how", "triple", "features", "instruction", "times"),
    [
        ("_by_bytes", "arm64-apple-darwin24", {}, "tbl", 8),
        ("_by_bytes", "aarch64-unknown-linux-gnu", {}, "tbl", 8),
        # Two of them take the table apart.
        ("_by_bytes", "x86_64-unknown-linux-gnu", {"avx2": True}, "vpshufb", 6),
        ("_by_numbers", "x86_64-unknown-linux-gnu", {"avx512bw": True}, "vpermw", 2),
    ],
)
def test_a_processor_that_has_an_instruction_looks_64_codes_up_with_a_few(
    how, triple, features, instruction, times, monkeypatch
):
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    code = _look_up_of(how, triple, features, monkeypatch)
    code.triple = triple
    machine = binding.Target.from_triple(triple).create_target_machine(
        features=",".join(f"+{name}" for name in features)
    )
    written = machine.emit_assembly(code).split()
    assert sum(word.startswith(instruction) for word in written) == times


@pytest.mark.parametrize("told", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_ENABLE_AVX": "0"}])
def test_what_numba_is_told_to_do_without_is_not_used(told, tmp_path):
    # LLVM would end the process.
    code = (
        "import torch; from mens_torch import quant; from mens_core.exchange import NF4Spec\n"
        "stored = quant.quantize(torch.ones(2, 64), NF4Spec()); print(stored.write(torch.empty(128)).sum().item())"
    )
    environment = {**os.environ, **told, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert float(done.stdout) == 128


def test_weights_brought_back_one_after_the_other_share_their_memory():
    from mens_torch._adapted import _dense
    from mens_torch._scratch import scratch
    from mens_torch.quant import dequantize, quantize

    generator = torch.Generator().manual_seed(0)
    stored = [quantize(torch.randn(8, 64, generator=generator), NF4Spec()) for _ in range(2)]
    first, second = (_dense(weight, torch.float32).clone() for weight in stored)
    for weight, found in zip(stored, (first, second), strict=True):
        torch.testing.assert_close(found, dequantize(weight, torch.float32), rtol=0, atol=0)
    assert _dense(stored[0], torch.float32).data_ptr() == _dense(stored[1], torch.float32).data_ptr()
    assert scratch(8 * 64, torch.float32).data_ptr() == _dense(stored[0], torch.float32).data_ptr()
