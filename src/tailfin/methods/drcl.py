"""A pre-training stage before any method: 2DRCL and the pre-trainings that it is compared with (`pretraining.preset`).

Duan et al., "Long-Tailed Object Detection Pre-training: Dynamic Rebalancing Contrastive Learning with Dual
Reconstruction" (NeurIPS 2024):

    3.1  holistic and local contrast        pretraining/contrast.py, momentum.py
    3.2  dynamic rebalancing                samplers/repeat_factor.py, rebuilt each epoch by the plan
    3.3  dual reconstruction                pretraining/reconstruction.py
    eq. 8 and the order of one iteration    pretraining/shell.py

`start(run)` is what a method begins with instead of `run.detector()`: where the recipe has a section `pretraining`, it
is stage 1 of the run, and the detector that it returns has backbone, pyramid, RPN and shared layers of that stage and
a new classifier and box layer. RUN/pretrained.safetensors holds the same for other recipes (`weights: FILE`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from tailfin.checkpoint import save_model
from tailfin.data.proposals import open_proposals
from tailfin.data.views import PretrainingDataset
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.images import MEAN, STD, batch_images
from tailfin.pretraining import reconstruction as recon
from tailfin.pretraining.shell import PreTrainer, View
from tailfin.processes import on_main
from tailfin.run import Run, batch_plan
from tailfin.schema.pretraining import Proposals
from tailfin.weights import load_fitting

TRANSFERRED = ("backbone.", "rpn.", "roi_heads.head.")
PREDICTOR = "roi_heads.predictor."
PICTURES, NEGATIVES = 6, 256  # in the file for the report


def start(run: Run) -> Detector:
    """The detector that a method starts from, pre-trained where the recipe says so."""
    config = run.recipe.pretraining
    if config is None:
        return run.detector()
    recipe = run.planned("pretrain").recipe
    wanted = config.proposals if config.uses_proposals else Proposals(source="gt")  # image terms need no file
    proposals = open_proposals(wanted, run.train, recipe.data.root)
    dataset = PretrainingDataset(run.train, recipe.data, recipe.seed, config.views, proposals, third=config.third_view)
    stats = run.stats
    if config.sampler.instance_source == "proposal":
        stats = replace(stats, instance_count=proposals.instances(run.train.index))
    plan = batch_plan(recipe, dataset, stats)
    detector: Detector = run.detector(recipe)
    assert isinstance(detector, FasterRCNN)
    shell = PreTrainer(detector, config, iterations=plan.iterations, accumulation=recipe.schedule.accumulation)
    product = run.stage("pretrain", shell, recipe=recipe, dataset=dataset, plan=plan, product="detector")
    parts = (*TRANSFERRED, PREDICTOR) if config.keep_predictor else TRANSFERRED

    def write() -> None:
        pictures = run.out / "stages" / "1-pretrain" / "pictures.npz"
        if not pictures.exists() and int(shell.step):  # a stage that was finished before has no shell any more
            np.savez_compressed(pictures, **look(shell, dataset))
        exported = run.out / "pretrained.safetensors"
        if not exported.exists():
            save_model(exported, product, recipe, run.stats, parents=run.parents, parts=parts)

    on_main(run.accelerator, write)
    return transfer(run, product, parts)


def transfer(run: Run, trained: Detector, parts: tuple[str, ...]) -> Detector:
    """A fresh detector of the recipe with the weights of `trained` whose names start with one of `parts`."""
    torch.manual_seed(run.recipe.seed)  # new weights must not depend on whether the stage ran just now or was loaded
    model, _ = build_detector(run.recipe, run.stats, start=False)
    loaded = load_fitting(model, trained.state_dict(), lambda name: name.startswith(parts))
    run.say(f"pre-training: {len(loaded.names)} weights loaded {_parts(loaded.names)}")
    for what, keys in (("dropped", loaded.dropped), ("new", loaded.missing)):
        if keys:
            run.say(f"  {what}: {len(keys)} {_parts(keys)}")
    return model


@torch.no_grad()
def look(shell: PreTrainer, dataset: PretrainingDataset) -> dict[str, Any]:
    """What the trained networks make of a few fixed pictures, as arrays for the report.

    For n pictures, padded to the largest (true sizes in `size1`, `size2`: int [n, 2], height and width):

        view1, view2          uint8 [n, 3, H, W]
        boxes1, boxes2        float32 [n, P, 4], paired boxes, NaN where a picture has fewer than P
        reconstruction        uint8 [n, 3, H, W] of view 1; masks: int [n, 4], the masked rectangle (xyxy)
        positive, negative    float32 [n] and [n, Q]: similarity of the query with its key and with rows of the queue
        box_positive, box_negative    float32 [m] and [m, Q], the same for all boxes, pictures one after another

    An entry is there only where its term is trained.
    """
    training, device = shell.training, shell.step.device
    shell.eval()
    rows = dataset.rows()
    chosen = rows[np.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).astype(int)]
    samples = [dataset.sample(0, int(row), 0) for row in chosen]
    images = [image.to(device) for image, _ in samples]
    targets = [{key: value.to(device) for key, value in target.items()} for _, target in samples]
    channels_last = shell.detector.channels_last
    first = View(batch_images(images, channels_last=channels_last), [target["proposals"] for target in targets])
    second = View(
        batch_images([target["view"] for target in targets], channels_last=channels_last),
        [target["view_proposals"] for target in targets],
    )
    found: dict[str, Any] = {
        "view1": _pixels(first),
        "view2": _pixels(second),
        "size1": np.array(first.batch.image_sizes),
        "size2": np.array(second.batch.image_sizes),
        "boxes1": _padded(first.boxes),
        "boxes2": _padded(second.boxes),
        "image_id": chosen,
    }
    features = shell.encode(first)
    if shell.reconstructs:
        made = shell.generator(features.layers[shell.deepest]).float()
        if made.shape != first.batch.tensors.shape:
            made = F.interpolate(made, size=first.batch.tensors.shape[-2:], mode="bilinear", align_corners=False)
        found["reconstruction"] = _pixels(View(ImageList(made, first.batch.image_sizes), []))
        generator = torch.Generator().manual_seed(0)
        rectangles = recon.mask_rectangles(first.boxes, shell.config.reconstruction.mask_fraction, generator=generator)
        found["masks"] = rectangles[:, 0].cpu().numpy()
    if shell.average:
        found |= _similarities(shell, first, second)
    shell.train(training)
    return found


def _similarities(shell: PreTrainer, first: View, second: View) -> dict[str, Any]:
    online, keys = shell.encode(first), shell.encode_keys(second)
    found = {}
    for term, prefix in (("image", ""), ("box", "box_")):
        if f"{term}_projector" not in shell.average:
            continue
        if term == "image":
            queries, positives = shell.pooled(online, first), shell.pooled(keys, second)
        else:
            queries, positives = shell.box_features(first, online), shell.box_features(second, keys, keys=True)
        queries, positives = shell.embed(term, queries), shell.embed(term, positives, keys=True)
        found[f"{prefix}positive"] = (queries * positives).sum(1).cpu().numpy()
        if term in shell.queues:
            stored = shell.queue(term).rows
            some = stored[torch.linspace(0, len(stored) - 1, min(NEGATIVES, len(stored))).long().to(stored.device)]
            found[f"{prefix}negative"] = (queries @ some.T).cpu().numpy()
    return found


def _pixels(view: View) -> np.ndarray[Any, Any]:
    """A batch as uint8 pictures again."""
    tensors = view.batch.tensors.float().cpu()
    deviation, mean = torch.tensor(STD)[:, None, None], torch.tensor(MEAN)[:, None, None]
    pictures = ((tensors * deviation + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    for picture, (height, width) in zip(pictures, view.batch.image_sizes, strict=True):
        picture[:, height:] = 0
        picture[:, :, width:] = 0
    return pictures.numpy()


def _padded(boxes: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    most = max(len(own) for own in boxes)
    result = np.full((len(boxes), most, 4), np.nan, dtype=np.float32)
    for row, own in zip(result, boxes, strict=True):
        row[: len(own)] = own.cpu().numpy()
    return result


def _parts(keys: Any) -> str:
    """How many of the weights are in which part: "(backbone.body 102, rpn 6)"."""
    depth = {"backbone": 2, "roi_heads": 3}
    names = Counter(".".join(key.split(".")[: depth.get(key.split(".")[0], 1)]) for key in sorted(keys))
    return "(" + ", ".join(f"{name} {count}" for name, count in names.items()) + ")"
