"""SigLIP's encoder with fewer passes gives vLLM's values, and leaves other layers alone."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import run_interpreted

INTERPRETED = """
import torch
from torch import nn
from transformers import SiglipVisionConfig
from bench.tower import make_tower
from scissor_vllm.worker.siglip import embedded_patches, fused_encoder

config = SiglipVisionConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
    image_size=16, patch_size=4, hidden_act="gelu_pytorch_tanh", vision_use_head=False,
)
tower = make_tower(config, torch.device("cpu"), torch.float32)
generator = torch.Generator().manual_seed(3)
for weight in tower.parameters():
    weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
for module in tower.modules():
    # As vLLM does where it packs no weights.
    module.cpu_linear = torch.nn.functional.linear
pixels = torch.randn(2, 3, 16, 16, generator=generator)

def outputs(**options):
    with torch.inference_mode():
        return tower(pixels, **options)

embeddings = tower.vision_model.embeddings
with torch.inference_mode():
    # A picture's last columns and lines may not fill a patch.
    for wide in (pixels, torch.nn.functional.pad(pixels, (0, 3, 0, 2))):
        for dtype in (torch.float32, torch.bfloat16):
            embeddings.to(dtype)
            expected = embeddings(wide)
            given = embedded_patches(embeddings, wide)
            atol = 1e-5 if dtype == torch.float32 else 0.1
            assert given.dtype == dtype and torch.allclose(given, expected, atol=atol)
            numbers = torch.tensor([0, 3, 17, 30, 31], dtype=torch.int32)
            some = embedded_patches(embeddings, wide, numbers)
            assert torch.equal(some, given.flatten(0, 1)[numbers.long()])
            embeddings.to(torch.float32)

stock, every = outputs(), outputs(select_layers=[1, -1])
with fused_encoder(tower) as is_on:
    assert is_on
    fused = outputs()
    # Kernels of our own ran: the same values, in another order of sums.
    assert torch.allclose(fused, stock, atol=1e-5), (fused - stock).abs().max()
    assert not torch.equal(fused, stock)
    assert torch.equal(outputs(select_layers=[1, -1]), every)
assert torch.equal(outputs(), stock)
try:
    with fused_encoder(tower):
        raise KeyError
except KeyError:
    assert torch.equal(outputs(), stock)

layer = tower.vision_model.encoder.layers[1]

class Adapted(type(layer.mlp.fc1)):
    pass

class Quantized(type(layer.mlp.fc1.quant_method)):
    pass

for module, name, value in [
    (layer.mlp, "activation_fn", nn.GELU()),
    (layer.mlp.fc1, "__class__", Adapted),
    (layer.mlp.fc1, "quant_method", Quantized()),
    (layer.layer_norm1, "bias", None),
    (layer, "layer_norm2", nn.LayerNorm(48)),
    (embeddings, "__class__", type("Other", (type(embeddings),), {})),
    (embeddings.patch_embedding, "enable_linear", False),
]:
    kept = getattr(module, name)
    setattr(module, name, value)
    with fused_encoder(tower) as is_on:
        assert not is_on, name
        outputs()
    setattr(module, name, kept)
with fused_encoder(nn.Linear(2, 2)) as is_on:
    assert not is_on
with fused_encoder(tower) as is_on:
    assert is_on
print("the same")
"""


def test_interpreted_on_the_cpu_it_gives_what_vllm_gives() -> None:
    run = run_interpreted(INTERPRETED)
    assert run.stdout.strip().splitlines()[-1:] == ["the same"], run.stderr


@pytest.mark.gpu
def test_on_a_gpu_it_is_as_near_to_exact_as_vllm() -> None:
    pytest.importorskip("vllm", reason="compares with vLLM's tower")
    from bench.tower import SO400M, make_tower
    from scissor_vllm.worker.siglip import fused_encoder

    device = torch.device("cuda")
    tower = make_tower(SO400M, device, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 3, SO400M.image_size, SO400M.image_size)
    pixels = torch.randn(shape, device=device, generator=generator)
    with torch.inference_mode():
        stock = tower(pixels.bfloat16()).float()
        with fused_encoder(tower) as is_on:
            assert is_on
            fused = tower(pixels.bfloat16()).float()
        exact = make_tower(SO400M, device, torch.float32)
        # Of a float32 tower vLLM draws other numbers, and so they are copied.
        exact.load_state_dict({name: w.float() for name, w in tower.state_dict().items()})
        expected = exact(pixels.bfloat16().float())
    assert not torch.equal(fused, stock)
    error, vllms = ((output - expected).norm() / expected.norm() for output in (fused, stock))
    assert error < 1.05 * vllms
    assert error < 0.05
