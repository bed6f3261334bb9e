"""Equalized quality focal loss: reference vectors, gradients, statistics over processes, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tailfin.losses.efl import EFL
from tailfin.losses.eqfl import EQFL

STATE = ("pos_grad", "neg_grad", "pos_neg")


def reference(logits, labels, quality, pos_neg, normalizer, focal_gamma=2.0, scale_factor=8.0):
    """(loss, gradient) in NumPy float64 from the documented formula; labels: background C."""
    z = np.asarray(logits, dtype=np.float64)
    classes = z.shape[1]
    target = np.where(
        np.asarray(labels)[:, None] == np.arange(classes), np.asarray(quality, dtype=np.float64)[:, None], 0.0
    )
    gamma = focal_gamma + scale_factor * (1 - np.asarray(pos_neg, dtype=np.float64))
    p = np.exp(-np.logaddexp(0, -z))
    entropy = np.logaddexp(0, z) - target * z
    factor = np.abs(target - p) ** gamma
    weight = gamma / focal_gamma / normalizer
    # derivative of |p - q|^gamma: gamma |p - q|^(gamma - 1) sign(p - q) p (1 - p)
    slope = factor * (p - target) + entropy * gamma * np.abs(target - p) ** (gamma - 1) * np.sign(p - target) * p * (
        1 - p
    )
    return (weight * entropy * factor).sum(), weight * slope


def rows(seed, n, classes, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes), generator=generator, dtype=dtype)
    labels = torch.randint(0, classes + 1, (n,), generator=generator)
    return logits, labels, torch.rand(n, generator=generator, dtype=torch.float32)


@pytest.fixture
def build(stats_of):
    return lambda classes, **options: EQFL(stats_of([5] * classes), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
def test_reference_vectors(vectors, build, assert_close, case, dtype):
    data = vectors("eqfl")
    classes = int(data[f"{case}/num_classes"])
    loss = build(classes, **{key: float(value) for key, value in data.under(f"{case}/hp").items()})
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for name in STATE:
        np.testing.assert_array_equal(getattr(loss, name), data[f"{case}/step0/state_before/{name}"])
    for step in range(3):
        at = f"{case}/step{step}"
        logits = data.tensor(f"{at}/logits", dtype).requires_grad_()
        labels = data.tensor(f"{at}/labels")
        labels = torch.where(labels > 0, labels - 1, torch.where(labels == 0, classes, -1))
        value = loss(logits, labels, quality=data.tensor(f"{at}/quality"))
        assert_close(value, logits, data[f"{at}/loss"], data[f"{at}/grad"])
        for name in STATE:
            np.testing.assert_allclose(
                getattr(loss, name), data[f"{at}/state_after/{name}"], rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 2.0, True), (7, 40, 2.0, False), (30, 48, 12.0, True), (1203, 64, 2.0, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(build, classes, n, scale, background, dtype):
    loss = build(classes)
    pos, neg = np.zeros(classes), np.zeros(classes)
    for step in range(3):
        logits, labels, quality = rows(step, n, classes, dtype, scale)
        if not background:
            labels = labels.clamp(max=classes - 1)
        pos_neg = loss.pos_neg.clone()
        value = loss(logits.requires_grad_(), labels, quality=quality, normalizer=5.0)
        wanted, grad = reference(logits.detach(), labels, quality, pos_neg, 5.0)
        relative, absolute = (1e-6, 1e-6) if dtype == torch.float64 else (1e-4, 1e-5)
        (found,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(wanted, rel=relative)
        np.testing.assert_allclose(found, grad, atol=absolute, rtol=relative)
        target = labels.numpy()[:, None] == np.arange(classes)
        pos += (np.abs(grad) * target).sum(axis=0)
        neg += (np.abs(grad) * ~target).sum(axis=0)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(loss.pos_grad, pos, rtol=tolerance)
    np.testing.assert_allclose(loss.neg_grad, neg, rtol=tolerance)
    np.testing.assert_allclose(loss.pos_neg, np.clip(pos / (neg + 1e-10), 0, 1), rtol=2 * tolerance)


def test_quality_one_is_the_plain_loss_without_alpha(build, stats_of):
    logits, labels, quality = rows(1, 30, 6)
    plain = EFL(stats_of([5] * 6), focal_alpha=-1.0)
    one, default = build(6), build(6)
    for _ in range(2):
        wanted = plain(logits, labels)
        torch.testing.assert_close(one(logits, labels, quality=torch.ones_like(quality)), wanted)
        torch.testing.assert_close(default(logits, labels), wanted)
    torch.testing.assert_close(one.pos_grad, plain.pos_grad)


@pytest.mark.parametrize("options", [{}, {"focal_gamma": 0.7, "scale_factor": 0.2}])
def test_gradcheck(build, options):
    loss = build(5, **options)
    loss(*rows(0, 30, 5)[:2])
    loss.eval()
    logits, labels, quality = rows(1, 9, 5)
    quality[0], quality[1] = 0, 1
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, quality=quality), logits.requires_grad_())


@pytest.mark.parametrize("focal_gamma", [0.5, 2.0])
def test_a_prediction_equal_to_its_quality_has_no_gradient(build, focal_gamma):
    loss = build(1, focal_gamma=focal_gamma, scale_factor=0.0)
    logits = torch.zeros((1, 1), requires_grad=True)
    value = loss(logits, torch.tensor([0]), quality=torch.tensor([0.5]))
    value.backward()
    assert value.item() < 1e-12
    assert logits.grad.item() == 0


@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_are_one_on_the_joined_batch(run_on_ranks, build, empty):
    batches = [(rows(10 + step, 9, 6), rows(20 + step, 0 if empty else 14, 6)) for step in range(3)]

    def on_rank(rank):
        loss, values = build(6), []
        for batch in batches:
            logits, labels, quality = batch[rank]
            values.append(loss(logits, labels, quality=quality).item())
        return values, loss.pos_neg.numpy()

    results = run_on_ranks(on_rank)
    joined = build(6)
    for step, batch in enumerate(batches):
        logits, labels, quality = (torch.cat(parts) for parts in zip(*batch, strict=True))
        value = joined(logits, labels, quality=quality)
        assert sum(result[0][step] for result in results) / 2 == pytest.approx(value.item(), rel=1e-12)
    for _, pos_neg in results:
        np.testing.assert_allclose(pos_neg, joined.pos_neg, rtol=1e-12, atol=1e-15)


def test_rows_and_classes_can_be_permuted(build):
    logits, labels, quality = rows(3, 20, 5)
    order, columns = torch.randperm(20, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0, 4, 1, 2])
    first, turned, renamed = build(5), build(5), build(5)
    value = first(logits, labels, quality=quality)
    torch.testing.assert_close(turned(logits[order], labels[order], quality=quality[order]), value)
    new_label = torch.cat([torch.argsort(columns), torch.tensor([5])])[labels]
    torch.testing.assert_close(renamed(logits[:, columns], new_label, quality=quality), value)
    torch.testing.assert_close(renamed.pos_grad, first.pos_grad[columns])


def test_ignored_rows_take_their_quality_with_them(build):
    logits, labels, quality = rows(4, 12, 5)
    labels[::3] = -1
    keep = labels >= 0
    torch.testing.assert_close(
        build(5)(logits, labels, quality=quality), build(5)(logits[keep], labels[keep], quality=quality[keep])
    )


def test_prior_scores_and_mistakes(build):
    loss = build(6)
    torch.testing.assert_close(loss.scores(loss.prior_bias()[None]), torch.full((1, 6), 0.001))
    with pytest.raises(TypeError, match="focal_alpha"):
        build(3, focal_alpha=0.25)
    with pytest.raises(ValueError, match=r"quality must be \[4\]"):
        logits, labels, _ = rows(0, 4, 6)
        loss(logits, labels, quality=torch.ones((4, 6)))
