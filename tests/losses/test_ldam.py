"""LDAM and its deferred re-weighting: reference vectors, the formula by itself, what it may not break on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.ldam import LDAM
from tailfin.stats import ClassStats

CASES = ["a_typical", "a_typical_drw", "b_small", "c_nofg"]


def build(count, **options):
    # LDAM is made of instance counts: image counts must not matter
    count = np.asarray(count)
    return LDAM(ClassStats(image_count=(count + 1) // 2, instance_count=count, num_images=10**6), **options)


def counts(classes, seed=0):
    return np.random.default_rng(seed).permutation(np.ceil(20000 / np.arange(1, classes + 1) ** 1.5)).astype(int)


def rows(seed, n, classes, dtype=torch.float64, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes + 1), generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes + 1, (n,), generator=generator)


def reference(logits, labels, count, beta=None, max_m=0.5, s=30.0, bg_ratio=3):
    """(loss, gradient) in NumPy float64, a row at a time."""
    z = np.asarray(logits, dtype=np.float64)
    n = np.append(np.maximum(count, 1), bg_ratio * np.maximum(count, 1).sum())
    margin = n ** (-1 / 4)
    margin *= max_m / margin.max()
    weight = np.ones_like(margin)
    if beta is not None:
        weight = (1 - beta) / (1 - beta**n)
        weight *= len(n) / weight.sum()
    total, grad = 0.0, np.zeros_like(z)
    for row, label in enumerate(np.asarray(labels)):
        u = s * z[row]
        u[label] -= s * margin[label]
        top = np.logaddexp.reduce(u)
        total += weight[label] * (top - u[label])
        grad[row] = np.exp(u - top)
        grad[row, label] -= 1
        grad[row] *= weight[label] * s
    divisor = weight[np.asarray(labels)].sum()
    return total / divisor, grad / divisor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(vectors, assert_close, case, dtype):
    data = vectors("ldam")
    options = {name: float(value) for name, value in data.under(f"{case}/hp").items()}
    loss = build(data[f"{case}/class_count"], **options)
    np.testing.assert_allclose(loss.margin, data[f"{case}/margins"], rtol=1e-12)
    if f"{case}/per_cls_weights" in data:
        np.testing.assert_allclose(loss.weight, data[f"{case}/per_cls_weights"], rtol=1e-9)
    logits = data.tensor(f"{case}/logits", dtype).requires_grad_()
    value = loss(logits, data.tensor(f"{case}/labels"))
    assert value.dtype == dtype
    assert_close(value, logits, data[f"{case}/loss"], data[f"{case}/grad"])
    torch.testing.assert_close(loss.scores(logits.detach()), (30 * logits.detach()).softmax(dim=1)[:, :-1])


@pytest.mark.parametrize("beta", [None, 0.0, 0.9999])
@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 0.3, True), (1, 24, 0.3, False), (7, 40, 0.3, False), (30, 48, 2.0, True), (1203, 64, 0.3, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(assert_close, classes, n, scale, background, dtype, beta):
    count = counts(classes)
    count[0] = 0  # counts as 1
    logits, labels = rows(classes, n, classes, dtype, scale)
    if not background:
        labels = labels.clamp(max=classes - 1)
    value = build(count, drw_beta=beta)(logits.requires_grad_(), labels)
    wanted, grad = reference(logits.detach(), labels, count, beta)
    if dtype == torch.float32 and scale > 1:  # exponents up to 200: float32's own rounding of the logits shows
        (found,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(wanted, rel=1e-4)
        np.testing.assert_allclose(found, grad, atol=1e-4, rtol=1e-4)
    else:
        assert_close(value, logits, wanted, grad)


def test_by_hand():
    # counts 1, 15 and background 16 = 1 x their sum: margins 1/2, 15^-1/4 / 2 and 1/4
    loss = build([1, 15], s=2.0, bg_ratio=1.0)
    np.testing.assert_allclose(loss.margin, [0.5, 0.5 * 15**-0.25, 0.25])
    value = loss(torch.zeros((2, 3), dtype=torch.float64), torch.tensor([0, 2]))
    assert value.item() == pytest.approx((np.log(1 + 2 * np.e) + np.log(1 + 2 * np.e**0.5)) / 2, rel=1e-12)


@pytest.mark.parametrize("beta", [None, 0.99])
def test_gradcheck(beta):
    loss = build(counts(5), drw_beta=beta)
    logits, labels = rows(1, 9, 5)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 8), n=st.integers(1, 20), beta=st.sampled_from([None, 0.999]))
def test_permuting_rows_and_classes(seed, classes, n, beta):
    generator = torch.Generator().manual_seed(seed)
    count = counts(classes, seed)
    logits, labels = rows(seed, n, classes)
    loss = build(count, drw_beta=beta)
    value = loss(logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(value, logits)
    order, columns = torch.randperm(n, generator=generator), torch.randperm(classes, generator=generator)
    torch.testing.assert_close(loss(logits[order], labels[order]), value)
    renamed = build(count[columns.numpy()], drw_beta=beta)
    columns = torch.cat([columns, torch.tensor([classes])])
    permuted = logits.detach()[:, columns].requires_grad_()
    other = renamed(permuted, torch.argsort(columns)[labels])
    torch.testing.assert_close(other, value)
    (permuted_grad,) = torch.autograd.grad(other, permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


def test_state_prior_and_options():
    loss = build(counts(6))
    assert loss.state_dict() == {}
    assert loss.half().margin.dtype == torch.float64
    torch.testing.assert_close(loss.scores(loss.prior_bias()[None]), torch.full((1, 6), 1 / 7))
    for options in ({"max_m": -0.1}, {"s": 0.0}, {"drw_beta": 1.0}, {"bg_ratio": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build([1, 2], **options)
