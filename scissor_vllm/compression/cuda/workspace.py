"""Device memory of a search, sized for the largest video.

Searches of up to ``SHARED_TOKENS`` tokens share memory on a device and run one after the other. So
CUDA graphs have fixed addresses, and memory does not grow with the number of shapes. Larger
searches allocate their own.
"""

import torch
import triton

from scissor_vllm.compression.cuda.kernels import layout

SHARED_TOKENS = 1 << 13
"""Most tokens of a search on shared memory: 256 MiB of products and 256 MiB of weights."""

LANES = (64, 128, 256, 512, 1024, 4096)
"""Lanes of a program that holds a row of a frame. Kernels are compiled for each value."""

SHARED_LANES = 1024
"""Most products inside frames of a search on shared memory: 32 MiB."""

WIDE_BLOCK = 1024
"""Nodes of one program of the small kernels."""


def num_lanes(per_frame: int) -> int:
    """Return the lanes for a frame of P tokens, P <= ``layout.MAX_PER_FRAME``."""
    return next(lanes for lanes in LANES if lanes >= per_frame)


class Workspace:
    """Tensors that kernels of one search read and write, for up to ``capacity`` tokens.

    Attributes:
        shape: (8,) int32, see ``layout``.
        state: (9,) int64, see ``layout``.
        outcome: (3,) float64, see ``layout``.
        order: (capacity,) int32, the token at each position of Prim's order.
        link: (capacity,) float32, the weight that joins each to its frame's tree, -inf for the
            first of a frame.
        parent: (capacity,) int32 by node, the forest of components.
        inside, cosine: (T*P*P,) float32 or more, dot products and cosines inside frames.
        products: (products,) float32, of all pairs that are searched, None if not held.
        weights: (components, components) int32 or more, flat.
        guess: (1,) float32, the threshold that is counted.
        tau: (1,) float32, the threshold that was asked for or found.
        always: (1,) int32, 1.
        by_part: (capacity,) int64, the tokens of part 0, of part 1, ...
        begin: (capacity + 1,) int32, where each part begins among them.
        weight: (capacity,) float64, the token's share in its part's mean of runs' means.
        number: (capacity,) int64, how many parts have their lead token at or before the token.
    """

    def __init__(
        self,
        capacity: int,
        num_components: int,
        num_products: int | None,
        num_inside: int,
        device: torch.device,
    ) -> None:
        """Allocate for so many tokens, components of a dense tree, and products."""
        self.capacity = capacity
        self.num_components = num_components
        self.device = device
        self.grid = (triton.cdiv(capacity, WIDE_BLOCK),)
        # Tensors of inference mode are read-only outside of it.
        with torch.inference_mode(False):
            i32, i64, f32, f64 = torch.int32, torch.int64, torch.float32, torch.float64
            self.shape = self.new(layout.NUM_SHAPE, i32)
            self.state = self.new(layout.NUM_STATE, i64)
            self.outcome = self.new(3, f64)
            self.balance = self.new(2, f64)
            self.guess, self.tau = self.new(1, f32), self.new(1, f32)
            self.searching, self.again, self.tied = (self.new(1, i32) for _ in range(3))
            self.always = torch.ones(1, dtype=i32, device=device)
            self.positions = torch.arange(capacity, dtype=i32, device=device)
            self.bounds = torch.arange(capacity + 1, dtype=i32, device=device)
            self.order, self.parent = self.new(capacity, i32), self.new(capacity, i32)
            self.link, self.unit = self.new(capacity, f32), self.new(capacity, f32)
            self.length, self.largest = self.new(capacity, f32), self.new(capacity, f32)
            self.run_of, self.run_size = self.new(capacity, i32), self.new(capacity, i32)
            self.interval = self.new(capacity + 1, i32)
            self.inside, self.cosine = self.new(num_inside, f32), self.new(num_inside, f32)
            self.products = None if num_products is None else self.new(num_products, f32)
            self.weights = self.new(num_components**2, i32)
            self.by_part, self.begin = self.new(capacity, i64), self.new(capacity + 1, i32)
            self.weight, self.number = self.new(capacity, f64), self.new(capacity, i64)

    def new(self, size: int, dtype: torch.dtype, value: int | None = None) -> torch.Tensor:
        """Return a tensor (size,) on the device."""
        if value is None:
            return torch.empty(size, dtype=dtype, device=self.device)
        return torch.full((size,), value, dtype=dtype, device=self.device)

    @classmethod
    def shared(cls, num_tokens: int, device: torch.device) -> "Workspace":
        """Return the shared workspace for up to this many tokens; its capacity is a power of
        two.
        """
        capacity = triton.next_power_of_2(num_tokens)
        return cls(capacity, capacity, capacity**2, capacity * min(SHARED_LANES, capacity), device)
