"""Reports: numbers and predictions of runs as one HTML file, and boxes drawn on pictures.

The names below load on first use: drawing a box needs no chart library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["build_report", "class_color", "draw_detections", "serve", "write_labels", "write_report"]

if TYPE_CHECKING:
    from tailfin.report.build import build_report, write_labels, write_report
    from tailfin.report.draw import class_color, draw_detections
    from tailfin.report.live import serve

_HOMES = {
    "build_report": "build",
    "class_color": "draw",
    "draw_detections": "draw",
    "serve": "live",
    "write_labels": "build",
    "write_report": "build",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
