"""A loss of tailfin inside transformers' Deformable DETR and a plain PyTorch loop, without recipe and engine.

    python examples/losses_inside_transformers.py [LOSS]

The model and its matcher are transformers' own and unchanged: the classifier is asked to be as wide as the loss wants,
and the loss takes every query as a row, labelled with the class of its object or as background. Labels are tailfin's:
0..C-1, background C. Takes about a minute on one CPU core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torchvision.ops import box_convert, generalized_box_iou
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from tailfin import ClassStats, losses
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.data.synth import make_synthetic
from tailfin.models.images import batch_images
from tailfin.schema.data import Data, DataFiles

SIDE = 128


def main(name: str, steps: int = 8) -> None:
    """Train for `steps` iterations of 4 pictures, then print the best detection of one picture."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        files = make_synthetic(Path(folder) / "data", images_train=60, images_val=4, classes=6, size=SIDE)
        stats = ClassStats.from_json(files.train)
        source = open_source(DataFiles(annotations=str(files.train)), "", "train")
        dataset = TrainingDataset(source, Data(resize="square", sizes=(SIDE,)), seed=0)
        samples = [dataset.sample(0, row, 0) for row in dataset.rows().tolist()]  # uint8 picture, boxes and labels

    loss = losses.build(name, stats)
    body = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    model = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=body, num_labels=loss.num_logits, num_queries=20, d_model=64, encoder_layers=1,
            decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        )
    )  # fmt: skip
    for head in model.class_embed:
        torch.nn.init.normal_(head.weight, std=0.01)
        head.bias.data.copy_(loss.prior_bias())
    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    model.train()
    for step in range(steps):
        batch = [samples[(4 * step + k) % len(samples)] for k in range(4)]
        pictures = batch_images([image for image, _ in batch]).tensors
        side = pictures.shape[-1]
        targets = [
            {"class_labels": target["labels"], "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / side}
            for _, target in batch
        ]
        out = model(pixel_values=pictures)
        rows = out.logits.flatten(0, 1)  # [4 x 20, num_logits]
        matches = matcher(
            {"logits": loss.scores(rows).view(4, 20, -1).logit(1e-6), "pred_boxes": out.pred_boxes}, targets
        )
        query = torch.cat([20 * picture + queries for picture, (queries, _) in enumerate(matches)])
        wanted = torch.cat([target["boxes"][objects] for target, (_, objects) in zip(targets, matches, strict=True)])
        labels = torch.full((len(rows),), stats.num_classes)
        labels[query] = torch.cat(
            [target["class_labels"][objects] for target, (_, objects) in zip(targets, matches, strict=True)]
        )
        found = out.pred_boxes.flatten(0, 1)[query]
        corners = (box_convert(found, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        parts = {
            "class": loss(rows, labels) * len(rows) / len(query),  # per object, as DETR counts, not per query
            "box": 5 * (found - wanted).abs().sum(1).mean(),
            "giou": 2 * (1 - generalized_box_iou(*corners).diag()).mean(),
        }
        optimizer.zero_grad()
        sum(parts.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        print(f"step {step + 1}: " + ", ".join(f"{key} {value.item():.3f}" for key, value in parts.items()))

    model.eval()
    with torch.inference_mode():
        out = model(pixel_values=batch_images([samples[0][0]]).tensors)
    scores = loss.scores(out.logits[0])  # [20, C]
    best = int(scores.max(1).values.argmax())
    print(f"{name}: best of 20 queries is {stats.names[int(scores[best].argmax())]}, score {scores[best].max():.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "ecm")
