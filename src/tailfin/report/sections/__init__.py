"""The sections of the report, one file each, in the order of the page.

A new section is a function `(runs) -> Section | None` in a file here and one line in `SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tailfin.report.page import Section
from tailfin.report.runs import Run
from tailfin.report.sections.classes import class_table
from tailfin.report.sections.classifier import classifier
from tailfin.report.sections.confusion import swallowed
from tailfin.report.sections.costs import costs
from tailfin.report.sections.curves import curves
from tailfin.report.sections.errors import errors
from tailfin.report.sections.examples import examples
from tailfin.report.sections.fed import fed
from tailfin.report.sections.groups import groups
from tailfin.report.sections.labels import labels
from tailfin.report.sections.overview import overview
from tailfin.report.sections.provenance import provenance
from tailfin.report.sections.scatter import scatter
from tailfin.report.sections.scores import scores
from tailfin.report.sections.steps import steps
from tailfin.report.sections.summary import summary
from tailfin.report.sections.views import pretraining

SECTIONS: tuple[Callable[[Sequence[Run]], Section | None], ...] = (
    overview,
    summary,
    groups,
    scatter,
    class_table,
    errors,
    costs,
    swallowed,
    scores,
    classifier,
    curves,
    fed,
    examples,
    labels,
    pretraining,
    steps,
    provenance,
)
