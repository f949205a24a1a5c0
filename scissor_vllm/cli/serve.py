"""``scissor-vllm serve``: ``vllm serve`` with compression. It takes every flag of vLLM."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, MutableMapping
from importlib.metadata import entry_points
from typing import Any

from scissor_vllm.cli import NEEDS_VLLM, has_vllm
from scissor_vllm.cli.defaults import (
    choose_api_servers,
    choose_executor,
    choose_parallelism,
    choose_tower_fp8,
    choose_tower_merging,
    leave_parallelism_open,
)
from scissor_vllm.cli.options import (
    add_page_options,
    add_retention_options,
    apply_page_options,
    apply_retention_options,
    exposure,
    given_options,
    in_force,
    print_help,
    refuse,
)
from scissor_vllm.demo.model import DEMO_MODEL, demo_model_path
from scissor_vllm.orphans import VARIABLE as SERVER_PID
from scissor_vllm.settings import VIDEO_LOADER
from scissor_vllm.version_gate import reason_for_stock, warn_once

DEFAULT_SHUTDOWN_SECONDS = 60
"""Of ``--shutdown-timeout``; vLLM's own is 0, which cuts every answer at SIGTERM."""
PLUGIN = "scissor_vllm"
"""Name of our entry points, as ``VLLM_PLUGINS`` lists it."""

# A child of vLLM's logger, which alone has a handler.
logger = logging.getLogger(f"vllm.{__name__}")


def serve(argv: list[str]) -> int:
    """Serve a model and return the exit status."""
    if "-h" in argv or "--help" in argv:
        print_help()
        return 0
    if not has_vllm():
        raise refuse(NEEDS_VLLM)
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").strip() not in ("", "0"):
        raise refuse(
            "VLLM_USE_RUST_FRONTEND serves none of our routes, so no ratio would be taken: unset "
            "it, or start vllm serve"
        )
    reason = reason_for_stock()
    if reason is not None:
        return _serve_stock(argv, reason)
    from scissor_vllm.allocator import keep_touched_memory
    from scissor_vllm.metrics import DIRECTORY_VARIABLE, metrics_directory

    keep_touched_memory()
    is_ours = not os.environ.get(DIRECTORY_VARIABLE)
    set_environment(os.environ)
    with metrics_directory(os.environ):
        return _serve(argv, has_own_metrics_directory=is_ours)


def _serve(argv: list[str], *, has_own_metrics_directory: bool) -> int:
    command, args = _parsed(
        argv, drain_by_default, leave_parallelism_open, add_retention_options, add_page_options
    )
    from vllm.logger import configure_logging_from_args

    if args.model_tag == DEMO_MODEL:
        use_demo_model(args)
    choose_tower_merging(args)
    choose_tower_fp8(args)
    apply_retention_options(args)
    bound_encoder_steps(args)
    apply_page_options(args)
    choose_api_servers(args)
    choose_parallelism(args)
    choose_executor(args)
    args.process_metrics = has_own_metrics_directory and args.api_server_count in (None, 1)
    configure_logging_from_args(args)
    logger.info(in_force(args))
    if exposed := exposure(args):
        warn_once(exposed)
    command.validate(args)
    command.cmd(args)
    return _status()


def _status() -> int:
    """Return the exit status of a server that has ended: 1 if its engine failed."""
    from scissor_vllm.frontend.draining import ENGINE_FAILED

    if ENGINE_FAILED.is_set():
        logger.error("scissor_vllm: the engine failed, see above: start the server again")
        return 1
    return 0


def _serve_stock(argv: list[str], reason: str) -> int:
    """Serve as stock vLLM, because this vLLM is not supported."""
    if given := given_options(argv):
        raise refuse(f"{', '.join(given)} cannot be honoured: {reason}")
    if argv[:1] == [DEMO_MODEL]:
        raise refuse(f"the demo shows compression: {reason}")
    warn_once(reason)
    # The plugin stays loaded to refuse ratios.
    name_plugin(os.environ)
    try:
        command, args = _parsed(argv)
    except (ImportError, AttributeError) as error:
        raise refuse(f"vLLM's command is not where it was ({error}): start vllm serve") from error
    command.validate(args)
    command.cmd(args)
    return 0


def _parsed(
    argv: list[str], *add_options: Callable[[argparse.ArgumentParser], None]
) -> tuple[Any, argparse.Namespace]:
    """Return vLLM's command and the parsed arguments, our options included."""
    # vLLM reads the environment as it is imported.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from scissor_vllm.vllm_compat import cli_env_setup

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="scissor-vllm")
    options = command.subparser_init(parser.add_subparsers(dest="subparser", required=True))
    options.usage = "scissor-vllm serve [model_tag] [options]"
    for add in add_options:
        add(options)
    return command, parser.parse_args(["serve", *argv])


def set_environment(environment: MutableMapping[str, str]) -> None:
    """Set what the plugin needs in the environment of this process and its children.

    A loader that the operator chose stays.
    """
    name_plugin(environment)
    environment[SERVER_PID] = str(os.getpid())
    environment.setdefault("VLLM_VIDEO_LOADER_BACKEND", VIDEO_LOADER)


def name_plugin(environment: MutableMapping[str, str]) -> None:
    """Name our plugin in ``VLLM_PLUGINS``, which is a filter over all plugins.

    Ours is added to what it names, or to all that vLLM would load by itself.
    """
    named = environment.get("VLLM_PLUGINS")
    if named is None:
        # Endpoint plugins load only when named, so other packages' endpoints are left out.
        groups = ("general", "io_processor", "platform", "stat_logger")
        names = {e.name for group in groups for e in entry_points(group=f"vllm.{group}_plugins")}
    else:
        names = set(filter(None, named.split(",")))
    environment["VLLM_PLUGINS"] = ",".join(sorted({*names, PLUGIN}))


def drain_by_default(parser: argparse.ArgumentParser) -> None:
    """Have SIGTERM wait for answers in flight, unless the operator sets another time."""
    parser.set_defaults(shutdown_timeout=DEFAULT_SHUTDOWN_SECONDS)


def bound_encoder_steps(args: argparse.Namespace) -> None:
    """Bound the tower's work in a step, unless the operator chose another cache manager."""
    from scissor_vllm.scheduler.encoder_budget import CACHE_MANAGER

    if args.ec_manager_config.encoder_cache_manager_cls is None:
        args.ec_manager_config.encoder_cache_manager_cls = CACHE_MANAGER


def use_demo_model(args: argparse.Namespace) -> None:
    """Put the demo model's folder and settings where the user gave none."""
    args.model_tag = str(demo_model_path())
    args.served_model_name = args.served_model_name or [DEMO_MODEL]
    # Compiling a model this small takes longer than it saves.
    args.enforce_eager = True
    args.dtype = "float32" if args.dtype == "auto" else args.dtype
    args.max_model_len = args.max_model_len or 8192
    # An uncompressed video must fit into one step; vLLM's own choice on a CPU is 17 frames.
    args.max_num_batched_tokens = args.max_num_batched_tokens or args.max_model_len
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
