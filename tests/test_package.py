"""The distributions: what an index shows is right, and the tests run from the sdist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from scissor_vllm.version import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    for path in (ROOT / "scissor_vllm").rglob("*.py"):
        has_version = re.search(rf"[\"']{re.escape(__version__)}[\"']", path.read_text())
        assert bool(has_version) == (path.name == "version.py"), path


def test_an_index_gets_authors_links_classifiers_and_the_extras() -> None:
    assert PROJECT["authors"] == [{"name": "scissor-vllm contributors"}]
    assert PROJECT["urls"].keys() >= {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert any(name.startswith("Environment :: GPU") for name in PROJECT["classifiers"])
    assert PROJECT["optional-dependencies"].keys() >= {"gpu", "cpu", "bench", "show"}
    readme = (ROOT / "README.md").read_text()
    install = re.search(r"pip install \"scissor-vllm\[(\w+)\]\"", readme)
    assert install is not None
    assert install[1] in PROJECT["optional-dependencies"]
    first_command = re.search(r"^```sh\n(.*)", readme, re.M)
    assert first_command is not None
    assert first_command[1] == install[0]


OF_DEFAULT_DTYPE = {"empty", "eye", "linspace", "ones", "rand", "randn", "zeros"}
"""Functions of torch whose tensors have the default dtype, unless they are told one."""


def test_no_tensor_takes_the_default_dtype_which_is_the_models_while_vllm_loads_weights() -> None:
    without = []
    for path in sorted((ROOT / "scissor_vllm").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            is_torchs = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
            names = {keyword.arg for keyword in call.keywords}
            if is_torchs and call.func.attr in OF_DEFAULT_DTYPE and "dtype" not in names:
                without.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert without == []


def test_every_extra_that_a_message_names_exists() -> None:
    extras = PROJECT["optional-dependencies"].keys()
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for path in [*pages, *(ROOT / "scissor_vllm").rglob("*.py")]:
        for names in re.findall(r"scissor-vllm\[([\w,]+)\]", path.read_text()):
            assert set(names.split(",")) <= extras, path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_twine_finds_nothing_wrong(distributions: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
    in_package = {name for name in names if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "scissor_vllm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_package == sources


@pytest.mark.slow
def test_the_tests_run_from_the_sdist(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(distributions[0]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    collected = subprocess.run(
        [*pytest_here, "--collect-only", "tests"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=environment,
    )
    assert collected.returncode == 0, collected.stdout[-4000:]
    some = ["tests/test_docs.py", "tests/test_package.py", "tests/test_retention.py"]
    run = subprocess.run(
        [*pytest_here, *some],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env=environment,
    )
    assert run.returncode == 0, run.stdout[-4000:]
