"""Classes that are added to a trained detector: AP of the known ones before and after, with and without replay.

    python benchmarks/add_classes.py DATA OUT                     # 20 of 31 classes, then the other 11
    python benchmarks/add_classes.py DATA OUT --size 96 --epochs 3 --steps 3

DATA has `train.json`, `train/`, `val.json`, `val/`. Of the classes by falling number of pictures every third one is
added later, so that both sets have a head and a tail; a detector (`fod/packaged:rfs`) is trained on the pictures of the
others, and the recipe `fod/add_classes` is given all annotations: it takes the known classes from the model by name.
Finished runs are not run again. Prints a table: AP over the known and over the added classes, one row per run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ADDED = 11
VARIANTS = ("fod/add_classes", "fod/add_classes:no_replay", "fod/add_classes:plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--epochs", type=int, default=8, help="of the known classes")
    parser.add_argument("--steps", type=int, default=4, help="epochs of the added classes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train = json.loads((options.data / "train.json").read_text())
    added = added_classes(train)
    known_file = options.out / "known.json"
    known_file.write_text(json.dumps(without(train, added)))
    val = json.loads((options.data / "val.json").read_text())
    val_file = options.out / "known-val.json"
    val_file.write_text(json.dumps(without(val, added)))
    pictures = ["--train-images", options.data / "train", "--val-images", options.data / "val"]
    size = [f"data.sizes=[{options.size}]"]
    base = options.out / "base"
    run("fod/packaged:rfs", "--train", known_file, "--val", val_file, *pictures, "--out", base,
        f"schedule.epochs={options.epochs}", *size)  # fmt: skip
    rows = [("known classes alone", json.loads((base / "metrics.json").read_text()))]
    whole = ["--train", options.data / "train.json", "--val", options.data / "val.json", *pictures]
    for variant in VARIANTS:
        folder = options.out / variant.replace("/", "_").replace(":", "_")
        steps = [f"stepwise.tail.epochs={options.steps}", f"stepwise.tail.milestones=[{max(options.steps - 1, 1)}]"]
        run(variant, *whole, "--out", folder, "--weights", base / "model.safetensors", *steps, *size)
        rows.append((f"{variant}, before", json.loads((folder / "stages/0-base/metrics.json").read_text())))
        rows.append((f"{variant}, after", json.loads((folder / "metrics.json").read_text())))
    names = {category["id"]: category["name"] for category in train["categories"]}
    print(f"added: {', '.join(sorted(names[one] for one in added))}")
    print("| run | AP, known classes | AP, added classes |\n|---|---|---|")
    for name, metrics in rows:
        known = mean(metrics, added, inside=False)
        new = mean(metrics, added, inside=True)
        print(f"| {name} | {known:.3f} | {'' if new is None else f'{new:.3f}'} |")


def added_classes(document: dict[str, Any]) -> set[int]:
    """Ids of every third class by falling number of pictures, `ADDED` at most."""
    pictures: dict[int, set[int]] = {category["id"]: set() for category in document["categories"]}
    for annotation in document["annotations"]:
        pictures[annotation["category_id"]].add(annotation["image_id"])
    order = sorted(pictures, key=lambda one: (-len(pictures[one]), one))
    return set(order[::3][:ADDED])


def without(document: dict[str, Any], added: set[int]) -> dict[str, Any]:
    """The set without some classes, and without the pictures that show none of the others."""
    annotations = [one for one in document["annotations"] if one["category_id"] not in added]
    shown = {one["image_id"] for one in annotations}
    return {
        **document,
        "annotations": annotations,
        "images": [image for image in document["images"] if image["id"] in shown],
        "categories": [category for category in document["categories"] if category["id"] not in added],
    }


def mean(metrics: dict[str, Any], added: set[int], *, inside: bool) -> float | None:
    """Mean AP of the added classes or of the others; classes without a value aside."""
    values = [
        one["bbox"]["AP"]
        for one in metrics["per_category"]
        if (one["id"] in added) == inside and one["bbox"]["AP"] >= 0
    ]
    return sum(values) / len(values) if values else None


def run(recipe: str, *arguments: object) -> None:
    """`tailfin train`, where the run is not finished; an interrupted one goes on."""
    out = Path(str(arguments[arguments.index("--out") + 1]))
    if (out / "metrics.json").exists():
        return
    given = ["--resume", out] if (out / "recipe.yaml").exists() else [recipe, *arguments]
    subprocess.run([sys.executable, "-m", "tailfin", "train", *map(str, given)], check=True)


if __name__ == "__main__":
    main()
