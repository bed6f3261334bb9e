"""A data set on one page: how long its tail is, pictures of every class with their boxes, duplicates, leaks, odd boxes.

write_view("train.json", "view.html", val="val.json")          # `tailfin data view train.json`
write_stats("stats.html", summary, areas)                       # `tailfin data stats --plot`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tailfin.data import stats_report
from tailfin.data.images import read_image
from tailfin.data.index import AnnotationIndex, image_folder, image_path, open_index
from tailfin.data.near_duplicates import Hashes, near_pairs, picture_hashes
from tailfin.data.odd_boxes import KINDS, odd_boxes
from tailfin.errors import UserError
from tailfin.files import write_atomic
from tailfin.report.build import packed_plotly
from tailfin.report.draw import Color, class_color, data_uri, draw_detections
from tailfin.report.page import Section, asset, chart, count, group_choices, render
from tailfin.stats import ClassStats
from tailfin.version import __version__

PICTURES = 20  # of a class
BUDGET = 1200  # pictures of all classes together, about 5 MB
HASHED = 20_000  # pictures that are compared
_SIDE = 120
_QUALITY = 70
_PAIRS, _ODD = 24, 12
_LISTED = 3000  # pairs that can be saved

Track = Callable[[Iterable[Path], int], Iterable[Path]]


def write_view(
    file: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    val: str | Path | None = None,
    val_images: str | Path | None = None,
    pictures: int = PICTURES,
    group_bounds: Sequence[int] | None = None,
    track: Track | None = None,
) -> Path:
    """Write one HTML file about an annotation file and its pictures.

    Args:
        images, val_images: folders of the pictures; else those beside the files.
        val: another file, whose pictures are looked for among these (leaks).
        pictures: of each class; of many classes fewer, so that the page stays small.
        track: shows how far the reading of pictures is.
    """
    target = Path(out).expanduser()
    stats_report.check_plot_path(target)
    index = open_index(file)
    stats = ClassStats.from_index(index, group_bounds)
    summary = stats_report.summarize(index, stats, Path(images) if images else None)
    own = _Set(index, image_folder(file, images))
    other = None if val is None else _Set(open_index(val), image_folder(val, val_images))
    sections = [
        _overview(summary, own.index.areas[~own.index.crowd]),
        _classes(own, summary, pictures),
        _duplicates(own, other, track),
        _odd(own),
    ]
    write_atomic(target, _page(f"{Path(file).name}", sections))
    return target


def write_stats(out: str | Path, summary: dict[str, Any], areas: NDArray[np.float64]) -> None:
    """Write the statistics alone, with the advice."""
    stats_report.check_plot_path(Path(out))
    write_atomic(Path(out), _page(Path(summary["file"]).name, [_overview(summary, areas)]))


# ---- details ---------------------------------------------------------------------------------------------------------


class _Set:
    """An annotation file with its pictures."""

    def __init__(self, index: AnnotationIndex, folder: Path) -> None:
        self.index, self.folder = index, folder

    def path(self, row: int) -> Path:
        return image_path(self.folder, self.index.file_name(row))

    def thumbnail(self, row: int, boxes: NDArray[np.int64], color: Color, *, close: bool = True) -> str:
        """A picture with some of its boxes; where all are small, what is around them."""
        index = self.index
        wide, high = int(index.widths[row]), int(index.heights[row])
        picture = read_image(self.path(row), width=wide, height=high)
        drawn = np.array(index.boxes[boxes], dtype=np.float64).reshape(-1, 4)
        drawn[:, 2:] += drawn[:, :2]
        x0, y0, x1, y1 = 0, 0, picture.shape[1], picture.shape[0]
        if close and len(drawn):
            low, top = drawn[:, :2].min(axis=0), drawn[:, 2:].max(axis=0)
            need = 2.5 * float(max(top - low))
            if need < 0.8 * max(x1, y1):
                middle, half = (low + top) / 2, max(need, 32.0) / 2
                x0, y0 = (int(max(0, value)) for value in middle - half)
                x1, y1 = int(min(x1, middle[0] + half)) + 1, int(min(y1, middle[1] + half)) + 1
        cut = np.ascontiguousarray(picture[y0:y1, x0:x1])
        if not cut.size:
            raise UserError(f"{index.path}: a box lies outside {index.file_name(row)}")
        count_ = len(drawn)
        shown = draw_detections(
            cut, drawn - [x0, y0, x0, y0], [0] * count_, [], size=_SIDE, texts=[""] * count_, colors=[color] * count_
        )
        return data_uri(shown, _QUALITY)


def _page(title: str, sections: Sequence[Section]) -> str:
    return render(
        "report.html",
        title=title,
        sections=list(sections),
        runs=[],
        style=asset("report.css"),
        script=asset("report.js"),
        plotly=packed_plotly(),
        live=False,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _overview(summary: dict[str, Any], areas: NDArray[np.float64]) -> Section:
    picture = stats_report.figure(summary, areas)
    picture.update_layout(title=None, showlegend=True)
    html = render("data_overview.html", chart=chart(picture, height=int(picture.layout.height)), **_facts(summary))
    return Section("Tail", html)


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    sizes, boxes = summary["box_sizes"], max(sum(summary["box_sizes"].values()), 1)
    factor = summary["imbalance_factor"]["images"]
    return {
        "facts": [
            (
                "pictures",
                f"{count(summary['images'])}, {count(summary['images_without_annotation'])} without annotation",
            ),
            ("annotations", f"{count(summary['annotations'])} of {count(summary['classes'])} classes"),
            ("imbalance", "none" if factor is None else f"{factor:.4g} (most over fewest pictures of a class)"),
            ("Gini", f"{summary['gini']['images']:.2f} of pictures, {summary['gini']['instances']:.2f} of instances"),
            ("groups", ", ".join(f"{number} {name}" for name, number in summary["groups"].items() if number)),
            ("boxes", ", ".join(f"{100 * sizes[name] / boxes:.0f} % {name}" for name in stats_report.SIZE_NAMES)),
        ],
        "notes": summary["notes"],
        "advice": summary["advice"],
    }


def _classes(own: _Set, summary: dict[str, Any], pictures: int) -> Section:
    """Every class by falling number of pictures, with some of them."""
    index, listed = own.index, summary["per_class"]
    each = max(1, min(pictures, BUDGET // max(len(listed), 1)))
    labels = {int(number): place for place, number in enumerate(index.category_ids.tolist())}
    order = np.argsort(np.asarray(index.labels), kind="stable")
    starts = np.searchsorted(np.asarray(index.labels)[order], np.arange(len(listed) + 1))
    rows, unread = [], []
    for entry in listed:
        label = labels[entry["id"]]
        mine = order[starts[label] : starts[label + 1]]
        where = np.unique(np.asarray(index.image_of)[mine])
        chosen = np.random.default_rng([0, label]).permutation(where)[:each]
        panels = []
        for image in np.sort(chosen).tolist():
            boxes = mine[np.asarray(index.image_of)[mine] == image]
            try:
                panels.append(
                    {"image": own.thumbnail(image, boxes, class_color(entry["name"])), "file": index.file_name(image)}
                )
            except UserError as error:
                unread.append(str(error))
        rows.append({**entry, "panels": panels})
    html = render(
        "data_classes.html",
        rows=rows,
        each=each,
        unread=unread[:1],
        failed=len(unread),
        choices=group_choices(row["frequency"] for row in rows),
    )
    return Section("Classes", html)


def _duplicates(own: _Set, other: _Set | None, track: Track | None) -> Section:
    hashed = [_hashes(source, track) for source in ([own] if other is None else [own, other])]
    within = near_pairs(hashed[0])
    across = near_pairs(hashed[0], hashed[1]) if other is not None else []
    strips = [
        ("Duplicates in this file", within, own),
        *([("Also in the other file (leaks)", across, other)] if other else []),
    ]
    document = [
        {"kind": title, "first": own.index.file_name(a), "second": second.index.file_name(b), "difference": round(d, 2)}
        for title, pairs, second in strips
        for a, b, d in pairs[:_LISTED]
    ]
    shown = [
        {"title": title, "number": _said(pairs, second is own), "pairs": _pair_panels(own, second, pairs[:_PAIRS])}
        for title, pairs, second in strips
    ]
    html = render(
        "data_duplicates.html",
        strips=shown,
        compared=[count(int(found.usable.sum())) for found in hashed],
        all=[len(source.index) <= HASHED for source in ([own] if other is None else [own, other])],
        limit=count(HASHED),
        document=document,
    )
    return Section("Duplicates and leaks" if other is not None else "Duplicates", html)


def _said(pairs: Sequence[tuple[int, int, float]], within: bool) -> str:
    """How many pictures are concerned, and in how many pairs."""
    if within:
        pictures = len({place for a, b, _ in pairs for place in (a, b)})
        return f"{count(pictures)} pictures in {count(len(pairs))} pairs"
    here, there = (len({pair[side] for pair in pairs}) for side in (0, 1))
    return f"{count(there)} pictures of the other file, {count(here)} of this one"


def _hashes(source: _Set, track: Track | None) -> Hashes:
    number = min(len(source.index), HASHED)
    paths = (source.path(row) for row in range(number))
    return picture_hashes(track(paths, number) if track is not None else paths)


def _pair_panels(own: _Set, other: _Set, pairs: Sequence[tuple[int, int, float]]) -> list[dict[str, Any]]:
    panels = []
    for a, b, difference in pairs:
        images = []
        for source, row in ((own, a), (other, b)):
            try:
                with Image.open(source.path(row)) as picture:
                    small = picture.convert("RGB")
                    small.thumbnail((_SIDE, _SIDE))
                images.append({"image": data_uri(small, _QUALITY), "file": source.index.file_name(row)})
            except OSError:
                images.append({"image": "", "file": source.index.file_name(row)})
        panels.append({"images": images, "note": f"difference {difference:.1f}"})
    return panels


def _odd(own: _Set) -> Section:
    index, strips = own.index, []
    document = []
    for kind, rows in odd_boxes(index).items():
        if not len(rows):
            continue
        panels = []
        for row in rows[:_ODD].tolist():
            image = int(index.image_of[row])
            try:
                picture = own.thumbnail(image, np.array([row]), (255, 64, 150), close=kind != "outside")
            except UserError:
                picture = ""
            x, y, wide, high = (float(value) for value in index.boxes[row])
            panels.append(
                {
                    "image": picture,
                    "name": index.names[int(index.labels[row])],
                    "file": index.file_name(image),
                    "note": f"{wide:.0f} x {high:.0f} at {x:.0f}, {y:.0f}",
                }
            )
        document += [{"kind": kind, "annotation_id": int(index.annotation_ids[row])} for row in rows.tolist()]
        strips.append({"title": kind, "what": KINDS[kind], "number": count(len(rows)), "panels": panels})
    return Section("Odd boxes", render("data_odd.html", strips=strips, document=document))
