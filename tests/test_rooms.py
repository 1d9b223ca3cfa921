"""The house: imports point one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import dslm

ROOT = Path(dslm.__file__).parent
ORDER = [
    {"errors", "places", "progress"},
    {"families"},
    {"sizes"},
    {"shrink_plan"},
    {"plan", "targets", "texts"},
    {"targets_down"},
    {"checkpoint"},
    {"grow", "load", "logits"},
    {"output", "sampler"},
    {"adapter", "resizing", "shrink", "generation", "chat"},
    {"verify", "report"},
    {"train"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from at run time or for types."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.append(node.module)
            modules += [f"{node.module}.{name.name}" for name in node.names if node.module == "dslm"]
        elif isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
    return {m.split(".")[1] for m in modules if m.startswith("dslm.")}


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms == set(RANK)


def test_imports_point_one_way():
    backwards = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py" or path.parent != ROOT
        for room in imported(path)
        if room != room_of(path) and RANK[room] >= RANK[room_of(path)]
    ]
    assert backwards == []


def test_only_the_command_line_prints():
    printing = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if room_of(path) != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_importing_dslm_and_planning_do_not_import_torch():
    code = (
        "import sys, dslm, dslm.plan, dslm.targets, dslm.checkpoint.source, dslm.cli.plan, dslm.cli.up, dslm.cli.desc\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
