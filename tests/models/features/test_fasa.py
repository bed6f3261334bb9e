"""FASA: reference vectors, adaptation over processes, clustering, limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tailfin.models.features.fasa import FASA, affinity_propagation

HP = ("decay_ratio", "loss_aug_weight", "instance_prob_power", "instance_prob_scale", "dynamic_up", "dynamic_down")
NAMES = {"mean": "mean", "variance": "var", "used": "used"}


def build(classes=4, channels=2, **options):
    return FASA([1] * classes, channels, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
def test_reference_vectors(golden_dir: Path, case: str, dtype: torch.dtype):
    data = np.load(golden_dir / "fasa.npz")
    hp = {name: data[f"{case}/hp/{name}"].item() for name in HP}
    module = FASA(data[f"{case}/class_count"], data[f"{case}/step0/features"].shape[1], **hp).to(dtype)
    np.testing.assert_allclose(module.prob, data[f"{case}/prob_init"], rtol=1e-12)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    for step in range(3):
        at = f"{case}/step{step}"
        module.update(torch.from_numpy(data[f"{at}/features"]), torch.from_numpy(data[f"{at}/labels"]))
        for own, official in NAMES.items():
            np.testing.assert_allclose(
                getattr(module.statistics, own), data[f"{at}/state_after/{official}"], **tolerance
            )
        draws = torch.from_numpy(data[f"{at}/uniform"]), torch.from_numpy(data[f"{at}/noise"])
        features, labels = module.sample(draws=draws)
        np.testing.assert_allclose(features, data[f"{at}/aug_features"], **tolerance)
        np.testing.assert_array_equal(labels, data[f"{at}/aug_labels"])

        np.testing.assert_allclose(module.prob, data[f"{at}/prob_before"], rtol=1e-12)
        rows = torch.from_numpy(data[f"{at}/val_cum_labels"])
        losses = torch.from_numpy(data[f"{at}/val_cum_losses"])
        label = torch.repeat_interleave(torch.arange(len(rows)), rows.long())
        half = len(label) // 2  # in two batches
        for part in (slice(None, half), slice(half, None)):
            module.observe((losses / rows)[label][part], label[part])
        module.adapt(torch.from_numpy(data[f"{at}/cluster_labels"]))
        np.testing.assert_allclose(module.prob, data[f"{at}/prob_after"], rtol=1e-12)


def test_first_probabilities():
    np.testing.assert_allclose(FASA([1, 3, 0], 2).prob, np.array([3, 1, 3]) / 7)
    options = {"instance_prob_power": 0.5, "instance_prob_scale": 2.0}
    np.testing.assert_allclose(FASA([1, 4, 16], 2, **options).prob, np.array([1, 2 * 2 / 7, 2 * 1 / 7]))


def test_classes_come_with_their_probability():
    module = FASA([1, 1, 2, 2], 1)  # 1/3, 1/3, 1/6, 1/6
    module.update(torch.tensor([[5.0], [7.0], [9.0]]), torch.tensor([0, 2, 3]))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.bincount(module.sample(generator=generator)[1], minlength=4) for _ in range(3000)])
    assert drawn.max() == 1
    share = drawn.double().mean(dim=0)
    np.testing.assert_allclose(share, [1 / 3, 0, 1 / 6, 1 / 6], atol=0.03)
    features, labels = module.sample(draws=(torch.zeros(4), torch.ones(3, 1)))
    assert labels.tolist() == [0, 2, 3]
    assert features.flatten().tolist() == [5, 7, 9]  # one row each: no variance


def test_augmentation_loss():
    logits = torch.randn((5, 4), generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0])
    module = build(loss_aug_weight=0.3)
    torch.testing.assert_close(module.augmentation_loss(logits, labels), 0.3 * F.cross_entropy(logits, labels))
    nothing = module.augmentation_loss(logits[:0], labels[:0])
    nothing.backward()
    assert nothing.item() == 0
    assert module.augmentation_loss(logits.half(), labels).dtype == torch.float32


def test_probability_follows_the_loss_of_the_cluster():
    module = FASA([1, 1, 1, 1], 1)
    clusters = torch.tensor([0, 0, 1, 2])
    labels = torch.tensor([0, 1, 2, 3, 4, -1])

    def phase(*losses):
        module.observe(torch.tensor([*losses, 5.0, 100.0]), labels)
        module.adapt(clusters)
        return module.prob.tolist()

    assert phase(1.0, 2.0, 3.0, 4.0) == [0.25] * 4
    # class 0 fell, but its cluster rose (3 to 3.5); class 2 fell; class 3 did not change
    np.testing.assert_allclose(phase(0.5, 3.0, 1.0, 4.0), [0.225, 0.225, 0.275, 0.25])
    for _ in range(40):
        value = module.last_losses[2].item() * 5 / 2
        phase(0.0, 0.0, value, 0.0)
    assert module.prob[2] == 1  # clamped


def test_means_are_clustered():
    for clustering in ("negated", "released"):
        module = build(6, 2, clustering=clustering)
        points = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [9, 9], [9.1, 9], [9, 9.1]])
        module.update(points, torch.arange(6))
        module.observe(torch.ones(6), torch.arange(6))
        module.adapt()
        # in the group of 0, 1 and 2 the loss rises as a whole, in the other one it falls
        module.observe(torch.tensor([3.0, 1, 0.5, 0.5, 0.9, 1.1]), torch.arange(6))
        module.adapt()
        if clustering == "negated":
            np.testing.assert_allclose(module.prob * 6, [0.9] * 3 + [1.1] * 3)
        else:
            assert set(np.round(module.prob.numpy() * 6, 9)) <= {0.9, 1.0, 1.1}


def test_affinity_propagation_finds_groups():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(6).repeat_interleave(15)
    points = 20 * torch.eye(6)[truth] + torch.randn((90, 6), generator=generator)
    similarity = -torch.cdist(points, points).square()
    found = affinity_propagation(similarity)
    assert sorted(set(found.tolist())) == list(range(6))
    same = found[:, None] == found[None, :]
    assert torch.equal(same, truth[:, None] == truth[None, :])
    order = torch.randperm(90, generator=generator)
    again = affinity_propagation(similarity[order][:, order])
    assert torch.equal(again[:, None] == again[None, :], same[order][:, order])


def test_affinity_propagation_of_nothing_to_tell_apart():
    assert affinity_propagation(torch.zeros(1, 1)).tolist() == [0]
    assert affinity_propagation(torch.zeros(4, 4)).tolist() == [0] * 4
    # classes that were never seen all have the mean 0
    points = torch.cat([torch.zeros(20, 2), 50 + torch.randn((20, 2), generator=torch.Generator().manual_seed(0))])
    found = affinity_propagation(-torch.cdist(points, points).square())
    assert len(set(found[:20].tolist()) & set(found[20:].tolist())) == 0


def test_state_is_saved_and_stays_exact():
    module = build(3, 2)
    module.update(torch.randn(5, 2), torch.tensor([0, 0, 1, 2, 2]))
    module.observe(torch.rand(4), torch.tensor([0, 1, 2, 3]))
    module.adapt()
    module.observe(torch.rand(4), torch.tensor([0, 1, 2, 3]))
    other = build(3, 2)
    other.load_state_dict(module.state_dict())
    for each in (module, other):
        each.adapt(torch.tensor([0, 1, 1]))
    assert torch.equal(module.prob, other.prob)
    assert module.half().prob.dtype == torch.float64
    assert module.to("meta").val_losses.device.type == "meta"
    assert module.statistics.mean.dtype == torch.float16


@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_adapt_as_one(run_on_ranks, empty):
    generator = torch.Generator().manual_seed(0)
    phases = []
    for _ in range(3):
        label = torch.randint(0, 5, (30,), generator=generator)
        phases.append((torch.rand(30, generator=generator), label))
    clusters = torch.tensor([0, 1, 0, 1])
    cut = 30 if empty else 17

    def on_rank(rank):
        module = build(4)
        for losses, label in phases:
            part = slice(None, cut) if rank == 0 else slice(cut, None)
            module.observe(losses[part], label[part])
            module.adapt(clusters)
        return module.prob.numpy()

    joined = build(4)
    for losses, label in phases:
        joined.observe(losses, label)
        joined.adapt(clusters)
    assert len(joined.prob.unique()) == 2
    for prob in run_on_ranks(on_rank):
        np.testing.assert_allclose(prob, joined.prob, rtol=1e-12)


def test_nothing_observed_and_mistakes():
    module = build(3)
    module.adapt()
    module.adapt()
    assert torch.isfinite(module.prob).all()
    with pytest.raises(ValueError, match="clustering must be"):
        build(3, clustering="other")
    with pytest.raises(ValueError, match="must not be negative"):
        build(3, loss_aug_weight=-1.0)
