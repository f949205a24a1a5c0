"""The command ``scissor-vllm``: ``serve`` is ``vllm serve`` with compression, ``demo`` shows it."""

import argparse
import os
import sys
from importlib.metadata import entry_points
from typing import Any

from scissor_vllm.retention import RETENTION_RATIO, check_retention_ratio
from scissor_vllm.settings import (
    DEFAULT_MAX_VIDEO_TOKENS,
    DEFAULT_MIN_RETENTION_RATIO,
    DEFAULT_RETENTION_RATIO,
    DEFAULT_VIDEO_COMPRESSION,
    MAX_VIDEO_TOKENS,
    MIN_RETENTION_RATIO,
    VIDEO_COMPRESSION,
    VIDEO_FEATURE_CACHE_GB,
    VIDEO_FRAME_CACHE_GB,
)

PLUGIN = "scissor_vllm"
"""Name of our entry points, as ``VLLM_PLUGINS`` lists it."""

API_SERVERS, CPUS_FOR_API_SERVERS = 2, 16
"""API servers where there are so many CPUs for them. More are the operator's to choose: vLLM keeps
a cache of 4 GiB in each."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"serve": serve, "demo": demo, "bench": bench, "convert": convert, "show": show}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    asked = argv[:1] in (["-h"], ["--help"])
    print(
        "usage: scissor-vllm serve MODEL [options]  serve MODEL ('demo': a small one)\n"
        "       scissor-vllm demo [options]         serve the small one, send it a clip, stop\n"
        "       scissor-vllm bench [options]        load a server at every ratio\n"
        "       scissor-vllm convert SOURCE OUT     make an original checkpoint one for vLLM\n"
        "       scissor-vllm show VIDEO [options]   draw what compression does to a video\n\n"
        "scissor-vllm COMMAND --help lists a command's options.",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2


def demo(argv: list[str]) -> int:
    """Show the ratio at work; see ``scissor_vllm.demo.client``."""
    from scissor_vllm.demo.client import main as run

    return run(argv)


def bench(argv: list[str]) -> int:
    """Load a server and measure it; see ``scissor_vllm.loadtest``."""
    from scissor_vllm.loadtest.command import main as run

    return run(argv)


def convert(argv: list[str]) -> int:
    """Convert an original LLaVA-OneVision checkpoint; see ``scissor_vllm.convert``."""
    from scissor_vllm.convert.command import main as run

    return run(argv)


def show(argv: list[str]) -> int:
    """Draw what compression does to a video; see ``scissor_vllm.show``."""
    from scissor_vllm.show.command import main as run

    return run(argv)


def serve(argv: list[str]) -> int:
    """Serve a model with vLLM; every flag of ``vllm serve`` is taken."""
    from scissor_vllm.allocator import keep_touched_memory
    from scissor_vllm.metrics import metrics_directory

    keep_touched_memory()
    set_environment(os.environ)
    with metrics_directory(os.environ):
        return _serve(argv)


def _serve(argv: list[str]) -> int:
    # vLLM reads the environment as it is imported.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from scissor_vllm.cpus import num_cpus
    from scissor_vllm.vllm_compat import cli_env_setup

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="scissor-vllm")
    options = command.subparser_init(parser.add_subparsers(dest="subparser", required=True))
    options.usage = "scissor-vllm serve [model_tag] [options]"
    add_retention_options(options)
    add_page_options(options)
    args = parser.parse_args(["serve", *argv])
    if args.model_tag is not None:
        from scissor_vllm.demo.model import DEMO_MODEL

        if args.model_tag == DEMO_MODEL:
            use_demo_model(args)
    apply_retention_options(args)
    bound_encoder_steps(args)
    if not current_platform.is_cpu():
        # There the engine needs the CPUs itself.
        widen_front_end(args, num_cpus())
    apply_page_options(args)
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0


def set_environment(environment: Any) -> None:
    """Set what the plugin needs in the environment of this process and its children.

    ``VLLM_PLUGINS`` is a filter over all plugins: ours is added to what it names, or to all that
    vLLM would load by itself. A loader that the operator chose stays.
    """
    named = environment.get("VLLM_PLUGINS")
    if named is None:
        # Endpoint plugins of others load only when named, and nobody named them.
        groups = ("general", "io_processor", "platform", "stat_logger")
        names = {e.name for group in groups for e in entry_points(group=f"vllm.{group}_plugins")}
    else:
        names = set(filter(None, named.split(",")))
    environment["VLLM_PLUGINS"] = ",".join(sorted({*names, PLUGIN}))
    environment.setdefault("VLLM_VIDEO_LOADER_BACKEND", "pyav")


def add_retention_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``vllm serve`` does not have."""
    from scissor_vllm.compression import METHODS
    from scissor_vllm.settings import DEFAULT_FEATURE_CACHE_GB, DEFAULT_FRAME_CACHE_GB

    group = parser.add_argument_group("Video compression")
    group.add_argument(
        "--default-retention-ratio",
        type=_ratio,
        default=None,
        help="fraction of video tokens kept where a request names none "
        f"(default {DEFAULT_RETENTION_RATIO}: as vLLM without compression)",
    )
    group.add_argument(
        "--min-retention-ratio",
        type=_ratio,
        default=None,
        help=f"a request below this is refused (default {DEFAULT_MIN_RETENTION_RATIO})",
    )
    group.add_argument(
        "--max-video-tokens",
        type=int,
        default=None,
        help="most tokens, before compression, of a video that is compressed: all are in the GPU's "
        f"memory at once (default {DEFAULT_MAX_VIDEO_TOKENS}: 167 frames of 196)",
    )
    group.add_argument(
        "--video-compression",
        choices=sorted(METHODS),
        default=None,
        help="scc: Semantic Connected Components of the whole video, as in the paper; scc-windows: "
        "of 4 frames each; the others are for comparison: selections of tokens, with +merge those "
        "with SCC's last step, and SCC without one of its steps "
        f"(default {DEFAULT_VIDEO_COMPRESSION})",
    )
    group.add_argument(
        "--video-frame-cache-gb",
        type=_gigabytes,
        default=None,
        help="GiB of decoded frames that each API server keeps, so that a video asked about again "
        f"is not decoded again; 0 keeps none (default {DEFAULT_FRAME_CACHE_GB:g}, or 0 with "
        "--mm-processor-cache-gb 0)",
    )
    group.add_argument(
        "--video-feature-cache-gb",
        type=_gigabytes,
        default=None,
        help="GiB of host memory in which each worker keeps videos as the vision tower sees them, "
        "so that one asked about at another ratio below 1.0 is not encoded again; 0 keeps none "
        f"(default {DEFAULT_FEATURE_CACHE_GB:g}, or 0 with --mm-processor-cache-gb 0)",
    )


def _gigabytes(text: str) -> float:
    from scissor_vllm.settings import check_cache_gb

    try:
        return check_cache_gb("the size", float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _ratio(text: str) -> float:
    try:
        return check_retention_ratio(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def apply_retention_options(args: argparse.Namespace) -> None:
    """Move our options into the engine's ``mm_processor_kwargs``, which reach every process.

    Raises:
        SystemExit: the default ratio is below the minimum, a setting is no number, or there is no
            such method of compression.
    """
    from scissor_vllm.compression import check_method
    from scissor_vllm.settings import CacheSizes, RetentionPolicy

    own = {
        RETENTION_RATIO: args.default_retention_ratio,
        MIN_RETENTION_RATIO: args.min_retention_ratio,
        MAX_VIDEO_TOKENS: args.max_video_tokens,
        VIDEO_COMPRESSION: args.video_compression,
        VIDEO_FRAME_CACHE_GB: args.video_frame_cache_gb,
        VIDEO_FEATURE_CACHE_GB: args.video_feature_cache_gb,
    }
    given = {key: value for key, value in own.items() if value is not None}
    merged = {**(args.mm_processor_kwargs or {}), **given}
    try:
        check_method(RetentionPolicy.from_mm_processor_kwargs(merged).method)
        CacheSizes.of(merged, args.mm_processor_cache_gb)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"scissor-vllm serve: {error}") from error
    if merged:
        args.mm_processor_kwargs = merged


def bound_encoder_steps(args: argparse.Namespace) -> None:
    """Bound the tower's work in a step, unless the operator chose another cache manager."""
    from scissor_vllm.scheduler.encoder_budget import CACHE_MANAGER

    if args.ec_manager_config.encoder_cache_manager_cls is None:
        args.ec_manager_config.encoder_cache_manager_cls = CACHE_MANAGER


def widen_front_end(args: argparse.Namespace, num_cpus: int) -> None:
    """Start two API servers where there are CPUs for them, unless the operator says how many.

    One interpreter prepares all videos of an API server and writes all of its answers. When many
    requests end at once, the next are prepared while it still writes, and the GPU waits. Where vLLM
    has a rule of its own (data parallelism, no server on this host) or allows one server only, its
    default stays.
    """
    from vllm import envs

    options = (
        *("api_server_count", "headless", "grpc", "enable_elastic_ep"),
        *("data_parallel_rank", "data_parallel_start_rank", "data_parallel_external_lb"),
        *("data_parallel_hybrid_lb", "data_parallel_multi_port_external_lb"),
    )
    given = (getattr(args, name, None) for name in options)
    is_decided = any(value is not None and value is not False for value in given)
    allow_one = ("VLLM_USE_RUST_FRONTEND", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    is_single = any(getattr(envs, name, False) for name in allow_one)
    if is_decided or is_single or args.data_parallel_size != 1:
        return
    if num_cpus >= CPUS_FOR_API_SERVERS:
        args.api_server_count = API_SERVERS


def add_page_options(parser: argparse.ArgumentParser) -> None:
    """Add the option of the web page, which ``vllm serve`` does not have."""
    parser.add_argument_group("Web page").add_argument(
        "--web-page",
        action="store_true",
        help="serve a page at /scissor on which to ask about a video at any ratio, and to see what "
        "was kept of it (default: no page)",
    )


def apply_page_options(args: argparse.Namespace) -> None:
    """Have the workers answer what the page asks them.

    Raises:
        SystemExit: the operator extends the workers by a class, and vLLM takes one.
    """
    if not args.web_page:
        return
    from scissor_vllm.show import WORKER_EXTENSION

    if args.worker_extension_cls not in ("", WORKER_EXTENSION):
        raise SystemExit(
            "scissor-vllm serve: --web-page needs --worker-extension-cls for its own class, got "
            f"{args.worker_extension_cls}: leave one of the two out"
        )
    args.worker_extension_cls = WORKER_EXTENSION


def use_demo_model(args: argparse.Namespace) -> None:
    """Put the demo model's folder and settings where the user gave none."""
    from scissor_vllm.demo.model import DEMO_MODEL, demo_model_path

    args.model_tag = str(demo_model_path())
    args.served_model_name = args.served_model_name or [DEMO_MODEL]
    # Compiling a model this small takes longer than it saves.
    args.enforce_eager = True
    args.dtype = "float32" if args.dtype == "auto" else args.dtype
    args.max_model_len = args.max_model_len or 8192
    # An uncompressed video must fit into one step; vLLM's own choice on a CPU is 17 frames.
    args.max_num_batched_tokens = args.max_num_batched_tokens or args.max_model_len
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


if __name__ == "__main__":
    sys.exit(main())
