"""Every name that the package takes from vLLM is in every supported version, by sources alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scissor_vllm.version_gate import SUPPORTED_VLLM
from tests.vllm_names import (
    PACKAGE,
    Recorded,
    Sources,
    alternatives,
    has,
    installed,
    package_files,
    recorded,
    wanted_modules,
    wanted_names,
)

VERSIONS: list[Sources | Recorded] = [installed(), *recorded()]
every_version = pytest.mark.parametrize(
    "source", VERSIONS, ids=lambda each: f"{type(each).__name__.lower()}-{each.version}"
)
RENEW = "if a module is new to the package, record it as tests/vllm_names.py says"


def test_the_record_covers_every_supported_version() -> None:
    (major, first), (_, beyond) = SUPPORTED_VLLM
    minors = {tuple(map(int, source.version.split(".")[:2])) for source in recorded()}
    assert minors == {(major, minor) for minor in range(first, beyond)}


@every_version
def test_all_that_the_package_takes_from_vllm_is_there(source: Sources | Recorded) -> None:
    wanted = [(path, *each) for path in package_files() for each in wanted_names(path)]
    assert len(wanted) > 150
    missing = [
        f"{path.relative_to(PACKAGE)}:{line}: {module}.{name}"
        for path, module, name, line in wanted
        if not has(source, module, name)
    ]
    assert not missing, RENEW


@every_version
def test_of_imports_for_some_versions_one_is_there(source: Sources | Recorded) -> None:
    groups = [
        (path, group)
        for path in package_files()
        for group in alternatives(ast.parse(path.read_text()))
    ]
    assert groups
    for path, group in groups:
        assert any(
            all(has(source, node.module or "", alias.name) for alias in node.names)
            for node in group
        ), f"{path.relative_to(PACKAGE)}:{group[0].lineno}; {RENEW}"


def test_the_record_says_of_the_installed_vllm_what_its_sources_say() -> None:
    sources = installed()
    record = next((each for each in recorded() if each.version == sources.version), None)
    if record is None:
        pytest.skip(f"vLLM {sources.version} is not in the record")
    for module in wanted_modules():
        assert record.names_of(module) == sources.names_of(module), f"{module}: {RENEW}"


SOURCE = """
from .part import *
from vllm.elsewhere import moved as here
LAZY = {"Lazy": "vllm.lazy"}
import json
def __getattr__(name):
    if name == "later":
        return 1
if TYPE_CHECKING:
    from vllm.types import OnlyTyped
try:
    import fast
except ImportError:
    fast = None
def outer():
    inner = 1
class Model:
    field = 2
    def method(self): ...
"""


def test_only_names_that_an_import_can_reach_count(tmp_path: Path) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    (package / "part.py").write_text("starred = 1")
    sources = Sources(tmp_path)
    reached = {"starred", "here", "LAZY", "Lazy", "fast", "outer", "Model", "part", "later"}
    assert (sources.names_of("vllm") or set()) - {"__getattr__"} == reached
    assert sources.names_of("vllm.absent") is None


def test_a_name_that_vllm_has_not_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "from vllm import ModelRegistry, Nothing\n"
        "from vllm.model_executor.models import qwen3_vl as stock\n"
        "def later():\n    from vllm.confi import VllmConfig\n"
        "class Model(stock.Qwen3VLForConditionalGeneration, stock.Qwen3VLFor): ...\n"
    )
    for source in VERSIONS:
        missing = {name for module, name, _ in wanted_names(file) if not has(source, module, name)}
        assert missing == {"Nothing", "VllmConfig", "Qwen3VLFor"}
