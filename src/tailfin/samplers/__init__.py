"""Which image, how often, in which order; and which proposals (`nms_resampling.py`)."""

from __future__ import annotations

from tailfin.samplers.class_aware import class_aware_order
from tailfin.samplers.plan import BatchPlan
from tailfin.samplers.repeat_factor import category_factors, image_factors, repeat_factors, round_factors

__all__ = [
    "BatchPlan",
    "category_factors",
    "class_aware_order",
    "image_factors",
    "repeat_factors",
    "round_factors",
]
