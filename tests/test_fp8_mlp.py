"""MLPs in FP8: rounding by a plain oracle, the tower with them, and what a request's ratio sets."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import set_default_torch_dtype

from scissor_vllm.demo.model import demo_model_path
from scissor_vllm.plugin import register
from scissor_vllm.retention import MAX_RETAINED_VIDEO_TOKENS
from scissor_vllm.settings import TowerFP8
from scissor_vllm.video_fields import NUM_RETAINED, TOWER_FP8, VIDEO_IDENTITY
from scissor_vllm.worker.fp8_mlp import FP8MLP, LARGEST, make_mlps, quantized, refresh
from tests.families import Media, build_llava_next_video, build_llava_onevision, changed_by
from tests.interpreter import run_interpreted
from tests.test_pixels import Processors


def rounded(row: list[float]) -> list[float]:
    """A row by its scale, to the nearest of E4M3's numbers."""
    scale = np.float32(max(max(map(abs, row)), 1e-12)) / np.float32(LARGEST)
    values = []
    for value in row:
        divided = float(np.float32(value) / scale)
        exponent = max(-6, math.frexp(divided)[1] - 1)
        step = 2.0 ** (exponent - 3)
        values.append(round(divided / step) * step * float(scale))
    return values


numbers = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=4))
def test_rows_are_rounded_to_the_nearest_of_eight_bits(rows: list[list[float]]) -> None:
    values, scales = quantized(torch.tensor(rows))
    assert values.shape == (len(rows), 128)
    assert values.dtype == torch.float8_e4m3fn
    assert (values[:, 5:].float() == 0).all()
    products = (values.double() * scales.double())[:, :5]
    expected = torch.tensor([rounded(row) for row in rows], dtype=torch.float64)
    largest = expected.abs().amax(dim=1, keepdim=True)
    # A quotient may lie within float32's rounding of the middle between two numbers.
    away = (products - expected).abs() > 1e-6 * largest
    assert away.float().mean() <= 0.05
    assert ((products - expected).abs() <= largest / 14).all()


class MLP(nn.Module):
    """SigLIP's, in torch."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def made_up(width: int = 48, inner: int = 80) -> MLP:
    torch.manual_seed(1)
    return MLP(width, inner).requires_grad_(False)


def test_an_mlp_is_that_of_rounded_rows_and_near_the_exact_one() -> None:
    mlp = made_up()
    [in_fp8] = make_mlps([_layer(mlp)])
    x = torch.randn(7, 3, 48)
    x[0, 0] = 0
    x[1, 1, 5] = 1e3

    def product(rows: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ours = torch.tensor([rounded(row) for row in rows.tolist()])
        weight = torch.tensor([rounded(row) for row in layer.weight.tolist()])
        # The bias is rounded too, as are sums.
        return (ours @ weight.T + layer.bias.bfloat16().float()).bfloat16().float()

    widened = product(x.flatten(0, 1), mlp.fc1)
    expected = product(nn.functional.gelu(widened, approximate="tanh"), mlp.fc2).view(x.shape)
    found = in_fp8(x)
    assert found.dtype == x.dtype
    error = (found - expected).norm() / expected.norm()
    assert error < 5e-3
    exact = mlp(x)
    # One large value costs its own row alone.
    errors = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-3 < errors.mean() < 0.05
    assert errors.max() < 0.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mlps_that_are_made_while_weights_are_loaded_are_the_same(dtype: torch.dtype) -> None:
    mlp = made_up().to(dtype)
    [expected] = make_mlps([_layer(mlp)])
    with set_default_torch_dtype(dtype):
        [found] = make_mlps([_layer(mlp)])
    for ours, others in ((found.fc1, expected.fc1), (found.fc2, expected.fc2)):
        assert ours.scales.dtype == torch.float32
        assert torch.equal(ours.scales, others.scales)
        assert torch.equal(ours.weight.float(), others.weight.float())
        assert torch.equal(ours.bias, others.bias)


def _layer(mlp: MLP) -> Any:
    layer = nn.Module()
    layer.mlp = mlp
    return layer


def test_new_weights_are_taken_over_in_place_and_packed_ones_leave_the_old() -> None:
    mlp = made_up()
    mlps = make_mlps([_layer(mlp)])
    x = torch.randn(4, 48)
    before, places = mlps[0](x), _places(mlps[0])
    mlp.fc1.weight.mul_(2)
    assert torch.equal(mlps[0](x), before)
    refresh(mlps)
    after = mlps[0](x)
    assert not torch.equal(after, before)
    mlp.fc1.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    refresh(mlps)
    assert torch.equal(mlps[0](x), after)
    assert _places(mlps[0]) == places


def _places(mlp: FP8MLP) -> list[int]:
    linears = (mlp.fc1, mlp.fc2)
    return [part.data_ptr() for of in linears for part in (of.weight, of.scales, of.bias)]


INTERPRETED = """
import torch
from transformers import SiglipVisionConfig
from bench.tower import make_tower
from scissor_vllm.worker.fp8_mlp import make_mlps, quantized, why_not
from scissor_vllm.worker.merged_encoder import merging_encoder
from scissor_vllm.worker.siglip import add_and_norm, add_and_norm_to_fp8, fused_encoder
from scissor_vllm.worker.siglip import gelu_of_rows
from scissor_vllm.worker.siglip_layers import encoding_with, plain_layers
from tests.test_merged_tower import SIDE, made_up_anchors

config = SiglipVisionConfig(
    hidden_size=48, intermediate_size=144, num_hidden_layers=3, num_attention_heads=3,
    image_size=4 * SIDE, patch_size=4, hidden_act="gelu_pytorch_tanh", vision_use_head=False,
)
tower = make_tower(config, torch.device("cpu"), torch.float32)
generator = torch.Generator().manual_seed(3)
for weight in tower.parameters():
    weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
for module in tower.modules():
    # As vLLM does where it packs no weights.
    module.cpu_linear = torch.nn.functional.linear
layers = plain_layers(tower)
assert why_not(layers) is None
assert "plain" in why_not(plain_layers(torch.nn.Linear(2, 2)))
mlps = make_mlps(layers)
pixels = torch.randn(9, 3, 4 * SIDE, 4 * SIDE, generator=generator)


def near(found, expected, atol):
    return (found - expected).norm() < atol * expected.norm()


# The kernels scale as the reference does. Triton's interpreter cuts bits off where a GPU rounds.
for dtype in (torch.float32, torch.bfloat16):
    hidden = torch.randn(5, 48, generator=generator).to(dtype)
    added = torch.randn(5, 48, generator=generator).bfloat16()
    norm = layers[0].layer_norm2
    sums, normed = hidden.clone(), hidden.clone()
    rows, scales = add_and_norm_to_fp8(sums, added, norm)
    expected = add_and_norm(normed, added, norm).float()
    assert torch.equal(sums, normed) and torch.allclose(sums, (hidden + added).to(dtype), rtol=0.01)
    assert rows.shape == (5, 128) and (rows[:, 48:].float() == 0).all()
    assert near((rows.float() * scales)[:, :48], expected, 0.08)
    assert torch.allclose(scales[:, 0], expected.abs().amax(1) / 448, rtol=1e-2)
widened = torch.randn(6, 256, generator=generator).bfloat16()
widened[3] = 0
rows, scales = gelu_of_rows(widened)
gelu = torch.nn.functional.gelu(widened.float(), approximate="tanh")
assert torch.allclose(scales, quantized(gelu)[1], rtol=1e-5)
assert near(rows.float() * scales, gelu, 0.08)

with torch.inference_mode():
    stock = tower(pixels)
    with encoding_with(tower, mlps):
        by_modules = tower(pixels)
        assert torch.equal(tower(pixels), by_modules)
    with fused_encoder(tower, None, mlps) as is_on:
        assert is_on
        fused = tower(pixels)
    assert not torch.equal(by_modules, stock)
    error = (by_modules - stock).norm()
    assert error < 0.1 * stock.norm(), error / stock.norm()
    assert (fused - stock).norm() < 2.5 * error
    assert not torch.equal(fused, by_modules)
    # On a CPU its layers are modules.
    whole = made_up_anchors(9, 2, 0.0)
    with merging_encoder(tower, whole, None, mlps):
        assert near(tower(pixels), by_modules, 1e-5)
    anchors = made_up_anchors(9, 2, 0.5)
    with merging_encoder(tower, anchors):
        merged = tower(pixels)
    with merging_encoder(tower, anchors, None, mlps):
        both = tower(pixels)
    assert not near(both, merged, 1e-5) and near(both, merged, 0.1)
    assert torch.equal(tower(pixels), stock)
print("near")
"""


def test_the_tower_has_them_fused_merged_and_by_modules() -> None:
    run = run_interpreted(INTERPRETED)
    assert run.stdout.strip().splitlines()[-1:] == ["near"], run.stderr


# What a request's ratio sets.


@pytest.fixture(scope="module")
def demo() -> Processors:
    register()
    return Processors(demo_model_path(), mm_processor_kwargs={"tower_fp8_max_ratio": 0.25})


def item_of(processors: Processors, **options: Any) -> Any:
    video = np.random.default_rng(4).integers(0, 256, (8, 64, 64, 3), np.uint8)
    (item,) = processors.run(processors.ours, {"video": [video]}, **options)["video"]
    return item


def test_videos_up_to_the_ratio_name_it_and_have_features_of_their_own(demo: Processors) -> None:
    items = {ratio: item_of(demo, retention_ratio=ratio) for ratio in (1.0, 0.5, 0.26, 0.25, 0.1)}
    assert [ratio for ratio, item in items.items() if TOWER_FP8 in item] == [0.25, 0.1]
    assert bool(items[0.1][TOWER_FP8].data)
    names = {r: items[r][VIDEO_IDENTITY].data.numpy().tobytes() for r in (0.5, 0.26, 0.25, 0.1)}
    assert names[0.5] == names[0.26] != names[0.25] == names[0.1]
    assert int(items[1.0][NUM_RETAINED].data) == 4 * int(items[0.25][NUM_RETAINED].data)


def test_a_budget_has_it_where_its_ratio_is_low_enough(demo: Processors) -> None:
    num_tokens = int(item_of(demo, retention_ratio=1.0)[NUM_RETAINED].data)
    for share, is_low in ((0.2, True), (0.4, False)):
        budget = {MAX_RETAINED_VIDEO_TOKENS: round(share * num_tokens)}
        assert (TOWER_FP8 in item_of(demo, **budget)) == is_low


def test_a_model_without_such_a_tower_ends_the_start(tmp_path: Path) -> None:
    register()
    build_llava_next_video(tmp_path)
    setting = {"tower_fp8_max_ratio": 0.25}
    config = ModelConfig(model=str(tmp_path), dtype="float32", mm_processor_kwargs=setting)
    with pytest.raises(ValueError, match="tower_fp8_max_ratio cannot be set for this model"):
        MULTIMODAL_REGISTRY.create_processor(config)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.0, ValueError, "below 1, got 1.0"),
        (-0.1, ValueError, "must be 0 or more"),
        (float("nan"), ValueError, "got nan"),
        ("0.1", TypeError, "must be a number, got '0.1'"),
    ],
)
def test_a_ratio_out_of_range_is_named(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TowerFP8.from_mm_processor_kwargs({"tower_fp8_max_ratio": value})


# Through the engine.


@pytest.mark.usefixtures("engines")
def test_an_engine_rounds_up_to_its_ratio_and_nothing_else_changes(tmp_path: Path) -> None:
    build_llava_onevision(tmp_path)
    videos = (Media(320, 320, 12, 5, shift=0), Media(320, 320, 12, 6, shift=9))
    changed = changed_by({"tower_fp8_max_ratio": 0.25}, tmp_path, videos)
    assert changed == [(video, ratio) for video in videos for ratio in (0.25, 0.1)]


# On a GPU.


@pytest.mark.gpu
def test_on_a_gpu_kernels_round_to_the_nearest() -> None:
    from scissor_vllm.worker.siglip import add_and_norm_to_fp8, gelu_of_rows

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    hidden, added, weight, bias = (
        torch.randn(shape, device=device, generator=generator).bfloat16()
        for shape in ((300, 1152), (300, 1152), (1152,), (1152,))
    )
    norm: Any = SimpleNamespace(weight=weight, bias=bias, eps=1e-6)
    sums = hidden.float().add(added.float()).bfloat16()
    normed = nn.functional.layer_norm(sums.float(), (1152,), weight.float(), bias.float(), norm.eps)
    rows = add_and_norm_to_fp8(hidden, added, norm)
    assert torch.equal(hidden, sums)
    widened = torch.randn(300, 4352, device=device, generator=generator).bfloat16()
    widened[7] = 0
    gelu = nn.functional.gelu(widened.float(), approximate="tanh")
    for (values, scales), exact in ((rows, normed), (gelu_of_rows(widened), gelu)):
        expected, by_reference = quantized(exact)
        assert torch.allclose(scales, by_reference, rtol=1e-5)
        # A value near the middle of two numbers may fall to either.
        same = values.float() == expected.float()
        assert same.float().mean() > 0.999
        assert (values.float() - expected.float()).abs().max() <= 32


@pytest.mark.gpu
def test_on_a_gpu_products_are_those_of_the_reference() -> None:
    from bench.tower import SO400M, make_tower
    from scissor_vllm.worker.fp8_mlp import FP8Linear
    from scissor_vllm.worker.siglip_layers import plain_layers

    device = torch.device("cuda")
    tower = make_tower(SO400M, device, torch.bfloat16)
    layers = plain_layers(tower)
    assert layers is not None
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(729, 1152, device=device, generator=generator)
    for layer, pads in ((layers[0].mlp.fc1, True), (layers[0].mlp.fc2, False)):
        with set_default_torch_dtype(torch.bfloat16):
            on_gpu, on_cpu = FP8Linear(layer, pads), FP8Linear(layer.cpu(), pads)
        on_cpu.refresh()
        layer.cuda()
        on_gpu.refresh()
        # A GPU divides by a constant as it multiplies by its inverse. So only a value in the middle
        # of two numbers may fall to the other one, as one of many bfloat16 weights is.
        by_gpu, by_cpu = on_gpu.weight.cpu().double(), on_cpu.weight.double()
        differs = by_gpu != by_cpu
        exact = torch.zeros_like(by_cpu)
        exact[: len(layer.weight), : layer.weight.shape[1]] = layer.weight.cpu().double()
        middle = ((by_gpu + by_cpu) / 2)[differs]
        wanted = (exact / on_cpu.scales.double().reshape(-1, 1))[differs]
        torch.testing.assert_close(wanted, middle, rtol=1e-6, atol=0)
        width = layer.weight.shape[1]
        rows = quantized(torch.cat([x] * 4, dim=1)[:, :width])
        found = on_gpu.product(*rows).cpu().float()
        expected = on_cpu.product(*(part.cpu() for part in rows)).float()
        assert (found - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.gpu
def test_on_a_gpu_the_tower_is_as_near_to_exact_as_rounding_allows() -> None:
    from bench.tower import SO400M, draw_anchors, make_tower
    from scissor_vllm.worker.merged_encoder import merging_encoder
    from scissor_vllm.worker.siglip import fused_encoder, graphs_of
    from scissor_vllm.worker.siglip_layers import encoding_with, plain_layers

    device = torch.device("cuda")
    tower = make_tower(SO400M, device, torch.bfloat16)
    mlps = make_mlps(plain_layers(tower) or ())
    graphs = graphs_of(tower)
    assert graphs is not None
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randn(8, 3, 384, 384, device=device, generator=generator).bfloat16()
    anchors = draw_anchors(8, 729, 0.5)
    with torch.inference_mode():
        stock = tower(pixels).float()

        def error(context: Any, exact: torch.Tensor) -> float:
            with context:
                tokens = tower(pixels).float()
            return float((tokens - exact).norm() / exact.norm())

        by_modules = error(encoding_with(tower, mlps), stock)
        fused = error(fused_encoder(tower, None, mlps), stock)
        assert 0.005 < fused < 0.1
        assert fused == pytest.approx(by_modules, rel=0.2)
        # Eager first, then as a graph.
        again = [error(fused_encoder(tower, graphs, mlps), stock) for _ in range(4)]
        assert set(again) == {fused}
        with fused_encoder(tower, graphs) as is_on:
            assert is_on
            bfloat16 = tower(pixels).float()
        assert (bfloat16 - stock).norm() < 0.5 * fused * stock.norm()
        with merging_encoder(tower, anchors):
            merged = tower(pixels).float()
        both = [error(merging_encoder(tower, anchors, graphs, mlps), merged) for _ in range(4)]
        assert set(both) == {both[0]}
        assert 0.005 < both[0] < 0.1
