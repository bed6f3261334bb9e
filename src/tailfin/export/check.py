"""Whether an exported file finds what the model finds: the same detections, scores to a thousandth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailfin.api import Detector
from tailfin.models.detector import Limits

SCORES, PIXELS, MASKS = 1e-3, 0.5, 1e-2  # largest differences of scores, box sides and mask probabilities
FALLBACK = 1e-6  # below the lowest threshold, so that none is lost to rounding


@dataclass(frozen=True)
class Agreement:
    """Of all detections on the photos."""

    photos: int
    detections: int  # of the model
    missing: int  # of them, those that the file lacks, and those that it has beside them
    scores: float  # largest differences of detections that both have
    pixels: float
    masks: float

    @property
    def good(self) -> bool:
        """Whether the file is as good as the model."""
        return self.missing == 0 and self.scores <= SCORES and self.pixels <= PIXELS and self.masks <= MASKS

    def __str__(self) -> str:
        text = f"{self.detections} detections on {self.photos} photos, {self.missing} different, scores to "
        return f"{text}{self.scores:.1e}, boxes to {self.pixels:.1e} px, masks to {self.masks:.1e}"


@torch.inference_mode()
def compare(
    detector: Detector,
    thresholds: Tensor,
    most: int,
    run: Callable[[Tensor, Tensor], Sequence[Tensor]],
    pictures: Sequence[Tensor],
) -> Agreement:
    """Run the model and the file on pictures [3, h, w] alone, then on all of them as one padded batch.

    A detection whose score is within `SCORES` of its threshold, or of the last place among the `most` best, may be
    missing on either side.
    """
    detections = missing = 0
    scores = pixels = masks = 0.0
    limits = Limits(max(float(thresholds.min()) - FALLBACK, 0.0), -1, detector.model.limits.nms)
    for group in [*([picture] for picture in pictures), list(pictures)]:
        found = run(*as_batch(group))
        for row, reference in enumerate(detector.model(group, limits=limits)):
            keep = reference["scores"] >= thresholds[reference["labels"]]
            wanted = {key: value[keep][:most] for key, value in reference.items()}
            there = found[2][row] >= 0
            own = [value[row][there] for value in found]
            cut = float(wanted["scores"][-1]) if len(wanted["scores"]) == most else 0.0
            detections += len(wanted["scores"])
            pairs, lonely, other = _paired(wanted, own)
            missing += sum(not _at_the_edge(wanted["scores"][k], thresholds[wanted["labels"][k]], cut) for k in lonely)
            missing += sum(not _at_the_edge(own[1][k], thresholds[own[2][k]], cut) for k in other)
            if pairs:
                one, two = (torch.tensor(side) for side in zip(*pairs, strict=True))
                scores = max(scores, float((wanted["scores"][one] - own[1][two]).abs().max()))
                pixels = max(pixels, float((wanted["boxes"][one] - own[0][two]).abs().max()))
                if "masks" in wanted:
                    masks = max(masks, float((wanted["masks"][one] - own[3][two]).abs().max()))
    return Agreement(len(pictures), detections, missing, scores, pixels, masks)


def as_batch(pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [3, h, w] as images [B, 3, H, W] and sizes [B, 2], as an exported file takes them."""
    sizes = torch.tensor([[picture.shape[1], picture.shape[2]] for picture in pictures])
    height, width = sizes.amax(dim=0).tolist()
    images = torch.zeros((len(pictures), 3, height, width), dtype=torch.uint8)
    for row, picture in enumerate(pictures):
        images[row, :, : picture.shape[1], : picture.shape[2]] = picture
    return images, sizes


def _paired(wanted: dict[str, Tensor], own: list[Tensor]) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """(pairs of equal detections, rows of `wanted` without one, rows of `own` without one)."""
    apart = (wanted["boxes"][:, None] - own[0][None]).abs().amax(dim=2)
    apart = apart + 1e4 * (wanted["scores"][:, None] - own[1][None]).abs()  # of two at one place the one of its score
    apart = apart.masked_fill(wanted["labels"][:, None] != own[2][None], float("inf"))
    pairs, free = [], set(range(len(own[1])))
    for row, line in enumerate(apart):
        place = min(free, key=line.__getitem__, default=None)
        if place is not None and float(line[place]) <= PIXELS + 1e4 * SCORES:
            pairs.append((row, place))
            free.discard(place)
    taken = {row for row, _ in pairs}
    return pairs, [row for row in range(len(apart)) if row not in taken], sorted(free)


def _at_the_edge(score: Tensor, threshold: Tensor, cut: float) -> bool:
    return abs(float(score) - float(threshold)) <= SCORES or abs(float(score) - cut) <= SCORES
