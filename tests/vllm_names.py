"""What vLLM's modules define, read from its sources without importing them.

Names of versions that are not installed here are kept in ``tests/data/vllm-names.json``. To record
a version, unpack its wheel and name the folder that holds ``vllm``:

    pip download --no-deps --dest build vllm==0.33.0
    python -m zipfile -e build/vllm-0.33.0-*.whl build/vllm-0.33.0
    python -m tests.vllm_names build/vllm-0.33.0

The installed vLLM is named by the folder ``installed``. A record covers the modules that the
package imports. It must be renewed for all versions when the package imports another module.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import scissor_vllm

PACKAGE = Path(scissor_vllm.__file__).parent
RECORD = Path(__file__).parent / "data" / "vllm-names.json"
Record = dict[str, dict[str, list[str]]]
"""Module to versions, separated by blanks, to the names that it has in exactly these."""


# What the package takes from vLLM.


def package_files() -> list[Path]:
    """Return the package's source files."""
    return sorted(PACKAGE.rglob("*.py"))


def is_vllm(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "vllm"


def imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Yield the imports from vLLM, those within functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_vllm(node.module):
            yield node


def alternatives(tree: ast.AST) -> list[list[ast.ImportFrom]]:
    """Return groups of imports of which one has to succeed: a ``try`` catches ImportError."""
    groups = [
        list(imports(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(h) for h in node.handlers)
    ]
    return [group for group in groups if group]


def wanted_names(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield a module of vLLM, a name that a file needs of it, and the line.

    Imports of which one has to succeed are left out, see :func:`alternatives`. With
    ``from vllm.package import module as stock`` the file needs every ``stock.Name`` as well.
    """
    tree = ast.parse(path.read_text())
    optional = {id(node) for group in alternatives(tree) for node in group}
    modules = {}
    for node in imports(tree):
        for alias in node.names:
            if id(node) not in optional:
                yield node.module or "", alias.name, node.lineno
            modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for use in ast.walk(tree):
        if isinstance(use, ast.Attribute) and isinstance(use.value, ast.Name):
            module = modules.get(use.value.id)
            if module is not None and installed().names_of(module) is not None:
                yield module, use.attr, use.lineno


def wanted_modules() -> set[str]:
    """Return the modules of vLLM that the package names, and what it imports from packages."""
    modules = set()
    for path in package_files():
        for node in imports(ast.parse(path.read_text())):
            modules.add(node.module or "")
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


# What vLLM has.


class Sources:
    """vLLM's source files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names_of = cache(self._names_of)

    @property
    def version(self) -> str:
        """vLLM's version."""
        text = (self._folder / "vllm" / "_version.py").read_text()
        match = re.search(r"^__version__ = (?:\w+ = )?'([^'+]+)", text, re.MULTILINE)
        assert match is not None
        return match[1]

    def _names_of(self, module: str) -> frozenset[str] | None:
        """Return what a module binds at its top level, None if there is no such module.

        Names that it loads lazily count: those in its ``__getattr__`` and keys of its dictionaries.
        """
        path = self._file_of(module)
        if path is None:
            return None
        names: set[str] = set()
        for node in _top_level(ast.parse(path.read_text()).body):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                names |= self.names_of(_absolute(node, path, module)) or set()
            names |= set(_bound(node)) - {"*"}
        if path.name == "__init__.py":
            inside = [*path.parent.glob("*.py"), *path.parent.glob("*/__init__.py")]
            inside = [
                module_path.parent if module_path.stem == "__init__" else module_path
                for module_path in inside
            ]
            names |= {module_path.stem for module_path in inside if module_path != path.parent}
        return frozenset(names)

    def _file_of(self, module: str) -> Path | None:
        path = self._folder.joinpath(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None


class Recorded:
    """A version of vLLM in the record."""

    def __init__(self, version: str, record: Record) -> None:
        self.version = version
        self._record = record

    def names_of(self, module: str) -> frozenset[str] | None:
        """Return what a module binds at its top level, None if there is no such module."""
        names = {
            name
            for versions, of_these in self._record.get(module, {}).items()
            if self.version in versions.split()
            for name in of_these
        }
        return frozenset(names) or None


@cache
def installed() -> Sources:
    """Return the sources of the installed vLLM."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Sources(Path(spec.origin).parent.parent)


def recorded() -> list[Recorded]:
    """Return the versions in the record."""
    record = _read_record()
    versions = {version for names in record.values() for key in names for version in key.split()}
    return [Recorded(version, record) for version in sorted(versions)]


def _read_record() -> Record:
    return dict(json.loads(RECORD.read_text())) if RECORD.exists() else {}


def has(source: Sources | Recorded, module: str, name: str) -> bool:
    """Return whether a module of vLLM has a name."""
    return name in (source.names_of(module) or ())


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield a module's statements, those that run under a condition included."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _top_level(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                for inner in getattr(node, field, ()):
                    is_handler = isinstance(inner, ast.ExceptHandler)
                    yield from _top_level(inner.body if is_handler else [inner])


def _bound(node: ast.stmt) -> Iterator[str]:
    """Yield the names that one statement binds, also lazily.

    Names of other distributions are left out: nobody should import them from vLLM.
    """
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        if node.name == "__getattr__":
            yield from _identifiers(ast.walk(node))
    elif isinstance(node, ast.ImportFrom) and (node.level or is_vllm(node.module)):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id
            elif isinstance(inner, ast.Dict):
                yield from _identifiers(inner.keys)


def _identifiers(nodes: Iterable[ast.AST | None]) -> Iterator[str]:
    """Yield the strings among some constants that may be names."""
    for node in nodes:
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and value.isidentifier():
            yield value


def _absolute(node: ast.ImportFrom, path: Path, module: str) -> str:
    """Return the module that a module imports from."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *filter(None, [node.module])])


def main(folders: list[str]) -> None:
    """Record the versions of vLLM in some folders, beside those recorded before."""
    sources = [
        installed() if folder == "installed" else Sources(Path(folder)) for folder in folders
    ]
    versions: dict[str, Sources | Recorded] = {source.version: source for source in recorded()}
    versions |= {source.version: source for source in sources}
    record: Record = {}
    for module in sorted(wanted_modules()):
        versions_of: dict[str, list[str]] = {}
        for version, source in sorted(versions.items()):
            for name in source.names_of(module) or ():
                versions_of.setdefault(name, []).append(version)
        for name, having in sorted(versions_of.items()):
            record.setdefault(module, {}).setdefault(" ".join(having), []).append(name)
    lines = ",\n".join(f"{json.dumps(module)}: {json.dumps(record[module])}" for module in record)
    RECORD.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
