"""The list of verbs: what it says is what the verbs say, and it is there at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from tailfin.cli.main import VERBS, app, verb


@pytest.mark.parametrize("name", VERBS)
def test_the_list_says_what_the_verb_says(name):
    command = verb(name)
    assert " ".join(command.help.split("\n\n")[0].split()) == VERBS[name]
    assert " ".join(VERBS[name].split()[:3]) in CliRunner().invoke(app, [name, "--help"]).output


def test_verbs_are_listed_in_order_and_found_by_the_nearest_name():
    listed = CliRunner().invoke(app, ["--help"]).output
    places = [listed.index(f"│ {name} ") for name in VERBS]
    assert places == sorted(places)
    assert "train" in str(CliRunner().invoke(app, ["trian"]).output)


def test_help_imports_nothing_heavy():
    """A tenth of a second on a machine at rest: neither torch nor numpy is loaded for it."""
    code = "import sys; from tailfin.cli.main import main; sys.argv[1:] = ['--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'pydantic', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    best = 9.0
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
        best = min(best, time.perf_counter() - begun)
    assert done.stderr.strip() == "[]" and "recipes" in done.stdout
    assert best < 2  # 0.11 s measured; a busy machine is slower
