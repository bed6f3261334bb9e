"""Evaluation: detections on disk, protocol numbers from them, and tables of the numbers."""

from tailfin.evaluation.bootstrap import paired_bootstrap
from tailfin.evaluation.confusion import confusion
from tailfin.evaluation.error_types import error_types
from tailfin.evaluation.groups import TrainCounts
from tailfin.evaluation.pool import ap_pool
from tailfin.evaluation.protocols import IOU_TYPES, PROTOCOLS, evaluate
from tailfin.evaluation.reading import reading
from tailfin.evaluation.results import ResultWriter, merge_shards, segm_results_path
from tailfin.evaluation.table import comparison_table, metrics_table, per_category_table
from tailfin.evaluation.tide import tide

__all__ = [
    "IOU_TYPES",
    "PROTOCOLS",
    "ResultWriter",
    "TrainCounts",
    "ap_pool",
    "comparison_table",
    "confusion",
    "error_types",
    "evaluate",
    "merge_shards",
    "metrics_table",
    "paired_bootstrap",
    "per_category_table",
    "reading",
    "segm_results_path",
    "tide",
]
