"""Are tailfin's Mask R-CNN and RetinaNet as fast and as small as torchvision's, in training and in inference?

    python benchmarks/detector_speed.py                          # R50-FPN, 2 pictures of 320 px, 1,203 classes, CPU
    python benchmarks/detector_speed.py --detectors retinanet --size 480 --rounds 9
    python benchmarks/detector_speed.py --skip-training --skip-memory
    python benchmarks/detector_speed.py --short                  # 1 picture of 160 px

The peers are `maskrcnn_resnet50_fpn` and `retinanet_resnet50_fpn` of the installed torchvision, built by torchvision's
own functions, with their settings (anchors, samplers, losses, weights) carried over to tailfin's recipe; pictures keep
their size on both sides. Steps, turns and memory are those of `training_speed.py`: CPU seconds, ratios are medians over
the rounds. Targets: a training step at 1.05 of torchvision's images per second, inference at 3 times, at most its
memory.

In inference both report up to 300 detections of scores above 1e-4, as LVIS is measured, with logits spread like those
of a trained classifier. Masks stay 28 x 28 on both sides: pasting them is not the detector's work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import training_speed
from rich.console import Console
from rich.table import Table
from short_form import short, table_lines
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from training_speed import NAMES, Step, Targets, speed_row, tailfin_step, torchvision_step

from tailfin.config import check_recipe
from tailfin.models import build_detector
from tailfin.models.convert_torchvision import convert_mask_rcnn, convert_retinanet
from tailfin.models.detector import Detector
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

# torchvision's settings where they are not tailfin's defaults
SETTINGS = {
    "mask_rcnn": {
        "rpn_post_nms": [2000, 1000],
        "box_loss": "smooth_l1",
        "mask_targets": "torchvision",
    },
    "retinanet": {
        "fpn_convs": "pyramid",
        "anchor_style": "torchvision",
        "low_quality": "keep_owner",
        "normalizer": "picture",
    },
}
SCORE, MOST = 1e-4, 300
SPREAD = 3.0  # of a trained classifier's logits over the classes
LEVEL = -8.0  # mean logit of a trained dense classifier: a score of 3e-4


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.memory:
        pair = training_pair(options.detectors[0], options)
        print(json.dumps(training_speed.peak_memory_of(pair[NAMES.index(options.memory)], options)))
        return
    table = Table(
        title=f"R50-FPN, {options.batch} pictures of {options.size} px, {options.classes:,} classes, float32, "
        f"{options.threads} threads, torch {torch.__version__}, {options.rounds} rounds, CPU seconds"
    )
    for name in ("", "tailfin", "torchvision", "ratio", "over the rounds", "target"):
        table.add_column(name, justify="left" if name == "" else "right")
    done = Console(stderr=True)
    for name in options.detectors:
        if not options.skip_training:
            speed_row(table, f"{name}, training, images/s", options, training_pair(name, options), "at least 1.05")
            done.print(list(column._cells[-1] for column in table.columns))
        if not options.skip_inference:
            speed_row(table, f"{name}, inference, images/s", options, inference_pair(name, options), "at least 3")
            done.print(list(column._cells[-1] for column in table.columns))
        if not options.skip_memory:
            training_speed.memory_row(table, options, __file__, ["--detectors", name], f"{name}, ", "at most 1.0")
            done.print(list(column._cells[-1] for column in table.columns))
    Console(width=130).print(table)
    if options.short:
        what = f"R50, {options.batch} x {options.size} px, {options.classes:,} classes, float32: "
        table_lines(table, what, spread=4, who="torchvision")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="*", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--size", type=int, default=320, help="side of the pictures in pixels")
    parser.add_argument("--batch", type=int, default=2, help="pictures per step")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--skip-inference", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory", choices=NAMES, help=argparse.SUPPRESS)
    short(parser, size=160, batch=1, rounds=2)
    options = parser.parse_args()
    # what the functions of training_speed.py ask for
    options.device, options.precision, options.channels_last, options.steps, options.cpu_time = (
        "cpu",
        "no",
        False,
        1,
        True,
    )
    return options


# ---- the two detectors -----------------------------------------------------------------------------------------------


def pair_of(name: str, options: argparse.Namespace) -> tuple[Detector, nn.Module, list[Tensor], Targets]:
    """tailfin's and torchvision's detector with equal weights, pictures and targets."""
    make: Callable[..., nn.Module] = {"mask_rcnn": maskrcnn_resnet50_fpn, "retinanet": retinanet_resnet50_fpn}[name]
    limits = {"box_score_thresh": SCORE, "box_detections_per_img": MOST}
    if name == "retinanet":
        limits = {"score_thresh": SCORE, "detections_per_img": MOST}
    background = 1 if name == "mask_rcnn" else 0
    torch.manual_seed(0)
    twin = make(weights=None, weights_backbone=None, num_classes=options.classes + background, **limits)
    twin.transform = _KeepSize(1, 1, twin.transform.image_mean, twin.transform.image_std)
    recipe = recipe_of(name)
    counts = [100] * options.classes
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=100 * options.classes)
    model, _ = build_detector(recipe, stats, start=False)
    if name == "mask_rcnn":
        state = convert_mask_rcnn(twin.state_dict())
    else:
        state = convert_retinanet(twin.state_dict())
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [key for key in missing if "loss" not in key], missing
    return model, twin, *workload(options)


def recipe_of(name: str) -> Recipe:
    return check_recipe(
        {
            "weights": "none",
            "backbone": "resnet50",
            "detector": {"name": name, "norm": "bn", "frozen_layers": 0, **SETTINGS[name]},
            "loss": "softmax" if name == "mask_rcnn" else "focal",
            "evaluation": {"max_dets": MOST, "score_threshold": SCORE},
        },
        "benchmark",
    )


def workload(options: argparse.Namespace) -> tuple[list[Tensor], Targets]:
    """Seeded pictures, six boxes in each, and an ellipse in each box as its mask."""
    given = argparse.Namespace(**{**vars(options), "r50": True})
    _, pictures, targets = training_speed.workload(given)
    pixel = torch.arange(options.size) + 0.5
    for target in targets:
        boxes = target["boxes"]
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        across, down = (pixel - centre[:, :1]) / half[:, :1], (pixel - centre[:, 1:]) / half[:, 1:]
        target["masks"] = (down[:, :, None] ** 2 + across[:, None] ** 2 <= 1).to(torch.uint8)
    return pictures, targets


class _KeepSize(GeneralizedRCNNTransform):
    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def postprocess(self, result: Targets, image_shapes: object, original_image_sizes: object) -> Targets:
        return result


# ---- steps -----------------------------------------------------------------------------------------------------------


def training_pair(name: str, options: argparse.Namespace) -> tuple[Step, Step]:
    model, twin, pictures, targets = pair_of(name, options)
    if name == "retinanet":  # its classes count from 0
        targets = [{key: value for key, value in target.items() if key != "masks"} for target in targets]
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
    else:
        shifted = targets
    ours = tailfin_step(model.train(), pictures, targets, options)
    return ours, torchvision_step(twin.train(), pictures, shifted, options)


def inference_pair(name: str, options: argparse.Namespace) -> tuple[Step, Step]:
    """Both detectors with the norms of the pictures and logits spread as a trained classifier's."""
    model, twin, pictures, _ = pair_of(name, options)
    settle(name, twin, pictures)
    if name == "mask_rcnn":
        state = convert_mask_rcnn(twin.state_dict())
    else:
        state = convert_retinanet(twin.state_dict())
    model.load_state_dict(state, strict=False)
    model.eval()

    def step(chosen: nn.Module) -> Step:
        def run() -> object:
            with torch.no_grad():
                return chosen(pictures)

        return run

    check_equal(step(model)(), step(twin)(), shift=1 if name == "mask_rcnn" else 0)
    return step(model), step(twin)


@torch.no_grad()
def settle(name: str, twin: nn.Module, pictures: list[Tensor]) -> None:
    images, _ = twin.transform(pictures)
    for _ in range(20):
        twin.train().backbone(images.tensors)
    twin.eval()
    features = twin.backbone(images.tensors)
    if name == "retinanet":
        head = twin.head
        found = head(list(features.values()))
        head.classification_head.cls_logits.weight.mul_(SPREAD / found["cls_logits"].std())
        head.classification_head.cls_logits.bias.fill_(LEVEL)
        head.regression_head.bbox_reg.weight.mul_(training_speed.DELTA_SPREAD / found["bbox_regression"].std())
        return
    heads = twin.roi_heads
    _, deltas = twin.rpn.head(list(features.values()))
    twin.rpn.head.bbox_pred.weight.mul_(training_speed.DELTA_SPREAD / torch.cat([d.flatten() for d in deltas]).std())
    proposals, _ = twin.rpn(images, features)
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes)))
    heads.box_predictor.cls_score.weight.mul_(SPREAD / logits.std(dim=1).mean())
    heads.box_predictor.bbox_pred.weight.mul_(training_speed.DELTA_SPREAD / deltas.std())


def check_equal(ours: Targets, theirs: Targets, shift: int) -> None:
    """The two report the same, so that they are compared on equal work."""
    for own, other in zip(ours, theirs, strict=True):
        assert len(own["scores"]) == len(other["scores"]) > 0, (len(own["scores"]), len(other["scores"]))
        torch.testing.assert_close(own["scores"], other["scores"], rtol=1e-3, atol=1e-5)
        same = (own["labels"] + shift == other["labels"]).float().mean()
        assert same > 0.98, f"{same:.3f} of the labels agree"


if __name__ == "__main__":
    main()
