"""Pasting in windows and moving runs gives the very bytes that pasting whole pictures and pycocotools give."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tailfin import mask_encoding
from tailfin.mask_encoding import decode_masks, encode_masks
from tailfin.models.mask_ops import paste_masks


def objects(number: int, height: int, width: int, seed: int, scale: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    """Random probabilities, blobs and squares among them, and boxes, some over the border, degenerate or outside."""
    draw = torch.Generator().manual_seed(seed)
    probs = torch.rand((number, 28, 28), generator=draw)
    probs[::3] = 0.9
    probs[1::4, :14] = 0.1
    size = torch.tensor([width, height])
    centre, sides = torch.rand((2, number, 2), generator=draw) * size
    boxes = torch.cat([centre - scale * sides / 2, centre + scale * sides / 2], dim=1)
    special = torch.tensor([[0.0, 0, width, height], [-9, -9, width + 9, height + 9], [-20, -20, -10, -10]])
    boxes[: len(special)] = special[:number]
    if number > 5:
        boxes[3] = torch.tensor([width, height, width, height]) / 2
        boxes[4] = boxes[1] + 1e5
        probs[1] = 1.0
    return probs, boxes


def reference(probs: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, list]:
    whole = paste_masks(probs, boxes, size)
    return whole, coco_mask.encode(np.asfortranarray(whole.numpy().transpose(1, 2, 0).astype(np.uint8)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99), st.sampled_from([0.1, 0.8, 2.0]))
def test_equal_to_whole_pictures(number: int, height: int, width: int, seed: int, scale: float) -> None:
    probs, boxes = objects(number, height, width, seed, scale)
    whole, rles = reference(probs, boxes, (height, width))
    found = encode_masks(probs, boxes, (height, width))
    assert found == rles
    assert torch.equal(decode_masks(found, (height, width)), whole)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, boxes = objects(60, 120, 90, 0)
    expected = encode_masks(probs, boxes, (120, 90))
    monkeypatch.setattr(mask_encoding, "CHUNK", 500)
    assert encode_masks(probs, boxes, (120, 90)) == expected


def test_inputs_stay_and_half_precision_passes() -> None:
    probs, boxes = objects(9, 40, 50, 1)
    before = probs.clone(), boxes.clone()
    rles = encode_masks(probs.bfloat16(), boxes, (40, 50))
    assert rles == encode_masks(probs.bfloat16().float(), boxes, (40, 50)) and len(rles) == 9
    encode_masks(probs, boxes, (40, 50))
    assert torch.equal(probs, before[0]) and torch.equal(boxes, before[1])


def test_no_detections_and_wrong_shapes() -> None:
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (30, 40)) == []
    assert decode_masks([], (30, 40)).shape == (0, 30, 40)
    with pytest.raises(ValueError, match=r"beside boxes \[D, 4\], not \[2, 28, 28\], \[3, 4\]"):
        encode_masks(torch.zeros(2, 28, 28), torch.zeros(3, 4), (30, 40))


def test_300_masks_of_a_large_picture_stay_small() -> None:
    """4000 x 3000: 300 whole masks would be 3.6 GB."""
    probs, _ = objects(300, 3000, 4000, 2)
    draw = torch.Generator().manual_seed(3)
    corner = torch.rand((300, 2), generator=draw) * torch.tensor([3600.0, 2600.0])
    boxes = torch.cat([corner, corner + 20 + 350 * torch.rand((300, 2), generator=draw)], dim=1)
    tracemalloc.start()
    rles = encode_masks(probs, boxes, (3000, 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rles) == 300 and peak < 400 * 2**20
    for row in (0, 150, 299):  # by themselves, whole
        assert rles[row] == reference(probs[row : row + 1], boxes[row : row + 1], (3000, 4000))[1][0]
