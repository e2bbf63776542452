"""Who may import whom, read off the sources: the arrows of docs/architecture.md and no others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("builder", "plugins", "runtime", "models", "scripts")
# For each package, the prefixes of ours that it may import, and the foreign packages that it may not.
ALLOWED = {
    "plugins": ("fp8.plugins",),
    "builder": ("fp8.builder", "fp8.plugins"),
    "runtime": ("fp8.runtime", "fp8.plugins", "fp8.builder.engine"),
    "models": ("fp8.models", "fp8.builder.graph"),
    "scripts": ("fp8",),
}
FORBIDDEN = {
    "runtime": ("onnx", "onnx_graphsurgeon", "onnxruntime"),
    "models": ("torch", "transformers"),
    "plugins": ("onnx", "onnx_graphsurgeon", "transformers"),
    "builder": (),
    "scripts": (),
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, lazy ones included; a relative import shows as a leading dot."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            package = module in ("fp8", *(f"fp8.{name}" for name in PACKAGES))  # then what is imported is a module
            yield from ((node.lineno, f"{module}.{alias.name}" if package else module) for alias in node.names)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    wrong = []
    for path in sources(package):
        for line, name in imports(path):
            ours = within(name, ("fp8",)) and name != "fp8"
            if (ours and not within(name, ALLOWED[package])) or within(name, FORBIDDEN[package]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_scheduler_is_plain_python() -> None:
    """So is what it decides on: it can be reasoned about, and tested by ten thousands of traces, without a tensor."""
    modules = ("scheduler", "kv_cache", "policy", "request", "sampling_params", "statistics", "beam_search")
    code = f"import sys, {', '.join(f'fp8.runtime.{m}' for m in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_absolute(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources(package)
        for line, name in imports(path)
        if name.startswith(".")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_are_pure(package: str) -> None:
    """An `__init__.py` is empty: importing a package does nothing and pulls in nothing."""
    full = [str(p.relative_to(ROOT)) for p in sources(package) if p.name == "__init__.py" and p.read_text().strip()]
    assert not full


def test_every_source_folder_is_a_package_that_the_wheel_holds() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    inits = [p for name in PACKAGES for p in sources(name) if p.name == "__init__.py"]
    found = {"fp8." + ".".join(p.parent.relative_to(ROOT).parts) for p in inits}
    assert found <= listed, f"not in pyproject.toml: {sorted(found - listed)}"


def test_a_plugin_has_cases() -> None:
    """What is not in a list of cases is neither checked nor timed on a GPU."""
    folders = [p.parent for p in (ROOT / "plugins").glob("*/plugin.py")]
    assert folders
    assert not [folder.name for folder in folders if not (folder / "cases.py").is_file()]


def test_inline_ptx_stands_in_the_headers_that_name_its_instructions() -> None:
    plugins = ROOT / "plugins"
    sources = {path for ending in ("cu", "cuh") for path in plugins.rglob(f"*.{ending}")}
    with_ptx = {path for path in sources if re.search(r"\basm\b", path.read_text())}
    assert with_ptx and all(path.is_relative_to(plugins / "include" / "fp8") for path in with_ptx), with_ptx
