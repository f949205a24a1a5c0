"""Every name that the package takes from vLLM is there, by the sources of vLLM alone.

Checked is the installed vLLM and, where ``SCISSOR_VLLM_SOURCES`` names some, further ones: folders
with an unpacked wheel's ``vllm``, separated by colons. (``pip download --no-deps vllm==0.33.0`` and
``unzip`` make one; nothing of it is imported.)
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import scissor_vllm

PACKAGE = Path(scissor_vllm.__file__).parent


def sources() -> list[Path]:
    """Return folders that hold a ``vllm``."""
    installed = find_spec("vllm")
    assert installed is not None
    assert installed.origin is not None
    others = os.environ.get("SCISSOR_VLLM_SOURCES", "").split(":")
    return [Path(installed.origin).parent.parent, *(Path(each) for each in others if each)]


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield a module of vLLM, a name of it that a file imports, and the line.

    An import in a ``try`` that catches ImportError may fail in some versions: the names of its
    handlers are alternatives, see ``alternatives``.
    """
    tree = ast.parse(path.read_text())
    optional = {id(node) for group in alternatives(tree) for node in group}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_vllm(node.module) and id(node) not in optional:
            for alias in node.names:
                yield node.module or "", alias.name, node.lineno


def alternatives(tree: ast.AST) -> list[list[ast.ImportFrom]]:
    """Return groups of imports of which one has to succeed."""
    groups = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(h) for h in node.handlers):
            found = [
                each
                for each in ast.walk(node)
                if isinstance(each, ast.ImportFrom) and is_vllm(each.module)
            ]
            groups.append(found)
    return [group for group in groups if group]


def is_vllm(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "vllm"


def file_of(source: Path, module: str) -> Path | None:
    """Return a module's file."""
    path = source.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def names_of(source: Path, module: str) -> frozenset[str] | None:
    """Return what a module binds at its top level, None if there is no such module.

    Names that it offers lazily count: strings of a dictionary, as in vLLM's own ``__init__``.
    """
    path = file_of(source, module)
    if path is None:
        return None
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                names |= names_of(source, _absolute(node, path, module)) or set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Dict):
            names |= {
                key.value
                for key in node.keys
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            }
    return frozenset(names)


def _absolute(node: ast.ImportFrom, path: Path, module: str) -> str:
    """Return the module that a module imports from."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *filter(None, [node.module])])


def is_there(source: Path, module: str, name: str) -> bool:
    """Return whether a module of vLLM has a name, or a module of that name."""
    names = names_of(source, module)
    if names is not None and (name in names or name == "*"):
        return True
    return file_of(source, f"{module}.{name}") is not None


@pytest.mark.parametrize("source", sources(), ids=str)
def test_all_that_the_package_imports_from_vllm_is_there(source: Path) -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    wanted = [(path, *each) for path in files for each in imports(path)]
    assert len(wanted) > 100
    missing = [
        f"{path.relative_to(PACKAGE)}:{line}: {module}.{name}"
        for path, module, name, line in wanted
        if not is_there(source, module, name)
    ]
    assert not missing


@pytest.mark.parametrize("source", sources(), ids=str)
def test_of_imports_for_some_versions_one_is_there(source: Path) -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for group in alternatives(ast.parse(path.read_text())):
            assert any(
                all(is_there(source, node.module or "", alias.name) for alias in node.names)
                for node in group
            ), f"{path.relative_to(PACKAGE)}:{group[0].lineno}"


@pytest.mark.parametrize("source", sources(), ids=str)
def test_what_the_models_take_from_vllms_modules_is_there(source: Path) -> None:
    """``from vllm.model_executor.models import qwen3_vl as stock``, then ``stock.Name``."""
    missing, seen = [], 0
    for path in sorted((PACKAGE / "models").glob("*.py")):
        tree = ast.parse(path.read_text())
        modules = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and is_vllm(node.module)
            for alias in node.names
            if file_of(source, f"{node.module}.{alias.name}") is not None
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                if module is not None:
                    seen += 1
                    if not is_there(source, module, node.attr):
                        missing.append(f"{path.name}:{node.lineno}: {module}.{node.attr}")
    assert seen > 40
    assert not missing


def test_a_name_that_is_not_there_is_seen() -> None:
    (source, *_) = sources()
    assert is_there(source, "vllm", "ModelRegistry")
    assert is_there(source, "vllm.config", "VllmConfig")
    assert not is_there(source, "vllm.config", "VllmConfigs")
    assert not is_there(source, "vllm.confi", "VllmConfig")
