"""A loss of tailfin inside a plain torchvision detector and a plain PyTorch loop, without recipe and engine.

    python examples/losses_outside_tailfin.py [LOSS]

torchvision's box head has its loss built in, so tailfin's box head takes its place, with torchvision's pooling and
layers in it; backbone, RPN, resizing and the loop stay as they are. Labels are tailfin's: 0..C-1, background C. Takes
half a minute on one CPU core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from tailfin import ClassStats, losses
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.data.synth import make_synthetic
from tailfin.models.heads.roi_heads import BoxPredictor, RoIHeads
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.schema.data import Data, DataFiles


def main(name: str, steps: int = 8) -> None:
    """Train for `steps` iterations of 4 pictures, then count the detections of one picture."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = make_synthetic(Path(folder) / "data", images_train=60, images_val=4, classes=6, size=128)
        stats = ClassStats.from_json(files.train)
        source = open_source(DataFiles(annotations=str(files.train)), "", "train")
        dataset = TrainingDataset(source, Data(sizes=(128,)), seed=0)
        samples = [dataset.sample(0, row, 0) for row in dataset.rows().tolist()]  # uint8 picture, boxes and labels

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
    )
    model = FasterRCNN(backbone, num_classes=stats.num_classes + 1, min_size=128, max_size=128)

    # the lines that matter
    loss = losses.build(name, stats)
    heads = model.roi_heads
    predictor = BoxPredictor(heads.box_predictor.cls_score.in_features, loss, class_agnostic=False)
    pool = PyramidRoIAlign(heads.box_roi_pool.featmap_names, [4, 8, 16, 32], output_size=7, sampling_ratio=2)
    model.roi_heads = RoIHeads(pool, heads.box_head, predictor, loss, batch=128)  # 512 where time allows

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for step in range(steps):
        batch = [samples[(4 * step + k) % len(samples)] for k in range(4)]
        parts = model([image / 255 for image, _ in batch], [target for _, target in batch])
        total = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        print(f"step {step + 1}: " + ", ".join(f"{key} {value.item():.3f}" for key, value in parts.items()))

    model.eval()
    with torch.inference_mode():
        found = model([samples[0][0] / 255])[0]
    print(f"{name}: {len(found['scores'])} detections, scores up to {found['scores'].max():.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "objectness")
