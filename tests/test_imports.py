"""Imports: quick, silent, lazy, and in one direction."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import seg_attn

PACKAGE = Path(seg_attn.__file__).parent
# What each part, a module or a sub-package, may import of ours besides itself.
MAY_IMPORT = {
    "attention": {"norm"},
    "fusion": {"attention", "norm"},
    "models": {"attention", "fusion", "norm", "errors"},
    "data": {"errors"},
    "draw": set(),
    "losses": set(),
    "metrics": set(),
    "norm": set(),
    "errors": set(),
    "resume": set(),
    "report": set(),
    "checkpoint": {"data", "errors", "models"},
    "task": {"checkpoint", "errors", "losses", "metrics", "models", "resume"},
    "prediction": {"checkpoint", "data", "draw", "errors", "models"},
    "predict": {"checkpoint", "data", "errors", "models", "prediction"},
    "sharding": {"errors", "predict", "prediction"},
    "export": {"checkpoint", "errors", "models"},
    "statistics": {"report"},
    "boundaries": {"data", "statistics"},
    "memory": {"predict"},
    "compare": {
        "boundaries",
        "checkpoint",
        "data",
        "errors",
        "memory",
        "metrics",
        "models",
        "predict",
        "prediction",
        "report",
        "seeds",
        "statistics",
    },
    "seeds": {"checkpoint"},
    "comparison_page": {"compare", "data", "report"},
    "comparison_report": {"compare", "comparison_page", "data", "report"},
    "callbacks": {"data", "draw", "task"},
    "parsing": set(),
    "training": {
        "attention",
        "callbacks",
        "checkpoint",
        "data",
        "errors",
        "models",
        "parsing",
        "report",
        "task",
    },
}
HEAVY = ("torch", "torchvision", "numpy", "pytorch_lightning", "albumentations", "segmentation_models_pytorch", "PIL")


def _part(module):
    return module.split(".")[1] if "." in module else "__init__"


def _imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "seg_attn":
            yield _part(node.module)
        elif isinstance(node, ast.Import):
            yield from (_part(name.name) for name in node.names if name.name.split(".")[0] == "seg_attn")


def test_layers():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in MAY_IMPORT:
            wrong += [f"{path.name}: {name}" for name in _imports(path) if name not in MAY_IMPORT[part] | {part}]
    assert not wrong


@pytest.mark.parametrize("code", ["import seg_attn", "from seg_attn.cli import main; main(['--help'])"])
def test_nothing_heavy_is_imported_and_nothing_connects(code):
    script = f"""
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
{code}
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_resolve_and_others_do_not():
    for name in seg_attn.__all__:
        assert getattr(seg_attn, name).__name__ == name
    assert set(seg_attn.__all__) <= set(dir(seg_attn))
    with pytest.raises(AttributeError, match="no attribute 'DeepLabV4'"):
        seg_attn.DeepLabV4  # noqa: B018
