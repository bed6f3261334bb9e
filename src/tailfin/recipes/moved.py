"""Names of recipes as they were before files had variants, and where each recipe is now; they go on for one version."""

from __future__ import annotations

_FOD_LOSSES = ("eql", "eqlv2", "efl", "eqfl", "droploss", "seesaw", "ecm", "pcb", "rog", "ldam")
_LVIS_LOSSES = ("sigmoid", "objectness", "eql", "eqlv2", "droploss", "seesaw", "ecm", "pcb", "rog")
_LVIS_PARTS = ("tde", "forest_rcnn", "balms", "fasa", "rio")
_TWO_STAGES = ("bags", "acsl", "loce", "disalign", "simcal")

MOVED: dict[str, str] = {
    **{f"fod/{loss}_r18": f"fod/losses:{loss}" for loss in (*_FOD_LOSSES, "logit_adjusted", "class_balanced")},
    **{f"fod/faster_rcnn_r18_{loss}": f"fod/losses:{loss}" for loss in ("sigmoid", "objectness", "focal")},
    **{f"fod/{classifier}_r18": f"fod/classifiers:{classifier}" for classifier in ("tde", "forest")},
    "fod/pcb_iterative_r18": "fod/classifiers:pcb",
    **{f"fod/{feature}_r18": f"fod/features:{feature}" for feature in ("balms", "fasa", "rio")},
    **{f"fod/{method}_r18": f"fod/decoupled:{method}" for method in _TWO_STAGES},
    "fod/drcl_bacl_r18": "fod/drcl_r18:bacl",
    "fod/head_tail_both_r18": "fod/stepwise_faster_rcnn_r18:head_tail_both",
    "lvis_v1/faster_rcnn_r50_drcl": "lvis_v1/faster_rcnn_r50:drcl",
    "lvis_v0.5/faster_rcnn_r50_balms_decoupled": "lvis_v0.5/faster_rcnn_r50_decoupled:balms",
    "lvis_v0.5/faster_rcnn_r50_bacl_end_to_end": "lvis_v0.5/faster_rcnn_r50:bacl_end_to_end",
    "coco_lt/faster_rcnn_r50_softmax": "coco_lt/faster_rcnn_r50",
    **{f"coco_lt/faster_rcnn_r50_{name}": f"coco_lt/faster_rcnn_r50:{name}" for name in ("eqlv2", "seesaw", "drcl")},
}
for _data in ("lvis_v1", "lvis_v0.5"):
    _old, _new = f"{_data}/faster_rcnn_r50_", f"{_data}/faster_rcnn_r50"
    MOVED |= {f"{_old}softmax": _new}
    MOVED |= {f"{_old}{method}": f"{_new}:{method}" for method in (*_LVIS_LOSSES, *_LVIS_PARTS)}
    MOVED |= {f"{_old}{method}": f"{_new}_decoupled:{method}" for method in _TWO_STAGES}
    MOVED |= {
        f"{_data}/deformable_detr_r50_focal": f"{_data}/deformable_detr_r50",
        f"{_data}/deformable_detr_r50_stepwise": f"{_data}/deformable_detr_r50:stepwise",
    }
