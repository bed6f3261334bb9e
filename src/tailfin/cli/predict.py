"""`tailfin predict`: detections for any pictures, as COCO results and as drawings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from tailfin.cli.output import echo
from tailfin.errors import UserError, nearest

T = TypeVar("T")


def predict(
    model: Annotated[Path, typer.Argument(help="RUN/model.safetensors, or the run folder.")],
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Images, folders, globs or videos.")],
    out: Annotated[Path, typer.Option(help="COCO results JSON to write.")] = Path("predictions.json"),
    draw: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for pictures with drawn detections.")] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Draw detections from this score on.")] = 0.3,
    classes: Annotated[str | None, typer.Option(help="Keep only these classes, separated by commas.")] = None,
    max_dets: Annotated[int | None, typer.Option(help="Detections per picture; -1 = no limit.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per step.")] = 8,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad/--no-skip-bad", help="Pass over files that cannot be read, and list them at the end."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing results file.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, cuda:1, ...")] = None,
) -> None:
    """Detect objects in pictures; no annotations are needed.

    Every entry of the results has the picture's `image_id` (1, 2, ... in order) and `file_name`, the category's id and
    name, an xywh box in pixels and a score; of a detector with masks also `segmentation`, the mask as RLE. Results are
    written as they come; the file appears when it is whole.
    """
    import numpy as np

    from tailfin import api
    from tailfin.evaluation.results import JsonList
    from tailfin.mask_encoding import decode_masks
    from tailfin.pictures import find_pictures, read_pictures
    from tailfin.progress import Progress
    from tailfin.report.draw import draw_detections

    if max_dets is not None and (max_dets == 0 or max_dets < -1):
        raise UserError(f"--max-dets must be positive, or -1 for no limit (given: {max_dets})")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists (--overwrite replaces it)")
    files = find_pictures(paths)
    detector = api.load(model, device)
    wanted = _chosen(classes, detector.names)
    ids = np.asarray(detector.stats.category_ids)
    drawn: set[str] = set()
    bad: list[str] = []
    done = 0
    pictures = read_pictures(files, detector.recipe.data, bad if skip_bad else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Progress("predict", len(files)) as progress, JsonList(out) as results:
        for group in _groups(enumerate(pictures, start=1), batch):
            found = detector.results([image for _, (_, image) in group], max_dets=max_dets, batch=batch)
            if draw is not None:
                draw.mkdir(parents=True, exist_ok=True)
            for (image_id, (name, image)), output in zip(group, found, strict=True):
                keep = np.isin(output["labels"].numpy(), wanted)
                rles = [output["rles"][row] for row in np.flatnonzero(keep)] if "rles" in output else None
                boxes, labels = output["boxes"].numpy()[keep], output["labels"].numpy()[keep]
                scores = output["scores"].numpy()[keep]
                sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
                entries: list[dict[str, Any]] = []
                for row, (box, label, value) in enumerate(
                    zip(sides.tolist(), labels.tolist(), scores.tolist(), strict=True)
                ):
                    entries.append(
                        {
                            "image_id": image_id,
                            "category_id": int(ids[label]),
                            "bbox": [round(side, 2) for side in box],
                            "score": value,
                            "file_name": name,
                            "category_name": detector.names[label],
                        }
                    )
                    if rles is not None:
                        entries[-1]["segmentation"] = {**rles[row], "counts": rles[row]["counts"].decode("ascii")}
                results.extend(entries)
                if draw is not None:
                    shown = scores >= score
                    masks = None
                    if rles is not None:
                        masks = decode_masks([rles[row] for row in np.flatnonzero(shown)], image.shape[:2])
                    picture = draw_detections(image, boxes[shown], labels[shown], detector.names, scores[shown], masks)
                    picture.save(draw / _free_name(name, drawn), quality=92)
                done += 1
                progress.update(min(done, len(files)))
        if bad and not done:
            raise UserError(f"none of the {len(bad)} files can be read; the first: {bad[0]}")
        results.wanted = True
    echo(f"{results.count} detections in {done} pictures: {out}" + (f"; drawings in {draw}" if draw else ""))
    if bad:
        echo(f"{len(bad)} files skipped:", err=True)
        for message in bad:
            echo(f"  {message}", err=True)


def _groups(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    while group := list(islice(items, size)):
        yield group


def _chosen(classes: str | None, names: list[str]) -> list[int]:
    """Labels of the classes to keep."""
    if classes is None:
        return list(range(len(names)))
    chosen = [name.strip() for name in classes.split(",") if name.strip()]
    for name in chosen:
        if name not in names:
            raise UserError(f'--classes: the model has no class "{name}"{nearest(name, names)}')
    return [names.index(name) for name in chosen]


def _free_name(name: str, taken: set[str]) -> str:
    """A file name for a drawing that no other picture of this call has."""
    file, _, frame = name.partition("#")
    stem = Path(file).stem + (f"_{frame}" if frame else "")
    candidate, number = f"{stem}.jpg", 1
    while candidate in taken:
        number += 1
        candidate = f"{stem}_{number}.jpg"
    taken.add(candidate)
    return candidate
