"""The package's face: what modules promise in `__all__`, their docstrings, and the layers."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import xcloud

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "xcloud").rglob("*.py"))
PUBLIC = sorted(
    module.name
    for module in pkgutil.walk_packages(xcloud.__path__, "xcloud.")
    if not any(part.startswith("_") for part in module.name.split("."))
)
FAMILIES = {
    "xcloud.aggregators": "AGGREGATORS",
    "xcloud.codecs": "CODECS",
    "xcloud.data": "SOURCES",
    "xcloud.data.tokenizers": "TOKENIZERS",
    "xcloud.outer": "OUTER_OPTIMIZERS",
    "xcloud.training.settings": "INNER_OPTIMIZERS",
}


@pytest.mark.parametrize("name", ["xcloud", *PUBLIC])
def test_exported_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert [public for public in exported if not hasattr(module, public)] == []
    assert len(exported) == len(set(exported))


@pytest.mark.parametrize(("name", "registry"), FAMILIES.items())
def test_a_family_exports_its_registry_and_knows_its_parts(name: str, registry: str) -> None:
    module = importlib.import_module(name)
    assert registry in module.__all__
    family = getattr(module, registry)
    assert family.names
    for part in family.names:
        config = family.get(part)
        assert config.model_fields["type"].default == part
        assert config.__doc__, f"{config.__name__} does not say what it is"
        assert config.model_config["extra"] == "forbid"
        assert config.model_config["frozen"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_layers_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
