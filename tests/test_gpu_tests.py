"""The command that runs all GPU tests: its choice of files, and its counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu_tests import Counter, default_output, gpu_test_files

GPU_TEST = """
import pytest

@pytest.mark.gpu
def test_that_passes() -> None: ...

@pytest.mark.gpu
def test_that_fails() -> None:
    assert 1 == 2

@pytest.mark.gpu
def test_that_skips() -> None:
    pytest.skip("no second GPU")

def test_of_no_gpu() -> None: ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Its modules stay imported: each test has a package of another name.
    folder = tmp_path / f"gpu_tests_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "test_here.py").write_text(GPU_TEST)
    (folder / "test_absent.py").write_text("import no_such_package\n" + GPU_TEST)
    (folder / "test_cpu.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_files_that_need_what_is_not_installed_are_named_with_the_reason(folder: Path) -> None:
    files, left_out = gpu_test_files(folder)
    assert files == [folder / "test_here.py"]
    assert left_out == {"test_absent.py": "needs no_such_package, which is not installed"}


def test_outcomes_are_counted_and_failures_named(folder: Path) -> None:
    counter = Counter()
    arguments = ["-m", "gpu", "--noconftest", "-q", "-p", "no:cacheprovider"]
    code = pytest.main([*arguments, str(folder / "test_here.py")], plugins=[counter])
    assert code == pytest.ExitCode.TESTS_FAILED
    assert counter.counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert [name.split("::")[1] for name in counter.failed] == ["test_that_fails"]
    assert list(counter.skipped.values()) == ["Skipped: no second GPU"]


def test_a_result_is_named_by_gpu_and_commit() -> None:
    result = {"gpu": "NVIDIA H100 80GB HBM3", "environment": {"commit": "0522b2f3a1"}}
    assert default_output(result).name == "gpu-tests-h100-80gb-hbm3-0522b2f.json"


def test_every_gpu_test_of_the_suite_is_found() -> None:
    tests = Path(__file__).parent
    files, left_out = gpu_test_files(tests)
    names = {path.name for path in files} | set(left_out)
    assert {"test_kernels.py", "test_compress.py", "test_methods.py", "test_metrics.py"} <= names
