"""`tailfin report RUN...`: one self-contained HTML file about one or several runs, or a live page while one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailfin.errors import UserError


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories; the first is what the others are compared with.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file. Default: RUN/report.html, or report.html in the folder that holds all runs."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Write the labels worth a look as a COCO file for a label tool, too.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="Show where the models look: mean or gradcam. They run over some pictures of the evaluated file."
        ),
    ] = None,
    live: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Serve a page about this run that follows it while it trains.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the live page on 127.0.0.1; 0 takes a free one.")] = 6070,
) -> None:
    """Write one HTML file about runs, side by side, or serve it with --live."""
    given = list(runs or [])
    if live is not None:
        written = {"--out": out, "--labels": labels, "--activations": activations}
        if name := next((key for key, value in written.items() if value is not None), None):
            raise UserError(f"{name} and --live do not go together: the live page is served, not written")
        from tailfin.report.live import serve

        serve([*given, live], port, ready=lambda url: typer.echo(f"live report: {url} (Ctrl-C ends it)"))
        return
    if not given:
        raise UserError("no run directory given: tailfin report RUN... (or --live RUN)")
    from tailfin.report.build import write_labels, write_report

    if labels is not None:
        typer.echo(f"labels to check: {write_labels(given, labels)}")
    typer.echo(f"report: {write_report(given, out, title=title, activations=activations)}")
