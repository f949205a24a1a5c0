"""Checks by AST that what the package imports from vLLM exists in a vLLM's source.

    python -m tests.vllm_imports FOLDER

FOLDER holds the package ``vllm``: an unzipped wheel or a checkout. Nothing of it is imported, so
neither a GPU nor vLLM's dependencies are needed. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "scissor_vllm"


@dataclass(frozen=True)
class Reference:
    """A module of vLLM that a file of the package needs, or a name in it."""

    place: str
    """File and line."""
    module: str
    name: str | None

    def __str__(self) -> str:
        """Return one line for the terminal."""
        return f"{self.place}: {self.module}" + (f".{self.name}" if self.name else "")


class Source:
    """The modules of a vLLM, read from files."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "vllm" / "__init__.py").exists():
            raise FileNotFoundError(f"{folder} has no vllm/__init__.py: name the folder above it")
        self._folder = folder
        self._names = cache(self._read_names)

    def has(self, module: str, name: str | None) -> bool:
        """Return whether there is such a module, and in it such a name or submodule."""
        path = self._path(module)
        if path is None:
            return False
        if name is None or self._path(f"{module}.{name}") is not None:
            return True
        return name in self._names(module)

    def _path(self, module: str) -> Path | None:
        stem = self._folder.joinpath(*module.split("."))
        for path in (stem / "__init__.py", stem.with_suffix(".py")):
            if path.exists():
                return path
        return None

    def _read_names(self, module: str) -> frozenset[str]:
        """Return the names that a module defines or imports outside of its functions."""
        path = self._path(module)
        if path is None:
            return frozenset()
        tree = ast.parse(path.read_text())
        names: set[str] = set()
        for node in _module_level(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
                if node.name == "__getattr__":
                    # Names that are made when they are asked for stand in tables as strings.
                    names |= {
                        text.value
                        for text in ast.walk(tree)
                        if isinstance(text, ast.Constant) and isinstance(text.value, str)
                    }
            elif isinstance(node, ast.Import):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                origin = _absolute(node, module, path.name == "__init__.py")
                for alias in node.names:
                    if alias.name == "*":
                        names |= self._names(origin)
                    else:
                        names.add(alias.asname or alias.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
        return frozenset(names)


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a module, those inside of functions and classes left out."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _module_level(child)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def references(folder: Path = PACKAGE) -> list[list[list[Reference]]]:
    """Return what the package needs of vLLM.

    Each entry is a list of alternatives, as ``try`` and ``except ImportError`` have them. An
    alternative is a list of references that must all exist.
    """
    needed = []
    for path in sorted(folder.rglob("*.py")):
        where = str(path.relative_to(folder.parent))
        tree = ast.parse(path.read_text())
        inside: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Try) and any(map(_catches_imports, node.handlers)):
                parts: list[list[ast.stmt]] = [node.body, *(h.body for h in node.handlers)]
                groups = [(part, _imported(ast.Module(part, []), where)) for part in parts]
                alternatives = [group for _, group in groups if group]
                if len(alternatives) > 1:
                    needed.append(alternatives)
                    for part, _ in groups:
                        inside.update(child for one in part for child in ast.walk(one))
        needed += [[[one]] for one in _imported(tree, where, inside)]
    return needed


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    return handler.type is not None and "ImportError" in ast.unparse(handler.type)


def _imported(
    tree: ast.AST, where: str, without: set[ast.AST] | frozenset[ast.AST] = frozenset()
) -> list[Reference]:
    """Return the imports from vLLM below a node, and what is read off imported modules."""
    names = []
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if node in without:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    names.append(Reference(f"{where}:{node.lineno}", alias.name, None))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                module = str(node.module)
                names.append(Reference(f"{where}:{node.lineno}", module, alias.name))
                aliases[alias.asname or alias.name] = f"{module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = aliases.get(node.value.id, "")
            # A class has lower-case names above it only in its module's path.
            if module and module.rsplit(".", 1)[1].islower():
                names.append(Reference(f"{where}:{node.lineno}", module, node.attr))
    return names


def missing(folder: Path, package: Path = PACKAGE) -> list[Reference]:
    """Return the references that a vLLM's source does not have."""
    source = Source(folder)
    absent = []
    for alternatives in references(package):
        if not any(all(source.has(r.module, r.name) for r in group) for group in alternatives):
            absent += alternatives[0]
    # An imported object in lower case is no module, and its attributes are nobody's names.
    return [
        one
        for one in absent
        if one.name is None or source.has(one.module, None) or not _is_object(source, one.module)
    ]


def _is_object(source: Source, dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    return source.has(module, name) and not source.has(dotted, None)


def main(argv: list[str] | None = None) -> int:
    """Print what is missing; 1 if anything is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds the package vllm")
    args = parser.parse_args(argv)
    try:
        absent = missing(args.folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    for reference in absent:
        print(reference)
    print(f"{len(absent)} of {len(references())} names are missing in {args.folder}")
    return int(bool(absent))


if __name__ == "__main__":
    sys.exit(main())
