"""`tailfin data proposals`: class-agnostic boxes of a trained detector, for pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailfin.cli.output import echo


def proposals(
    model: Annotated[
        Path, typer.Argument(help="RUN folder or model file: a localizer or any detector; or: selective_search.")
    ],
    annotations: Annotated[Path, typer.Option("--annotations", help="COCO or LVIS file whose images are wanted.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .npz, or .json (COCO results).")],
    images: Annotated[
        Path | None, typer.Option("--images", help="Image folder; else the folder with the file's stem, else its own.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Most boxes per image.")] = 1000,
    nms: Annotated[float, typer.Option(min=0, max=1, help="IoU above which the lower-scored of two boxes goes.")] = 0.7,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Print the recall of the file's own boxes: AR@10, @100, ...")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="With --evaluate: write the recall as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu keeps a GPU out of it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write class-agnostic proposals for every image; repeated after an interruption, it goes on."""
    from accelerate import PartialState

    from tailfin.errors import UserError
    from tailfin.files import write_json
    from tailfin.propose import average_recall, propose  # loads torch's detectors

    if device not in (None, "cpu"):
        raise UserError(f'--device "{device}": only cpu can be asked for; a GPU is used where there is one')
    if json_file is not None and not evaluate:
        raise UserError("--json holds the recall: it needs --evaluate")
    found, index = propose(
        model, annotations, out, images=images, top=top, nms_iou=nms, device=device, overwrite=overwrite
    )
    if not PartialState().is_main_process:
        return
    echo(f"wrote {out}: {len(found.boxes)} proposals of {len(found.image_ids)} of {len(index)} images")
    if evaluate:
        recall = average_recall(found, index, sorted({min(limit, top) for limit in (10, 100, 300, 1000)}))
        for name, value in recall.items():
            echo(f"  {name:<9} {'–' if value < 0 else f'{100 * value:5.1f}'}")
        if json_file is not None:
            write_json(json_file, recall, indent=1)
            echo(f"wrote {json_file}")
