"""What the processes of ``tests.preloaded`` begin with."""

import os
from functools import cache
from typing import Any

import vllm.entrypoints.cli.serve
import vllm.entrypoints.openai.api_server
import vllm.model_executor.models.llava_onevision
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401
from prometheus_client import values


@cache
def _value_class(is_of_several_processes: bool) -> Any:
    return values.get_value_class()


def _value(*args: Any, **options: Any) -> Any:
    return _value_class("PROMETHEUS_MULTIPROC_DIR" in os.environ)(*args, **options)


# It chooses at its import, which in a server comes after the directory is set.
values.ValueClass = _value
