"""SigLIP's encoder in FP8: near to the exact values, and refused where it would not be."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import run_interpreted

SETUP = """
import torch
from torch.nn.functional import gelu, layer_norm
from transformers import SiglipVisionConfig
from bench.tower import make_tower
from scissor_vllm import siglip_fp8
from scissor_vllm.worker.siglip_fp8 import Fp8Encoder

class Hopper:
    device_name = "a GPU"
    is_cuda = staticmethod(lambda: True)
    is_cpu = staticmethod(lambda: False)
    has_device_capability = staticmethod(lambda least: least <= 90)

def make(**sizes):
    config = SiglipVisionConfig(**{
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "image_size": 16,
        "num_attention_heads": 3, "patch_size": 4, "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False, **sizes,
    })
    tower = make_tower(config, torch.device("cpu"), torch.float32)
    for weight in tower.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
    for module in tower.modules():
        # As vLLM does where it packs no weights.
        module.cpu_linear = torch.nn.functional.linear
    return tower

generator = torch.Generator().manual_seed(3)
tower = make()
pixels = torch.randn(2, 3, 16, 16, generator=generator)
"""

INTERPRETED = (
    SETUP
    + """
def check(rows, expected):
    # A number of 4 binary digits is off by a 16th at most; Triton's interpreter halves one that is
    # rounded up to the next power of two.
    scale = expected.abs().amax(dim=1, keepdim=True) / 448
    assert torch.allclose(rows.scale, scale, rtol=1e-5)
    exact = expected / scale
    rounded = exact.to(torch.float8_e4m3fn).float()
    carried = rounded.abs() >= 2 ** torch.ceil(torch.log2(exact.abs()))
    values = rows.values.float()
    near = (values - rounded).abs() <= 0.07 * rounded.abs() + 2**-9
    assert (near | carried).all(), (values[~near], rounded[~near], exact[~near])
    assert (values == rounded).float().mean() > 0.9

x = torch.randn(7, 48, generator=generator)
x[3] = 0
check(siglip_fp8.quantized(x[:3]), x[:3])
zero = siglip_fp8.quantized(x[3:4])
assert not zero.values.float().any() and zero.scale.isfinite().all()
check(siglip_fp8.quantized(x[:3], gelu=True), gelu(x[:3], approximate="tanh"))
norm = tower.vision_model.encoder.layers[0].layer_norm2
hidden, added = torch.randn(2, 7, 48, generator=generator)
total = hidden + added
rows = siglip_fp8.add_norm_quantized(hidden, added, norm)
assert torch.equal(hidden, total)
check(rows, layer_norm(total, (48,), norm.weight, norm.bias, norm.eps).detach())

# What a CPU does without kernels.
siglip_fp8._by_kernels = lambda x: False
check(siglip_fp8.quantized(x[:3]), x[:3])
check(siglip_fp8.quantized(x[:3], gelu=True), gelu(x[:3], approximate="tanh"))
sum_of = hidden - added
check(siglip_fp8.add_norm_quantized(sum_of, added, norm), rows.values.float() * rows.scale)
assert torch.allclose(sum_of, total, atol=1e-5)
with torch.inference_mode(), Fp8Encoder(tower, Hopper).encoding():
    plain = tower(pixels)
siglip_fp8._by_kernels = lambda x: True

with torch.inference_mode():
    stock = tower(pixels)
    encoder = Fp8Encoder(tower, Hopper)
    with encoder.encoding():
        first = tower(pixels)
    assert (first - plain).norm() < 0.01 * stock.norm()
    error = (first - stock).norm() / stock.norm()
    assert 1e-4 < error < 0.05, error
    assert torch.equal(tower(pixels), stock)
    for weight in tower.parameters():
        weight.data.mul_(0.5)
    with encoder.encoding():
        kept = tower(pixels)
    encoder.quantize()
    with encoder.encoding():
        anew = tower(pixels)
    changed = tower(pixels)
    kept, anew = ((each - changed).norm() / changed.norm() for each in (kept, anew))
    assert anew < 0.01 < kept, (anew, kept)
print("near")
"""
)

REFUSED = (
    SETUP
    + """
def refused(tower, platform, *words):
    try:
        Fp8Encoder(tower, platform)
    except ValueError as error:
        assert "video_encoder_dtype" in str(error), error
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError(words)

class Ampere(Hopper):
    device_name = "an A100"
    has_device_capability = staticmethod(lambda least: least <= 80)

class Other(Hopper):
    device_name = "xpu"
    is_cuda = staticmethod(lambda: False)

refused(tower, Ampere, "8.9", "an A100")
refused(tower, Other, "xpu")
refused(torch.nn.Linear(2, 2), Hopper, "Linear")
refused(make(hidden_size=60), Hopper, "16", "60")
layer = tower.vision_model.encoder.layers[2]
layer.mlp.fc2.tp_size = 2
refused(tower, Hopper, "2th", "--mm-encoder-tp-mode data")
layer.mlp.fc2.tp_size = 1
layer.self_attn.out_proj.quant_method = object()
refused(tower, Hopper, "object")
print("refused")
"""
)


@pytest.mark.parametrize(("program", "end"), [(INTERPRETED, "near"), (REFUSED, "refused")])
def test_interpreted_on_the_cpu(program: str, end: str) -> None:
    run = run_interpreted(program)
    assert run.stdout.strip().splitlines()[-1:] == [end], run.stderr


@pytest.mark.gpu
def test_on_a_gpu_it_is_near_to_exact() -> None:
    from vllm.platforms import current_platform

    from bench.tower import SO400M, make_tower
    from scissor_vllm.worker.siglip_fp8 import DTYPE, LARGEST, Fp8Encoder, quantized

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(100, 1152, device=device, generator=generator)
    rows = quantized(x)
    exact = (x / rows.scale).clamp(-LARGEST, LARGEST).to(DTYPE)
    assert torch.equal(rows.values.float(), exact.float())
    tower = make_tower(SO400M, device, torch.bfloat16)
    shape = (3, 3, SO400M.image_size, SO400M.image_size)
    pixels = torch.randn(shape, device=device, generator=generator).bfloat16()
    with torch.inference_mode():
        stock = tower(pixels).float()
        with Fp8Encoder(tower, current_platform).encoding():
            fp8 = tower(pixels).float()
        assert torch.equal(tower(pixels).float(), stock)
    assert 0 < (fp8 - stock).norm() < 0.1 * stock.norm()
