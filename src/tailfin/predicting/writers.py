"""The files that a prediction becomes: COCO results, CSV, Parquet, or a folder of YOLO labels.

    json      a list of detections (COCO results), and beside it `NAME.images.json` with all pictures and the categories
    csv       a line per detection; of a picture without any a line with its name alone
    parquet   the same as columns
    yolo      `FOLDER/PICTURE.txt`: class, centre x, centre y, width, height (fractions of the picture), score; the file
              of a picture without detections is empty; `FOLDER/classes.txt` has the names

Each writer takes one picture at a time, in order, and its files appear when it is closed.
"""

from __future__ import annotations

import csv
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from tailfin.errors import UserError, nearest
from tailfin.evaluation.results import JsonList
from tailfin.files import write_json, writing

FORMATS = ("json", "csv", "parquet", "yolo")
ENDINGS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = ("image_id", "file_name", "width", "height", "category_id", "category_name", "score", "x", "y", "w", "h")
ROWS = 100_000  # of a group in a Parquet file


class Found:
    """One picture and what was found in it."""

    def __init__(
        self,
        image_id: int,
        name: str,
        size: tuple[int, int],
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        counts: Sequence[bytes] | None,
    ) -> None:
        self.image_id, self.name, self.size = image_id, name, size  # (height, width)
        self.boxes, self.scores, self.labels, self.counts = boxes, scores, labels, counts

    def sides(self) -> list[list[float]]:
        """[x, y, width, height] to a hundredth of a pixel."""
        sides = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1).astype(np.float64)
        return [[round(side, 2) for side in box] for box in sides.tolist()]


class Writer(Protocol):
    """Takes pictures in order; as a context, its files appear at the end of one without an error."""

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, found: Found) -> None: ...


def format_of(out: Path, chosen: str | None) -> str:
    """The format that is asked for, else that of the ending, json where there is none; checked, with the packages it
    needs."""
    name = chosen or ENDINGS.get(out.suffix.lower() or ".json")
    if name is None:
        raise UserError(
            f"--out {out}: its ending is none of {', '.join(ENDINGS)} (--format writes one of {', '.join(FORMATS)} "
            "under any name, yolo into a folder)"
        )
    if name not in FORMATS:
        raise UserError(f'--format: there is no "{name}"{nearest(name, FORMATS)}')
    if name == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError("writing Parquet needs pyarrow: pip install 'tailfin[parquet]'") from None
    if name == "yolo" and out.is_file():
        raise UserError(f"--out {out} is a file, and YOLO labels are a folder")
    return name


def writer(format_name: str, out: Path, names: Sequence[str], ids: Sequence[int]) -> Writer:
    """The writer of a format; `ids` are the category ids of the classes."""
    kinds: dict[str, Any] = {"json": CocoJson, "csv": Csv, "parquet": Parquet, "yolo": Yolo}
    made: Writer = kinds[format_name](out, names, ids)
    return made


def images_file(out: Path) -> Path:
    """The list of pictures beside COCO results."""
    return out.with_name(f"{out.name.removesuffix('.json')}.images.json")


class CocoJson:
    """COCO results with `file_name` and `category_name` in every entry, masks as RLE."""

    def __init__(self, out: Path, names: Sequence[str], ids: Sequence[int]) -> None:
        self.out, self.names, self.ids = out, names, ids
        self.results = JsonList(out)
        self.images: list[dict[str, Any]] = []

    def __enter__(self) -> CocoJson:
        self.results.__enter__()
        return self

    def add(self, found: Found) -> None:
        height, width = found.size
        self.images.append({"id": found.image_id, "file_name": found.name, "width": width, "height": height})
        entries: list[dict[str, Any]] = [
            {
                "image_id": found.image_id,
                "category_id": int(self.ids[label]),
                "bbox": box,
                "score": score,
                "file_name": found.name,
                "category_name": self.names[label],
            }
            for box, score, label in zip(found.sides(), found.scores.tolist(), found.labels.tolist(), strict=True)
        ]
        if found.counts is not None:
            for entry, counts in zip(entries, found.counts, strict=True):
                entry["segmentation"] = {"size": [height, width], "counts": counts.decode("ascii")}
        self.results.extend(entries)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            categories = [{"id": int(n), "name": name} for n, name in zip(self.ids, self.names, strict=True)]
            write_json(images_file(self.out), {"images": self.images, "annotations": [], "categories": categories})
        self.results.wanted = kind is None
        self.results.__exit__(kind, error, trace)


class Csv:
    """Lines of `COLUMNS`."""

    def __init__(self, out: Path, names: Sequence[str], ids: Sequence[int]) -> None:
        self.out, self.names, self.ids = out, names, ids
        self.part = out.with_name(f".{out.name}.{os.getpid()}.part")

    def __enter__(self) -> Csv:
        with writing(self.out):
            self.file = self.part.open("w", newline="", encoding="utf-8")
        self.lines = csv.writer(self.file)
        self.lines.writerow(COLUMNS)
        return self

    def add(self, found: Found) -> None:
        with writing(self.out):
            self.lines.writerows(rows_of(found, self.names, self.ids))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.file.close()
        if kind is None:
            self.part.replace(self.out)
        else:
            self.part.unlink(missing_ok=True)


class Parquet:
    """Columns of the same names, a row group of `ROWS` rows at a time."""

    def __init__(self, out: Path, names: Sequence[str], ids: Sequence[int]) -> None:
        self.out, self.names, self.ids = out, names, ids
        self.part = out.with_name(f".{out.name}.{os.getpid()}.part")
        self.rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> Parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = [pa.int64(), pa.string(), pa.int32(), pa.int32(), pa.int64(), pa.string(), *[pa.float32()] * 5]
        self.schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
        with writing(self.out):
            self.file = pq.ParquetWriter(str(self.part), self.schema)
        return self

    def add(self, found: Found) -> None:
        self.rows += rows_of(found, self.names, self.ids)
        if len(self.rows) >= ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        columns: list[Any] = list(zip(*self.rows, strict=True)) if self.rows else [()] * len(COLUMNS)
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, self.schema, strict=True)]
        with writing(self.out):
            self.file.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self.rows = []

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._flush()
        self.file.close()
        if kind is None:
            self.part.replace(self.out)
        else:
            self.part.unlink(missing_ok=True)


class Yolo:
    """A folder of label files, made beside its place."""

    def __init__(self, out: Path, names: Sequence[str], ids: Sequence[int]) -> None:
        self.out, self.names = out, names
        self.part = out.with_name(f".{out.name}.{os.getpid()}.part")
        self.taken: set[str] = set()
        self.renamed: list[str] = []

    def __enter__(self) -> Yolo:
        with writing(self.out):
            self.part.mkdir(parents=True)
            (self.part / "classes.txt").write_text("".join(f"{name}\n" for name in self.names), encoding="utf-8")
        self.taken.add("classes")
        return self

    def add(self, found: Found) -> None:
        height, width = found.size
        boxes = found.boxes.astype(np.float64)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / [width, height]
        sides = (boxes[:, 2:] - boxes[:, :2]) / [width, height]
        lines = [
            f"{label} {' '.join(f'{value:.6f}' for value in (*centre, *side))} {score:.6f}\n"
            for label, centre, side, score in zip(
                found.labels.tolist(), centres.tolist(), sides.tolist(), found.scores.tolist(), strict=True
            )
        ]
        stem = free_stem(found.name, self.taken)
        if stem != own_stem(found.name):
            self.renamed.append(f"{stem}.txt of {found.name}")
        with writing(self.out):
            (self.part / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            if self.out.is_dir():
                shutil.rmtree(self.out)
            self.part.replace(self.out)
            if self.renamed:
                files = "1 label file has" if len(self.renamed) == 1 else f"{len(self.renamed)} label files have"
                warnings.warn(
                    f"{files} another name than the picture, since an earlier picture has the same (first: "
                    f"{self.renamed[0]})",
                    UserWarning,
                    stacklevel=2,
                )
        else:
            shutil.rmtree(self.part, ignore_errors=True)


def rows_of(found: Found, names: Sequence[str], ids: Sequence[int]) -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` per detection; one without detection where there is none."""
    height, width = found.size
    about = (found.image_id, found.name, width, height)
    if not len(found.labels):
        return [(*about, *[None] * 7)]
    return [
        (*about, int(ids[label]), names[label], score, *box)
        for label, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.sides(), strict=True)
    ]


def own_stem(name: str) -> str:
    """A file name without ending for a picture; that of `clip.mp4#12` is `clip_12`."""
    file, _, frame = name.rpartition("#") if name.rpartition("#")[2].isdigit() else (name, "", "")
    return Path(file).stem + (f"_{frame}" if frame else "")


def free_stem(name: str, taken: set[str]) -> str:
    """`own_stem`, with a number behind it where an earlier picture has that; it is taken then."""
    stem = candidate = own_stem(name)
    number = 1
    while candidate in taken:
        number += 1
        candidate = f"{stem}_{number}"
    taken.add(candidate)
    return candidate
