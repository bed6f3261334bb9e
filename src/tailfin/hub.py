"""Models to and from a model hub, or a folder: `tailfin push` and `tailfin pull`.

    push("RUN", "someone/bolts")        repository of the Hugging Face Hub, with a model card
    push("RUN", "shared/bolts/")        the same files in a folder
    pull("someone/bolts", "bolts")

What is pushed is the model file, the recipe, the numbers, and a card (README.md) made of them. A model that is pulled
is opened before it is there: it is a file of tailfin, safetensors and no code.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tailfin.api import load
from tailfin.checkpoint import ModelFile, load_model_file
from tailfin.config import dump_recipe
from tailfin.errors import UserError
from tailfin.files import existing_file, read_object, write_atomic, writing

MODEL, RECIPE, METRICS, CARD = "model.safetensors", "recipe.yaml", "metrics.json", "README.md"
NUMBERS = ("AP", "AP50", "AP75", "APr", "APc", "APf")
LISTED = 60  # classes on the card


def push(model: str | Path, target: str, *, private: bool = False, overwrite: bool = False) -> str:
    """Put a model with its card to `target`: `owner/name` on the hub, or a folder (a path with a separator in front or
    at its end, or one that is there); returns where it is."""
    path = Path(model)
    file = load_model_file(existing_file(path / MODEL if path.is_dir() else path, "model"))
    metrics = read_object(path / METRICS) if path.is_dir() and (path / METRICS).is_file() else None
    with tempfile.TemporaryDirectory(prefix="tailfin-push-") as temporary:
        folder = Path(temporary)
        shutil.copyfile(file.path, folder / MODEL)
        write_atomic(folder / RECIPE, dump_recipe(file.recipe))
        if metrics is not None:
            shutil.copyfile(path / METRICS, folder / METRICS)
        write_atomic(folder / CARD, card(file, metrics))
        if is_folder(target):
            place = Path(target)
            if (place / MODEL).exists() and not overwrite:
                raise UserError(f"{place / MODEL} exists already; add --overwrite to replace it")
            with writing(place):
                place.mkdir(parents=True, exist_ok=True)
                for own in sorted(folder.iterdir()):
                    shutil.copyfile(own, place / f".{own.name}.part")
                    (place / f".{own.name}.part").replace(place / own.name)
            return str(place)
        api = _hub().HfApi()
        try:
            api.create_repo(target, exist_ok=True, private=private)
            done = api.upload_folder(repo_id=target, folder_path=str(folder), commit_message="Model of tailfin")
        except Exception as error:
            raise UserError(f"{target}: the hub says: {_reason(error)}") from None
        return str(getattr(done, "repo_url", None) or target)


def pull(source: str, out: str | Path, *, revision: str | None = None, overwrite: bool = False) -> Path:
    """Get a model from the hub (`owner/name`) or a folder into the folder `out`; returns its model file."""
    target = Path(out)
    if (target / MODEL).exists() and not overwrite:
        raise UserError(f"{target / MODEL} exists already; add --overwrite to replace it")
    with tempfile.TemporaryDirectory(prefix="tailfin-pull-") as temporary:
        if is_folder(source):
            folder = Path(source)
        else:
            names = [MODEL, RECIPE, METRICS, CARD]
            try:
                folder = Path(
                    _hub().snapshot_download(source, revision=revision, local_dir=temporary, allow_patterns=names)
                )
            except Exception as error:
                raise UserError(f"{source}: the hub says: {_reason(error)}") from None
        load(existing_file(folder / MODEL, f"model of {source}"), "cpu")  # a file of tailfin, and whole
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            for name in (METRICS, RECIPE, CARD, MODEL):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / f".{name}.part")
                    (target / f".{name}.part").replace(target / name)
    return target / MODEL


def is_folder(place: str) -> bool:
    """Whether a target is a folder here rather than a repository of the hub."""
    path = Path(place)
    return path.is_dir() or path.is_absolute() or place.startswith((".", "~")) or place.endswith(("/", "\\"))


def card(file: ModelFile, metrics: dict[str, Any] | None) -> str:
    """The model card: what it is, its numbers as measured, its classes with their training images, how to use it."""
    recipe, stats = file.recipe, file.stats
    title = recipe.name or recipe.detector.name
    lines = ["---", "library_name: tailfin", "pipeline_tag: object-detection", "tags:", "- object-detection"]
    lines += ["- long-tail", "---", "", f"# {title}", ""]
    lines.append(
        f"A {recipe.detector.name} on {recipe.backbone}, loss {recipe.loss.name}, sampler {recipe.sampler.name}, "
        f"method {recipe.method}; {stats.num_classes} classes, trained on {stats.num_images} pictures."
    )
    if recipe.calibration is not None:
        lines += ["", f"Scores are calibrated ({recipe.calibration.name})."]
    for kind in ("bbox", "segm"):
        if metrics is not None and kind in metrics:
            own = {name: metrics[kind][name] for name in NUMBERS if metrics[kind].get(name, -1) >= 0}
            lines += ["", f"{kind}, protocol {metrics.get('protocol', '')}, in percent:", ""]
            lines.append("| " + " | ".join(own) + " |")
            lines.append("|" + "---|" * len(own))
            lines.append("| " + " | ".join(f"{100 * value:.1f}" for value in own.values()) + " |")
    order = sorted(range(stats.num_classes), key=lambda row: -int(stats.image_count[row]))
    lines += ["", "| class | training images |", "|---|---|"]
    lines += [f"| {_plain(stats.names[row])} | {int(stats.image_count[row])} |" for row in order[:LISTED]]
    if len(order) > LISTED:
        lines.append(f"| ... {len(order) - LISTED} more | |")
    lines += ["", "```", "tailfin pull OWNER/NAME --out model", "tailfin predict model photo.jpg", "```", ""]
    lines += ["The recipe is `recipe.yaml`, with every setting.", ""]
    return "\n".join(lines)


def _plain(name: str) -> str:
    """A class name that cannot break out of a table."""
    return json.dumps(name, ensure_ascii=False)[1:-1].replace("|", "\\|").replace("<", "&lt;")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'tailfin[hub]'; a folder needs nothing") from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
