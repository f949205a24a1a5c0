"""The installer: one line with the remedy for each missing thing, and no change if all is well."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
INSTALL = ROOT / "deploy" / "cpu" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", INSTALL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_index_without_cpu_torch_gets_one_line_with_the_remedy(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run = subprocess.run(
        [sys.executable, str(INSTALL), str(tmp_path / "venv")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            **os.environ,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(empty),
        },
    )
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("install: ")]
    assert "PyTorch's CPU builds" in line
    assert "PIP_EXTRA_INDEX_URL" in line
    assert "Traceback" not in run.stderr


def test_another_python_gets_one_line_with_the_remedy(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 10, 4))
    with pytest.raises(install.InstallError, match=r"found 3\.10\.4.*make PYTHON=python3\.11"):
        install.install(tmp_path / "venv", dev=False)
    assert not (tmp_path / "venv").exists()


def test_make_without_python_says_what_to_do() -> None:
    run = subprocess.run(
        ["make", "demo", "VENV=/nonexistent/venv", "PYTHON=python0.0"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode != 0
    assert "python0.0 not found: install Python 3.11" in run.stderr


def test_every_pinned_version_is_exact() -> None:
    for path in INSTALL.parent.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert "==" in line, line


OPERATORS = INSTALL.parent / "torchvision_operators.py"


def fake_torchvision(folder: Path, body: str) -> None:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(body))


def run_with_operators(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "operators.py").write_text(OPERATORS.read_text())
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = sys.argv[1:]; {code}",
         str(folder), *sys.path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip


def test_a_torchvision_that_loads_is_not_touched(tmp_path: Path) -> None:
    fake_torchvision(tmp_path, "value = 3")
    run = run_with_operators(
        tmp_path,
        "import operators, torchvision; assert torchvision.value == 3; "
        "assert 'torch' not in sys.modules; assert not operators._declared",
    )
    assert run.returncode == 0, run.stderr


def test_operators_that_are_missing_are_declared_and_the_import_is_made_again(
    tmp_path: Path,
) -> None:
    fake_torchvision(
        tmp_path,
        """
        import torch
        if not hasattr(torch.ops.torchvision, "nms"):
            raise RuntimeError("operator torchvision::nms does not exist")
        value = 3
        """,
    )
    run = run_with_operators(tmp_path, "import operators, torchvision; print(torchvision.value)")
    assert run.stdout.strip() == "3", run.stderr


def test_another_failure_of_torchvision_is_passed_on(tmp_path: Path) -> None:
    fake_torchvision(tmp_path, "raise RuntimeError('something else')")
    run = run_with_operators(tmp_path, "import operators, torchvision")
    assert "something else" in run.stderr


def test_bytecode_beside_the_installer_does_not_install_again() -> None:
    run = subprocess.run(
        ["make", "-n", "-o", "pyproject.toml", "-W", "deploy/cpu/__pycache__", "demo"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "scissor-vllm demo" in run.stdout
    assert "install.py" not in run.stdout
