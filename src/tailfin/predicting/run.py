"""A prediction from inputs to its file: pieces, each process its share, decoded ahead; then one file, in order.

    summary = predict("RUN", ["photos/", "clip.mp4"], "found.json", score=0.05)

Started by torchrun or accelerate, the processes share the pieces. A call that was killed is given again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tailfin.api import Detector, load
from tailfin.checkpoint import content_hash
from tailfin.errors import UserError, nearest
from tailfin.files import existing_file, writing
from tailfin.mask_encoding import decode_masks
from tailfin.models.folding import for_inference
from tailfin.pictures import read_pictures
from tailfin.predicting.inputs import decoded, fetched, find_inputs, is_video
from tailfin.predicting.shards import PIECE, Pieces, Record
from tailfin.predicting.views import Looks, look
from tailfin.predicting.writers import Found, format_of, free_stem, images_file, writer
from tailfin.processes import limit_threads, on_main, process_state
from tailfin.progress import Progress
from tailfin.report.draw import draw_detections
from tailfin.schema.data import Data

SCORE = 0.05  # for files, where the model has no operating points
SMALL = 480  # a drawing has at least this long a side, so that labels leave room for what they name


@dataclass
class Summary:
    """What a prediction came to."""

    detections: int = 0
    pictures: int = 0
    taken_up: int = 0  # inputs that a call before had done
    bad: list[str] = field(default_factory=list)  # what could not be read, and why
    main: bool = True  # whether this is the process that speaks for all


@dataclass(frozen=True)
class Options:
    """What is kept and drawn; see `predict`."""

    score: float | None
    max_dets: int | None
    wanted: np.ndarray  # int64, labels that are kept
    looks: Looks
    batch: int
    draw: Path | None
    draw_score: float
    skip_bad: bool


def predict(
    model: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    lists: Sequence[str | Path] = (),
    format_name: str | None = None,
    score: float | None = None,
    max_dets: int | None = None,
    classes: Sequence[str] | None = None,
    looks: Looks = Looks(),
    draw: str | Path | None = None,
    draw_score: float = 0.3,
    batch: int = 8,
    threads: int = 2,
    skip_bad: bool = True,
    overwrite: bool = False,
    device: str | None = None,
) -> Summary:
    """Write what `model` finds in the inputs to `out`.

    Args:
        paths, lists: see `inputs.find_inputs`.
        format_name: one of `writers.FORMATS`; by default the ending of `out` says.
        score: detections are kept from this score on; without it the model's operating points, else 0.05. 0 keeps all.
        classes: names of the classes that are kept.
        looks: tiles, flips, suppression over classes.
        draw, draw_score: folder for drawings, and from which score on detections are drawn.
        threads: that decode pictures.
        skip_bad: pass over inputs that cannot be read; else the first one is a `UserError`.
        overwrite: replace `out`, and begin anew where a call before left pieces.
    """
    target = Path(out)
    state = process_state(device == "cpu")
    several = state.num_processes > 1
    if max_dets is not None and (max_dets == 0 or max_dets < -1):
        raise UserError(f"--max-dets must be positive, or -1 for no limit (given: {max_dets})")
    if not 0 <= looks.overlap < 1:
        raise UserError(f"--overlap must be at least 0 and below 1 (given: {looks.overlap})")
    chosen_format = format_of(target, format_name)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists (--overwrite replaces it)")
    inputs = on_main(state, lambda: find_inputs(paths, lists))
    limit_threads()
    detector = load(model, state.device if several else device)
    detector.limits()
    for_inference(detector.model)
    options = Options(
        SCORE if score is None and detector.points is None else score,
        max_dets,
        _labels(classes, detector.names),
        looks,
        batch,
        Path(draw) if draw is not None else None,
        draw_score,
        skip_bad,
    )
    pieces = Pieces(target.with_name(f".{target.name}.pieces"), inputs)
    settings = _settings(model, options, batch)

    def begin() -> int:
        if overwrite and not _same(pieces, settings):
            pieces.remove()
        target.parent.mkdir(parents=True, exist_ok=True)
        return pieces.begin(settings)

    there = on_main(state, begin)
    summary = Summary(taken_up=min(there * PIECE, len(inputs)))
    own = pieces.missing(state.process_index, state.num_processes)
    state.wait_for_everyone()  # all have looked at what is there before the first new piece appears
    try:
        _detect(detector, pieces, own, options, threads, summary.taken_up, state.is_main_process)
    except UserError:
        on_main(state, pieces.remove_if_empty) if not several else None
        raise
    state.wait_for_everyone()
    summary = on_main(state, lambda: _finish(detector, pieces, target, chosen_format, options, summary))
    return replace(summary, main=state.is_main_process)


# ---- one process -----------------------------------------------------------------------------------------------------


def _detect(
    detector: Detector, pieces: Pieces, own: Sequence[int], options: Options, threads: int, done: int, shown: bool
) -> None:
    """Do the pieces of this process."""
    left = sum(len(pieces.numbers(piece)) for piece in own)
    stems = _stems(pieces.inputs) if options.draw is not None else []
    if options.draw is not None and own:
        with writing(options.draw):
            options.draw.mkdir(parents=True, exist_ok=True)
    pictures = ((n, pieces.inputs[n]) for piece in own for n in pieces.numbers(piece) if not is_video(pieces.inputs[n]))
    ahead = 2 * options.batch + threads
    stream = decoded(pictures, detector.recipe.data, threads=threads, ahead=ahead)
    with Progress("predict", done + left, start=done, enabled=shown) as progress:
        for piece in own:
            records: list[Record] = []
            for group in _groups(_of_piece(pieces, piece, stream, detector.recipe.data), options.batch):
                good = [(number, frame, pixels) for number, frame, pixels in group if isinstance(pixels, np.ndarray)]
                for number, frame, problem in group:
                    if isinstance(problem, UserError):
                        if not options.skip_bad:
                            raise problem
                        records.append(Record(number, frame, 0, 0, bad=str(problem)))
                found = look(
                    detector,
                    [pixels for _, _, pixels in good],
                    options.looks,
                    score_threshold=_threshold(options.score),
                    max_dets=options.max_dets,
                    batch=options.batch,
                )
                for (number, frame, pixels), output in zip(good, found, strict=True):
                    record = _record(number, frame, pixels.shape, output, options)
                    records.append(record)
                    if options.draw is not None:
                        stem = stems[number] + (f"_{frame}" if frame >= 0 else "")
                        _draw(detector, record, pixels, options, options.draw / f"{stem}.jpg")
            records.sort(key=lambda record: (record.number, record.frame))
            pieces.write(piece, records)
            done += len(pieces.numbers(piece))
            progress.update(done)


def _of_piece(
    pieces: Pieces, piece: int, stream: Iterator[tuple[int, str, Any]], config: Data
) -> Iterator[tuple[int, int, Any]]:
    """(number, frame or -1, pixels or what is wrong) of the inputs of a piece."""
    for number in pieces.numbers(piece):
        name = pieces.inputs[number]
        if not is_video(name):
            _, _, pixels = next(stream)
            yield number, -1, pixels
            continue
        try:
            with fetched(name) as path:
                for frame, (_, pixels) in enumerate(read_pictures([path], config)):
                    yield number, frame, pixels
        except UserError as error:
            yield number, -1, error


def _record(number: int, frame: int, shape: Sequence[int], output: dict[str, Any], options: Options) -> Record:
    keep = np.isin(output["labels"].numpy(), options.wanted)
    counts = [output["rles"][row]["counts"] for row in np.flatnonzero(keep)] if "rles" in output else None
    return Record(
        number,
        frame,
        int(shape[0]),
        int(shape[1]),
        np.ascontiguousarray(output["boxes"].numpy()[keep], np.float32).tobytes(),
        np.ascontiguousarray(output["scores"].float().numpy()[keep], np.float32).tobytes(),
        output["labels"].numpy()[keep].astype(np.int32).tobytes(),
        counts,
    )


def _draw(detector: Detector, record: Record, pixels: np.ndarray, options: Options, path: Path) -> None:
    boxes, scores, labels = record.arrays()
    shown = scores >= options.draw_score
    masks = None
    if record.counts is not None:
        size = (record.height, record.width)
        chosen = [{"size": list(size), "counts": record.counts[row]} for row in np.flatnonzero(shown)]
        masks = decode_masks(chosen, size)
    larger = SMALL if max(pixels.shape[:2]) < SMALL else None
    picture = draw_detections(pixels, boxes[shown], labels[shown], detector.names, scores[shown], masks, size=larger)
    picture.save(path, quality=92)


# ---- all together ----------------------------------------------------------------------------------------------------


def _finish(
    detector: Detector, pieces: Pieces, target: Path, format_name: str, options: Options, summary: Summary
) -> Summary:
    """One file of all pieces; pictures are numbered 1, 2, ... in order, those that cannot be read left out."""
    for record in pieces.records():  # known before anything is written
        if record.bad:
            summary.bad.append(record.bad)
        else:
            summary.pictures += 1
    if summary.bad and not summary.pictures:
        pieces.remove()
        raise UserError(f"none of the {len(summary.bad)} files can be read; the first: {summary.bad[0]}")
    with writer(format_name, target, detector.names, detector.stats.category_ids.tolist()) as written:
        good = (record for record in pieces.records() if not record.bad)
        for image_id, record in enumerate(good, start=1):
            boxes, scores, labels = record.arrays()
            name = pieces.inputs[record.number] + (f"#{record.frame}" if record.frame >= 0 else "")
            size = (record.height, record.width)
            written.add(Found(image_id, name, size, boxes, scores, labels, record.counts))
            summary.detections += len(scores)
    if format_name != "json":
        images_file(target).unlink(missing_ok=True)
    pieces.remove()
    return summary


def _settings(model: str | Path, options: Options, batch: int) -> dict[str, Any]:
    """What the detections depend on, as plain values."""
    path = Path(model)
    path = existing_file(path / "model.safetensors" if path.is_dir() else path, "model")
    return {
        "model": f"{content_hash(path)} {path.stat().st_size}",
        "options": [
            options.score,
            options.max_dets,
            options.wanted.tolist(),
            list(options.looks),
            batch,
            None if options.draw is None else str(options.draw),
            options.draw_score,
        ],
    }


def _same(pieces: Pieces, settings: dict[str, Any]) -> bool:
    """Whether the pieces that are there belong to this very call."""
    try:
        pieces.begin(settings)
    except UserError:
        return False
    return True


def _threshold(score: float | None) -> float | None:
    """Just below `score`, as detectors report what lies above."""
    return score if score is None or score <= 0 else float(np.nextafter(np.float32(score), np.float32(0)))


def _stems(inputs: Sequence[str]) -> list[str]:
    taken: set[str] = set()
    return [free_stem(name, taken) for name in inputs]


def _groups(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    while group := list(itertools.islice(items, size)):
        yield group


def _labels(classes: Sequence[str] | None, names: Sequence[str]) -> np.ndarray:
    """Labels of the classes to keep."""
    if classes is None:
        return np.arange(len(names))
    for name in classes:
        if name not in names:
            raise UserError(f'--classes: the model has no class "{name}"{nearest(name, names)}')
    return np.array([names.index(name) for name in classes], dtype=np.int64)
