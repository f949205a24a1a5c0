"""MLPs with aligned rows give vLLM's values, and leave other layers alone."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import run_interpreted

INTERPRETED = """
import torch
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from bench.qwen_tower import make_qwen_tower
from bench.tower import make_tower
from scissor_vllm.worker.aligned_mlp import AlignedMLPs, silu_and_mul

for width, padding in [(10, 2), (1023, 1), (8, 0)]:
    gate_up = torch.randn(2, 3, 2 * width, generator=torch.Generator().manual_seed(width))
    gate, up = gate_up.double().split(width, dim=-1)
    out = silu_and_mul(gate_up, padding)
    assert out.shape == (2, 3, width + padding)
    assert torch.allclose(out[..., :width].double(), gate * torch.sigmoid(gate) * up, atol=1e-6)
    assert not out[..., width:].any()

def make(intermediate_size):
    config = Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=64, intermediate_size=intermediate_size, num_heads=2,
        out_hidden_size=16, fullatt_block_indexes=[1], patch_size=2, window_size=8,
    )
    tower = make_tower(config, torch.device("cpu"), torch.float32, make=make_qwen_tower)
    for module in tower.modules():
        # As vLLM does where it packs no weights.
        module.cpu_linear = torch.nn.functional.linear
    for weight in tower.parameters():
        weight.data += 0.1
    return tower

tower = make(30)  # Rows of 120 bytes.
patches = torch.randn(2 * 4 * 4, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(3))

def encode():
    with torch.inference_mode():
        return tower(patches, grid_thw=[[2, 4, 4]])

stock = encode()
aligned = AlignedMLPs(tower)
assert len(aligned) == 2
with aligned.in_use():
    assert torch.allclose(encode(), stock, atol=1e-5), (encode() - stock).abs().max()
    narrowing = tower.blocks[0].mlp.down_proj
    narrowing.forward = None  # It is not called.
    assert torch.allclose(encode(), stock, atol=1e-5)
    del narrowing.forward
assert torch.equal(encode(), stock)
try:
    with aligned.in_use():
        raise KeyError
except KeyError:
    assert torch.equal(encode(), stock)

with torch.inference_mode():  # As while memory is profiled.
    aligned = AlignedMLPs(tower)
copies = [each.weight.data_ptr() for each in aligned._narrowings.values()]
narrowing = tower.blocks[0].mlp.down_proj
narrowing.weight.data *= -2
narrowing.bias = nn.Parameter(narrowing.bias.detach() + 1, requires_grad=False)
changed = encode()
assert not torch.allclose(changed, stock, atol=1e-2)
with aligned.in_use():
    assert not torch.allclose(encode(), changed, atol=1e-2)
aligned.refresh()
with aligned.in_use():
    assert torch.allclose(encode(), changed, atol=1e-5), (encode() - changed).abs().max()
assert copies == [each.weight.data_ptr() for each in aligned._narrowings.values()]

assert len(AlignedMLPs(make(32))) == 0  # Rows of 128 bytes.
assert len(AlignedMLPs(nn.Linear(2, 2))) == 0

mlp = tower.blocks[1].mlp

class Adapted(type(mlp.down_proj)):
    pass

class Quantized(type(mlp.down_proj.quant_method)):
    pass

for module, name, value in [
    (mlp, "act_fn", nn.SiLU()),
    (mlp.down_proj, "__class__", Adapted),
    (mlp.down_proj, "quant_method", Quantized()),
]:
    kept = getattr(module, name)
    setattr(module, name, value)
    assert len(AlignedMLPs(tower)) == 1, name
    setattr(module, name, kept)
tower.blocks[0].do_not_compile = False
assert len(AlignedMLPs(tower)) == 0
print("the same")
"""


def test_interpreted_on_the_cpu_they_give_what_vllm_gives() -> None:
    run = run_interpreted(INTERPRETED)
    assert run.stdout.strip().splitlines()[-1:] == ["the same"], run.stderr


@pytest.mark.gpu
def test_on_a_gpu_they_are_as_near_to_exact_as_vllm() -> None:
    pytest.importorskip("vllm", reason="compares with vLLM's tower")
    from bench.qwen_tower import QWEN2_5_VL_7B, make_qwen_tower, random_patches
    from bench.tower import make_tower
    from scissor_vllm.worker.aligned_mlp import AlignedMLPs

    device = torch.device("cuda")
    tower = make_tower(QWEN2_5_VL_7B, device, torch.bfloat16, make=make_qwen_tower)
    mlp = tower.blocks[0].mlp
    x = torch.randn(300, 1, 1280, device=device, generator=torch.Generator(device).manual_seed(0))
    aligned = AlignedMLPs(tower)
    assert len(aligned) == 32
    with torch.inference_mode():
        stock = mlp(x.bfloat16()).float()
        with aligned.in_use():
            ours = mlp(x.bfloat16()).float()
        gate, up = (x.bfloat16().float() @ mlp.gate_up_proj.weight.float().t()).chunk(2, dim=-1)
        exact = (torch.nn.functional.silu(gate) * up) @ mlp.down_proj.weight.float().t()
        error, vllms = ((output - exact).norm() / exact.norm() for output in (ours, stock))
        assert error < 1.05 * vllms
        patches = random_patches(QWEN2_5_VL_7B, (2, 10, 14), device).bfloat16()
        whole = tower(patches, grid_thw=[[2, 10, 14]]).float()
        with aligned.in_use():
            same = tower(patches, grid_thw=[[2, 10, 14]]).float()
    assert torch.nn.functional.cosine_similarity(whole, same, dim=-1).min() > 0.98
