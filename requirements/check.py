"""Does tailfin work with the oldest, the tested and the newest versions of what it needs, installed and without its
repository?

    python requirements/check.py                 # oldest, tested and newest, each in a fresh virtual environment
    python requirements/check.py oldest --keep ENVS
    python requirements/check.py --lock          # write tested.txt from the environment that runs this
    python requirements/check.py tested --install-only

Wheel and sdist are built, the wheel (the sdist with `oldest`) is installed, and from an empty folder outside of the
repository it makes a set, plans and trains two iterations, evaluates, predicts and writes a report; then `TESTS` run
against the installed package. It takes some minutes for each set, most of them for the download of torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SETS = ("oldest", "tested", "newest")  # newest: what an installer takes today
TESTS = ("tests/losses/test_every_loss.py", "tests/models/test_faster_rcnn.py", "tests/models/test_deformable_detr.py",
         "tests/data/test_images.py", "tests/engine/test_resume.py")  # fmt: skip
NEEDED_BY_TESTS = ("pytest", "hypothesis")
PLATFORM = re.compile(r"nvidia-|cuda-|triton$")  # torch's own, by platform
TINY = """\
weights: none
backbone: resnet18
detector: {norm: bn, frozen_layers: 0, fpn_channels: 16, fpn_layers: [2, 3], fpn_pool: false, anchor_sizes: [12, 24],
  roi_size: 3, roi_batch: 16, head_channels: 32}
schedule: {epochs: 0.4, batch: 4, lr: 0.01, warmup: 0}
data: {resize: square, sizes: [64], workers: 0}
"""


def lock() -> list[str]:
    """`name==version` of all that tailfin with its extras needs, as installed here, sorted."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own_needs = [
        *project["dependencies"],
        *(text for part in project["optional-dependencies"].values() for text in part),
    ]
    found: dict[str, str] = {}
    todo: list[tuple[str, tuple[str, ...]]] = [("", ())]
    while todo:
        name, extras = todo.pop()
        for text in (importlib.metadata.requires(name) or []) if name else own_needs:
            requirement, _, marker = text.partition(";")
            wanted = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
            own = re.match(r"\s*([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
            assert own is not None
            key = re.sub(r"[-_.]+", "-", own[1]).lower()
            if key in found or PLATFORM.match(key) or (wanted is not None and wanted[1] not in extras):
                continue
            try:
                found[key] = importlib.metadata.version(own[1]).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:  # of another platform or Python
                continue
            todo.append((own[1], tuple((own[2] or "").split(","))))
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def run(*words: object, cwd: Path | None = None) -> str:
    """The output of a command, in an environment that knows nothing of the repository; a failure ends this script."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """(wheel, sdist) of the repository."""
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        folder / "build-tools",
        "build",
        "hatchling>=1.25",
    )
    tools = {**os.environ, "PYTHONPATH": str(folder / "build-tools")}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(command, check=True, env=tools, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def use(python: Path, folder: Path) -> None:
    """The command from a folder that has nothing of the repository."""
    (folder / "tiny.yaml").write_text(TINY)
    where = run(python, "-c", "import tailfin; print(tailfin.__file__)", cwd=folder).strip()
    assert not Path(where).is_relative_to(ROOT), where
    for words in (
        ("doctor",),
        ("recipes", "list"),
        ("data", "synth", "set", "--images", "24", "--val-images", "6", "--classes", "4", "--size", "96"),
        ("data", "check", "set/train.json"),
        ("data", "stats", "set/train.json"),
        ("train", "tiny.yaml", "--train", "set/train.json", "--val", "set/val.json", "--dry-run"),
        ("train", "tiny.yaml", "--train", "set/train.json", "--val", "set/val.json", "--out", "run"),
        ("evaluate", "run", "--per-category"),
        ("predict", "run", "set/val", "--out", "found.json"),
        ("report", "run", "--out", "page.html"),
    ):
        run(python, "-m", "tailfin", *words, cwd=folder)


def check(name: str, folder: Path, packages: tuple[Path, Path], *, install_only: bool) -> None:
    """One set of versions in a fresh environment."""
    wheel, sdist = packages
    home = folder / name
    venv.create(home / "env", with_pip=True, clear=True)
    python = home / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pinned = ["-c", str(HERE / f"{name}.txt")] if name != "newest" else []
    package = sdist if name == "oldest" else wheel
    run(python, "-m", "pip", "install", "--quiet", *pinned, *NEEDED_BY_TESTS, package)
    versions = run(python, "-m", "pip", "list", "--format=freeze").split()
    print(name, *[line for line in versions if line.partition("==")[0] in ("torch", "torchvision", "transformers")])
    work = home / "work"
    work.mkdir(exist_ok=True)
    use(python, work)
    if not install_only:
        print(
            run(python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, cwd=ROOT).strip().splitlines()[-1]
        )
    print(f"{name}: works")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; default: all")
    parser.add_argument("--keep", type=Path, help="folder of the environments; default: a temporary one")
    parser.add_argument("--lock", action="store_true", help="write tested.txt from this environment")
    parser.add_argument("--install-only", action="store_true", help="without the tests")
    options = parser.parse_args()
    if unknown := set(options.sets) - set(SETS):
        parser.error(f"there is no set {', '.join(sorted(unknown))} (choices: {', '.join(SETS)})")
    if options.lock:
        head = "# The versions that the tests have passed with, written by `requirements/check.py --lock`\n"
        (HERE / "tested.txt").write_text(head + "\n".join(lock()) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        packages = build(folder)
        for name in options.sets or SETS:
            check(name, folder, packages, install_only=options.install_only)


if __name__ == "__main__":
    main()
