"""RMS norms, gates and rotations as one node of torch's graph: every bit of transformers' own, and its gradients."""

import copy
import importlib

import pytest
import torch
from mens_torch import _remade, _rotary
from mens_torch._gated import fuse_gates
from mens_torch._remade import origin_of
from mens_torch._rms_norm import RMSNorm, fuse_rms_norms
from mens_torch._rotary import fuse_rotations
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

FORMATS = (torch.float32, torch.bfloat16)
# Both ways compute in float32 and round once to the format of x, the last of at most ten roundings.
NEAR = {torch.float32: 10 * 2**-24, torch.bfloat16: 2**-8}


def _drawn(*shape, dtype=torch.float32, seed=0, requires_grad=True):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return drawn.requires_grad_(requires_grad)


def _norm(kind, dtype):
    norm = kind(24, eps=1e-6)
    norm.weight.data.copy_(_drawn(24, seed=3, requires_grad=False))
    return norm.requires_grad_(requires_grad=False).to(dtype)


def _slopes(module, x, dtype):
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, _drawn(*y.shape, dtype=dtype, seed=1, requires_grad=False))[0].float()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_norm_gives_the_bits_and_the_slopes_of_transformers(kind, dtype, size):
    own = _norm(kind, dtype)
    fused = copy.deepcopy(own)
    fuse_rms_norms(nn.ModuleList([fused]), dtype)
    assert isinstance(fused.forward, RMSNorm)
    x = (size * _drawn(2, 5, 24, dtype=dtype).detach()).requires_grad_()
    (found, slope), (expected, right) = _slopes(fused, x, dtype), _slopes(own, x, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert (slope - right).norm() <= NEAR[dtype] * right.norm()
    without_mean = (_drawn(2, 5, 24, dtype=dtype, seed=1).float() * fused.forward.gain).detach()
    without_mean *= torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + 1e-6)
    assert (without_mean - right).norm() > NEAR[dtype] * right.norm(), "the twin: a slope without its second part"
    with torch.no_grad():
        assert torch.equal(fused(x), expected)


def test_a_norm_keeps_its_input_and_one_number_a_row():
    norm, kept = _norm(LlamaRMSNorm, torch.bfloat16), []
    fuse_rms_norms(nn.ModuleList([norm]), torch.bfloat16)
    x = _drawn(5, 24, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in kept] == [((5, 24), x.dtype), ((5, 1), torch.float32)]
    assert kept[0].data_ptr() == x.data_ptr()


class _CentredRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class _BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, size, eps):
        super().__init__(size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(size))


class _WideRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x.float())


class _AskingRMSNorm(LlamaRMSNorm):
    def forward(self, x, shift):
        return super().forward(x) + shift


class _TellingRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("kind", [_CentredRMSNorm, _BiasedRMSNorm, _WideRMSNorm, _AskingRMSNorm, _TellingRMSNorm])
def test_a_norm_that_computes_something_else_is_left_alone(kind):
    norm = _norm(kind, torch.bfloat16)
    fuse_rms_norms(nn.ModuleList([norm]), torch.bfloat16)
    assert "forward" not in vars(norm)


def test_a_norm_in_another_format_than_the_run_s_is_left_alone():
    norm = _norm(LlamaRMSNorm, torch.float32)
    fuse_rms_norms(nn.ModuleList([norm]), torch.bfloat16)
    assert "forward" not in vars(norm), "it gives float32"


def test_a_norm_that_is_trained_is_left_alone():
    norm = _norm(LlamaRMSNorm, torch.float32)
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    fuse_rms_norms(nn.ModuleList([norm]), torch.float32)
    assert "forward" not in vars(norm)


def _mlp(dtype, activation="silu", kind=LlamaMLP):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=24, num_attention_heads=2, intermediate_size=40, hidden_act=activation)
    return kind(config).requires_grad_(requires_grad=False).to(dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_gate_gives_the_bits_and_the_slopes_of_transformers(dtype):
    own, x = _mlp(dtype), _drawn(2, 5, 24, dtype=dtype)
    fused = copy.deepcopy(own)
    fuse_gates(nn.ModuleList([fused]), dtype)
    assert "forward" in vars(fused)
    (found, slope), (expected, right) = _slopes(fused, x, dtype), _slopes(own, x, dtype)
    assert torch.equal(found, expected)
    assert torch.equal(slope, right)
    with torch.no_grad():
        assert torch.equal(fused(x), expected)
    fused.up_proj.weight.data.mul_(1.01)
    assert not torch.equal(_slopes(fused, x, dtype)[1], right), "the twin"


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_a_gate_made_is_made_again_in_float32_alone(monkeypatch, dtype):
    monkeypatch.setattr(_remade, "_MANY", 1)
    mlp, given = _mlp(dtype), []
    fuse_gates(nn.ModuleList([mlp]), dtype)
    mlp.down_proj.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    mlp(_drawn(5, 24, dtype=dtype))
    origin = origin_of(given[0])
    assert (origin is not None) == (dtype == torch.float32)
    assert origin is None or torch.equal(origin.make(*origin.tensors), given[0])


class _ScaledMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 0.5


class _AskingMLP(LlamaMLP):
    def forward(self, x, residual):
        return super().forward(x) + residual


class _CappedMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x))


class _FoldedMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x.view(*x.shape[:-1], self.hidden_size)).view(x.shape)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("gelu", LlamaMLP), *(("silu", kind) for kind in (_ScaledMLP, _AskingMLP, _CappedMLP, _FoldedMLP))],
)
def test_a_layer_that_computes_something_else_is_left_alone(activation, kind):
    mlp = _mlp(torch.float32, activation, kind)
    fuse_gates(nn.ModuleList([mlp]), torch.float32)
    assert "forward" not in vars(mlp)


def test_a_tensor_of_few_numbers_is_kept():
    made = torch.ones(_remade._MANY - 1, requires_grad=True) * 2
    large = torch.ones(_remade._MANY, requires_grad=True) * 2
    origin = _remade.Origin(torch.zeros_like, (made,))
    for tensor in (made, large):
        _remade.remember(tensor, origin)
    assert [_remade.origin_of(tensor) for tensor in (made, large)] == [None, origin]


_SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "head_dim": 16}


def _attention(kind, dtype, config=LlamaConfig):
    torch.manual_seed(0)
    settings = config(**_SMALL, attn_implementation="eager")
    return kind(settings, layer_idx=0).requires_grad_(requires_grad=False).to(dtype)


def _at_positions(attention, x, width=16):
    angles = torch.linspace(0, 9, x.shape[1] * width).view(1, -1, width)
    at = tuple(turn(angles).to(x.dtype) for turn in (torch.cos, torch.sin))
    return lambda hidden: attention(hidden, position_embeddings=at, attention_mask=None)[0]


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_rotation_gives_the_bits_and_the_slopes_of_transformers(dtype):
    own, x = _attention(LlamaAttention, dtype), _drawn(1, 5, 32, dtype=dtype)
    fused = copy.deepcopy(own)
    fuse_rotations(nn.ModuleList([fused]), dtype)
    assert "forward" in vars(fused)
    (found, slope), (expected, right) = (_slopes(_at_positions(each, x), x, dtype) for each in (fused, own))
    assert torch.equal(found, expected)
    assert torch.equal(slope, right)
    with torch.no_grad():
        assert torch.equal(_at_positions(fused, x)(x), expected)
        assert not torch.equal(_at_positions(fused, x)(x.flip(1)).flip(1), expected), "the twin: other positions"


def _nodes(output):
    found, waiting = [], [output.grad_fn]
    while waiting:
        found.append(waiting.pop())
        waiting += [node for node, _ in found[-1].next_functions if node is not None]
    return {type(node).__name__: node for node in found}


def test_a_rotation_keeps_the_cosines_alone_and_no_other_network_sees_it():
    own = modeling_llama.apply_rotary_pos_emb
    rotated, alone = (_attention(LlamaAttention, torch.float32) for _ in range(2))
    fuse_rotations(nn.ModuleList([rotated]), torch.float32)
    assert modeling_llama.apply_rotary_pos_emb is own
    x = _drawn(1, 5, 32)
    one, several = (_nodes(_at_positions(attention, x)(x)) for attention in (rotated, alone))
    assert [tensor.shape for tensor in one["_RotationBackward"].saved_tensors] == 2 * [(1, 1, 5, 16)]
    assert "_RotationBackward" not in several
    assert several.keys() - one.keys() >= {"NegBackward0", "CatBackward0", "SliceBackward0"}


def test_a_rotation_of_a_part_of_each_head_or_in_another_format_is_the_family_s_own():
    asked = []
    rotate = _rotary._one_node(lambda *given: asked.append((given[2].shape[-1], given[2].dtype)))
    q, wide = torch.ones(1, 2, 5, 16), torch.ones(1, 5, 16)
    rotate(q, q, wide, wide)
    assert not asked
    rotate(q, q, wide[..., :8], wide[..., :8])
    rotate(q.bfloat16(), q.bfloat16(), wide, wide)
    assert asked == [(8, torch.float32), (16, torch.float32)]


@pytest.mark.parametrize("family", ["cohere", "glm4", "gpt_oss"])
def test_a_rotation_of_another_form_is_left_alone(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = next(getattr(module, name) for name in dir(module) if name.endswith("Attention") and name != "Attention")
    attention = _attention(kind, torch.float32, lambda **fields: AutoConfig.for_model(family, **fields))
    fuse_rotations(nn.ModuleList([attention]), torch.float32)
    assert "forward" not in vars(attention)
