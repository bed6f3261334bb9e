"""Seesaw: reference vectors, the formula by itself, its counts over processes, and what it may not break on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.seesaw import Seesaw
from tailfin.stats import ClassStats

CASES = ["a_typical", "a_typical_p0", "a_typical_q0", "b_small", "c_nofg"]


def build(classes, **options):
    return Seesaw(ClassStats(image_count=[3] * classes, instance_count=[4] * classes, num_images=9), **options)


def rows(seed, n, classes, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes + 2), generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes + 1, (n,), generator=generator)


def reference(logits, labels, count, p=0.8, q=2.0, eps=1e-2):
    """(loss, gradient) in NumPy float64, a row at a time; `count` [C + 1] already with these rows."""
    z = np.asarray(logits, dtype=np.float64)
    classes = z.shape[1] - 2
    n = np.maximum(np.asarray(count, dtype=np.float64), 1)
    total, grad = 0.0, np.zeros_like(z)
    for row, label in enumerate(np.asarray(labels)):
        if label < classes:
            s = softmax(z[row, :classes])
            mitigation = np.minimum(n[:classes] / n[label], 1) ** p
            compensation = np.maximum(s / max(s[label], eps), 1) ** q
            compensation[label] = 1
            # softmax of z + log(M R) is proportional to M R softmax(z); sums of logs where s would underflow
            u = z[row, :classes] + np.log(mitigation) + np.log(compensation)
            total += np.logaddexp.reduce(u) - u[label]
            grad[row, :classes] = softmax(u)
            grad[row, label] -= 1
        pair, side = z[row, classes:], int(label == classes)
        total += np.logaddexp.reduce(pair) - pair[side]
        grad[row, classes:] = softmax(pair)
        grad[row, classes + side] -= 1
    return total / len(z), grad / len(z)


def softmax(values):
    return np.exp(values - np.logaddexp.reduce(values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(vectors, assert_close, case, dtype):
    data = vectors("seesaw")
    options = {name: float(value) for name, value in data.under(f"{case}/hp").items()}
    loss = build(int(data[f"{case}/num_classes"]), **options)
    np.testing.assert_array_equal(loss.cum_samples, data[f"{case}/step0/state_before/cum_samples"])
    for step in range(3):
        at = f"{case}/step{step}"
        logits = data.tensor(f"{at}/logits", dtype).requires_grad_()
        value = loss(logits, data.tensor(f"{at}/labels"))
        assert value.dtype == dtype
        assert_close(value, logits, data[f"{at}/loss"], data[f"{at}/grad"])
        for part in ("classes", "objectness"):
            expected = float(data[f"{at}/loss_parts/loss_cls_{part}"])
            assert loss.parts[part].item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float64 else 1e-4)
        np.testing.assert_array_equal(loss.cum_samples, data[f"{at}/state_after/cum_samples"])
        np.testing.assert_allclose(loss.scores(logits.detach()), data[f"{at}/scores"][:, :-1], atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 2.0, True), (1, 24, 2.0, False), (7, 40, 2.0, False), (30, 48, 12.0, True), (1203, 64, 2.0, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(assert_close, classes, n, scale, background, dtype):
    loss, count = build(classes), np.zeros(classes + 1)
    for step in range(3):
        logits, labels = rows(step, n, classes, dtype, scale)
        if not background:
            labels = labels.clamp(max=classes - 1)
        count += np.bincount(labels, minlength=classes + 1)
        value = loss(logits.requires_grad_(), labels)
        assert_close(value, logits, *reference(logits.detach(), labels, count))
    np.testing.assert_array_equal(loss.cum_samples, count)


def test_by_hand():
    # two classes with 8 and 1 rows seen (this one among them); equal logits: s = 1/2, so no compensation
    loss = build(2)
    loss.cum_samples[:2] = torch.tensor([7.0, 1.0])
    logits = torch.zeros((1, 4), dtype=torch.float64, requires_grad=True)
    value = loss(logits, torch.tensor([0]))
    mitigation = (1 / 8) ** 0.8
    assert value.item() == pytest.approx(np.log(1 + mitigation) + np.log(2), rel=1e-12)
    value.backward()
    share = mitigation / (1 + mitigation)
    np.testing.assert_allclose(logits.grad[0], [-share, share, -0.5, 0.5], rtol=1e-12)


def test_without_both_factors_it_is_softmax():
    logits, labels = rows(0, 20, 5)
    loss = build(5, p=0.0, q=0.0)
    foreground = labels < 5
    expected = torch.nn.functional.cross_entropy(logits[foreground, :5], labels[foreground], reduction="sum") / 20
    loss(logits, labels)
    assert loss.parts["classes"].item() == pytest.approx(expected.item(), rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 8), n=st.integers(1, 20))
def test_permuting_rows_and_classes(seed, classes, n):
    generator = torch.Generator().manual_seed(seed)
    count = torch.cat([torch.randint(0, 40, (classes,), generator=generator), torch.zeros(1)])
    logits, labels = rows(seed, n, classes)
    order, columns = torch.randperm(n, generator=generator), torch.randperm(classes, generator=generator)
    first, turned, renamed = build(classes), build(classes), build(classes)
    first.cum_samples.copy_(count)
    turned.cum_samples.copy_(count)
    renamed.cum_samples.copy_(torch.cat([count[:classes][columns], count[classes:]]))
    value = first(logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(turned(logits[order], labels[order]), value)
    columns = torch.cat([columns, torch.tensor([classes, classes + 1])])
    permuted = logits.detach()[:, columns].requires_grad_()
    other = renamed(permuted, torch.argsort(columns[: classes + 1])[labels])
    torch.testing.assert_close(other, value)
    (permuted_grad,) = torch.autograd.grad(other, permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


@pytest.mark.parametrize("situation", ["both", "no foreground on one", "no rows on one"])
def test_two_processes_are_one_on_the_joined_batch(run_on_ranks, situation):
    classes, batches = 6, []
    for step in range(3):
        first, second = rows(10 + step, 8, classes), rows(20 + step, 8, classes)
        if situation == "no foreground on one":
            second = second[0], torch.full_like(second[1], classes)
        if situation == "no rows on one":
            second = second[0][:0], second[1][:0]
        batches.append((first, second))

    def on_rank(rank):
        loss, values, grads = build(classes), [], []
        for batch in batches:
            logits = batch[rank][0].clone().requires_grad_()
            value = loss(logits, batch[rank][1])
            value.backward()
            values.append(value.item())
            grads.append(logits.grad.numpy())
        return values, grads, loss.cum_samples.numpy()

    results, joined = run_on_ranks(on_rank), build(classes)
    ranks = 1 if situation == "no rows on one" else 2  # each process divides by its own rows
    for step, batch in enumerate(batches):
        logits = torch.cat([part[0] for part in batch]).requires_grad_()
        value = joined(logits, torch.cat([part[1] for part in batch]))
        value.backward()
        assert sum(result[0][step] for result in results) / ranks == pytest.approx(value.item(), rel=1e-12)
        grads = np.concatenate([result[1][step] for result in results]) / ranks
        np.testing.assert_allclose(grads, logits.grad, rtol=1e-10, atol=1e-15)
    for result in results:
        np.testing.assert_array_equal(result[2], joined.cum_samples)


@pytest.mark.parametrize("seen", [0.0, 1e9])
def test_extreme_logits_and_half_precision_stay_finite(seen):
    for change in (lambda z: 60 * z, lambda z: z.bfloat16(), lambda z: z.half(), lambda z: -300 + 0 * z):
        loss = build(1203)
        loss.cum_samples[::2] = seen
        logits, labels = rows(7, 16, 1203, torch.float32)
        value = change(logits).detach().requires_grad_()
        result = loss(value, labels)
        result.backward()
        assert result.dtype == torch.float32
        assert torch.isfinite(result)
        assert torch.isfinite(value.grad).all()
        assert torch.isfinite(loss.scores(value.detach())).all()


def test_prior_and_options():
    loss = build(6)
    assert loss.num_logits == 8
    torch.testing.assert_close(loss.scores(loss.prior_bias()[None]), torch.full((1, 6), 1 / 12))
    for options in ({"p": -0.1}, {"q": -1.0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(3, **options)
