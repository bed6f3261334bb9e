"""A checkpoint of another project as a model file, to be measured as it is (`tailfin evaluate --model --recipe`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tailfin.checkpoint import file_hash, save_model
from tailfin.class_rows import join_class_rows
from tailfin.config import load_recipe
from tailfin.data.index import open_index
from tailfin.errors import UserError
from tailfin.joins import join_classes
from tailfin.models import build_detector, released_weights
from tailfin.schema.stages import final_stage
from tailfin.stats import ClassStats
from tailfin.weights import load_fitting


def converted(
    recipe: str | Path,
    weights: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    train: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Write a checkpoint of another project, which `weights` of the recipe would read, as a model file as it is.

    Args:
        recipe: name or path; its detector (that of the last stage) is the checkpoint's.
        annotations: file whose classes the model has; with their counts, unless `train` names the training file.
        out: the model file.

    Returns:
        Lines that say what was loaded, dropped, and how classes were told.

    Raises:
        UserError: weights that the model needs are not in the checkpoint: they would be random.
    """
    given = final_stage(load_recipe(recipe, [f"weights={weights}", *overrides])).recipe
    stats = ClassStats.from_index(open_index(annotations if train is None else train))
    released = released_weights(given, stats)
    if released is None:
        raise UserError(f"{weights}: it has no known names of a {given.detector.name} of another project")
    names = stats.names if released.names is None else released.names
    join = join_classes(stats.names, names)
    if join.missing:
        raise UserError(f"{weights}: it has no class {join.first_missing()}, which the annotations have")
    model, _ = build_detector(given, stats, start=False)
    joined, said = join_class_rows(model.state_dict(), released.state, names, stats.names)
    loaded = load_fitting(model, joined)
    if lost := [key for key in loaded.missing if ".loss." not in key]:  # a loss's counts are no matter of detections
        more = ", ..." if len(lost) > 1 else ""
        raise UserError(f"{weights}: {len(lost)} weights of this detector are not in it ({lost[0]}{more})")
    notes = [*released.notes, f"{weights}: {len(loaded.names)} weights loaded", *said]
    if loaded.dropped:
        notes.append(f"  not in this detector: {len(loaded.dropped)} ({loaded.dropped[0]}, ...)")
    save_model(Path(out), model, given, stats, parents=[file_hash(Path(str(weights).partition("#")[0]))])
    return notes
