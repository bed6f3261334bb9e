"""What `--train` and `--val` may name beside a COCO or LVIS file: a YOLO folder or data.yaml, a VOC or COCO folder,
`hf:NAME` for a data set of Hugging Face's `datasets` (`hub_sets.py`).

    given = as_coco("yolo-set", "val", Path("RUN/data"))  # RUN/data/val.json, with the folder of its pictures

The annotations are converted, as `tailfin data convert` does it; the pictures stay where they are, those of a hub's
data set are written beside the annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tailfin.data.convert import detect_layout, read_coco
from tailfin.data.document import with_train_counts
from tailfin.data.hub_sets import MARK, coco_of, open_hub_set
from tailfin.data.parts import SPLITS, Part, common_folder, on_both_sides
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
    return str(source) if str(source).startswith(MARK) else str(Path(source).absolute())


def below(root: Path, source: str) -> str:
    """A source that is named relative to `root`."""
    return source if source.startswith(MARK) else str(root / source)


def is_annotation_file(source: str | Path) -> bool:
    """Whether `source` is used as it is: anything but a folder and a YAML file."""
    path = Path(source)
    return not str(source).startswith(MARK) and not path.is_dir() and path.suffix.lower() not in (".yaml", ".yml")


def splits_of(source: str | Path) -> list[str]:
    """The splits that a data set has beside its training part; none of an annotation file."""
    if is_annotation_file(source):
        return []
    return list(open_hub_set(str(source))) if str(source).startswith(MARK) else [p.name for p in _parts(Path(source))]


def notes_on_splits(source: str | Path) -> list[str]:
    """What there is to say of the splits of a folder together: pictures that two of them have."""
    return [] if is_annotation_file(source) or str(source).startswith(MARK) else on_both_sides(_parts(Path(source)))


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
    if str(source).startswith(MARK):
        return _from_hub(str(source), split, folder)
    parts = _parts(path)
    part = parts[_chosen([own.name for own in parts], split, str(path))]
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


def _from_hub(source: str, split: str, folder: Path) -> Given:
    parts = open_hub_set(source)
    names = list(parts)
    name = names[_chosen(names, split, source)]
    document = coco_of(parts[name], folder, split)
    target = folder / f"{split}.json"
    write_json(target, with_train_counts(document, document) if name == "train" else document)
    return Given(target, folder / split, [f"{source}: {len(document['images'])} pictures of {name}"])


def _chosen(names: Sequence[str], split: str, source: str) -> int:
    """The place of a split among those that there are; the only one, whatever it is called."""
    if split not in names and len(names) > 1:
        raise UserError(f"{source} has no split {split} (it has {', '.join(names)})")
    return names.index(split) if split in names else 0
