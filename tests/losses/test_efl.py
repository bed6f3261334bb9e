"""Equalized focal loss: reference vectors, gradients, statistics over processes, and what it may not break on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.efl import EFL
from tailfin.losses.focal import Focal

STATE = ("pos_grad", "neg_grad", "pos_neg")
CASES = ["a_typical", "a_typical_noalpha", "b_small", "c_nofg"]


def reference(logits, labels, pos_neg, normalizer, focal_gamma=2.0, scale_factor=8.0, focal_alpha=0.25):
    """(loss, gradient) in NumPy float64 from the documented formula; labels: background C."""
    z = np.asarray(logits, dtype=np.float64)
    classes = z.shape[1]
    target = np.asarray(labels)[:, None] == np.arange(classes)
    gamma = focal_gamma + scale_factor * (1 - np.asarray(pos_neg, dtype=np.float64))
    sign = np.where(target, -1.0, 1.0)  # u = sign z: the element falls with it on targets, rises elsewhere
    weight = gamma / focal_gamma
    if focal_alpha >= 0:
        weight = weight * np.where(target, focal_alpha, 1 - focal_alpha)
    u = sign * z
    wrong = np.exp(-np.logaddexp(0, -u))  # 1 - p_t
    entropy = np.logaddexp(0, u)
    element = weight * wrong**gamma * entropy
    slope = sign * weight * wrong**gamma * (wrong + gamma * entropy * (1 - wrong))
    return element.sum() / normalizer, slope / normalizer


def state_by_hand(grads_and_labels, classes):
    """(pos_grad, neg_grad, pos_neg) after gradients of successive batches."""
    pos, neg = np.zeros(classes), np.zeros(classes)
    for grad, labels in grads_and_labels:
        target = np.asarray(labels)[:, None] == np.arange(classes)
        pos += (np.abs(grad) * target).sum(axis=0)
        neg += (np.abs(grad) * ~target).sum(axis=0)
    return pos, neg, np.clip(pos / (neg + 1e-10), 0, 1)


def rows(seed, n, classes, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes), generator=generator, dtype=dtype)
    labels = torch.randint(0, classes + 1, (n,), generator=generator)
    return logits, labels


def ours(labels, classes):
    """Labels of the vectors (background 0, ignored -1) as tailfin's."""
    return torch.where(labels > 0, labels - 1, torch.where(labels == 0, classes, -1))


@pytest.fixture
def build(stats_of):
    return lambda classes, **options: EFL(stats_of([5] * classes), **options)


@pytest.mark.parametrize("given_normalizer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(vectors, build, assert_close, case, dtype, given_normalizer):
    data = vectors("efl")
    classes = int(data[f"{case}/num_classes"])
    hp = {key: float(value) for key, value in data.under(f"{case}/hp").items()}
    loss = build(classes, **hp)
    for name in STATE:
        np.testing.assert_array_equal(getattr(loss, name), data[f"{case}/step0/state_before/{name}"])
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for step in range(3):
        at = f"{case}/step{step}"
        logits = data.tensor(f"{at}/logits", dtype).requires_grad_()
        labels = ours(data.tensor(f"{at}/labels"), classes)
        keywords = {"normalizer": float(data[f"{at}/normalizer"])} if given_normalizer else {}
        value = loss(logits, labels, **keywords)
        assert value.dtype == dtype
        assert_close(value, logits, data[f"{at}/loss"], data[f"{at}/grad"])
        for name in STATE:
            np.testing.assert_allclose(
                getattr(loss, name), data[f"{at}/state_after/{name}"], rtol=tolerance, atol=tolerance
            )
    np.testing.assert_allclose(loss.scores(logits.detach()), logits.detach().sigmoid())


@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 2.0, True), (1, 24, 2.0, False), (7, 40, 2.0, False), (30, 48, 12.0, True), (1203, 64, 2.0, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(build, assert_close, classes, n, scale, background, dtype):
    loss = build(classes)
    history = []
    for step in range(3):
        logits, labels = rows(step, n, classes, dtype, scale)
        if not background:
            labels = labels.clamp(max=classes - 1)
        pos_neg = loss.pos_neg.clone()
        value = loss(logits.requires_grad_(), labels)
        wanted, grad = reference(logits.detach(), labels, pos_neg, max(1, int((labels < classes).sum())))
        if dtype == torch.float64:
            assert_close(value, logits, wanted, grad)
        else:
            (found,) = torch.autograd.grad(value, logits)
            assert value.item() == pytest.approx(wanted, rel=1e-4)
            np.testing.assert_allclose(found, grad, atol=1e-5, rtol=1e-4)
        history.append((grad, labels))
    for found, wanted in zip(
        (loss.pos_grad, loss.neg_grad, loss.pos_neg), state_by_hand(history, classes), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-9 if dtype == torch.float64 else 1e-4, atol=1e-12)


def test_by_hand(build):
    # one class, one row of it with p = 1/2: gamma 2, weight 1: 0.25 * 0.5^2 log 2; slope -0.25 * 0.5^2 (0.5 + log 2)
    loss = build(1)
    logits = torch.zeros((1, 1), dtype=torch.float64, requires_grad=True)
    value = loss(logits, torch.tensor([0]), normalizer=2.0)
    assert value.item() == pytest.approx(0.0625 * np.log(2) / 2, rel=1e-12)
    assert loss.pos_grad.item() == pytest.approx(0.0625 * (0.5 + np.log(2)) / 2, rel=1e-12)
    assert (loss.neg_grad.item(), loss.pos_neg.item()) == (0, 1)
    # a background row next: g = 0 is 2, gamma and weight are still those of g = 1
    loss(logits, torch.tensor([1]), normalizer=2.0)
    assert loss.neg_grad.item() == pytest.approx(0.1875 * (0.5 + np.log(2)) / 2, rel=1e-12)
    assert loss.pos_neg.item() == pytest.approx(1 / 3)
    # now gamma = 2 + 8 * 2/3
    gamma = 2 + 16 / 3
    value = loss(logits, torch.tensor([0]))
    assert value.item() == pytest.approx(gamma / 2 * 0.25 * 0.5**gamma * np.log(2), rel=1e-8)


def test_classes_in_balance_are_focal(build, stats_of):
    logits, labels = rows(1, 30, 6)
    torch.testing.assert_close(build(6)(logits, labels), Focal(stats_of([5] * 6))(logits, labels))


@pytest.mark.parametrize("options", [{}, {"focal_alpha": -1.0, "focal_gamma": 0.7, "scale_factor": 3.0}])
def test_gradcheck(build, options):
    loss = build(5, **options)
    loss(*rows(0, 30, 5))
    loss.eval()
    logits, labels = rows(1, 9, 5)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


def test_statistics_ignore_what_happens_to_the_loss_afterwards(build):
    logits, labels = rows(2, 12, 4)
    plain, weighted = build(4), build(4)
    for _ in range(2):
        one, other = (logits.clone().requires_grad_() for _ in range(2))
        plain(one, labels).backward()
        (weighted(other, labels) * 65536).backward()
        torch.testing.assert_close(other.grad, 65536 * one.grad, rtol=0, atol=0)
        with torch.no_grad():
            forward_only = build(4)
            forward_only.load_state_dict(plain.state_dict())
    for name in STATE:
        assert torch.equal(getattr(plain, name), getattr(weighted, name))
        assert torch.equal(getattr(plain, name), getattr(forward_only, name))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 8), n=st.integers(1, 20))
def test_permuting_rows_and_classes(seed, classes, n):
    from tailfin.stats import ClassStats

    def build():
        counts = np.full(classes, 3)
        loss = EFL(ClassStats(image_count=counts, instance_count=counts, num_images=9))
        loss(*rows(seed + 1, 15, classes))
        return loss

    logits, labels = rows(seed, n, classes)
    first, turned, renamed = build(), build(), build()
    value = first(logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(value, logits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    torch.testing.assert_close(turned(logits[order], labels[order]), value)
    torch.testing.assert_close(turned.pos_neg, first.pos_neg)

    columns = torch.randperm(classes, generator=generator)
    for name in STATE:
        getattr(renamed, name).copy_(getattr(renamed, name)[columns].clone())
    new_label = torch.cat([torch.argsort(columns), torch.tensor([classes])])[labels]
    permuted = logits.detach()[:, columns].requires_grad_()
    other = renamed(permuted, new_label)
    (permuted_grad,) = torch.autograd.grad(other, permuted)
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(permuted_grad, grad[:, columns])
    torch.testing.assert_close(renamed.pos_neg, first.pos_neg[columns])


@pytest.mark.parametrize("situation", ["both", "no foreground on one", "no rows on one", "normaliser given"])
def test_two_processes_are_one_on_the_joined_batch(run_on_ranks, build, situation):
    classes, batches = 6, []
    for step in range(3):
        first, second = rows(10 + step, 9, classes), rows(20 + step, 14, classes)
        if situation == "no foreground on one":
            second = second[0], torch.full_like(second[1], classes)
        if situation == "no rows on one":
            second = second[0][:0], second[1][:0]
        batches.append((first, second))
    normalizer = 7.0 if situation == "normaliser given" else None

    def on_rank(rank):
        loss, values, grads = build(classes), [], []
        for batch in batches:
            logits = batch[rank][0].clone().requires_grad_()
            value = loss(logits, batch[rank][1], normalizer=normalizer)
            value.backward()
            values.append(value.item())
            grads.append(logits.grad.numpy())
        return values, grads, {name: getattr(loss, name).numpy() for name in STATE}

    results = run_on_ranks(on_rank)
    joined = build(classes)
    for step, batch in enumerate(batches):
        logits = torch.cat([part[0] for part in batch]).requires_grad_()
        value = joined(logits, torch.cat([part[1] for part in batch]), normalizer=normalizer)
        value.backward()
        # averaged over processes, as DistributedDataParallel does
        share = 1 if normalizer else 2
        assert sum(result[0][step] for result in results) / share == pytest.approx(value.item(), rel=1e-12)
        grads = np.concatenate([result[1][step] for result in results])
        np.testing.assert_allclose(grads / share, logits.grad, rtol=1e-10, atol=1e-15)
    for result in results:
        for name in STATE:
            np.testing.assert_allclose(result[2][name], getattr(joined, name), rtol=1e-12, atol=1e-15)
            np.testing.assert_array_equal(result[2][name], results[0][2][name])


@pytest.mark.parametrize("pos_neg", [0.0, 1.0])
def test_extreme_logits_and_half_precision_stay_finite(build, pos_neg):
    for change in (lambda z: 60 * z, lambda z: z.bfloat16(), lambda z: z.half(), lambda z: -300 + 0 * z):
        loss = build(1203)
        loss.pos_neg.fill_(pos_neg)
        logits, labels = rows(7, 16, 1203, torch.float32)
        value = change(logits).detach().requires_grad_()
        result = loss(value, labels)
        result.backward()
        assert result.dtype == torch.float32
        assert torch.isfinite(result)
        assert torch.isfinite(value.grad).all()
        assert all(torch.isfinite(getattr(loss, name)).all() for name in STATE)


def test_prior_and_options(build):
    loss = build(6)
    torch.testing.assert_close(loss.scores(loss.prior_bias()[None]), torch.full((1, 6), 0.001))
    for options in ({"focal_gamma": 0.0}, {"scale_factor": -1.0}, {"focal_alpha": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(3, **options)
