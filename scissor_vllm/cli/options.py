"""The options that ``scissor-vllm serve`` adds to ``vllm serve``, and their effect."""

from __future__ import annotations

import argparse
import ipaddress
import os
from typing import Any

from scissor_vllm.cli.defaults import API_SERVERS, CPUS_FOR_API_SERVERS, architectures_of
from scissor_vllm.cpus import num_cpus
from scissor_vllm.retention import (
    AUTO,
    MAX_RETAINED_VIDEO_TOKENS,
    RETENTION_RATIO,
    check_token_budget,
    parse_retention_ratio,
)
from scissor_vllm.settings import (
    ALLOW_COMPRESS_IMAGES,
    AUTO_RETENTION_RATIO,
    DEFAULT_FEATURE_CACHE_GB,
    DEFAULT_FRAME_CACHE_GB,
    DEFAULT_MAX_VIDEO_TOKENS,
    DEFAULT_MIN_RETENTION_RATIO,
    DEFAULT_RETENTION_RATIO,
    DEFAULT_TOWER_FP8_MAX_RATIO,
    DEFAULT_TOWER_MERGING_THRESHOLD,
    DEFAULT_VIDEO_COMPRESSION,
    MAX_VIDEO_TOKENS,
    MIN_RETENTION_RATIO,
    OWN_KEYS,
    TARGET_TTFT_MS,
    TOWER_FP8_MAX_RATIO,
    TOWER_MERGING_MAX_RATIO,
    TOWER_MERGING_THRESHOLD,
    VIDEO_COMPRESSION,
    VIDEO_FEATURE_CACHE_GB,
    VIDEO_FRAME_CACHE_GB,
    CacheSizes,
    RetentionPolicy,
    TowerFP8,
    TowerMerging,
    check_cache_gb,
    check_keys,
    check_target_ttft_ms,
    parse_auto_bounds,
)

GROUP = "Video compression"


def refuse(message: str) -> SystemExit:
    """Return an exit with a message for the terminal."""
    return SystemExit(f"scissor-vllm serve: {message}")


def add_retention_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``vllm serve`` does not have."""
    group = parser.add_argument_group(GROUP)
    _add_ratio_options(group)
    _add_token_limits(group)
    _add_method_option(group)
    _add_cache_options(group)
    _add_tower_merging_options(group)


def _add_ratio_options(group: argparse._ArgumentGroup) -> None:
    """Add the default ratio, its lower bound and the automatic choice."""
    group.add_argument(
        "--default-retention-ratio",
        metavar="RATIO",
        type=_ratio_or_auto,
        default=None,
        help="fraction of video tokens kept where a request names none; 1.0 is as vLLM without "
        f"compression; auto has the server choose (default: {DEFAULT_RETENTION_RATIO})",
    )
    group.add_argument(
        "--min-retention-ratio",
        metavar="RATIO",
        type=_ratio,
        default=None,
        help=f"a request below this is refused (default: {DEFAULT_MIN_RETENTION_RATIO})",
    )
    group.add_argument(
        "--auto-retention-ratio",
        metavar="MIN:MAX",
        type=_auto_bounds,
        default=None,
        help="bounds of the ratio that the server chooses for a request with retention_ratio auto: "
        "the highest at which its first token comes in --target-ttft-ms (default: none is chosen)",
    )
    group.add_argument(
        "--target-ttft-ms",
        metavar="MS",
        type=_target,
        default=None,
        help="goal of --auto-retention-ratio: milliseconds from a request's arrival to its first "
        "token (default: none)",
    )


def _add_token_limits(group: argparse._ArgumentGroup) -> None:
    """Add the default budget of a request and the longest video that is compressed."""
    group.add_argument(
        "--default-max-retained-video-tokens",
        metavar="TOKENS",
        type=_budget,
        default=None,
        help="most tokens that the videos of a request keep together where it names no "
        "max_retained_video_tokens, shared out by their lengths (default: no limit)",
    )
    group.add_argument(
        "--allow-compress-images",
        action="store_true",
        help="a request may ask by compress_images that runs of images of one size are compressed "
        "as the frames of a video (default: off)",
    )
    group.add_argument(
        "--max-video-tokens",
        metavar="TOKENS",
        type=int,
        default=None,
        help="most tokens, before compression, of a video that is compressed: all are in the GPU's "
        f"memory at once, as 167 frames of 196 tokens are (default: {DEFAULT_MAX_VIDEO_TOKENS})",
    )


def _add_method_option(group: argparse._ArgumentGroup) -> None:
    """Add the compression method."""
    from scissor_vllm.compression import METHODS

    group.add_argument(
        "--video-compression",
        metavar="METHOD",
        choices=sorted(METHODS),
        default=None,
        help="average-linkage: groups of tokens joined by mean cosine, in windows of 4 frames; "
        "scc: Semantic Connected Components of the whole video, as in the paper; scc-windows: "
        "of 4 frames each; for comparison: selections of tokens, with +merge those with SCC's last "
        f"step, and SCC without one of its steps; one of {', '.join(sorted(METHODS))} "
        f"(default: {DEFAULT_VIDEO_COMPRESSION})",
    )


def _add_cache_options(group: argparse._ArgumentGroup) -> None:
    """Add the sizes of the frame cache and the feature cache."""
    group.add_argument(
        "--video-frame-cache-gb",
        metavar="GIB",
        type=_gigabytes,
        default=None,
        help="GiB of decoded frames that each API server keeps, so that a video asked about again "
        "is not decoded again; 0, or --mm-processor-cache-gb 0 alone, keeps none "
        f"(default: {DEFAULT_FRAME_CACHE_GB:g})",
    )
    group.add_argument(
        "--video-feature-cache-gb",
        metavar="GIB",
        type=_gigabytes,
        default=None,
        help="GiB of host memory in which a worker keeps videos as the vision tower sees them, "
        "so that one asked about at another ratio below 1.0 is not encoded again; 0, or "
        "--mm-processor-cache-gb 0 alone, keeps none "
        f"(default: {DEFAULT_FEATURE_CACHE_GB:g})",
    )


def _add_tower_merging_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of merging patches in the vision tower."""
    group.add_argument(
        "--tower-merging-max-ratio",
        metavar="RATIO",
        type=float,
        default=None,
        help="requests of this ratio and below have the vision tower compute a patch once for "
        "frames in which it hardly changes; approximate, for LLaVA-OneVision and Qwen-VL only, and "
        "without effect where the camera moves; 0 switches it off (default: 0.1 for "
        "LLaVA-OneVision, 0 for others)",
    )
    group.add_argument(
        "--tower-merging-threshold",
        metavar="DIFFERENCE",
        type=float,
        default=None,
        help="mean squared difference of 8-bit pixels up to which a patch counts as unchanged: "
        "higher is faster and less exact "
        f"(default: {DEFAULT_TOWER_MERGING_THRESHOLD:g})",
    )
    group.add_argument(
        "--tower-fp8-max-ratio",
        metavar="RATIO",
        type=float,
        default=None,
        help="videos of this ratio and below have the MLPs of SigLIP's tower computed in FP8; "
        "approximate, for LLaVA-OneVision only; 0 switches it off (default: "
        f"{DEFAULT_TOWER_FP8_MAX_RATIO:g} for LLaVA-OneVision on Hopper GPUs, else 0)",
    )


def _gigabytes(text: str) -> float:
    try:
        return check_cache_gb("the size", float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _ratio(text: str) -> float:
    try:
        return parse_retention_ratio(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _ratio_or_auto(text: str) -> float | str:
    return text if text == AUTO else _ratio(text)


def _auto_bounds(text: str) -> str:
    try:
        parse_auto_bounds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _target(text: str) -> int:
    try:
        return check_target_ttft_ms(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _budget(text: str) -> int:
    try:
        return check_token_budget(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def print_help() -> None:
    """Print our options; vLLM prints its own."""
    _own_parser().print_help()


def given_options(argv: list[str]) -> list[str]:
    """Return our options in a command line."""
    parser = _own_parser()
    known, _ = parser.parse_known_args(argv)
    return [
        f"--{name.replace('_', '-')}"
        for name, value in vars(known).items()
        if value is not None and value is not False
    ]


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scissor-vllm serve",
        usage="scissor-vllm serve MODEL [options]",
        description="Serves MODEL, or 'demo', as vllm serve does, with videos compressed.",
        epilog="Every option of vllm serve is taken as well: --help=all lists all of them.",
        allow_abbrev=False,
    )
    add_retention_options(parser)
    add_page_options(parser)
    return parser


def apply_retention_options(args: argparse.Namespace) -> None:
    """Move our options into the engine's ``mm_processor_kwargs``, which reach every process.

    Raises:
        SystemExit: the default ratio is below the minimum, a setting is misspelt or not a number,
            the method is unknown, or the model is not supported.
    """
    from scissor_vllm.compression import check_method

    settings = {
        RETENTION_RATIO: args.default_retention_ratio,
        MIN_RETENTION_RATIO: args.min_retention_ratio,
        MAX_RETAINED_VIDEO_TOKENS: args.default_max_retained_video_tokens,
        MAX_VIDEO_TOKENS: args.max_video_tokens,
        AUTO_RETENTION_RATIO: args.auto_retention_ratio,
        TARGET_TTFT_MS: args.target_ttft_ms,
        ALLOW_COMPRESS_IMAGES: args.allow_compress_images or None,
        VIDEO_COMPRESSION: args.video_compression,
        VIDEO_FRAME_CACHE_GB: args.video_frame_cache_gb,
        VIDEO_FEATURE_CACHE_GB: args.video_feature_cache_gb,
        TOWER_MERGING_MAX_RATIO: args.tower_merging_max_ratio,
        TOWER_MERGING_THRESHOLD: args.tower_merging_threshold,
        TOWER_FP8_MAX_RATIO: args.tower_fp8_max_ratio,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    merged = {**(args.mm_processor_kwargs or {}), **given}
    try:
        check_method(RetentionPolicy.from_mm_processor_kwargs(merged).method)
        CacheSizes.of(merged, args.mm_processor_cache_gb)
        TowerMerging.from_mm_processor_kwargs(merged)
        TowerFP8.from_mm_processor_kwargs(merged)
        _check_model(args, merged)
    except (TypeError, ValueError) as error:
        raise refuse(str(error)) from error
    if merged:
        args.mm_processor_kwargs = merged


def _check_model(args: argparse.Namespace, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if one of our settings is misspelt or the model is not supported."""
    from scissor_vllm.models import MODELS

    architectures = None if OWN_KEYS.isdisjoint(kwargs) else architectures_of(args)
    check_keys(kwargs, architectures is None or bool(MODELS.keys() & set(architectures)), MODELS)


def in_force(args: argparse.Namespace) -> str:
    """Return the settings in force as one log line."""
    kwargs = args.mm_processor_kwargs or {}
    policy = RetentionPolicy.from_mm_processor_kwargs(kwargs)
    sizes = CacheSizes.of(kwargs, args.mm_processor_cache_gb)
    num_servers = args.api_server_count or 1
    default = f"{policy.default_ratio}"
    if policy.auto_bounds is not None:
        lowest, highest = policy.auto_bounds
        auto = f"{lowest} to {highest} for a first token in {policy.target_ttft_ms} ms"
        default = f"auto ({auto})" if policy.is_auto_by_default else f"{default} (auto: {auto})"
    budget = ""
    if policy.default_budget is not None:
        budget = f", {policy.default_budget} video tokens a request at most by default"
    line = (
        f"scissor_vllm: retention ratio {default} by default and "
        f"{policy.min_ratio} at least{budget}, method {policy.method}, caches of "
        f"{sizes.frames / 2**30:g} GiB for frames and {sizes.features / 2**30:g} GiB for "
        f"features, API servers {num_servers}"
    )
    merging = TowerMerging.from_mm_processor_kwargs(kwargs)
    if merging.max_ratio:
        line += f", merging in the tower at ratios up to {merging.max_ratio}"
    in_fp8 = TowerFP8.from_mm_processor_kwargs(kwargs)
    if in_fp8.max_ratio:
        line += f", the tower's MLPs in FP8 at ratios up to {in_fp8.max_ratio}"
    if num_servers == 1 and num_cpus() >= CPUS_FOR_API_SERVERS:
        more = f"--api-server-count {API_SERVERS}"
        line += f" ({more} prepares more videos at once, with a cache in each)"
    return line


def exposure(args: argparse.Namespace) -> str | None:
    """Return what anyone can do with a server that the operator left open; None if none can.

    Each of a key, a list of hosts and a loopback address closes it.
    """
    has_key = any(args.api_key or ()) or bool(os.environ.get("VLLM_API_KEY"))
    if has_key or args.allowed_media_domains or args.uds or is_loopback(args.host):
        return None
    return (
        f"whoever reaches port {args.port} can use this server, and have it fetch any URL that it "
        "reaches: set --api-key, name the hosts of videos by --allowed-media-domains, or bind "
        "--host 127.0.0.1"
    )


def is_loopback(host: str | None) -> bool:
    """Return whether only this machine reaches a server bound to this host; None is any address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def add_page_options(parser: argparse.ArgumentParser) -> None:
    """Add the option of the web page, which ``vllm serve`` does not have."""
    parser.add_argument_group("Web page").add_argument(
        "--web-page",
        action="store_true",
        help="serve a page at /scissor on which to ask about a video at any ratio, and to see what "
        "was kept of it (default: no page)",
    )


def apply_page_options(args: argparse.Namespace) -> None:
    """Set the worker extension that makes the page's pictures.

    Raises:
        SystemExit: the operator set another extension, and vLLM takes only one.
    """
    if not args.web_page:
        return
    from scissor_vllm.show import WORKER_EXTENSION

    if args.worker_extension_cls not in ("", WORKER_EXTENSION):
        raise refuse(
            "--web-page needs --worker-extension-cls for its own class, got "
            f"{args.worker_extension_cls}: leave one of the two out"
        )
    args.worker_extension_cls = WORKER_EXTENSION
