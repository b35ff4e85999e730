"""The house rules a machine can check: lengths, names that say nothing, heavy imports in schemas.

Files: 600 lines at most (tests exempt). Functions: 100 lines at most. No module called utils, helpers, common or misc.
No `__init__.py` directly in `kernels/`: it would shadow the package of that name which transformers looks for. The
import linter does not see such a folder, so that kernels import nothing above them is checked here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("cluster", "trainer", "memory", "kernels", "jobs", "infra", "tests")
FILE_LINES, FUNCTION_LINES = 600, 100
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
LIGHT = ("config.py", "schema.py", "errors.py")
HEAVY = {"torch", "ray", "transformers", "deepspeed", "peft", "datasets"}


def problems(path: Path) -> list[str]:
    name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    tree, found = ast.parse(text), []
    if VAGUE & {part.removesuffix(".py") for part in name.parts}:
        found.append(f"{name}: the name says nothing; a helper lives with its owner or gets a real name")
    if name.parts[0] != "tests" and text.count("\n") > FILE_LINES:
        found.append(f"{name}: {text.count(chr(10))} lines, {FILE_LINES} at most")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{name}:{node.lineno}: {node.name} has {lines} lines, {FUNCTION_LINES} at most")
    if path.name in LIGHT:
        found += [f"{name}:{at}: imports {m}" for at, m in _imports(tree.body) if m.split(".")[0] in HEAVY]
    if name.parts[0] == "kernels":
        found += [
            f"{name}:{at}: kernels import nothing above them, got {module}"
            for at, module in _imports(ast.walk(tree))
            if module.startswith("farspan.") and not module.startswith(("farspan.kernels", "farspan.errors"))
        ]
    if ast.get_docstring(tree) is None and text.strip() and path.name != "__init__.py":
        found.append(f"{name}: no module docstring")
    return found


def _imports(nodes: Iterable[ast.AST]) -> list[tuple[int, str]]:
    """(line, module) of the import statements among `nodes`."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or ""))
    return found


def main() -> int:
    files = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")) if not _linked(p)]
    found = [problem for path in files for problem in problems(path)]
    if (ROOT / "kernels/__init__.py").exists():
        found.append("kernels/__init__.py: must not exist, it shadows the package `kernels` of transformers")
    print("\n".join(found) or f"{len(files)} files keep the house rules")
    return 1 if found else 0


def _linked(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent != ROOT)


if __name__ == "__main__":
    sys.exit(main())
