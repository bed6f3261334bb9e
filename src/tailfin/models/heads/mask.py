"""The mask branch of Mask R-CNN (He et al., ICCV'17): beside the box head, a small network that outlines the object.

    boxes -> RoIAlign 14 x 14 -> four 3 x 3 convolutions -> 2 x 2 deconvolution -> 28 x 28 logits of the box's class

The last layer has a filter per class, or one for all; only that of the row's own class is computed, so that 1203
classes cost what one does. It may be `NormedConv2d`, as in the Seesaw models with normalised masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tailfin.losses.base import at_least_float32
from tailfin.models.features.base import Rows, Targets
from tailfin.models.mask_ops import TargetStyle, batch_mask_targets, mask_loss
from tailfin.models.normed_conv import NormedConv2d
from tailfin.models.precision import in_float32
from tailfin.models.roi_align import Places, PyramidRoIAlign
from tailfin.models.row_sampling import chosen_rows

# boxes whose masks are computed at a time in evaluation: 28 x 28 cells of 256 channels are 0.8 MB each
CHUNK, CPU_CHUNK = 256, 32  # the latter stays in a core's cache, and is an eighth faster


class MaskHead(nn.Module):
    """Pooled features [N, in_channels, m, m] to [N, channels, 2 m, 2 m]."""

    def __init__(self, in_channels: int, channels: int = 256, layers: int = 4) -> None:
        super().__init__()
        widths = [in_channels, *[channels] * layers]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, 3, padding=1) for before, width in zip(widths, widths[1:], strict=False)
        )
        self.upsample = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        for layer in (*self.convs, self.upsample):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        for conv in self.convs:
            pooled = conv(pooled).relu_()
        return self.upsample(pooled).relu_()


class MaskPredictor(nn.Module):
    """A 1 x 1 convolution from mask features [N, channels, m, m] to logits.

    Args:
        num_masks: filters, one per class or a single one.
        temperature: of a normalised convolution; none: a plain one.
    """

    def __init__(self, channels: int, num_masks: int, temperature: float | None = None) -> None:
        super().__init__()
        self.conv: nn.Conv2d
        if temperature is not None:
            self.conv = NormedConv2d(channels, num_masks, 1, temperature=temperature)
        else:
            self.conv = nn.Conv2d(channels, num_masks, 1)
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of all filters, [N, num_masks, m, m], computed in float32 at least."""
        return in_float32(self.conv, features)

    def own(self, features: Tensor, labels: Tensor) -> Tensor:
        """Logits of each row's own class, [N, m, m], float32 at least; labels int64 [N], which a single filter
        does not look at."""
        weight = self.conv.weight
        if isinstance(self.conv, NormedConv2d):
            features, weight = self.conv.directions(features)
        bias = self.conv.bias
        assert bias is not None
        rows = labels if len(weight) > 1 else torch.zeros_like(labels)
        chosen = at_least_float32(weight)[rows, None, :, 0, 0]  # [N, 1, channels]
        logits = in_float32(torch.bmm, chosen, at_least_float32(features).flatten(2))
        logits = logits[:, 0].unflatten(1, features.shape[2:])
        return logits + at_least_float32(bias)[rows, None, None]


class MaskBranch(nn.Module):
    """Masks of boxes: their loss in training, probabilities in evaluation.

    Args:
        pool: features of the levels and boxes to [N, channels, m, m].
        head: pooled features to [N, width, 2 m, 2 m].
        predictor: those to logits.
        style: how targets are made of masks, see `mask_ops.mask_targets`.
        weight: of the loss.
    """

    def __init__(
        self,
        pool: PyramidRoIAlign,
        head: nn.Module,
        predictor: MaskPredictor,
        *,
        style: TargetStyle = "mmdet_bitmap",
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.head = head
        self.predictor = predictor
        self.style: TargetStyle = style
        self.weight = weight

    def logits(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        labels: Tensor,
        image_sizes: list[tuple[int, int]],
        places: Places | None = None,
    ) -> Tensor:
        """[N, m, m] of the boxes [n, 4] of each image and their classes int64 [N]."""
        return self.predictor.own(self.head(self.pool(features, boxes, image_sizes, places)), labels)

    def losses(
        self,
        features: dict[str, Tensor],
        rows: Rows,
        image_sizes: list[tuple[int, int]],
        targets: Targets,
        num_classes: int,
    ) -> dict[str, Tensor]:
        """`loss_mask` of the sampled foreground rows whose object has a mask (`mask_valid`, where targets have it).

        Empty where neither the branch nor anything below it trains.
        """
        if not any(value.requires_grad for value in (*self.parameters(), *features.values())):
            return {}
        learnt = rows.labels < num_classes
        if all("mask_valid" in target for target in targets):
            valid = torch.cat([target["mask_valid"] for target in targets])
            if len(valid):
                learnt = learnt & valid[rows.gt_index.clamp(min=0)]
        every = torch.cat(rows.boxes)
        levels, count = self.pool.levels(every), len(self.pool.featmap_names)
        chosen = chosen_rows(learnt, rows.places.picture, len(targets), levels, count)
        places = Places(rows.places.picture[chosen.rows], chosen.per_level)
        labels = rows.labels[chosen.rows]
        boxes = list(every[chosen.rows].split(chosen.per_picture))
        size = 2 * int(self.pool.output_size[0])
        index = rows.gt_index[chosen.rows].split(chosen.per_picture)
        wanted = batch_mask_targets([target["masks"] for target in targets], boxes, index, size, self.style)
        logits = self.logits(features, boxes, labels, image_sizes, places)
        return {"loss_mask": self.weight * mask_loss(logits[:, None], wanted, labels)}

    @torch.no_grad()
    def probabilities(
        self, features: dict[str, Tensor], boxes: list[Tensor], labels: Tensor, image_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """[N, m, m] of the boxes of each image and their classes int64 [N]; some boxes at a time."""
        pooled = self.pool(features, boxes, image_sizes)
        chunk = CPU_CHUNK if pooled.device.type == "cpu" else CHUNK
        parts = [
            self.predictor.own(self.head(own), classes).sigmoid()
            for own, classes in zip(pooled.split(chunk), labels.split(chunk), strict=True)
        ]
        return torch.cat(parts)
