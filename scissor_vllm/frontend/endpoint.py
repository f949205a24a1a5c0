"""The endpoint plugin: replaces vLLM's chat routes, and makes all other routes refuse a ratio.

vLLM loads it through the entry point ``vllm.endpoint_plugins`` if ``VLLM_PLUGINS`` names
``scissor_vllm``. It checks vLLM's version before it imports anything of vLLM.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from scissor_vllm.frontend.guard import guard_routes
from scissor_vllm.frontend.process_metrics import add_process_metrics
from scissor_vllm.settings import OWN_KEYS
from scissor_vllm.version_gate import reason_for_stock, stand_aside, warn_once

PROCESS_METRICS = "process_metrics"
"""Server argument: whether /metrics has the process metrics of the one API server."""


class RetentionEndpoint:
    """The endpoint plugin, for servers of every task."""

    name = "scissor_vllm"
    required_tasks: tuple[str, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Replace vLLM's routes by ours, or refuse every ratio if the plugin stands aside."""
        if getattr(app.state.args, PROCESS_METRICS, False):
            add_process_metrics(app)
        reason = reason_for_stock()
        if reason is None:
            try:
                from scissor_vllm.frontend.chat import attach_routes

                paths = attach_routes(app)
                guard_routes(app, except_paths=paths)
                return
            except (ImportError, AttributeError) as error:
                reason = stand_aside(error)
        warn_once(reason)
        guard_routes(app, reason=reason)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Store the operator's settings, which routes check a ratio against.

        Raises:
            ValueError: the plugin stands aside, and the operator set one of its options.
        """
        reason = reason_for_stock()
        if reason is None:
            from scissor_vllm.frontend.chat import init_state

            init_state(engine_client, state)
            return
        config = getattr(getattr(state, "vllm_config", None), "model_config", None)
        kwargs = getattr(getattr(config, "multimodal_config", None), "mm_processor_kwargs", None)
        if given := sorted(OWN_KEYS & (kwargs or {}).keys()):
            raise ValueError(f"{', '.join(given)} cannot be honoured: {reason}; or leave it out")
