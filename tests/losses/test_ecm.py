"""ECM: reference vectors, the formula as it is printed, gradients, and what it may not break on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.ecm import ECM
from tailfin.stats import ClassStats


def build(count, **options):
    # ECM is made of image counts: instance counts must not matter
    count = np.asarray(count)
    return ECM(ClassStats(image_count=count, instance_count=7 * count + 1, num_images=10**6), **options)


def counts(classes, seed=0):
    return np.random.default_rng(seed).permutation(np.ceil(20000 / np.arange(1, classes + 1) ** 1.5)).astype(int)


def rows(seed, n, classes, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes + 1), generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes + 1, (n,), generator=generator)


def reference(logits, labels, count, ratio=6.3313):
    """(loss, gradient) in NumPy float64, with both margins and the four exponentials of the definition (in logs)."""
    z = np.asarray(logits, dtype=np.float64)
    n = np.append(np.maximum(count, 1), ratio * np.maximum(count, 1).sum())
    total = n.sum()
    a, b = n**0.25, (total - n) ** 0.25
    positive, negative = z + np.log((a + b) / b), -z + np.log((a + b) / a)
    log_sum = np.logaddexp(positive, negative)
    r = (total - n) / n
    weight = r * np.log((1 + r) / r)
    target = np.asarray(labels)[:, None] == np.arange(z.shape[1])
    element = -np.where(target, positive - log_sum, negative - log_sum)
    # d(positive - negative)/dz = 2
    grad = 2 * weight * (np.exp(positive - log_sum) - target)
    return (weight * element).sum() / len(z), grad / len(z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
def test_reference_vectors(vectors, assert_close, case, dtype):
    data = vectors("ecm")
    loss = build(data[f"{case}/class_count"], fg_bg_ratio=float(data[f"{case}/hp/fg_bg_ratio"]))
    np.testing.assert_allclose(loss.weight, data[f"{case}/state_before/detection_cls_weight"][0], rtol=1e-12)
    logits = data.tensor(f"{case}/logits", dtype).requires_grad_()
    value = loss(logits, data.tensor(f"{case}/labels"))
    assert value.dtype == dtype
    assert_close(value, logits, data[f"{case}/loss"], data[f"{case}/grad"])
    np.testing.assert_allclose(loss.scores(logits.detach()), data[f"{case}/scores"][:, :-1], atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 2.0, True), (1, 24, 2.0, False), (7, 40, 2.0, False), (30, 48, 12.0, True), (1203, 64, 2.0, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(assert_close, classes, n, scale, background, dtype):
    count = counts(classes)
    count[0] = 0  # counts as 1
    logits, labels = rows(classes, n, classes, dtype, scale)
    if not background:
        labels = labels.clamp(max=classes - 1)
    value = build(count)(logits.requires_grad_(), labels)
    assert_close(value, logits, *reference(logits.detach(), labels, count))


def test_by_hand():
    # one class of 3 images with background 1: r = 1, 1 in both columns: no margin, weight log 2
    loss = build([3], fg_bg_ratio=1.0)
    np.testing.assert_allclose(loss.margin, [0, 0], atol=1e-15)
    np.testing.assert_allclose(loss.weight, [np.log(2)] * 2)
    value = loss(torch.zeros((2, 2), dtype=torch.float64), torch.tensor([0, 1]))
    assert value.item() == pytest.approx(2 * np.log(2) ** 2, rel=1e-12)


def test_gradcheck():
    loss = build(counts(5))
    logits, labels = rows(1, 9, 5)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 8), n=st.integers(1, 20))
def test_permuting_rows_and_classes(seed, classes, n):
    generator = torch.Generator().manual_seed(seed)
    count = counts(classes, seed)
    logits, labels = rows(seed, n, classes)
    loss = build(count)
    value = loss(logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(value, logits)
    order, columns = torch.randperm(n, generator=generator), torch.randperm(classes, generator=generator)
    torch.testing.assert_close(loss(logits[order], labels[order]), value)
    renamed = build(count[columns.numpy()])
    columns = torch.cat([columns, torch.tensor([classes])])
    permuted = logits.detach()[:, columns].requires_grad_()
    other = renamed(permuted, torch.argsort(columns)[labels])
    torch.testing.assert_close(other, value)
    (permuted_grad,) = torch.autograd.grad(other, permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


def test_state_prior_and_options():
    loss = build(counts(6))
    assert loss.state_dict() == {}
    assert loss.half().weight.dtype == torch.float64
    assert loss.num_logits == 7
    torch.testing.assert_close(loss.prior_bias(), torch.zeros(7))
    for ratio in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="fg_bg_ratio"):
            build([1, 2], fg_bg_ratio=ratio)
