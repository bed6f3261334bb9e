"""Equilibrium loss: reference vectors, the mean score over boxes, memory rows and processes, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.ebl import EBL
from tailfin.losses.softmax import Softmax
from tailfin.stats import ClassStats


def updated_score(mean_score, logits, labels, gt_index, memory, alpha=0.9, bg_score=0.01):
    """The mean score after a batch, in NumPy float64, class by class and box by box from the documented rule."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    prob = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels, gt_index, memory = (np.asarray(array) for array in (labels, gt_index, memory))
    classes = z.shape[1] - 1
    result, any_value = np.array(mean_score, dtype=np.float64), False
    for c in range(classes):
        boxes = np.unique(gt_index[(labels == c) & ~memory & (gt_index >= 0)])
        values = [prob[(labels == c) & ~memory & (gt_index == box), c].mean() for box in boxes]
        if (memory & (labels == c)).any():
            values.append(prob[memory & (labels == c), c].mean())
        if values:
            keep = alpha ** len(values)
            result[c] = keep * result[c] + (1 - keep) * np.mean(values)
            any_value = True
    if any_value:
        result[-1] = bg_score
    return result


def reference(logits, labels, mean_score):
    """(loss, gradient) in NumPy float64."""
    z = np.asarray(logits, dtype=np.float64) + np.log(mean_score)
    z = z - z.max(axis=1, keepdims=True)
    log_prob = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    target = np.asarray(labels)[:, None] == np.arange(z.shape[1])
    return -log_prob[target].mean(), (np.exp(log_prob) - target) / len(z)


def rows(seed, n, classes, dtype=torch.float64, scale=2.0, background=True):
    """Logits, labels, gt_index (three rows per box or none) and memory rows (the last fifth, all foreground)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes + 1), generator=generator, dtype=dtype)
    box_class = torch.randint(0, classes, (max(n // 4, 1),), generator=generator)
    gt_index = torch.randint(-1 if background else 0, len(box_class), (n,), generator=generator)
    labels = torch.where(gt_index >= 0, box_class[gt_index.clamp(min=0)], classes)
    memory = torch.arange(n) >= n - n // 5
    labels = torch.where(memory, torch.randint(0, classes, (n,), generator=generator), labels)
    return logits, labels, torch.where(memory, -1, gt_index), memory


@pytest.fixture
def build(stats_of):
    return lambda classes, **options: EBL(stats_of([5] * classes), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
def test_reference_vectors(vectors, build, assert_close, case, dtype):
    data = vectors("loce")
    loss = build(int(data[f"{case}/num_classes"]), **{k: float(v) for k, v in data.under(f"{case}/hp").items()})
    np.testing.assert_array_equal(loss.mean_score, data[f"{case}/step0/state_before/mean_score"])
    per_image = int(data[f"{case}/rois_per_image"])
    for step in range(3):
        at = f"{case}/step{step}"
        logits = data.tensor(f"{at}/logits", dtype).requires_grad_()
        labels = data.tensor(f"{at}/labels")
        gt_index = torch.full_like(labels, -1)
        boxes = 0
        for image in range(2):
            assigned = data.tensor(f"{at}/pos_assigned_gt_img{image}")
            gt_index[image * per_image : image * per_image + len(assigned)] = assigned + boxes
            boxes += len(data[f"{at}/gt_labels_img{image}"])
        memory = torch.arange(len(labels)) >= len(labels) - len(data[f"{at}/selected_labels"])
        value = loss(logits, labels, gt_index=gt_index, memory=memory)
        assert_close(value, logits, data[f"{at}/loss"], data[f"{at}/grad"])
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(loss.mean_score, data[f"{at}/state_after/mean_score"], rtol=0, atol=tolerance)
    torch.testing.assert_close(loss.scores(logits.detach()), logits.detach().softmax(1)[:, :-1])


@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 2.0, True), (1, 20, 2.0, False), (7, 40, 2.0, False), (30, 60, 12.0, True), (1203, 200, 2.0, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(build, assert_close, classes, n, scale, background, dtype):
    loss = build(classes)
    score = loss.mean_score.numpy().copy()
    for step in range(3):
        logits, labels, gt_index, memory = rows(step, n, classes, dtype, scale, background)
        value = loss(logits.requires_grad_(), labels, gt_index=gt_index, memory=memory)
        score = updated_score(score, logits.detach(), labels, gt_index, memory)
        assert_close(value, logits, *reference(logits.detach(), labels, score))
        np.testing.assert_allclose(loss.mean_score, score, rtol=1e-12 if dtype == torch.float64 else 1e-4)


def test_mean_score_by_hand(build):
    # two boxes of class 0: values (1/2 + 1/4) / 2 over its two rows, and 1/2; a memory class 1 with one value 1/2
    loss = build(2, alpha=0.5, bg_score=0.2, init_mean_score=0.1)
    logits = torch.tensor([[2.0, 1, 1], [1.0, 1, 2], [2.0, 1, 1], [1.0, 2, 1], [1.0, 2, 1]], dtype=torch.float64).log()
    labels = torch.tensor([0, 0, 0, 1, 1])
    gt_index = torch.tensor([4, 4, 9, -1, -1])
    loss(logits, labels, gt_index=gt_index, memory=torch.tensor([False, False, False, True, True]))
    wanted = [0.25 * 0.1 + 0.75 * (0.375 + 0.5) / 2, 0.5 * 0.1 + 0.5 * 0.5, 0.2]
    np.testing.assert_allclose(loss.mean_score, wanted, rtol=1e-12)


def test_defaults_of_the_keywords(build):
    logits, labels, _, memory = rows(1, 20, 4)
    one, other = build(4), build(4)
    torch.testing.assert_close(one(logits, labels), other(logits, labels, gt_index=torch.arange(20)))
    assert torch.equal(one.mean_score, other.mean_score)
    untouched = build(4)
    untouched(logits, labels, gt_index=torch.full((20,), -1))
    assert untouched.mean_score.tolist() == [0.01] * 5


def test_equal_scores_are_plain_softmax(build, stats_of):
    logits, labels, _, _ = rows(2, 20, 4)
    loss = build(4).eval()
    torch.testing.assert_close(loss(logits, labels), Softmax(stats_of([5] * 4))(logits, labels))
    assert torch.equal(loss.prior_bias(), torch.zeros(5))


def test_gradcheck(build):
    loss = build(5)
    logits, labels, gt_index, memory = rows(0, 20, 5)
    loss(logits, labels, gt_index=gt_index, memory=memory)
    loss.eval()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 8), n=st.integers(1, 30))
def test_permuting_rows_and_classes(seed, classes, n):
    def build():
        counts = np.full(classes, 3)
        loss = EBL(ClassStats(image_count=counts, instance_count=counts, num_images=9))
        loss.mean_score[:-1] = torch.linspace(0.01, 0.9, classes, dtype=torch.float64)
        return loss

    logits, labels, gt_index, memory = rows(seed, n, classes)
    first, turned, renamed = build(), build(), build()
    value = first(logits.requires_grad_(), labels, gt_index=gt_index, memory=memory)
    (grad,) = torch.autograd.grad(value, logits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    # other numbers for the boxes change nothing either
    other = turned(
        logits[order],
        labels[order],
        gt_index=torch.where(gt_index < 0, -1, 7 * gt_index + 3)[order],
        memory=memory[order],
    )
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(turned.mean_score, first.mean_score)

    columns = torch.cat([torch.randperm(classes, generator=generator), torch.tensor([classes])])
    renamed.mean_score.copy_(renamed.mean_score[columns].clone())
    permuted = logits.detach()[:, columns].requires_grad_()
    other = renamed(permuted, torch.argsort(columns)[labels], gt_index=gt_index, memory=memory)
    (permuted_grad,) = torch.autograd.grad(other, permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])
    torch.testing.assert_close(renamed.mean_score, first.mean_score[columns])


@pytest.mark.parametrize("situation", ["both", "no foreground on one", "no rows on one"])
def test_two_processes_are_one_on_the_joined_batch(run_on_ranks, build, situation):
    batches = []
    for step in range(3):
        first, second = rows(10 + step, 25, 6), list(rows(20 + step, 40, 6))
        second[2] = torch.where(second[2] < 0, -1, second[2] + 100)
        if situation == "no foreground on one":
            second[1:] = torch.full((40,), 6), torch.full((40,), -1), torch.zeros(40, dtype=torch.bool)
        if situation == "no rows on one":
            second = [part[:0] for part in second]
        batches.append((first, second))

    def on_rank(rank):
        loss, values = build(6), []
        for batch in batches:
            logits, labels, gt_index, memory = batch[rank]
            values.append(loss(logits, labels, gt_index=gt_index, memory=memory).item() * len(labels))
        return values, loss.mean_score.numpy()

    results = run_on_ranks(on_rank)
    joined = build(6)
    for step, batch in enumerate(batches):
        logits, labels, gt_index, memory = (torch.cat(parts) for parts in zip(*batch, strict=True))
        value = joined(logits, labels, gt_index=gt_index, memory=memory)
        assert sum(result[0][step] for result in results) == pytest.approx(value.item() * len(labels), rel=1e-12)
    for _, mean_score in results:
        np.testing.assert_allclose(mean_score, joined.mean_score, rtol=1e-12)
        np.testing.assert_array_equal(mean_score, results[0][1])


def test_ignored_rows_take_their_keywords_with_them(build):
    logits, labels, gt_index, memory = rows(4, 30, 5)
    labels[::3] = -1
    keep = labels >= 0
    one, other = build(5), build(5)
    torch.testing.assert_close(
        one(logits, labels, gt_index=gt_index, memory=memory),
        other(logits[keep], labels[keep], gt_index=gt_index[keep], memory=memory[keep]),
    )
    assert torch.equal(one.mean_score, other.mean_score)


def test_extreme_logits_and_half_precision_stay_finite(build):
    for change in (lambda z: 60 * z, lambda z: z.bfloat16(), lambda z: z.half()):
        loss = build(1203)
        logits, labels, gt_index, memory = rows(7, 30, 1203, torch.float32)
        value = change(logits).detach().requires_grad_()
        result = loss(value, labels, gt_index=gt_index, memory=memory)
        result.backward()
        assert result.dtype == torch.float32
        assert torch.isfinite(result)
        assert torch.isfinite(value.grad).all()


def test_a_score_that_underflows_ends_nothing(build):
    loss = build(2, alpha=0.0)
    logits = torch.tensor([[-2000.0, 0.0, 0.0]], requires_grad=True)
    value = loss(logits, torch.tensor([0]))
    value.backward()
    assert loss.mean_score[0] == 0
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_mistakes(build):
    for options in ({"alpha": 1.5}, {"bg_score": 0.0}, {"init_mean_score": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(3, **options)
