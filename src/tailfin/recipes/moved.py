"""Names of recipes as they were before files had variants, and where each recipe is now; they go on for one version."""

from __future__ import annotations

_LOSSES = ("eql", "eqlv2", "efl", "eqfl", "droploss", "seesaw", "ecm", "pcb", "rog", "ldam")
_TWO_STAGES = ("bags", "acsl", "loce", "disalign", "simcal")
_ONE_STAGE = ("sigmoid", "objectness", "eql", "eqlv2", "droploss", "seesaw", "ecm", "pcb", "rog", "balms", "fasa", "rio")

MOVED: dict[str, str] = {
    **{f"fod/{loss}_r18": f"fod/losses:{loss}" for loss in (*_LOSSES, "logit_adjusted", "class_balanced")},
    **{f"fod/faster_rcnn_r18_{loss}": f"fod/losses:{loss}" for loss in ("sigmoid", "objectness", "focal")},
    **{f"fod/{classifier}_r18": f"fod/classifiers:{classifier}" for classifier in ("tde", "forest")},
    "fod/pcb_iterative_r18": "fod/classifiers:pcb",
    **{f"fod/{feature}_r18": f"fod/features:{feature}" for feature in ("balms", "fasa", "rio")},
    **{f"fod/{method}_r18": f"fod/decoupled:{method}" for method in _TWO_STAGES},
    "fod/drcl_bacl_r18": "fod/drcl_r18:bacl",
    "fod/head_tail_both_r18": "fod/stepwise_faster_rcnn_r18:head_tail_both",
    **{
        f"{data}/faster_rcnn_r50_{method}": f"{data}/faster_rcnn_r50:{method}"
        for data in ("lvis_v1", "lvis_v0.5")
        for method in (*_ONE_STAGE, "tde", "forest_rcnn")
    },
    **{
        f"{data}/faster_rcnn_r50_{method}": f"{data}/faster_rcnn_r50_decoupled:{method}"
        for data in ("lvis_v1", "lvis_v0.5")
        for method in _TWO_STAGES
    },
    "lvis_v0.5/faster_rcnn_r50_balms_decoupled": "lvis_v0.5/faster_rcnn_r50_decoupled:balms",
    "lvis_v0.5/faster_rcnn_r50_bacl_end_to_end": "lvis_v0.5/faster_rcnn_r50:bacl_end_to_end",
    "lvis_v1/faster_rcnn_r50_drcl": "lvis_v1/faster_rcnn_r50:drcl",
    **{f"coco_lt/faster_rcnn_r50_{method}": f"coco_lt/faster_rcnn_r50:{method}" for method in ("eqlv2", "seesaw", "drcl")},
    **{f"{data}/faster_rcnn_r50_softmax": f"{data}/faster_rcnn_r50" for data in ("lvis_v1", "lvis_v0.5", "coco_lt")},
    **{f"{data}/deformable_detr_r50_focal": f"{data}/deformable_detr_r50" for data in ("lvis_v1", "lvis_v0.5")},
    **{
        f"{data}/deformable_detr_r50_stepwise": f"{data}/deformable_detr_r50:stepwise"
        for data in ("lvis_v1", "lvis_v0.5")
    },
}
