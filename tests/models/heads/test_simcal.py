"""SimCal: reference scores, which rows and weights calibration touches, bi-level sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from tailfin import losses
from tailfin.models.detector import Limits
from tailfin.models.heads.roi_heads import BoxPredictor, RoIHeads
from tailfin.models.heads.simcal import SimCal, episode_labels, simcal_scores, with_twin
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.samplers.episodes import draw_episodes
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[500, 20, 0], instance_count=[900, 30, 0], num_images=500)


def roi_heads(loss=None):
    torch.manual_seed(0)
    loss = loss or losses.build("softmax", STATS)
    pool = PyramidRoIAlign(["0"], [8], 3, 2)
    return RoIHeads(
        pool, TwoMLPHead(4 * 9, 8), BoxPredictor(8, loss, False), loss, batch=40, limits=Limits(1e-4, 20, 0.5)
    )


def inputs():
    torch.manual_seed(1)
    features = {"0": torch.randn((2, 4, 16, 16))}
    boxes = [
        torch.tensor([[10.0, 10.0, 40.0, 40.0], [60.0, 60.0, 100.0, 90.0]]),
        torch.tensor([[5.0, 5.0, 60.0, 50.0]]),
    ]
    proposals = [torch.cat([own.repeat(5, 1) + torch.randn((5 * len(own), 4)), torch.rand((15, 2)).repeat(1, 2) * 40
                            + torch.tensor([60.0, 0.0, 80.0, 20.0])]) for own in boxes]  # fmt: skip
    targets = [
        {"boxes": boxes[0], "labels": torch.tensor([0, 1]), "sampled_class": torch.tensor(1)},
        {"boxes": boxes[1], "labels": torch.tensor([0]), "sampled_class": torch.tensor(0)},
    ]
    return features, proposals, [(128, 128), (128, 128)], targets


def test_reference_scores(golden_dir):
    file = np.load(golden_dir / "simcal.npz")
    original, calibrated, expected = (
        torch.from_numpy(np.roll(file[f"c80/{name}"], -1, axis=1))  # background is the first column there
        for name in ("logits_original", "logits_calibrated", "scores")
    )
    counts = file["c80/instance_count"]
    threshold = int(file["c80/hp/instance_threshold"])
    scores = simcal_scores(original, calibrated, torch.from_numpy(counts < threshold))
    torch.testing.assert_close(scores, expected[:, :-1], atol=1e-6, rtol=0)
    loss = SimCal(
        ClassStats(image_count=counts, instance_count=counts, num_images=int(counts.sum())),
        instance_threshold=threshold,
    )
    torch.testing.assert_close(loss.scores(torch.cat([original, calibrated], dim=1)), scores)


def test_the_loss_trains_the_calibrated_half():
    loss = SimCal(STATS)
    assert loss.num_logits == 8
    assert loss.replaced.tolist() == [False, True, True]
    logits = torch.randn((6, 8), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 3, -1])
    value = loss(logits, labels)
    assert value.item() == pytest.approx(F.cross_entropy(logits[:5, 4:], labels[:5]).item())
    value.backward()
    assert logits.grad[:, :4].abs().sum() == 0
    assert logits.grad[:5, 4:].abs().sum() > 0
    empty = torch.zeros((0, 8), requires_grad=True)
    assert loss(empty, torch.zeros(0, dtype=torch.int64)).item() == 0
    with pytest.raises(ValueError, match="instance_threshold must not be negative"):
        SimCal(STATS, instance_threshold=-1)


def test_a_class_that_nobody_looked_for_is_left_out_of_the_calibrated_half():
    loss = SimCal(STATS)
    logits = torch.randn((4, 8), generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, known = torch.tensor([0, 1, 2, 3]), torch.tensor([[True, False, True]]).expand(4, -1)
    (gradient,) = torch.autograd.grad(loss(logits, labels, known=known), logits)
    assert not gradient[:, :4].any()  # the original
    assert not gradient[[0, 2, 3], 5].any() and gradient[1, 5] < 0  # but for the row of the class
    assert gradient[:, [4, 6, 7]].all()
    plain = F.cross_entropy(logits[[0, 2, 3]][:, [4, 6, 7]], torch.tensor([0, 1, 2]), reduction="sum")
    whole = plain + F.cross_entropy(logits[1:2, 4:], labels[1:2])
    torch.testing.assert_close(loss(logits, labels, known=known), whole / 4)


def test_rows_of_an_episode():
    labels = torch.tensor([0, 1, 3, 0, 3, 2, 1, 3, 3, 3, 2, 3])
    image_of = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    found = episode_labels(labels, image_of, torch.tensor([0, 1]), 3, torch.Generator().manual_seed(0))
    foreground = (found >= 0) & (found < 3)
    assert torch.where(foreground)[0].tolist() == [0, 3, 6]
    assert (found == 3).sum() == 3
    assert torch.equal(found[found >= 0], labels[found >= 0])
    few = episode_labels(torch.tensor([0, 0, 3]), torch.tensor([0, 0, 0]), torch.tensor([0]), 3)
    assert few.tolist() == [0, 0, 3]
    none = episode_labels(torch.tensor([1, 3]), torch.tensor([0, 0]), torch.tensor([0]), 3)
    assert none.tolist() == [-1, -1]
    every = episode_labels(torch.tensor([0, 1, 3, 3, 3, -1]), torch.zeros(6, dtype=torch.int64), None, 3)
    assert every[:2].tolist() == [0, 1] and (every == 3).sum() == 2


def test_a_fresh_copy_scores_like_the_original():
    plain = roi_heads().eval()
    features, proposals, sizes, _ = inputs()
    with torch.no_grad():
        expected, _ = plain(features, proposals, sizes)
        dual = with_twin(plain, STATS).eval()
        found, _ = dual(features, proposals, sizes)
    assert len(expected[0]["boxes"]) > 0
    for before, after in zip(expected, found, strict=True):
        for name, value in before.items():
            torch.testing.assert_close(after[name], value)


@pytest.mark.parametrize("fresh", [False, True])
def test_calibration_touches_the_new_head_alone(fresh):
    dual = with_twin(roi_heads(), STATS, fresh=fresh).train()
    predictor = dual.predictor
    same = torch.equal(predictor.calibrated_head.fc6.weight, predictor.head.fc6.weight)
    assert same != fresh
    before = {name: value.clone() for name, value in dual.state_dict().items()}
    trained = [value for value in dual.parameters() if value.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        _, found = dual(*inputs())
        assert list(found) == ["loss_classifier"]
        optimiser.zero_grad()
        found["loss_classifier"].backward()
        optimiser.step()
    changed = {name for name, value in dual.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "calibrated" in name}
    assert len(trained) == len(changed)


def test_only_softmax_detectors_are_calibrated():
    with pytest.raises(ValueError, match="trained with the loss softmax"):
        with_twin(roi_heads(losses.build("objectness", STATS)), STATS)
    with pytest.raises(ValueError, match="training needs targets"):
        with_twin(roi_heads(), STATS).train()(*inputs()[:3])


def test_bi_level_sampling_balances_the_classes():
    # class 0 in 90 images (twice in image 0), class 1 in images 3 and 4, class 3 in image 7; class 2 nowhere
    image_of = np.array([*range(90), 0, 3, 4, 7])
    labels = np.array([0] * 91 + [1, 1, 3])
    classes, images = draw_episodes(image_of, labels, 3000, np.random.default_rng(0), 4, 2)
    assert classes.shape == images.shape == (3000, 8)
    assert (classes.reshape(3000, 4, 2)[..., 0] == classes.reshape(3000, 4, 2)[..., 1]).all()
    share = np.bincount(classes.ravel(), minlength=4) / classes.size
    np.testing.assert_allclose(share, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.02)
    shown = set(zip(image_of.tolist(), labels.tolist(), strict=True))
    assert set(zip(images.ravel().tolist(), classes.ravel().tolist(), strict=True)) <= shown
    of_one = images[classes == 1]
    assert (of_one == 3).mean() == pytest.approx(0.5, abs=0.03)
    assert (images[classes == 0] == 0).mean() == pytest.approx(1 / 90, abs=0.01)
    again = draw_episodes(image_of, labels, 3000, np.random.default_rng(0), 4, 2)
    assert (again[1] == images).all()
    with pytest.raises(ValueError, match="at least one annotation"):
        draw_episodes(image_of[:0], labels[:0], 1, np.random.default_rng(0))
