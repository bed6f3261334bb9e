"""`tailfin data ...`: statistics and validation of annotation files, and the verbs that make new ones."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from tailfin.cli import data_make
from tailfin.cli.data_coco_lt import coco_lt
from tailfin.cli.data_proposals import proposals
from tailfin.cli.data_smooth_tail import smooth_tail
from tailfin.cli.data_view import view
from tailfin.cli.output import echo, table_console
from tailfin.data.check import CheckReport, check_file
from tailfin.data.images import MAX_PIXELS
from tailfin.data.index import AnnotationIndex, image_folder, open_index
from tailfin.data.layouts import as_coco, notes_on_splits, splits_of
from tailfin.errors import UserError
from tailfin.files import write_json
from tailfin.progress import Progress
from tailfin.stats import ClassStats

app = typer.Typer(help="Look at, check, make and convert annotation files.", no_args_is_help=True, add_completion=False)
QUIET_BELOW = 20_000  # pictures; fewer need no progress bar

Annotations = Annotated[Path, typer.Argument(metavar="FILE", help="COCO or LVIS annotation file.")]
Images = Annotated[
    Path | None, typer.Option("--images", help="Image folder; else the folder with the file's stem, else its own.")
]


@app.command()
def stats(
    file: Annotations,
    images: Images = None,
    group_bounds: Annotated[
        str | None, typer.Option(help="Largest image counts of a rare and of a common class, for example 10,100.")
    ] = None,
    all_classes: Annotated[bool, typer.Option("--all-classes", help="List every class.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a picture, one .html file.")] = None,
) -> None:
    """Show how long the tail is: counts, Gini, imbalance, groups, box sizes, and what to switch on."""
    from tailfin.data import stats_report  # plotly loads slowly

    if plot is not None:
        stats_report.check_plot_path(plot)
    bounds = _bounds(group_bounds)
    index = open_index(file)
    summary = stats_report.summarize(index, ClassStats.from_index(index, bounds), images)
    if images is not None:
        summary["pictures_found"] = _found(index, image_folder(file, images))
    stats_report.print_summary(summary, table_console(), most=None if all_classes else 40)
    if images is not None:
        echo(f"pictures: {summary['pictures_found']} of {len(index)} are in {images}")
    if json_file is not None:
        _write(json_file, lambda: write_json(json_file, summary, indent=2))
    if plot is not None:
        from tailfin.report.data_view import write_stats

        _write(plot, lambda: write_stats(plot, summary, index.areas[~index.crowd]))


@app.command()
def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE|FOLDER", help="COCO or LVIS file, YOLO folder or data.yaml, VOC folder.")
    ],
    images: Images = None,
    all_problems: Annotated[bool, typer.Option("--all", help="List every problem, not the first alone.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture: finds truncated ones.")] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse larger pictures.")] = MAX_PIXELS,
) -> None:
    """Check annotations and their pictures: exit code 0 if they can be used, 2 if not.

    Of a YOLO or VOC folder every split is converted, as `tailfin train` does it, and checked.
    """
    usable = True
    with tempfile.TemporaryDirectory(prefix="tailfin-check-") as folder:
        for split in splits_of(file) or [""]:
            given = as_coco(file, split, Path(folder).resolve(), images)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is our own, an error
                report = check_file(
                    given.annotations, given.images, all_problems, decode=decode, max_pixels=max_pixels, track=_track
                )
            usable &= _told(report, f"{file}, {split}" if split else str(report.path), given.notes)
    if not usable:
        raise typer.Exit(2)
    for note in notes_on_splits(file):
        echo(f"note: {note}")


for verb in (data_make.synth, data_make.split, data_make.convert, data_make.merge, proposals):
    app.command()(verb)
app.command()(view)
app.command("coco-lt")(coco_lt)
app.command("smooth-tail")(smooth_tail)


# ---- details ---------------------------------------------------------------------------------------------------------


def _told(report: CheckReport, name: str, notes: list[str]) -> bool:
    """Say what was found; whether the annotations can be used."""
    if not report.usable:
        for problem in report.problems:
            echo(problem, err=True)
        if others := report.num_problems - len(report.problems):
            echo(f"{others} more problem{'s' if others > 1 else ''} (--all lists them)", err=True)
        for note in report.notes:
            echo(f"  note: {note}", err=True)
        return False
    folder = str(report.images).removeprefix(f"{Path.cwd()}/")
    echo(f"{name}: usable; pictures in {folder}")
    echo("  " + ", ".join(f"{count} {what}" for what, count in report.summary.items()))
    for note in [*notes, *report.notes]:
        echo(f"  note: {note}")
    return True


def _track(pictures: Iterable, total: int) -> Iterator:
    with Progress("reading pictures", total, enabled=total >= QUIET_BELOW) as progress:
        for done, picture in enumerate(pictures, 1):
            progress.update(done)
            yield picture


def _found(index: AnnotationIndex, folder: Path) -> int:
    return sum((folder / index.file_name(image)).is_file() for image in range(len(index)))


def _bounds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"group bounds {text}: two whole numbers are needed, for example 10,100") from None


def _write(path: Path, write: Callable[[], None]) -> None:
    write()
    echo(f"wrote {path}")
