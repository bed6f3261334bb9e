"""BAGS: reference vectors of both public codes, layout, random rows, gradients, and what it may not break on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.bags import BAGS
from tailfin.stats import ClassStats

CASES = ["a_typical", "a_typical_allothers", "b_small", "c_nofg"]


def build(count, **options):
    # bins are made of instance counts: image counts must not matter
    count = np.asarray(count)
    return BAGS(ClassStats(image_count=(count + 1) // 2, instance_count=count, num_images=10**6), **options)


def counts(classes, seed=0):
    return np.random.default_rng(seed).permutation(np.ceil(20000 / np.arange(1, classes + 1) ** 1.5)).astype(int)


def rows(seed, n, loss, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, loss.num_logits), generator=generator, dtype=dtype)
    return logits, torch.randint(0, loss.num_classes + 1, (n,), generator=generator)


def layout(count, edges=(10, 100, 1000)):
    """[(logit columns, {label: place in them})] of the bins, bin 0 first, built a class at a time."""
    count = np.maximum(count, 1)
    bins = [([0, 1], {len(count): 0, **dict.fromkeys(range(len(count)), 1)})]
    start, bounds = 2, [0, *edges, np.inf]
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        members = [label for label in range(len(count)) if low <= count[label] < high]
        bins.append((list(range(start, start + 1 + len(members))), {c: k + 1 for k, c in enumerate(members)}))
        start += 1 + len(members)
    return bins


def reference(logits, labels, count, draws, edges=(10, 100, 1000)):
    """(loss, gradient) in NumPy float64, a bin and a row at a time."""
    z = np.asarray(logits, dtype=np.float64)
    total, grad = 0.0, np.zeros_like(z)
    for (columns, place), weight in zip(layout(count, edges), np.asarray(draws), strict=True):
        divisor = max(weight.sum(), 1)
        for row in np.flatnonzero(weight):
            part = z[row, columns]
            target = place.get(int(labels[row]), 0)
            top = np.logaddexp.reduce(part)
            total += (top - part[target]) / divisor
            grad[row, columns] += np.exp(part - top) / divisor
            grad[row, columns[target]] -= 1 / divisor
    return total, grad


def scores_reference(logits, count):
    z = np.asarray(logits, dtype=np.float64)
    scores = np.zeros((len(z), len(count)))
    foreground = 1 / (1 + np.exp(z[:, 0] - z[:, 1]))
    for columns, place in layout(count)[1:]:
        inside = np.exp(z[:, columns] - np.logaddexp.reduce(z[:, columns], axis=1, keepdims=True))
        for label, k in place.items():
            scores[:, label] = inside[:, k] * foreground
    return scores


def some_rows(loss, labels, seed=0):
    return loss.choose_rows(loss.bin_label[:, labels], torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(vectors, assert_close, case, dtype):
    data = vectors("bags")
    classes = int(data[f"{case}/num_classes"])
    count = data["a_typical/class_count" if case.startswith("a_typical") else f"{case}/class_count"]
    options = {name: value.tolist() for name, value in data.under(f"{case}/hp").items()}
    loss = build(count, **options)
    np.testing.assert_array_equal(loss.slices, data[f"{case}/pred_slice"])
    np.testing.assert_array_equal(loss.bin_label.roll(1, dims=1), data[f"{case}/label2binlabel"])
    logits = data.tensor(f"{case}/logits", dtype).requires_grad_()
    labels = data.tensor(f"{case}/labels")
    labels = torch.where(labels == 0, classes, labels - 1)
    value = loss(logits, labels, draws=data[f"{case}/bin_row_weights"])
    assert value.dtype == dtype
    assert_close(value, logits, data[f"{case}/loss"], data[f"{case}/grad"])
    parts = [loss.parts[f"bin{k}"].item() for k in range(5)]
    np.testing.assert_allclose(parts, data[f"{case}/bin_losses"], rtol=1e-6 if dtype == torch.float64 else 1e-4)
    np.testing.assert_allclose(loss.scores(logits.detach()), data[f"{case}/scores"][:, 1:], atol=1e-6)


@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
def test_reference_vectors_of_the_port_with_background_last(vectors, assert_close, case):
    # EQL v2's port has the bins first and [foreground, background] as the last group
    data = vectors("bags")
    loss = build(data[f"{case}/class_count"], others_sample_ratio=float(data[f"{case}/eqlv2repo/hp/beta"]))
    logits = data.tensor(f"{case}/eqlv2repo/logits", torch.float64)
    width = logits.shape[1]
    columns = [width - 1, width - 2, *range(width - 2)]
    logits = logits[:, columns].requires_grad_()
    labels = data.tensor(f"{case}/eqlv2repo/labels")
    value = loss(logits, labels, draws=np.roll(data[f"{case}/eqlv2repo/group_row_weights"], 1, axis=0))
    assert_close(value, logits, data[f"{case}/eqlv2repo/loss"], data[f"{case}/eqlv2repo/grad"][:, columns])
    scores = data[f"{case}/eqlv2repo/scores"][:, : loss.num_classes]
    np.testing.assert_allclose(loss.scores(logits.detach()), scores, atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 2.0, True), (1, 24, 2.0, False), (7, 40, 2.0, False), (30, 48, 12.0, True), (1203, 64, 2.0, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(assert_close, classes, n, scale, background, dtype):
    count = counts(classes)
    count[0] = 0  # counts as 1
    loss = build(count)
    assert loss.num_logits == classes + 6
    logits, labels = rows(classes, n, loss, dtype, scale)
    if not background:
        labels = labels.clamp(max=classes - 1)
    draws = some_rows(loss, labels)
    value = loss(logits.requires_grad_(), labels, draws=draws)
    assert_close(value, logits, *reference(logits.detach(), labels, count, draws))
    np.testing.assert_allclose(loss.scores(logits.detach()), scores_reference(logits.detach(), count), atol=1e-6)
    assert loss(logits, labels, generator=torch.Generator().manual_seed(0)).item() == value.item()


def test_other_edges():
    count = [3, 7, 5, 6]
    loss = build(count, bin_edges=[6])
    assert loss.num_logits == 8
    assert loss.slices == [(0, 2), (2, 3), (5, 3)]  # classes 0, 2 and classes 1, 3
    logits, labels = rows(0, 12, loss)
    draws = some_rows(loss, labels)
    value, _ = reference(logits, labels, count, draws, edges=(6,))
    assert loss(logits, labels, draws=draws).item() == pytest.approx(value, rel=1e-12)
    single = build(count, bin_edges=[])
    assert single.slices == [(0, 2), (2, 5)]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0, 8.0, 1000.0])
def test_random_rows(ratio):
    loss = build([5, 50, 500, 5000], others_sample_ratio=ratio)
    labels = torch.tensor([0] * 3 + [1] + [2] * 10 + [4] * 40)
    targets = loss.bin_label[:, labels]
    chosen = some_rows(loss, labels)
    assert chosen[0].all()
    for own, total, row in zip((3, 1, 10, 0), (labels == c for c in range(4)), chosen[1:], strict=True):
        assert row[total].all()
        assert row.sum() == own + min(int(ratio * own), len(labels) - own)
    assert torch.equal(some_rows(loss, labels), chosen)
    if 0 < ratio < 5:
        assert not torch.equal(some_rows(loss, labels, 1), chosen)
        often = torch.stack([loss.choose_rows(targets)[1] for _ in range(300)]).float().mean(dim=0)[3:]
        torch.testing.assert_close(often, torch.full((51,), int(3 * ratio) / 51), atol=0.12, rtol=0)


def test_gradcheck():
    loss = build([5, 50, 7, 5000])
    logits, labels = rows(1, 5, loss)
    draws = some_rows(loss, labels)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, draws=draws), logits.requires_grad_())


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 8), n=st.integers(1, 20))
def test_permuting_rows_and_classes(seed, classes, n):
    generator = torch.Generator().manual_seed(seed)
    count = counts(classes, seed)
    loss = build(count)
    logits, labels = rows(seed, n, loss)
    draws = some_rows(loss, labels, seed)
    value = loss(logits.requires_grad_(), labels, draws=draws)
    (grad,) = torch.autograd.grad(value, logits)
    order, classes_order = torch.randperm(n, generator=generator), torch.randperm(classes, generator=generator)
    torch.testing.assert_close(loss(logits[order], labels[order], draws=draws[:, order]), value)
    renamed = build(count[classes_order.numpy()])
    # a class's logit moves to its new column; "others", background and foreground stay
    columns = torch.arange(loss.num_logits)
    columns[renamed.column] = loss.column[classes_order]
    new_label = torch.cat([torch.argsort(classes_order), torch.tensor([classes])])
    permuted = logits.detach()[:, columns].requires_grad_()
    other = renamed(permuted, new_label[labels], draws=draws)
    torch.testing.assert_close(other, value)
    (permuted_grad,) = torch.autograd.grad(other, permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


@pytest.mark.parametrize("labels", [[], [-1, -1], [3, 3, 3], [0], [-1, 2, 3, 0]])
def test_no_rows_and_no_foreground(labels):
    loss = build([5, 0, 200])
    logits = torch.randn((len(labels), 9), generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = loss(logits, torch.tensor(labels, dtype=torch.int64))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    if not any(label >= 0 for label in labels):
        assert value.item() == 0
    if not any(label in (0, 1, 2) for label in labels):
        assert all(loss.parts[f"bin{k}"].item() == 0 for k in range(1, 5))


def test_ignored_rows_are_removed_first():
    loss = build(counts(4))
    logits, labels = rows(6, 30, loss)
    padded = torch.cat([torch.full((3, loss.num_logits), 50.0, dtype=logits.dtype), logits])
    draws = some_rows(loss, labels)
    other = loss(padded, torch.cat([torch.full((3,), -1), labels]), draws=draws)
    torch.testing.assert_close(other, loss(logits, labels, draws=draws))


def test_state_prior_and_options():
    loss = build([5, 50, 60])
    assert loss.state_dict() == {}
    # softmaxes of one and two classes beside "others", times P(foreground) = 1/2
    np.testing.assert_allclose(loss.scores(loss.prior_bias()[None])[0], [1 / 4, 1 / 6, 1 / 6], rtol=1e-6)
    with pytest.raises(ValueError, match=r"draws must be \[5, 2\]"):
        loss(torch.zeros((2, 9)), torch.tensor([0, 1]), draws=np.ones((2, 5)))
    for options in ({"others_sample_ratio": -1.0}, {"bin_edges": (10, 10)}, {"bin_edges": (0, 5)}, {"bin_edges": 10}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options)) if "bin_edges" not in options else None):
            build([1, 2], **options)
