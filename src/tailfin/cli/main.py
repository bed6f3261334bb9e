"""The `tailfin` command: every verb is registered here, and mistakes of the user end here with one message."""

from __future__ import annotations

import atexit
import errno
import os
import socket
import sys
import time
import warnings
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from tailfin.errors import UserError, printable
from tailfin.stop_signals import Interrupted
from tailfin.version import __version__

# verb -> its first line of help, as in its module `tailfin.cli.VERB`, which is imported where the verb is used
VERBS = {
    "demo": "Make the embedded long-tailed set, train the plain baseline and BACL on it, and compare them.",
    "train": "Train a detector, measure it and write its report.",
    "study": "Train a grid of recipes, sets and seeds once, each cell resumable, and compare the arms.",
    "evaluate": "Average precision and recall of a run, a model or a results file.",
    "predict": "Detect objects in pictures; no annotations are needed.",
    "report": "Write one HTML file about runs, side by side, or serve it with --live.",
    "cost": "Count multiply-adds and parameters, and measure pictures per second part by part.",
    "calibrate": "Calibrate the scores of a trained model, or those in any results file.",
    "convert": "Convert a detector of detectron2, mmdetection, torchvision or transformers to a model file.",
    "merge": "Merge the classes of two models with the same features into one detector.",
    "export": "Write a trained model for other programs: ONNX, torch.export or OpenVINO.",
    "push": "Put a model with its recipe, numbers and a card to a model hub or a folder.",
    "pull": "Get a model from a model hub or a folder; it is opened and checked before it is there.",
    "data": "Look at, check, make and convert annotation files.",
    "recipes": "List, show and copy recipes and published rows.",
    "doctor": "Check versions, devices, threads, disk and optional parts; exit code 2 where training cannot work.",
}


class Verbs(TyperGroup):
    """The verbs, each loaded when it is called: `tailfin --help` imports neither torch nor numpy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=line) for name, line in VERBS.items()}  # what the list shows

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb itself, with its options."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, verb(str(name)), rest


def verb(name: str) -> Any:
    """The command `name`: the group `app` of its module, or the function that has its name."""
    module = import_module(f"tailfin.cli.{name}")
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(getattr(module, name))
    return typer.main.get_command(alone)


# what a disk or a folder's rights can do to any command: no fault of the program, so no traceback
DISK = {errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}
DISK.add(getattr(errno, "EDQUOT", errno.ENOSPC))
TOLD = "tailfin/told"  # key of the store: how many processes have told a mistake
# what torch says of a process that does not answer
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection", "Timed out", "NCCL", "DistBackendError", "gloo")
PACKAGE = Path(__file__).resolve().parents[1]

app = typer.Typer(
    cls=Verbs,
    name="tailfin",
    help="Long-tailed object detection: from an imbalanced data set to a trained, measured detector.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tailfin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    imports: list[str] = typer.Option(
        [], "--import", metavar="FILE.py", help="Run a file first that registers a loss of your own; at any place."
    ),
) -> None:
    """Long-tailed object detection: from an imbalanced data set to a trained, measured detector."""
    if imports:
        from tailfin.plugins import import_file

        for file in imports:
            import_file(file)


def imports_first(words: list[str]) -> list[str]:
    """The words of a command with every `--import FILE` before the verb, where the group reads it."""
    first, rest = [], []
    given = iter(words)
    for word in given:
        if word == "--import":
            first += [word, *[file for file in [next(given, None)] if file is not None]]
        elif word.startswith("--import="):
            first.append(word)
        else:
            rest.append(word)
    return [*first, *rest]


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, an internal error a traceback and 1."""
    # pictures have a bound of their own, with a message of its own
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    warnings.showwarning = _show_warning
    try:
        code = app(imports_first(sys.argv[1:]), prog_name="tailfin", standalone_mode=False)
        _leave_group(code if isinstance(code, int) else 0)
    except UserError as error:
        _tell(f"error: {printable(str(error))}")
        code = 2
    except Interrupted as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{stop}; go on with: tailfin train --resume {stop.run}", file=sys.stderr)
        _leave_group(stop.exit_code)
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in DISK:
            raise
        from tailfin.files import disk_problem

        _tell(f"error: {printable(disk_problem(error))}")
        code = 2
    except Exception as error:
        if _others_are_gone(error):
            code = 2
        elif hasattr(error, "format_message"):
            code = _usage(error)
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


# ---- several processes -----------------------------------------------------------------------------------------------


def _tell(text: str) -> None:
    """Print a message, once where several processes make the same mistake; the others learn that one was told."""
    if (store := _store()) is None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # the others of this machine see the same files
            print(text, file=sys.stderr)
        return
    try:
        first = store.add(f"tailfin/{zlib.crc32(text.encode('utf-8', 'replace'))}", 1) == 1
        store.add(TOLD, 1)
    except Exception:  # the process that holds the store is gone
        first = True
    if first:
        print(text, file=sys.stderr)


def _others_are_gone(error: Exception) -> bool:
    """Whether `error` is that of a process whose group has lost another one: one line says so, none where the other
    has told why it ended (and the store, which a launcher or the first process holds, is still there)."""
    store = _store()
    if store is None or not isinstance(error, RuntimeError):
        return False
    if not any(word in str(error) or word in type(error).__name__ for word in LOST):
        return False
    try:
        time.sleep(0.5)  # until a process that is ending has ended
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5):
            pass  # the store is there; asked in vain, torch would print the frames of its C++
        told = store.add(TOLD, 0) > 0
    except Exception:
        told = False
    if not told:
        rank = os.environ.get("RANK", "0")
        print(
            f"error: process {rank} stops: another process of the run has ended, or cannot be reached; `tailfin train "
            "--resume RUN` goes on from the newest resume point",
            file=sys.stderr,
        )
    return True


def _store() -> Any:
    """What the processes of a group share, None where there is no group of several."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store() if distributed.get_world_size() > 1 else None


def _leave_group(code: int) -> None:
    """End the process group; one process of several ends here, with that code. Not after a mistake: the others may
    still wait, and leaving could then wait for them.

    What is left of torch's communication can abort a process that has done its work while the interpreter ends
    ("terminate called without an active exception", one time in ten on a busy machine), and the launcher then reports
    a failure. So of the interpreter's end such a process has the exit functions and the flushing alone.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    several = distributed.get_world_size() > 1
    distributed.destroy_process_group()
    if several:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """Warnings of tailfin to its user are one line; those of other packages keep Python's form."""
    if category is UserWarning and PACKAGE in Path(filename).parents:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"warning: {printable(str(message))}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _usage(error: Any) -> int:
    """Print a mistake in the command's own words and options; newer typer has its own copy of click's exceptions, older
    typer uses click's, so they are known by what they can do."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        print(f"error: {' '.join(error.format_message().split())}{hint}", file=sys.stderr)
    return int(error.exit_code)
