"""Released Deformable DETR checkpoints in tailfin's names: the released code's, and those of transformers.

    released = convert_released(state, stats.names, stats.category_ids, "FILE")     # the released code's, .pth
    released = convert_transformers(state, stats.names, classes, "FILE")            # transformers', .safetensors
    lines = load_weights(model, released.state, "FILE", stats.names, old=released.names)

The released code of Deformable DETR, and of the work built on it, keeps the transformer under `transformer.`, the
ResNet under `backbone.0.body.` and the heads at the top; self-attention is one matrix for queries, keys and values.
transformers (`DeformableDetrForObjectDetection`, the files of its hub) keeps everything under `model.`, the backbone by
timm's or its own names, the heads at the top or in the decoder. Copies of the heads and what batch norm counts with are
left out.

Class heads. The released ones are indexed by category id and carry no names: 91 rows are COCO's, whose rows go by name;
others go by the training file's ids where the largest of them is the last row, and are refused where the number of rows
is that of the classes or one more and the ids say otherwise, as rows would be shifted by one. transformers' rows have
the names of its configuration. Rows of classes that the training file lacks are left, those that it has and the
checkpoint lacks start anew; a checkpoint without any class of the training file starts all of its class rows anew. The
encoder's head, whose first row ranks proposals there, has that row last here.

    released = convert_hub(state, stats.names, classes, "FILE")              # D-FINE, RT-DETR v2, RF-DETR

Their names are transformers' already, under `network.` and `backbone.body.network.`; 80 rows are COCO's classes in
their order, 91 those by category id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from tailfin.errors import UserError
from tailfin.models.released import Released

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
# the same of transformers' names, of this and of earlier versions
HUB_BODY = r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?"
HUB_RENAMED = (
    (HUB_BODY + r"embedder\.embedder\.convolution\.", "backbone.body.conv1."),
    (HUB_BODY + r"embedder\.embedder\.normalization\.", "backbone.body.bn1."),
    (HUB_BODY + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.", r"stage.\1.\2.downsample.0."),
    (HUB_BODY + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.", r"stage.\1.\2.downsample.1."),
    (HUB_BODY + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.", r"stage.\1.\2.conv.\3."),
    (HUB_BODY + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.", r"stage.\1.\2.bn.\3."),
    (HUB_BODY, "backbone.body."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.(encoder|decoder)\.layers\.(\d+)\.fc([12])\.", r"\1.\2.mlp.fc\3."),
    (r"^model\.(encoder|decoder)\.layers\.(\d+)\.self_attn\.out_proj\.", r"\1.\2.self_attn.o_proj."),
    (r"^model\.(encoder|decoder)\.layers\.(\d+)\.", r"\1.\2."),
    (r"^model\.decoder\.(class_embed|bbox_embed)\.", r"\1."),
    (r"^model\.", ""),
)
STAGE = re.compile(r"^stage\.(\d+)\.(\d+)\.(?:(downsample\.\d)|(conv|bn)\.(\d+))\.")  # counted from 0; ours from 1
# copies that the released modules share, and counters of batch norm, which frozen norms have no use for
LEFT_OUT = re.compile(r"^transformer\.decoder\.(class_embed|bbox_embed)\.|num_batches_tracked$")
PACKED = re.compile(r"^transformer\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$")
COCO_ROWS = 91  # category ids 0..90, of which 80 are classes
HUB_NETWORK = (
    (r"^model\.backbone\.model\.", "backbone.body.network."),
    (r"^model\.backbone\.backbone\.", "backbone.body.network."),
    (r"^model\.", "network."),
    (r"^(class_embed|bbox_embed)\.", r"network.\1."),
)
HUB_HEADS = re.compile(r"(^|\.)(class_embed|enc_score_head|enc_out_class_embed|denoising_class_embed)\.")
NOISY = "denoising_class_embed."  # one more row, of no class


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a whole detector by the released names."""
    return any(key.startswith("transformer.encoder.layers.") for key in state)


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of transformers' Deformable DETR."""
    return any(re.match(r"model\.encoder\.layers\.\d+\.self_attn\.sampling_offsets\.", key) for key in state)


def convert_released(
    state: Mapping[str, Tensor], names: Sequence[str], category_ids: Sequence[int], source: str = "weights"
) -> Released:
    """A state dict of the released code.

    Args:
        names, category_ids: of the training file's classes, in label order.

    Raises:
        UserError: rows of a class head that cannot be told, see the top of the file.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if LEFT_OUT.search(key):
            continue
        if packed := PACKED.match(key):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                converted[f"decoder.{packed[1]}.self_attn.{name}_proj.{packed[2]}"] = part.clone()
            continue
        converted[_renamed(key, RENAMED)] = value
    rows, found, notes = _released_rows(_class_rows(converted), names, category_ids, source)
    return Released(_with_heads(converted, rows), found, notes)


def convert_transformers(
    state: Mapping[str, Tensor], names: Sequence[str], labels: Sequence[str] | None = None, source: str = "weights"
) -> Released:
    """A state dict of transformers' `DeformableDetrForObjectDetection`, as it is in memory or as it is saved.

    Args:
        names: of the training file's classes, in label order.
        labels: names of the checkpoint's classes (`id2label` of its config.json); without any, 91 rows are COCO's.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if LEFT_OUT.search(key):
            continue
        converted[_renamed(key, HUB_RENAMED)] = value
    converted |= _tied(converted)
    count = _class_rows(converted)
    if labels is not None and len(labels) != count:
        raise UserError(f"{source}: its class heads have {count} rows, its configuration has {len(labels)} classes")
    if labels is not None and not all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        rows, found = _named(labels, names)
        return Released(_with_heads(converted, rows), found)
    if count == COCO_ROWS:
        rows, found = _named(coco_names(), names)
        return Released(
            _with_heads(converted, rows), found, (f"{source}: its {count} class rows are taken for COCO's",)
        )
    if count == len(names):
        note = f"{source}: it names no classes; its {count} class rows are taken in their order"
        return Released(_with_heads(converted, list(range(count))), list(names), (note,))
    if count == len(names) + 1:
        raise UserError(
            f"{source}: its class heads have {count} rows and no names, the training file {len(names)} classes: which "
            "row is whose cannot be told (a config.json with id2label beside the file names them)"
        )
    return Released(_with_heads(converted, []), [], (f"{source}: it names none of its {count} classes",))


def is_hub(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of transformers' D-FINE, RT-DETR v2 or RF-DETR, by the names of its present version."""
    return any(re.match(r"model\.(enc_score_head|enc_out_class_embed\.0)\.weight$", key) for key in state)


def hub_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of these by tailfin's names; heads of RT-DETR and D-FINE are there twice, the decoder's are taken."""
    twice = any(key.startswith("model.decoder.class_embed.") for key in state)
    converted = {}
    for key, value in state.items():
        if twice and key.startswith(("class_embed.", "bbox_embed.")):
            continue
        if key.startswith("model.backbone.") and key.endswith("num_batches_tracked"):
            continue
        name = key
        for pattern, ours in HUB_NETWORK:
            name, found = re.subn(pattern, ours, name)
            if found:
                break
        converted[name] = value
    return converted


def convert_hub(
    state: Mapping[str, Tensor], names: Sequence[str], labels: Sequence[str] | None = None, source: str = "weights"
) -> Released:
    """A state dict of transformers' D-FINE, RT-DETR v2 or RF-DETR; arguments as of `convert_transformers`."""
    converted = hub_state(state)
    heads = [key for key in converted if HUB_HEADS.search(key)]
    count = next(len(converted[key]) for key in heads if NOISY not in key)
    if labels is not None and len(labels) != count:
        raise UserError(f"{source}: its class heads have {count} rows, its configuration has {len(labels)} classes")
    coco = [name for name in coco_names() if name != "N/A"]
    note: tuple[str, ...] = ()
    if labels is not None and not all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        # older spellings of some of COCO's names ("tvmonitor", "sofa") stand where COCO has its own
        same = count == len(coco) and sum(a == b for a, b in zip(labels, coco, strict=True)) > count / 2
        rows, found = _named(coco if same else labels, names)
    elif count in (len(coco), COCO_ROWS):
        rows, found = _named(coco if count == len(coco) else coco_names(), names)
        note = (f"{source}: its {count} class rows are taken for COCO's",)
    elif count == len(names):
        rows, found = list(range(count)), list(names)
        note = (f"{source}: it names no classes; its {count} class rows are taken in their order",)
    else:
        rows, found, note = [], [], (f"{source}: it names none of its {count} classes",)
    for key in heads:
        kept = [*rows, count] if NOISY in key else rows
        converted[key] = converted[key][torch.tensor(kept, dtype=torch.int64)]
    return Released(converted, found, note)


def coco_names() -> list[str]:
    """COCO's classes by category id 0..90; ids of no class are "N/A"."""
    first, *others = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ["N/A", *others]


# ---- details ---------------------------------------------------------------------------------------------------------


def _renamed(key: str, patterns: Sequence[tuple[str, str]]) -> str:
    for pattern, ours in patterns:
        key = re.sub(pattern, ours, key)
    if stage := STAGE.match(key):
        inner = stage[3] or f"{stage[4]}{int(stage[5]) + 1}"
        key = f"backbone.body.layer{int(stage[1]) + 1}.{stage[2]}.{inner}.{key[stage.end() :]}"
    return key


def _tied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads of later layers that a file of transformers leaves out, since they are the first one's there."""
    numbers = {int(key.split(".")[1]) for key in state if key.startswith("bbox_embed.")}
    alone = "class_embed.0.weight" in state and "class_embed.1.weight" not in state
    if not alone or len(numbers) < 2:
        return {}
    return {f"class_embed.{n}.{kind}": state[f"class_embed.0.{kind}"] for n in numbers for kind in ("weight", "bias")}


def _class_rows(state: Mapping[str, Tensor]) -> int:
    return next((len(value) for key, value in state.items() if re.fullmatch(r"class_embed\.\d+\.bias", key)), 0)


def _released_rows(
    count: int, names: Sequence[str], category_ids: Sequence[int], source: str
) -> tuple[list[int], list[str], tuple[str, ...]]:
    """Rows of the released class heads, the classes that they are of, and a line about it."""
    ids = [int(number) for number in category_ids]
    if count == COCO_ROWS:
        return *_named(coco_names(), names), (f"{source}: its {count} class rows are COCO's, by category id",)
    if ids and min(ids) >= 0 and max(ids) + 1 == count:
        return ids, list(names), (f"{source}: it names no classes; its {count} class rows go by category id",)
    if count in (len(names), len(names) + 1):
        raise UserError(
            f"{source}: its class heads have {count} rows by category id and no names; the training file has "
            f"{len(names)} classes with the ids {min(ids)} to {max(ids)}, which would need {max(ids) + 1} rows: its "
            "rows would go to other classes"
        )
    return [], [], (f"{source}: its {count} class rows, by category id, are of other classes than the training file's",)


def _named(labels: Sequence[str], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Rows that have a name, and the names, spelt as the training file does where only the case differs."""
    spelling = {name.lower(): name for name in names}
    known = [(row, label) for row, label in enumerate(labels) if label.lower() not in ("n/a", "__background__", "")]
    return [row for row, _ in known], [spelling.get(label.lower(), label) for _, label in known]


def _with_heads(state: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """The state with class heads of these rows; the encoder's head has them too and its first row behind them."""
    layers = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("decoder.")), default=-1)
    last = f"bbox_embed.{layers - 1}.layers.0.weight"
    shared = "query_embed.weight" in state and layers > 1 and _same(state, "bbox_embed.0.layers.0.weight", last)
    result = {}
    for key, value in state.items():
        if key.startswith(("class_embed.", "bbox_embed.")):
            number = int(key.split(".")[1])
            if shared and number:
                continue  # without refinement every layer has the same head
            if key.startswith("class_embed."):
                kept = [*rows, 0] if number == layers else list(rows)
                value = value[torch.tensor(kept, dtype=torch.int64)]
        result[key] = value
    return result


def _same(state: Mapping[str, Tensor], first: str, second: str) -> bool:
    return first in state and second in state and bool((state[first] == state[second]).all())
