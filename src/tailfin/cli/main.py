"""The `tailfin` command: every verb is registered here, and mistakes of the user end here with one message."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

import typer

from tailfin import __version__
from tailfin.cli import calibrate, cost, data, demo, doctor, evaluate, predict, recipes, report, train
from tailfin.errors import UserError
from tailfin.stop_signals import Interrupted

PACKAGE = Path(__file__).resolve().parents[1]

app = typer.Typer(
    name="tailfin",
    help="Long-tailed object detection: from an imbalanced data set to a trained, measured detector.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("report")(report.report)
app.command("cost")(cost.cost)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.command("doctor")(doctor.doctor)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tailfin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Long-tailed object detection: from an imbalanced data set to a trained, measured detector."""


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, an internal error a traceback and 1."""
    # pictures have a bound of their own, with a message of its own
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    warnings.showwarning = _show_warning
    try:
        code = app(prog_name="tailfin", standalone_mode=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Interrupted as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{stop}; go on with: tailfin train --resume {stop.run}", file=sys.stderr)
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        code = _usage(error)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """Warnings of tailfin to its user are one line; those of other packages keep Python's form."""
    if category is UserWarning and PACKAGE in Path(filename).parents:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"warning: {message}", file=sys.stderr)
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
