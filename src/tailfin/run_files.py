"""The files of a run folder: what a run writes there, what a killed one leaves behind, and who is writing now.

`WRITTEN` is every name that a run gives a file. `--overwrite` deletes those and no others, and the leftovers of killed
writes are known by them: a temporary name is `.NAME.` and a process or eight letters (`tailfin.files.write_atomic`).
One process holds `.lock` while it writes; the operating system frees the lock of a process that ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tailfin.checkpoint import PLACES, resume_point
from tailfin.errors import UserError
from tailfin.files import writing

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_RUN = (
    "recipe.yaml",
    "environment.json",
    "model.safetensors",
    "pretrained.safetensors",
    "results.bbox.json",
    "results.segm.json",
    "results.last.bbox.json",
    "results.last.segm.json",
    "metrics.json",
    "report.html",
    "exemplars.json",
    "auto.json",  # these seven by `tailfin train auto`
    "calibrated.safetensors",
    "calibration.json",
    "model.onnx",
    "model.pt2",
    "model.xml",
    "model.bin",
)
# annotations in another form than COCO's, converted, and pictures of a hub's data set
DATA = re.compile(r"data/(train|val|holdout|test)(\.json|/\d+\.\w+)")
_STAGE = (
    "model.safetensors",
    "best.safetensors",
    "metrics.jsonl",
    "metrics.json",
    "step.json",
    "pictures.npz",
    "skipped.json",
)


def _names(names: tuple[str, ...]) -> str:
    return "(" + "|".join(map(re.escape, names)) + ")"


WRITTEN = re.compile(
    rf"{_names(_RUN)}|\.lock|results\.shards/rank-\d{{5}}\.shard|exemplars\.shards/\d{{6}}\.npz"
    rf"|stages/\d+-[^/]+/({_names(_STAGE)}|{_names(PLACES)}/(state\.pt|complete\.json))"
    rf"|{DATA.pattern}"
    rf"|tailfin/([^/]+/)*(events\.out\.tfevents\.[^/]+|hparams\.yml)"  # TensorBoard's
)
FOLDERS = re.compile(rf"results\.shards|exemplars\.shards|stages(/\d+-[^/]+(/{_names(PLACES)})?)?|tailfin(/.+)?")
SAFETENSORS = re.compile(r"(stages/\d+-[^/]+/)?\.tmp[A-Za-z0-9]{6}")  # what its writer calls a file before it is whole
TEMPORARY = re.compile(r"\.(.+)\.(\d+|[a-z0-9_]{8}|\d+\.part)")


def is_leftover(name: str) -> bool:
    """Whether a path inside the run folder is a temporary one of a run, which a write that has ended does not leave."""
    folder, slash, last = name.rpartition("/")
    if last.endswith(".shard.part"):
        return WRITTEN.fullmatch(name.removesuffix(".part")) is not None
    if SAFETENSORS.fullmatch(name):
        return True
    found = TEMPORARY.fullmatch(last)
    return found is not None and WRITTEN.fullmatch(f"{folder}{slash}{found.group(1)}") is not None


def remove_leftovers(run: Path) -> list[str]:
    """Remove what killed writes have left in a run folder that no process writes to; returns the names."""
    removed = [name for name in _files(run) if is_leftover(name)]
    removed += [name for name in ("results.last.bbox.json", "results.last.segm.json") if (run / name).is_file()]
    for name in removed:
        (run / name).unlink(missing_ok=True)
    for stage in _stages(run):
        used = resume_point(stage)
        for folder in (stage / name for name in PLACES[1:]):
            whole = used is not None and used.parent == folder
            if folder.is_dir() and not folder.is_symlink() and not whole and (stage / PLACES[0]).is_dir():
                shutil.rmtree(folder)
                removed.append(str(folder.relative_to(run)))
        best = stage / "best.safetensors"
        if best.is_file() and (stage / "model.safetensors").is_file():  # the stage is finished with it
            best.unlink()
            removed.append(str(best.relative_to(run)))
    return removed


def check_replaceable(run: Path) -> None:
    """Refuse `--overwrite` of a folder that is no run's, or whose stages lie behind a link."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"--overwrite: {run} is not a run folder (it has no recipe.yaml), it is left as it is")
    links = [path for path in [run / "stages", *run.glob("stages/*"), *run.glob("*.shards")] if path.is_symlink()]
    if links:
        raise UserError(f"--overwrite: {links[0]} is a link to another folder, {run} is left as it is")


def empty_run(run: Path) -> list[str]:
    """Delete what a run has written in its folder, and folders that are empty then; returns what stays.

    Converted annotations stay: those of the run that follows are there already.

    Raises:
        UserError: the folder is no run's, another process writes to it, or stages lie behind a link.
    """
    check_replaceable(run)
    with locked(run), writing(run):
        for name in sorted(_files(run), key=lambda name: name == "recipe.yaml"):  # last: a kill leaves a run folder
            if name != LOCK and not DATA.fullmatch(name) and (WRITTEN.fullmatch(name) or is_leftover(name)):
                (run / name).unlink(missing_ok=True)
        for folder, _, _ in os.walk(run, topdown=False):
            if FOLDERS.fullmatch(Path(folder).relative_to(run).as_posix()):
                with contextlib.suppress(OSError):  # it holds what a run has not written
                    Path(folder).rmdir()
        return [name for name in _files(run) if name != LOCK and not DATA.fullmatch(name)]


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """`lock` for the time of a block."""
    handle = lock(run)
    try:
        yield
    finally:
        unlock(run, handle)


def lock(run: Path) -> int | None:
    """Hold the run folder as the one process that writes to it; for `unlock`. None where the file system has no locks.

    Raises:
        UserError: another process holds it.
    """
    path = run / LOCK
    while True:
        with writing(path):
            run.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return None
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by a loader's workers, as flock is
        except OSError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            raise UserError(
                f"{run} is being written by another process{f' ({holder})' if holder else ''}: wait for its end, or "
                "give another --out"
            ) from None
        try:
            same = os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(handle)  # the holder before has removed the file meanwhile
    with contextlib.suppress(OSError):  # a full disk: the lock counts without its text
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


def unlock(run: Path, handle: int | None) -> None:
    """Give the folder free."""
    if handle is not None:
        with contextlib.suppress(OSError):
            (run / LOCK).unlink(missing_ok=True)
        os.close(handle)


# ---- details ---------------------------------------------------------------------------------------------------------


def _files(run: Path) -> list[str]:
    """Paths of all files and links below the folder, with /; links are not followed."""
    found = []
    for folder, folders, files in os.walk(run):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name).relative_to(run).as_posix() for name in [*files, *links]]
    return sorted(found)


def _stages(run: Path) -> list[Path]:
    found = [path for path in run.glob("stages/*") if re.fullmatch(r"\d+-[^/]+", path.name)]
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())
