"""vLLM's parser of a server's command, for a process that begins with vLLM imported."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch


def write_parsed(commands: list[tuple[bool, list[str]]], names: list[str], path: Path) -> None:
    """Parse commands of servers as vLLM does, some with our options, and write what is named."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from scissor_vllm.cli.options import add_retention_options

    parsed = []
    for has_our_options, command in commands:
        parser = FlexibleArgumentParser()
        options = ServeSubcommand().subparser_init(parser.add_subparsers(dest="command"))
        if has_our_options:
            add_retention_options(options)
        args = vars(parser.parse_args(command))
        parsed.append({name: args.get(name) for name in names})
    path.write_text(json.dumps(parsed, default=vars))


def write_started(commands: list[tuple[str, list[str]]], path: Path) -> None:
    """Write what ``vllm`` or ``scissor-vllm`` gives vLLM's server: its arguments and environment.

    As on a host of 32 CPUs with enough shared memory. Nothing is served.
    """
    path.write_text(json.dumps([_started(*command) for command in commands], default=_plain))


def _started(program: str, command: list[str]) -> dict[str, dict[str, Any]]:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from scissor_vllm.cli.serve import serve
    from scissor_vllm.vllm_compat import cli_env_setup

    captured: list[dict[str, dict[str, Any]]] = []
    before = dict(os.environ)

    def capture(args: argparse.Namespace) -> None:
        changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
        captured.append({"arguments": dict(vars(args)), "environment": changed})

    with (
        patch.dict(os.environ),
        patch.object(ServeSubcommand, "cmd", staticmethod(capture)),
        patch("scissor_vllm.cli.defaults.num_cpus", lambda: 32),
        patch("scissor_vllm.cli.defaults._has_shared_memory", lambda: True),
    ):
        # Both set what vLLM's command sets.
        cli_env_setup()
        before |= os.environ
        if program == "scissor-vllm":
            assert serve(command[1:]) == 0
        else:
            parser = FlexibleArgumentParser()
            ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
            capture(parser.parse_args(command))
    (started,) = captured
    return started


def _plain(value: object) -> object:
    """Return a configuration's fields, or how a value of another kind is printed."""
    return vars(value) if hasattr(value, "__dict__") else repr(value)
