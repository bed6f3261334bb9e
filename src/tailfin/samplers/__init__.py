"""Which image, how often, in which order; and which proposals (`ResamplingRPN`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tailfin.samplers.class_aware import class_aware_order
from tailfin.samplers.plan import BatchPlan
from tailfin.samplers.repeat_factor import category_factors, image_factors, repeat_factors, round_factors

if TYPE_CHECKING:
    from tailfin.samplers.nms_resampling import ResamplingRPN

__all__ = [
    "BatchPlan",
    "ResamplingRPN",
    "category_factors",
    "class_aware_order",
    "image_factors",
    "repeat_factors",
    "round_factors",
]


def __getattr__(name: str) -> Any:
    if name == "ResamplingRPN":  # torchvision takes a second to import
        from tailfin.samplers.nms_resampling import ResamplingRPN

        return ResamplingRPN
    raise AttributeError(f"module 'tailfin.samplers' has no attribute '{name}'")
