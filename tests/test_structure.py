"""The house: what may import what, no circles, no file too long, and every module in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "tailfin"
LONGEST = 400  # lines of a file

# Upstream first: a module imports from its own line and those above, nowhere else. The longest name that fits counts.
ORDER = (
    ("version", "errors"),
    ("plugins",),
    ("files", "joins", "collectives", "progress", "stop_signals"),
    ("data.annotation_json", "data.box_forms"),
    ("parsing",),
    ("data.cache", "data.problems", "data.columns", "data.index", "data.masks", "stats"),
    ("losses", "calibration"),
    ("schema",),  # the list of losses is the schema of `loss`
    ("recipe_values", "recipes", "config"),
    ("data", "samplers"),
    ("class_rows", "weights", "checkpoint", "foreign"),
    ("schedule", "plan_notes"),
    ("models",),
    ("pretraining",),
    ("training_log", "engine"),
    ("evaluation",),
    ("mask_encoding", "inference", "exemplar_scores"),
    ("report", "pictures"),
    ("processes", "provenance", "reuse", "run_files", "run"),
    ("memory", "methods", "dry_run", "auto_batch", "coco_form"),
    ("api",),
    ("calibrate", "cost", "export", "hub", "neighbours", "predicting", "propose", "convert", "merging"),
    ("auto", "study"),
    ("cli", "__main__"),
)
PLACES = {f"tailfin.{name}": place for place, names in enumerate(ORDER) for name in names}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports(path: Path) -> dict[str, int]:
    """Modules of the package that a file imports, in functions too, with the line; those for type checking alone have
    no effect and do not count."""
    found: dict[str, int] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update((name.name, node.lineno) for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found[inner if inner in MODULES else node.module] = node.lineno
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name: line for name, line in found.items() if name in MODULES}


def place(module: str) -> int:
    """The line of `ORDER` that a module is on; the package itself, which only points to others, is on none."""
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        if (name := ".".join(parts[:length])) in PLACES:
            return PLACES[name]
    return len(ORDER) if module == "tailfin" else -1


EDGES = {module: imports(path) for module, path in MODULES.items()}


def test_every_module_has_a_place():
    assert [module for module in MODULES if place(module) < 0] == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_from_downstream(module):
    wrong = [f"line {line}: {name}" for name, line in EDGES[module].items() if place(name) > place(module)]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_there_are_no_circles():
    """Modules that import nothing but settled ones are settled, over and over; what is left imports in a circle."""
    left = {module: set(names) - {module} for module, names in EDGES.items()}
    while settled := [module for module, names in left.items() if not names & left.keys()]:
        for module in settled:
            del left[module]
    # of what merely leads to a circle nothing is told
    while tails := [module for module in left if not any(module in names for names in left.values())]:
        for module in tails:
            del left[module]
    assert sorted(left) == []


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{MODULES[module].relative_to(ROOT)} has {lines} lines"


def test_folders_are_not_deep():
    assert [path for path in MODULES.values() if len(path.relative_to(SOURCE).parts) > 3] == []


def test_the_architecture_names_every_module():
    """In the table of the layout: a file at the top by its name, one in a folder in that folder's row."""
    rows = [line.split("|") for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if "`" in line]
    named: dict[str, set[str]] = {}
    for _, where, what, *_ in (row for row in rows if len(row) == 4):
        folder = re.match(r"\s*`([\w/]+/)`", where)
        files = set(re.findall(r"\w+\.py", what if folder else where))
        named.setdefault(folder[1] if folder else "", set()).update(files)
    missing = []
    for path in MODULES.values():
        inside = path.relative_to(SOURCE)
        folder = "" if inside.parent == Path() else f"{inside.parent.as_posix()}/"
        if not inside.name.startswith("__") and inside.name not in named.get(folder, ()):
            missing.append(inside.as_posix())
    assert missing == []
