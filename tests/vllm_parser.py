"""vLLM's parser of a server's command, for a process that begins with vLLM imported."""

from __future__ import annotations

import json
from pathlib import Path


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
