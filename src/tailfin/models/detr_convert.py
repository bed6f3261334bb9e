"""Released Deformable DETR checkpoints in tailfin's names.

The released code of Deformable DETR, and of the work built on it, keeps the transformer under `transformer.`, the
ResNet under `backbone.0.body.` and the heads at the top; self-attention is one matrix for queries, keys and values.
Left out are the copies of the heads inside the decoder and what torchvision counts batches with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# part of a released name -> part of ours, applied in this order
RENAMED = (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^transformer\.encoder\.layers\.(\d+)\.norm1\.", r"encoder.\1.self_attn_layer_norm."),
    (r"^transformer\.encoder\.layers\.(\d+)\.norm2\.", r"encoder.\1.final_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm1\.", r"decoder.\1.encoder_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm2\.", r"decoder.\1.self_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm3\.", r"decoder.\1.final_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"decoder.\1.encoder_attn."),
    (r"^transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"decoder.\1.self_attn.o_proj."),
    (r"^transformer\.(encoder|decoder)\.layers\.(\d+)\.linear([12])\.", r"\1.\2.mlp.fc\3."),
    (r"^transformer\.(encoder|decoder)\.layers\.(\d+)\.", r"\1.\2."),
    (r"^transformer\.", ""),
)
# copies that the released modules share, and counters of batch norm, which frozen norms have no use for
LEFT_OUT = re.compile(r"^transformer\.decoder\.(class_embed|bbox_embed)\.|num_batches_tracked$")
PACKED = re.compile(r"^transformer\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$")
# COCO's 80 categories among the ids 1..90, by which the released COCO heads are indexed
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a whole detector by the released names."""
    return any(key.startswith("transformer.encoder.layers.") for key in state)


def convert_released(state: Mapping[str, Tensor], num_logits: int | None = None) -> dict[str, Tensor]:
    """A released state dict by tailfin's names.

    The class heads are indexed by category id there and by class here. Given `num_logits` they are cut to it where it
    is clear how: ids 1..C without gaps, or COCO's. The encoder's head becomes the one logit that ranks proposals.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if LEFT_OUT.search(key):
            continue
        if packed := PACKED.match(key):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                converted[f"decoder.{packed[1]}.self_attn.{name}_proj.{packed[2]}"] = part.clone()
            continue
        for pattern, ours in RENAMED:
            key = re.sub(pattern, ours, key)
        converted[key] = value
    return _class_heads(converted, num_logits)


def _class_heads(state: dict[str, Tensor], num_logits: int | None) -> dict[str, Tensor]:
    layers = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("decoder.")), default=-1)
    shared = f"bbox_embed.{layers - 1}.layers.0.weight"
    one_stage_shared = (
        "query_embed.weight" in state and layers > 1 and _same(state, "bbox_embed.0.layers.0.weight", shared)
    )
    result = {}
    for key, value in state.items():
        if key.startswith(("class_embed.", "bbox_embed.")):
            number = int(key.split(".")[1])
            if one_stage_shared and number:
                continue  # without refinement every layer has the same head
            if key.startswith("class_embed."):
                value = value[:1].clone() if number == layers else _cut(value, num_logits)
        result[key] = value
    return result


def _same(state: Mapping[str, Tensor], first: str, second: str) -> bool:
    return first in state and second in state and bool((state[first] == state[second]).all())


def _cut(rows: Tensor, num_logits: int | None) -> Tensor:
    if num_logits is None or len(rows) == num_logits:
        return rows
    if len(rows) == num_logits + 1:
        return rows[1:].clone()
    if len(rows) == 91 and num_logits == 80:
        return rows[[i for i in range(1, 91) if i not in COCO_GAPS]].clone()
    return rows
