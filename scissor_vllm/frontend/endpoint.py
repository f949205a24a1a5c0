"""The endpoint plugin: puts our routes in place of vLLM's, and no ratio is ignored on the others.

vLLM loads it through the entry point ``vllm.endpoint_plugins`` if ``VLLM_PLUGINS`` names
``scissor_vllm``. Nothing of vLLM is imported before it is known that this release fits it.
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
"""Of the server's arguments: whether /metrics has those of its one API server's process."""


class RetentionEndpoint:
    """The endpoint plugin, in servers of every task."""

    name = "scissor_vllm"
    required_tasks: tuple[str, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Put our routes in place of vLLM's, or refuse ratios where vLLM stays stock."""
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
        """Keep what the routes check a ratio against.

        Raises:
            ValueError: the operator set what this server cannot do.
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
