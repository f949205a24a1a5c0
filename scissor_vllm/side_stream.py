"""Work beside the caller's on a GPU: a thread that waits, so that the caller does not.

A search for a threshold is many small kernels and a look of the host at what came out. On a stream
of its own it fills what the next video's tower call leaves idle.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class SideStream:
    """A thread and a CUDA stream, first come first served."""

    def __init__(self, device: torch.device) -> None:
        """Take a CUDA device. Its small kernels go before waiting ones of other streams."""
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="side-stream")

    def start(
        self, work: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Start ``work(rows)`` after what the caller has launched until now.

        Args:
            work: runs in the thread, in the caller's inference mode.
            rows: on the device; kept until the result is taken.

        Returns:
            What waits for the result and returns it to the calling thread's stream, or raises what
            the work raised.
        """
        launched = torch.cuda.current_stream(rows.device).record_event()
        inference = torch.is_inference_mode_enabled()

        def run() -> tuple[torch.Tensor, torch.cuda.Event]:
            with torch.inference_mode(inference), torch.cuda.stream(self._stream):
                self._stream.wait_event(launched)
                result = work(rows)
                return result, self._stream.record_event()

        future = self._thread.submit(run)

        def take() -> torch.Tensor:
            result, done = future.result()
            stream = torch.cuda.current_stream(rows.device)
            stream.wait_event(done)
            # Its memory goes back to this stream's pool only when the caller's is through with it.
            result.record_stream(stream)
            return result

        return take
