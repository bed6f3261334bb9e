"""What `--train` and `--val` may name beside a COCO or LVIS file: a YOLO folder or data.yaml, a VOC or COCO folder.

    given = as_coco("yolo-set", "val", Path("RUN/data"))  # RUN/data/val.json, with the folder of its pictures

The annotations are converted, as `tailfin data convert` does it; the pictures stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tailfin.data.convert import detect_layout, read_coco
from tailfin.data.document import with_train_counts
from tailfin.data.parts import SPLITS, Part, common_folder
from tailfin.data.voc import read_voc
from tailfin.data.yolo import read_yolo
from tailfin.errors import UserError
from tailfin.files import write_json


@dataclass(frozen=True)
class Given:
    """An annotation file, the folder of its pictures (none: the usual rule), and what there is to say of it."""

    annotations: Path
    images: Path | None = None
    notes: list[str] = field(default_factory=list)


def as_given(source: str | Path) -> str:
    """A source as text that means the same from any working directory."""
    return str(Path(source).absolute())


def is_annotation_file(source: str | Path) -> bool:
    """Whether `source` is used as it is: anything but a folder and a YAML file."""
    path = Path(source)
    return not path.is_dir() and path.suffix.lower() not in (".yaml", ".yml")


def splits_of(source: str | Path) -> list[str]:
    """The splits that a data set has beside its training part; none of an annotation file."""
    return [] if is_annotation_file(source) else [part.name for part in _parts(Path(source))]


def as_coco(source: str | Path, split: str, folder: Path, images: str | Path | None = None) -> Given:
    """`source` as an annotation file: itself, or its part `split` (its only part, whatever that is called), written to
    `folder`/`split`.json.

    `images`: picture folder of an annotation file; the other layouts say themselves where their pictures are.
    """
    path = Path(source)
    if is_annotation_file(path):
        return Given(path, None if images is None else Path(images))
    if images is not None:
        raise UserError(f"{path} says itself where its pictures are: leave the picture folder out")
    parts = _parts(path)
    part = _chosen(parts, split, path)
    train = next((other for other in parts if other.name == "train"), part)
    target = folder / f"{split}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, with_train_counts(part.document, train.document))
    return Given(target, common_folder(part.files).absolute(), part.notes)


# ---- details ---------------------------------------------------------------------------------------------------------


def _parts(path: Path) -> list[Part]:
    layout = detect_layout(path)
    parts = read_yolo(path) if layout == "yolo" else read_voc(path) if layout == "voc" else read_coco(path)
    return sorted(parts, key=lambda part: SPLITS.index(part.name) if part.name in SPLITS else len(SPLITS))


def _chosen(parts: Sequence[Part], split: str, path: Path) -> Part:
    own = next((part for part in parts if part.name == split), None)
    if own is None and len(parts) == 1:
        own = parts[0]
    if own is None:
        raise UserError(f"{path} has no split {split} (it has {', '.join(part.name for part in parts)})")
    return own
