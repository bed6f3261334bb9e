"""The documents name what exists: links, files, losses, recipes, modules of the package; their commands are right."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tailfin import losses, recipes
from tailfin.auto.plan import wishes
from tailfin.cli.main import verb
from tailfin.config import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:src/tailfin|docs|examples|tests|benchmarks)/[\w./-]+\.(?:py|md|yaml|json))`", text)
    missing += [path for path in named if not (ROOT / path).exists() and "NAME" not in path and "mine" not in path]
    inside = re.findall(r"`((?:modules|losses|samplers|models|methods|data|evaluation|report|cli)/\w+\.py)", text)
    missing += [
        path
        for path in inside
        if not (ROOT / "src" / "tailfin" / path).exists() and "NAME" not in path and "mine" not in path
    ]
    assert not missing


def test_links_of_the_readme_work_on_a_package_index():
    """They are absolute, below the address in pyproject.toml, and what they name exists here."""
    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Documentation"].removesuffix(
        "#readme"
    )
    raw = home.replace("https://github.com", "https://raw.githubusercontent.com")
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    named = [link.removeprefix(f"{home}/blob/main/").removeprefix(f"{raw}/main/") for link in links]
    assert len(links) > 10 and not [link for link, name in zip(links, named, strict=True) if link == name]
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_lock_has_every_direct_dependency_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for file in ("tested.txt", "oldest.txt"):
        lines = (ROOT / "requirements" / file).read_text().splitlines()
        pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        for text in project["dependencies"]:
            name, bounds = re.fullmatch(r"([\w-]+)(.*)", text).groups()
            version = pinned[name]
            for kind, bound in re.findall(r"(>=|<|==)([\w.]+)", bounds):
                own, other = (tuple(int(part) for part in number.split(".")) for number in (version, bound))
                assert own >= other if kind == ">=" else own < other if kind == "<" else own == other, (file, text)


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_loss_is_named(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [name for name in losses.names() if f"`{name}`" not in text] == []


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "tailfin"
    files = [
        *package.glob("*.py"),
        *(path for part in ("data", "models", "methods", "samplers") for path in (package / part).glob("*.py")),
    ]
    assert [path.stem for path in files if path.stem not in text and not path.stem.startswith("__")] == []


def test_the_table_of_recipes_has_them_all():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = text[text.index("## Names") : text.index("## Overrides")]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    named = [
        (file, tuple(re.findall("`([^`]+)`", variants)))
        for pattern, variants in rows
        for file in expanded(re.findall("`([^`]+)`", pattern)[0])
    ]
    assert sorted(named) == [(file, recipes.variants(file)) for file in recipes.files()]


def expanded(pattern: str) -> list[str]:
    """`a_{b,c}` as a shell reads it."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(words) for words in itertools.product(*parts)]


def test_the_number_of_rows_that_can_be_run():
    count = sum(isinstance(recipes.resolve(row.id), recipes.Runnable) for row in recipes.rows())
    for page in ("README.md", "CHANGELOG.md", "docs/recipes.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert re.search(rf"\b{count} (of the rows )?can be\b", text), (page, count)


def commands(page: Path) -> list[list[str]]:
    """The words of every `tailfin ...` line in the blocks of a page."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [
        line[line.index("tailfin ") :]
        for line in lines
        if re.match(r"(torchrun .*-m |accelerate .*-m )?tailfin ", line)
    ]
    return [shlex.split(line, comments=True)[1:] for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_right(page):
    """Verbs and options exist, arguments parse, and a recipe takes the overrides beside it."""
    for words in commands(page):
        rest = [word for word in words if word != "..."]
        command = verb(rest.pop(0))
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        values = command.make_context("tailfin", list(rest)).params
        if values.get("recipe") == "auto":
            wishes(values.get("overrides") or ())
        elif values.get("recipe") and values["recipe"] != "RECIPE" and not values["recipe"].endswith(".yaml"):
            load_recipe(values["recipe"], values.get("overrides") or ())
    assert page.name not in ("README.md", "data.md", "training.md", "recipes.md") or len(commands(page)) > 4
