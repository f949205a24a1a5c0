"""The check of a vLLM's source for the names that the package imports finds what is missing."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.vllm_imports import main, missing, references


def installed() -> Path:
    """Return the folder that holds the installed vLLM."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def test_the_installed_vllm_has_every_name_that_the_package_imports() -> None:
    assert len(references()) > 100
    assert missing(installed()) == []


def test_a_name_or_a_module_that_vllm_lacks_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "file.py").write_text(
        "from vllm import LLM, Nothing\n"
        "from vllm.nowhere import anything\n"
        "from vllm.model_executor.models import llava_onevision as stock\n"
        "stock.LlavaOnevisionProcessingInfo\n"
        "stock.LlavaOnevisionProcessingInfos\n"
        "try:\n    from vllm.nowhere import setup\n"
        "except ImportError:\n    from vllm.config import VllmConfig as setup\n"
    )
    reported = {
        f"{reference.module}.{reference.name}" for reference in missing(installed(), package)
    }
    assert reported == {
        "vllm.Nothing",
        "vllm.nowhere.anything",
        "vllm.model_executor.models.llava_onevision.LlavaOnevisionProcessingInfos",
    }
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "has no vllm/__init__.py" in capsys.readouterr().err


def test_the_command_fails_for_a_vllm_without_a_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vllm").mkdir()
    shutil.copy(installed() / "vllm" / "__init__.py", tmp_path / "vllm")
    assert main([str(tmp_path)]) == 1
    assert "scissor_vllm/vllm_compat.py" in capsys.readouterr().out
