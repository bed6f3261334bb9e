"""mask_targets, mask_loss, paste_masks: reference vectors of the released conventions, cases by hand, mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tailfin.models.mask_ops import clip_boxes, mask_loss, mask_targets, paste_masks

DTYPES = (torch.float64, torch.float32)
CASES = ("a_typical", "b_boundary")


@pytest.fixture(scope="module")
def file(golden_dir) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "mask_head.npz"))


def matched(file, case, style):
    """The mask of each proposal's object, as the style wants it."""
    assigned = file[f"{case}/assigned"]
    if not style.endswith("polygon"):
        return torch.from_numpy(file[f"{case}/bitmaps"][assigned])
    return [
        [file[f"{case}/polygon/{gt}/{part}"] for part in range(file[f"{case}/polygon/{gt}/parts"])] for gt in assigned
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["mmdet_bitmap", "mmdet_polygon", "d2_bitmap", "d2_polygon", "torchvision"])
@pytest.mark.parametrize("case", CASES)
def test_targets(file, case, style, dtype):
    boxes = torch.from_numpy(file[f"{case}/proposals"]).to(dtype)
    before, masks = boxes.clone(), matched(file, case, style)
    size = int(file[f"{case}/mask_size"])
    found = mask_targets(masks, boxes, size, style, image_size=tuple(file[f"{case}/image_hw"]))
    expected = file[f"{case}/{style}/target"]
    assert found.dtype == dtype and found.shape == expected.shape
    assert torch.equal(boxes, before)  # mmdetection clips its caller's boxes in place
    if style == "torchvision":
        np.testing.assert_allclose(found, expected, atol=1e-5)  # stored from float32
        return
    differ = found.numpy() != expected
    if style == "mmdet_bitmap" and dtype == torch.float32:  # a few pixels lie on the threshold
        differ &= np.abs(file[f"{case}/mmdet_bitmap/target_soft"] - 0.5) > 1e-4
    assert differ.sum() <= (2 if style == "d2_bitmap" and dtype == torch.float32 else 0)


def test_the_conventions_differ_as_published(file):
    boxes = torch.from_numpy(file["b_boundary/proposals"])
    targets = {
        style: mask_targets(matched(file, "b_boundary", style), boxes, 28, style, image_size=(64, 80))
        for style in ("mmdet_bitmap", "mmdet_polygon", "d2_bitmap", "d2_polygon")
    }
    outside = torch.from_numpy((file["b_boundary/proposals"] < 0).any(1))
    assert not torch.equal(targets["mmdet_bitmap"][outside], targets["d2_bitmap"][outside])
    agree = (targets["mmdet_bitmap"] == targets["mmdet_polygon"]).float().mean()
    assert 0.84 <= agree < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["mmdet_bitmap", "mmdet_polygon", "torchvision"])
@pytest.mark.parametrize("case", CASES)
def test_loss(file, case, style, dtype):
    labels = torch.from_numpy(file[f"{case}/labels"])
    logits = torch.from_numpy(file[f"{case}/logits"]).to(dtype).requires_grad_()
    value = mask_loss(logits, torch.from_numpy(file[f"{case}/{style}/target"]), labels)
    value.backward()
    single = dtype == torch.float32 or style == "torchvision"  # torchvision's own loss was stored in float32
    assert value.item() == pytest.approx(float(file[f"{case}/{style}/loss"]), rel=1e-4 if single else 1e-9)
    expected = torch.zeros_like(logits)
    expected[torch.arange(len(labels)), labels] = torch.from_numpy(file[f"{case}/{style}/grad_gt_class"]).to(dtype)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_loss_of_one_channel(file, case):
    logits = torch.from_numpy(file[f"{case}/agnostic/logits"]).double().requires_grad_()
    targets = torch.from_numpy(file[f"{case}/mmdet_bitmap/target"])
    value = mask_loss(logits, targets, torch.full((len(logits),), 99))  # labels are not looked at
    assert value.item() == pytest.approx(float(file[f"{case}/agnostic/loss"]), rel=1e-9)
    (found,) = torch.autograd.grad(value, logits)
    np.testing.assert_allclose(found, file[f"{case}/agnostic/grad"], atol=1e-8)


def test_loss_without_rows(file):
    logits = torch.from_numpy(file["c_empty/logits"]).requires_grad_()
    value = mask_loss(logits, torch.from_numpy(file["c_empty/target"]), torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == file["c_empty/loss"] and logits.grad is not None


def test_loss_gradient_and_half_precision():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 4, 2, 2), generator=generator, dtype=torch.float64, requires_grad=True)
    targets, labels = torch.rand((3, 2, 2), generator=generator, dtype=torch.float64), torch.tensor([3, 0, 3])
    torch.autograd.gradcheck(lambda z: mask_loss(z, targets, labels), logits)
    assert mask_loss(logits.detach().bfloat16(), targets, labels).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["paste_a", "paste_edge"])
def test_pasted(file, case, dtype):
    probs, boxes = (torch.from_numpy(file[f"{case}/{name}"]).to(dtype) for name in ("probs", "boxes"))
    height, width = file[f"{case}/image_hw"]
    for style, key in (("mmdet", "mmdet/pasted"), ("mmdet", "d2/pasted"), ("torchvision", "torchvision/pasted_gt_0.5")):
        np.testing.assert_array_equal(paste_masks(probs, boxes, (height, width), style), file[f"{case}/{key}"])
    # boxes of the network's picture, divided by its scale
    scale = torch.from_numpy(file[f"{case}/mmdet_rescale/scale_factor"])
    network = torch.from_numpy(file[f"{case}/mmdet_rescale/boxes_network_size"]).to(dtype)
    found = paste_masks(probs, (network / scale.repeat(2)).to(dtype), (height, width))
    assert (found.numpy() != file[f"{case}/mmdet_rescale/pasted"]).sum() <= (0 if dtype == torch.float64 else 1)
    # without rescaling the picture is the network's: the same function with the boxes as they are
    np.testing.assert_array_equal(paste_masks(probs, boxes, (height, width)), file[f"{case}/mmdet_norescale/pasted"])


def test_boxes_outside_the_image_and_without_width():
    probs = torch.rand((5, 28, 28), generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    boxes = torch.tensor(
        [
            [-30.0, 2.0, -10.0, 12.0],  # left of the image: the original raises
            [3.0, -50.0, 9.0, -20.0],
            [60.0, 60.0, 80.0, 90.0],
            [5.2, 3.0, 5.2, 9.0],  # no width
            [float("nan")] * 4,
        ]
    )
    found = paste_masks(probs, boxes, (20, 30))
    assert found.flatten(1).any(1).tolist() == [False, False, False, True, False]
    columns = found[3].any(0).nonzero().flatten().tolist()
    assert columns == [4, 5, 6]  # floor(x1) - 1 up to ceil(x2): the columns that the original computes
    assert not paste_masks(probs[:3], boxes[:3], (20, 30), "torchvision").any()


@pytest.mark.parametrize("style", ["mmdet", "torchvision"])
def test_a_mask_on_whole_pixels_fills_its_box(style):
    found = paste_masks(torch.ones((1, 4, 4)), torch.tensor([[2.0, 3.0, 8.0, 9.0]]), (12, 11), style)
    expected = torch.zeros((12, 11), dtype=torch.bool)
    expected[3:9, 2:8] = True  # torchvision: grown to 1.5..10.5, cut to 1..10, 6 cells on 10 pixels
    assert torch.equal(found[0], expected)


def test_in_parts_and_in_half_precision(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand((7, 5, 5), generator=generator)
    boxes = torch.rand((7, 4), generator=generator) * 20
    boxes[:, 2:] += boxes[:, :2] + 1
    masks = torch.rand((7, 30, 40), generator=generator) > 0.5
    whole = paste_masks(probs, boxes, (30, 40)), mask_targets(masks, boxes)
    monkeypatch.setattr("tailfin.models.mask_ops.CHUNK", 2 * 30 * 40)
    assert torch.equal(paste_masks(probs, boxes, (30, 40)), whole[0])
    assert torch.equal(mask_targets(masks, boxes), whole[1])
    assert mask_targets(masks, boxes.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paste_masks(probs, boxes, (30, 40)), whole[0])


def test_nothing_at_all():
    none = torch.zeros((0, 4), dtype=torch.float64)
    for style in ("mmdet_bitmap", "d2_bitmap", "torchvision"):
        assert mask_targets(torch.zeros((0, 5, 6), dtype=torch.bool), none, 7, style).shape == (0, 7, 7)
    for style in ("mmdet_polygon", "d2_polygon"):
        assert mask_targets([], none, 7, style, image_size=(5, 6)).dtype == torch.float64
    assert paste_masks(torch.zeros((0, 7, 7)), none, (5, 6)).shape == (0, 5, 6)
    empty = mask_targets([[[0.0, 0.0, 5.0, 5.0]], []], torch.tensor([[0.0, 0, 5, 5]] * 2), 7, "d2_polygon")
    assert not empty.any()  # two points, and no part at all


def test_clipped_boxes_are_new():
    boxes = torch.tensor([[-5.0, 3.0, 50.0, 70.0]], dtype=torch.float64)
    np.testing.assert_array_equal(clip_boxes(boxes, (20, 30)), [[0, 3, 30, 20]])
    assert boxes[0, 0] == -5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "mmdet_bitmaps"}, 'did you mean "mmdet_bitmap"'),
        ({"style": "d2_polygon"}, "takes polygons"),
        ({"polygons_or_bitmaps": [[], []]}, "takes bitmaps"),
        ({"polygons_or_bitmaps": torch.zeros((3, 4, 4))}, "3 masks are given for 2 boxes"),
        ({"boxes": torch.zeros((2, 5))}, r"boxes must be floats \[P, 4\]"),
        ({"size": 0}, "size must be positive"),
        ({"style": "mmdet_polygon", "polygons_or_bitmaps": [[], []]}, "give image_size"),
        ({"style": "d2_polygon", "polygons_or_bitmaps": [[], [[1, 2, 3]]]}, "polygon of box 1"),
        ({"style": "d2_polygon", "polygons_or_bitmaps": [[[0, 0, 1, 1, 2, float("nan")]], []]}, "polygon of box 0"),
    ],
)
def test_mistakes_in_targets(arguments, message):
    given = {"polygons_or_bitmaps": torch.zeros((2, 4, 4)), "boxes": torch.zeros((2, 4))} | arguments
    with pytest.raises(ValueError, match=message):
        mask_targets(**given)


def test_other_mistakes():
    logits, labels = torch.zeros((2, 3, 4, 4)), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets \[2, 4, 5\]"):
        mask_loss(logits, torch.zeros((2, 4, 5)), labels)
    with pytest.raises(ValueError, match=r"labels must be \[2\]"):
        mask_loss(logits, torch.zeros((2, 4, 4)), labels[:1])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        mask_loss(logits, torch.zeros((2, 4, 4)), labels + 3)
    with pytest.raises(ValueError, match='did you mean "mmdet"'):
        paste_masks(torch.zeros((1, 4, 4)), torch.zeros((1, 4)), (5, 5), "mmdt")
    with pytest.raises(ValueError, match=r"probs must be \[N, m, m\]"):
        paste_masks(torch.zeros((1, 4, 4)), torch.zeros((2, 4)), (5, 5))
