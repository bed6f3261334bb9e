"""SlotCon's grouping and contrast of slots, against loops over pictures, cells and prototypes."""

from __future__ import annotations

import math

import pytest
import torch
from small_shell import samples, shell, total
from torch.nn import functional as F

from tailfin.pretraining.slots import SOFT, aligned, group, grouping, slot_contrast


def test_slots_are_means_of_cells_weighted_by_their_shares():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 2, 3, generator=generator, dtype=torch.float64)
    prototypes = F.normalize(torch.randn(4, 5, generator=generator, dtype=torch.float64), dim=1)
    real = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    real[1, :, :, 2] = False  # padding
    found = group(maps, prototypes, real, 0.07)
    for picture in range(2):
        cells = [
            maps[picture, :, row, column] for row in range(2) for column in range(3) if real[picture, 0, row, column]
        ]
        dots = torch.stack([prototypes @ (cell / cell.norm()) for cell in cells])  # [cells, K]
        share = (dots / 0.07).softmax(1) + SOFT
        for slot in range(4):
            wanted = sum(share[i, slot] * cell for i, cell in enumerate(cells)) / share[:, slot].sum()
            torch.testing.assert_close(found.slots[picture, slot], wanted)
            assert found.seen[picture, slot] == bool((dots.argmax(1) == slot).any())
        torch.testing.assert_close(found.dots[picture, :, 0, 0], dots[0])


def test_grouping_is_the_centred_teachers_cross_entropy_over_pictures_with_something_in_common():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    centre = torch.randn(4, generator=generator, dtype=torch.float64)
    common = torch.tensor([True, False, True])
    each = []
    for picture in (0, 2):
        for row in range(2):
            for column in range(2):
                p = ((teacher[picture, :, row, column] - centre) / 0.07).softmax(0)
                q = (student[picture, :, row, column] / 0.1).softmax(0)
                each.append(-sum(float(p[k]) * math.log(float(q[k])) for k in range(4)))
    assert float(grouping(student, teacher, centre, common, 0.1, 0.07)) == pytest.approx(sum(each) / len(each))
    assert float(grouping(student, teacher, centre, common & False, 0.1, 0.07)) == 0


def test_slots_in_sight_are_contrasted():
    keys = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    seen = torch.tensor([True, False, True, True, False])
    predicted = F.normalize(torch.randn(2, 3, generator=torch.Generator().manual_seed(3)), dim=1)
    rows = torch.tensor([2, 3])
    each = []
    for row, own in zip(rows.tolist(), predicted, strict=True):
        logits = {k: float(own @ keys[k]) / 0.2 for k in range(5) if seen[k]}
        each.append(math.log(sum(math.exp(value) for value in logits.values())) - logits[row])
    assert float(slot_contrast(predicted, rows, keys, seen, 0.2)) == pytest.approx(0.4 * sum(each) / 2, rel=1e-5)
    assert float(slot_contrast(predicted[:0], rows[:0], keys, seen, 0.2)) == 0


def test_overlaps_show_the_same_place():
    """One picture, seen whole and as its mirrored right half: aligned, the maps agree."""
    own = shell(preset="slotcon")
    images, targets = samples(1)
    whole = torch.arange(8.0).expand(1, 1, 2, 8)  # of a view of 64 pixels
    half = F.interpolate(whole[..., 4:], size=(2, 8), mode="bilinear", align_corners=False).flip(-1)
    targets[0]["overlap"] = torch.tensor([[32.0, 0.0, 64.0, 64.0], [0.0, 0.0, 64.0, 64.0]])
    targets[0]["flipped"] = torch.tensor([False, True])
    seen = own.look_at(images, targets)
    first, second = aligned(whole, seen, 0), aligned(half, seen, 1)
    torch.testing.assert_close(first[..., 1:-1], second[..., 1:-1], rtol=0, atol=0.2)
    assert float(first[0, 0, 0, 0]) < float(first[0, 0, 0, -1]), "unmirrored"


def test_the_centre_follows_the_teacher_in_training_alone():
    own = shell(preset="slotcon")
    term = own.terms["slots"]
    own(*samples())
    moved = term.centre.clone()
    assert moved.abs().sum() > 0
    own.eval()(*samples())
    assert torch.equal(term.centre, moved)


def test_a_few_steps_of_training():
    """Prototypes, projector, predictor and backbone train; the loss falls on pictures seen again and again."""
    own = shell(preset="slotcon")
    optimizer = torch.optim.Adam([p for p in own.parameters() if p.requires_grad], lr=2e-3)
    images, targets = samples()
    for target in targets:
        target["view"] = images[0]
        target["overlap"] = torch.tensor([[0.0, 0.0, 64.0, 64.0]] * 2)
        target["flipped"] = torch.tensor([False, False])
    values = []
    for _ in range(12):
        loss = total(own(images, targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert sum(values[-3:]) < 0.9 * sum(values[:3]), values
    average = own.average["slot_prototypes"].weight
    assert not torch.equal(average, own.terms["slots"].prototypes.weight)
