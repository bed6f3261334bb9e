"""Labels worth a look: confident detections without an annotation, or on one of another class, and annotations that no
run finds, ranked over all runs of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tailfin.errors import UserError
from tailfin.evaluation.doubts import Case, Doubts, ranked
from tailfin.report.crops import Pictures
from tailfin.report.draw import Color
from tailfin.report.evaluated import looks
from tailfin.report.page import Section, count, render
from tailfin.report.runs import Run

LIMIT = 200  # cases of a kind in the file
_SHOWN = 18
_COLORS: dict[str, Color] = {"unlabelled": (255, 122, 50), "other class": (255, 64, 150), "unfound": (47, 125, 225)}
_TITLES = {
    "unlabelled": "Detections on nothing",
    "other class": "Annotated as another class",
    "unfound": "Annotations that no run finds",
}


def labels(runs: Sequence[Run]) -> Section | None:
    """Strips of pictures and the list as a COCO file to save; None without detections or cases."""
    found, used = _doubts(runs)
    if found is None or not any(found.cases.values()):
        return None
    notes: list[str] = []
    html = render(
        "labels.html",
        strips=[
            {
                "title": _TITLES[kind],
                "number": count(len(cases)),
                "shown": _panels(used[0], found, cases[:_SHOWN], notes),
                "rest": max(0, len(cases) - _SHOWN),
            }
            for kind, cases in found.cases.items()
            if cases
        ],
        notes=list(dict.fromkeys(notes))[:1],
        runs=len(used),
        document=found.coco(),
    )
    return Section("Labels worth a look", html)


def labels_document(runs: Sequence[Run]) -> dict[str, Any]:
    """The cases as a COCO document; runs without detections are a `UserError`."""
    found, _ = _doubts(runs)
    if found is None:
        raise UserError("no run has detections on a file that is still there: no labels to look at")
    return found.coco()


# ---- details ---------------------------------------------------------------------------------------------------------


def _doubts(runs: Sequence[Run]) -> tuple[Doubts | None, list[Run]]:
    """Over the runs that were measured on the file of the first one."""
    seen, _ = looks(runs)
    if not seen:
        return None, []
    truth = seen[0][1].truth
    same = [
        (number, own)
        for number, own in seen
        if np.array_equal(own.truth.annotation_ids, truth.annotation_ids)
        and np.array_equal(own.truth.image_ids, truth.image_ids)
        and np.array_equal(own.truth.category_ids, truth.category_ids)
    ]
    return ranked(truth, [own.doubt for _, own in same], limit=LIMIT), [runs[number] for number, _ in same]


def _panels(run: Run, found: Doubts, cases: Sequence[Case], notes: list[str]) -> list[dict[str, str]]:
    names = {category.id: category.name or str(category.id) for category in found.truth.categories}
    panels = []
    for case in cases:
        text = _caption(case, names)
        place = int(np.searchsorted(found.truth.image_ids, case.image_id))
        image = ""
        if not notes:
            try:
                pictures = Pictures.of(run, found.truth)
                image = pictures.cut_out(place, case.box, _COLORS[case.kind], dashed=case.kind == "unfound")
            except UserError as error:
                notes.append(f"The pictures cannot be read: {error}")
        panels.append({"image": image, "file": found.truth.image_names[place] or f"image {case.image_id}", **text})
    return panels


def _caption(case: Case, names: dict[int, str]) -> dict[str, str]:
    own = names[case.category_id]
    said = f"{case.runs} runs" if case.runs > 1 else "1 run"
    if case.kind == "unlabelled":
        return {"title": own, "note": f"{case.score:.2f}, {said}"}
    if case.kind == "other class":
        return {"title": own, "note": f"{case.score:.2f}, {said}; annotated: {names[case.annotated_as]}"}
    return {"title": own, "note": f"{100 * case.score:.0f} % of the class are found"}
