"""fedloss: reference vectors with their stored draws, frequencies of its own draws, budgets, mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tailfin import losses
from tailfin.errors import UserError
from tailfin.losses import fedloss
from tailfin.losses.fedloss import FedLoss

DTYPES = (torch.float64, torch.float32)
CASES = ("a_typical", "b_background_only", "c_more_gt_than_budget", "d_zero_count_classes")


def build(file, case, stats_of, **options):
    power = float(file[f"{case}/hp/freq_power"])
    places = int(file[f"{case}/hp/num_fed_classes"])
    return losses.build("fedloss", stats_of(file[f"{case}/image_count"]), num_classes=places, power=power, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["d2_sigmoid", "centernet2_sigmoid"])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(vectors, assert_close, stats_of, case, kind, dtype):
    file = vectors("fedloss")
    loss = build(file, case, stats_of)
    logits = file.tensor(f"{case}/logits", dtype)[:, :-1].requires_grad_()  # no background column
    value = loss(logits, file.tensor(f"{case}/labels"), drawn=file.tensor(f"{case}/{kind}/drawn_classes"))
    grad = file[f"{case}/{kind}/grad"]
    assert not grad[:, -1].any()
    assert_close(value, logits, file[f"{case}/{kind}/loss"], grad[:, :-1])
    kept = torch.autograd.grad(value, logits)[0].any(0)
    assert torch.equal(kept, file.tensor(f"{case}/{kind}/class_mask"))
    np.testing.assert_allclose(
        loss.scores(logits).detach(), file[f"{case}/test/sigmoid_scores"][:, :-1], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(loss.prior_bias().sigmoid(), torch.full((loss.num_logits,), 0.01))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
def test_deformable_detr(vectors, assert_close, stats_of, dtype, given):
    file, case = vectors("fedloss"), "e_detr"
    loss = build(file, case, stats_of, base="focal")
    logits = file.tensor(f"{case}/logits", dtype).flatten(0, 1).requires_grad_()
    labels = file.tensor(f"{case}/query_labels").flatten()
    objects = int(file[f"{case}/num_boxes"])
    keywords = {"normalizer": objects} if given else {}  # by default the foreground rows, here as many
    value = loss(logits, labels, drawn=file.tensor(f"{case}/detic_detr/drawn_classes"), **keywords)
    grad = file[f"{case}/detic_detr/grad"].reshape(len(labels), -1)
    assert_close(value, logits, file[f"{case}/detic_detr/loss"], grad)


def test_on_softmax_the_scheme_does_nothing(vectors, stats_of):
    file = vectors("fedloss")
    for case in CASES:
        labels = file.tensor(f"{case}/labels")
        plain = losses.build("softmax", stats_of(file[f"{case}/image_count"]))
        value = plain(file.tensor(f"{case}/logits", torch.float64), labels)
        assert value.item() == pytest.approx(float(file[f"{case}/centernet2_softmax/loss"]), rel=1e-6)


def drawn_by(loss, labels, seed):
    """Classes that a call keeps."""
    logits = torch.zeros((len(labels), loss.num_logits), requires_grad=True)
    value = loss(logits, labels, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(value, logits)[0].any(0)


def test_frequencies_of_the_draws(vectors, stats_of):
    """40000 released draws and 8000 own ones: a standard error of 0.006."""
    file = vectors("fedloss")
    labels, counts = file.tensor("f_inclusion/labels"), file["f_inclusion/image_count"]
    loss = FedLoss(stats_of(counts), num_classes=int(file["f_inclusion/num_fed_classes"]))
    generator, draws = torch.Generator().manual_seed(0), 8000
    present = torch.zeros(13, dtype=torch.bool).index_fill_(0, labels, True)
    kept = torch.zeros(12)
    for _ in range(draws):
        kept += loss._draw(present[None], generator)[0] | present[:-1]
    np.testing.assert_allclose(kept / draws, file["f_inclusion/inclusion_frequency"][:-1], atol=0.025)
    assert kept[10] == 0  # no training image


def test_budgets(stats_of):
    loss = FedLoss(stats_of([5, 0, 7, 1, 900, 3]), num_classes=4)
    kept = drawn_by(loss, torch.tensor([1, 6, 6]), 0)
    assert kept.sum() == 3 and kept[1]  # background takes a place; a class of the batch is kept whatever its count
    assert drawn_by(loss, torch.tensor([1, 2]), 0).sum() == 4
    assert drawn_by(loss, torch.tensor([0, 1, 2, 3, 5, 6]), 0).tolist() == [True, True, True, True, False, True]
    many = FedLoss(stats_of([5, 0, 7, 0]), num_classes=50)  # more places than classes with images
    for seed in range(20):
        assert drawn_by(many, torch.tensor([4, 0]), seed).tolist() == [True, False, True, False]
    focal = FedLoss(stats_of([5, 2, 7, 1, 900, 3]), base="focal", num_classes=4)
    assert drawn_by(focal, torch.tensor([1, 6, 6]), 0).sum() == 4
    even = FedLoss(stats_of([1, 10**6, 0]), num_classes=2, power=0)
    seen = torch.stack([drawn_by(even, torch.tensor([3]), seed) for seed in range(200)]).float().mean(0)
    assert 0.4 < seen[0] < 0.6 and seen[2] == 0


def test_every_picture_has_its_own_classes(stats_of):
    """Rows keep what a call with their picture alone would: as many classes, those of their picture and others."""
    loss = FedLoss(stats_of([3] * 60), num_classes=10)
    labels, picture = torch.tensor([4, 60, 7, 8, 60, 9]), torch.tensor([0, 0, 1, 1, 1, 3])
    logits = torch.zeros((6, 60), requires_grad=True)
    value = loss(logits, labels, picture=picture, generator=torch.Generator().manual_seed(0))
    kept = torch.autograd.grad(value, logits)[0] != 0
    assert kept.sum(1).tolist() == [9, 9, 9, 9, 9, 10]  # background takes a place
    for rows in ([0, 1], [2, 3, 4]):
        assert (kept[rows] == kept[rows[0]]).all()
        assert set(labels[rows].tolist()) - {60} <= set(kept[rows[0]].nonzero().flatten().tolist())
    assert not torch.equal(kept[0], kept[2])
    together = FedLoss(stats_of([3] * 60), num_classes=10, per="process")
    value = together(logits, labels, picture=picture, generator=torch.Generator().manual_seed(0))
    kept = torch.autograd.grad(value, logits)[0] != 0
    assert (kept == kept[0]).all() and kept[0].sum() == 9
    with pytest.raises(ValueError, match='per must be "picture" or "process"'):
        FedLoss(stats_of([3] * 60), per="batch")


def test_its_own_draws_come_from_the_generator(stats_of):
    loss = FedLoss(stats_of([3] * 200), num_classes=20)
    logits = torch.randn((8, 200), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    first, again, other = (loss(logits, labels, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.item() == again.item() != other.item()
    torch.manual_seed(3)
    assert loss(logits, labels).item() != loss(logits, labels).item()  # one draw per call


def test_a_stored_draw_as_long_as_the_batch(stats_of):
    """It lists classes: removing ignored rows leaves it alone."""
    loss = FedLoss(stats_of([3] * 5), num_classes=5)
    logits = torch.randn((3, 5), generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor([2, 3, 4])
    padded = loss(logits, torch.tensor([0, -1, 5]), drawn=drawn)
    torch.testing.assert_close(padded, loss(logits[[0, 2]], torch.tensor([0, 5]), drawn=drawn))


@pytest.mark.parametrize("base", ["sigmoid", "focal"])
def test_all_classes_kept_is_the_base(stats_of, base):
    stats = stats_of([3, 4, 5])
    loss, plain = FedLoss(stats, base=base), losses.build(base, stats)
    logits = torch.randn((6, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 3, 3])
    torch.testing.assert_close(loss(logits, labels), plain(logits, labels))
    torch.testing.assert_close(
        loss(logits, labels, normalizer=2), plain(logits, labels) * (6 if base == "sigmoid" else 3) / 2
    )
    drawn = torch.tensor([1])
    torch.autograd.gradcheck(lambda z: loss(z, labels[3:], drawn=drawn), logits[3:])


def test_mistakes(stats_of):
    stats = stats_of([1, 2])
    with pytest.raises(ValueError, match=r'there is no base "sigmoit" \(did you mean "sigmoid"\?\)'):
        FedLoss(stats, base="sigmoit")
    with pytest.raises(ValueError, match="num_classes must be a positive whole number"):
        FedLoss(stats, num_classes=0)
    with pytest.raises(ValueError, match="power must not be negative"):
        FedLoss(stats, power=-1)
    loss, logits, labels = FedLoss(stats), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"drawn must be classes in 0\.\.1"):
        loss(logits, labels, drawn=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"drawn must be classes, int64 \[K\]"):
        loss(logits, labels, drawn=torch.zeros(2))


def test_any_sigmoid_is_a_base(stats_of):
    """With every class drawn the value is the base's own, with few of them less; the base's statistics move."""
    stats = stats_of(np.arange(1, 13))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 13, (40,), generator=generator)
    for base in fedloss.BASES:
        plain = fedloss.BASES[base](stats).train()
        logits = torch.randn((40, plain.num_logits), generator=generator)
        facts = {"quality": torch.rand(40)} if "quality" in plain.row_facts else {}
        wanted = plain(logits, labels, **facts).item()
        all_drawn = losses.build("fedloss", stats, base=base, num_classes=30).train()
        assert all_drawn(logits, labels, **facts).item() == pytest.approx(wanted, rel=1e-6), base
        state = all_drawn.state_dict()
        assert all(torch.equal(value, state[f"base.{name}"]) for name, value in plain.state_dict().items())
        present = labels[:4].clamp(max=11)
        few = losses.build("fedloss", stats, base=base, num_classes=1).train()
        facts = {name: value[:4] for name, value in facts.items()}
        assert few(logits[:4], present, **facts) < fedloss.BASES[base](stats).train()(logits[:4], present, **facts)


def test_base_options_are_the_bases(stats_of):
    stats = stats_of(np.arange(1, 13))
    loss = losses.build("fedloss", stats, base="focal", base_options={"focal_gamma": 1.0})
    assert loss.base.focal_gamma == 1.0
    with pytest.raises(UserError, match='has no option "gama"'):
        losses.build("fedloss", stats, base="focal", base_options={"gama": 1.0})
