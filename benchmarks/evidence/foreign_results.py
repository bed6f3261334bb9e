"""A detector that tailfin did not train: torchvision's Faster R-CNN by a plain loop, its results calibrated.

    python benchmarks/evidence/foreign_results.py DATA/road12-masks-lt OUT --epochs 6 --size 128   # again: goes on
    python benchmarks/evidence/foreign_results.py DATA/road12-masks-lt OUT --tables                # the numbers alone

The network is torchvision's `FasterRCNN` on torchvision's `BackboneWithFPN` over timm's EfficientNet-Lite0, which
starts from the ImageNet weights of `tailfin[weights]`; the loop is SGD with a cosine on Pillow pictures, in float32. It
is saved after each epoch. Two results files are written for the validation pictures:

    results.json        as torchvision reports them: after NMS within each class, one score per box
    results.scores.json the same boxes, with the softmax over all classes of the proposal that each is from

and `tailfin.calibrate` chooses each method's strength on one half of the validation pictures (the best of its grid,
also where plain scores are better); AP, AP_r, AP_c and AP_f are of the other half, on which nothing was chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign, batched_nms
from torchvision.ops import boxes as box_ops
from torchvision.transforms.functional import to_tensor

from tailfin import evaluation
from tailfin.calibrate.candidates import METHODS, PLAIN
from tailfin.calibrate.results import calibrate_results
from tailfin.data.document import load_document
from tailfin.data.split import split_train_val
from tailfin.evaluation.groups import TrainCounts
from tailfin.models.timm_body import packaged_state

BODY = "tf_efficientnet_lite0"
NUMBERS = ("AP", "APr", "APc", "APf")


class Body(nn.Module):
    """timm's network as torchvision's pyramid wants it: a dict of the layers with strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model(BODY, features_only=True, out_indices=(2, 3, 4))
        own = packaged_state(f"timm/{BODY}")
        missing = self.network.load_state_dict({k: v for k, v in own.items() if k in self.network.state_dict()}, False)
        assert not missing.missing_keys, missing.missing_keys[:3]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {str(level): value for level, value in enumerate(self.network(x))}


def postprocess(heads: Any, logits: Tensor, deltas: Tensor, proposals: list[Tensor], sizes: Any) -> Any:
    """torchvision's last step, which leaves the scores over all classes of each detection's proposal in `vectors`."""
    counts = [len(own) for own in proposals]
    boxes_of, scores_of = heads.box_coder.decode(deltas, proposals).split(counts), logits.softmax(1).split(counts)
    every = []
    for boxes, scores, size in zip(boxes_of, scores_of, sizes, strict=True):
        boxes = box_ops.clip_boxes_to_image(boxes, size)
        row, label = torch.where(scores[:, 1:] > heads.score_thresh)
        box, score = boxes[row, label + 1], scores[row, label + 1]
        keep = batched_nms(box, score, label, heads.nms_thresh)[: heads.detections_per_img]
        every.append((box[keep], score[keep], label[keep] + 1, scores[row[keep]]))
    heads.vectors = [own[3] for own in every]
    return [own[0] for own in every], [own[1] for own in every], [own[2] for own in every]


def network(classes: int, size: int) -> FasterRCNN:
    body = Body()
    channels = body.network.feature_info.channels()
    backbone = BackboneWithFPN(nn.Identity(), {}, channels, 64)
    backbone.body = body
    backbone.fpn.extra_blocks = None
    sides = tuple((round(size * share),) for share in (0.16, 0.35, 0.65))
    return FasterRCNN(
        backbone, min_size=size, max_size=size,
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 3),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 5, 2), rpn_pre_nms_top_n_train=400,
        rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=64, box_batch_size_per_image=64, box_score_thresh=1e-3, box_detections_per_img=300,
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(64 * 25, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
        box_predictor=Predictor(256, classes + 1),
    )  # fmt: skip


class Predictor(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(width, classes), nn.Linear(width, 4 * classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


def train(model: FasterRCNN, data: Path, options: argparse.Namespace) -> None:
    """A plain loop; goes on after the epochs that are done."""
    document = load_document(data / "train.json")
    label_of = {c["id"]: k + 1 for k, c in enumerate(sorted(document["categories"], key=lambda c: c["id"]))}
    grouped: dict[int, list[dict]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    samples = []
    for image in document["images"]:
        own = [a for a in grouped[image["id"]] if a["bbox"][2] > 0 and a["bbox"][3] > 0]
        if own:
            boxes = np.array([a["bbox"] for a in own], np.float32)
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([label_of[a["category_id"]] for a in own])
            samples.append((data / "train" / image["file_name"], {"boxes": torch.from_numpy(boxes), "labels": labels}))
    steps = -(-len(samples) // options.batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / (steps * options.epochs))),
    )
    first, point = 0, options.out / "torchvision.pt"
    if point.exists():
        state = torch.load(point, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, options.epochs):
        torch.manual_seed(epoch)
        order = random.Random(epoch).sample(range(len(samples)), len(samples))
        for start in range(0, len(order), options.batch):
            chosen = [samples[k] for k in order[start : start + options.batch]]
            pictures = [to_tensor(Image.open(path).convert("RGB")) for path, _ in chosen]
            losses = sum(model.train()(pictures, [dict(target) for _, target in chosen]).values())
            optimizer.zero_grad()
            losses.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "epoch": epoch + 1}, point)  # fmt: skip
        print(f"epoch {epoch + 1}: loss {losses.item():.3f}", flush=True)


@torch.no_grad()
def detect(model: FasterRCNN, data: Path, out: Path) -> None:
    """The two results files of the validation pictures."""
    document = load_document(data / "val.json")
    ids = sorted(category["id"] for category in document["categories"])
    heads = model.eval().roi_heads
    heads.postprocess_detections = lambda *given: postprocess(heads, *given)
    plain, whole = [], []
    for image in document["images"]:
        found = model([to_tensor(Image.open(data / "val" / image["file_name"]).convert("RGB"))])[0]
        for k, (left, top, right, bottom) in enumerate(found["boxes"].tolist()):
            entry = {"image_id": image["id"], "category_id": ids[int(found["labels"][k]) - 1],
                     "bbox": [left, top, right - left, bottom - top], "score": float(found["scores"][k])}  # fmt: skip
            plain.append(entry)
            vector = heads.vectors[0][k]
            whole.append({**entry, "scores": [round(v, 6) for v in [*vector[1:].tolist(), float(vector[0])]]})
    (out / "results.json").write_text(json.dumps(plain))
    (out / "results.scores.json").write_text(json.dumps(whole))


def tables(data: Path, out: Path) -> None:
    """Each method, chosen on one half of the validation pictures, measured on the other."""
    test, tuned = split_train_val(load_document(data / "val.json"), 0.5)
    for name, part in (("test", test), ("tuned", tuned)):
        part["categories"] = load_document(data / "val.json")["categories"]
        (out / f"{name}.json").write_text(json.dumps(part))
    counts = TrainCounts.from_json(data / "train.json")
    print(f"chosen on {len(tuned['images'])} pictures, measured on the other {len(test['images'])}")
    for kind in ("results", "results.scores"):
        entries = json.loads((out / f"{kind}.json").read_text())
        for name, part in (("test", test), ("tuned", tuned)):
            own = {image["id"] for image in part["images"]}
            (out / f"{kind}.{name}.json").write_text(json.dumps([e for e in entries if e["image_id"] in own]))

        def measured(file: Path) -> str:
            numbers = evaluation.evaluate(out / "test.json", file, "lvis", "bbox", train_counts=counts)["bbox"]
            return " | ".join(f"{100 * numbers[number]:.1f}" for number in NUMBERS)

        print(f"| {kind} | none | {measured(out / f'{kind}.test.json')} | |", flush=True)
        for method in METHODS:
            tuning = {"train": data / "train.json", "holdout": out / "tuned.json", "method": method, "overwrite": True}
            choice, found = calibrate_results(out / f"{kind}.tuned.json", out / "tuned.out.json", **tuning)
            own = {label: numbers for label, numbers in choice.tried.items() if label != PLAIN}
            best = max(own, key=lambda label: own[label]["AP"])
            strength = ",".join(part.split()[-1] for part in best.split(" ", 1)[1].split(", "))
            target = out / f"{kind}.{method}.json"
            calibrate_results(out / f"{kind}.test.json", target, train=data / "train.json", method=method,
                              strength=strength, kind=found, overwrite=True)  # fmt: skip
            gain = 100 * (own[best]["AP"] - choice.tried[PLAIN]["AP"])
            print(f"| {kind} | {best} | {measured(target)} | {gain:+.2f} where chosen |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="no training and detection")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    if not options.tables:
        torch.manual_seed(0)
        model = network(len(load_document(options.data / "train.json")["categories"]), options.size)
        train(model, options.data, options)
        detect(model, options.data, options.out)
    tables(options.data, options.out)


if __name__ == "__main__":
    main()
