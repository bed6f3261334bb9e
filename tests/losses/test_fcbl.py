"""fcbl: reference vectors, a plain re-derivation, every indicator and switch, statistics over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from tailfin.losses.fcbl import FCBL

CASES = ("a_typical", "a_typical_noweight", "a_typical_thr5", "b_small", "c_nofg")
INDICATORS = ("confusion", "image", "instance", "cumulative", "score", "tpr")
DTYPES = (torch.float64, torch.float32)


def rows(seed, n, classes, foreground, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes + 1), generator=generator, dtype=dtype) - 1
    labels = torch.full((n,), classes)
    labels[:foreground] = (torch.rand(foreground, generator=generator) ** 2 * classes).long()
    return logits.requires_grad_(), labels


def trained(stats_of, classes, **options):
    """A loss whose statistics have seen every other class."""
    counts = np.arange(classes) % 7 * 30
    loss = FCBL(stats_of(counts, 3 * counts + 1, 1000), **options)
    generator = torch.Generator().manual_seed(classes)
    for name, buffer in loss.named_buffers():
        if name != "frequency":
            buffer[::2] = torch.rand(buffer[::2].shape, generator=generator, dtype=torch.float64)
    if "num_gt" in dict(loss.named_buffers()):
        loss.num_gt[::2] = torch.randint(1, 9, loss.num_gt[::2].shape, generator=generator).double()
    return loss


def level_ratio(loss):
    """l_j / l_i of eq. 7 for all pairs [i = label, j], from the definition."""
    state = {name: buffer.numpy().copy() for name, buffer in loss.named_buffers()}
    if loss.indicator == "confusion":
        matrix = state["cm_numerator"] / np.maximum(state["num_gt"], 1)[:, None]
        matrix = np.maximum(matrix, 1e-3)
        return matrix / matrix.T
    if loss.indicator == "cumulative":
        level = np.maximum(state["num_gt"], 1)
    elif loss.indicator == "tpr":
        level = np.maximum(state["num_hit"] / np.maximum(state["num_gt"], 1), 1e-3)
    elif loss.indicator == "score":
        level = np.maximum(state["mean_score"], 1e-3)
    else:
        level = state["frequency"]
    return level[None] / level[:, None]


def plain(loss, logits, labels):
    """Value and gradient, row by row as the paper writes them (in float64, on the values the logits have)."""
    z = logits.detach().double().numpy()
    classes = loss.num_classes
    ratio = level_ratio(loss)
    total, grad = 0.0, np.zeros_like(z)
    for row, (own, label) in enumerate(zip(z, labels.tolist(), strict=True)):
        target = np.zeros(classes + 1)
        target[label] = 1
        weight, margin = np.ones(classes + 1), np.zeros(classes + 1)
        if label < classes:
            margin[:classes] = loss.alpha * np.log(ratio[label])
            if loss.reweight:
                q = expit(own[:classes]) * (1 - expit(own[classes]))
                wrong, sure = q >= q[label], q >= loss.prob_thr
                chosen = {"both": wrong | sure, "misclassified": wrong, "overconfident": sure}[loss.conditions]
                weight[:classes] = chosen
                weight[label] = 1
        moved = own + margin
        total += (weight * (np.logaddexp(0, moved) - moved * target)).sum()
        grad[row] = weight * (expit(moved) - target)
    return total / len(z), grad / len(z)


def check(loss, logits, labels):
    expected, grad = plain(loss, logits, labels)
    value = loss(logits, labels)
    value.backward()
    exact = logits.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-9 if exact else 1e-4)
    np.testing.assert_allclose(logits.grad, grad, atol=1e-10 if exact else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(vectors, assert_close, stats_of, case, dtype):
    file = vectors("bacl_fcbl")
    options = {key: value.item() for key, value in file.under(f"{case}/hp").items()}
    loss = FCBL(stats_of(file[f"{case}/class_count"]), **options)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for name, value in file.under(f"{case}/step0/state_before").items():
        np.testing.assert_array_equal(loss.get_buffer(name), value)
    for step in range(3):
        prefix = f"{case}/step{step}"
        logits = file.tensor(f"{prefix}/logits", dtype).requires_grad_()
        value = loss(logits, file.tensor(f"{prefix}/labels"))
        assert_close(value, logits, file[f"{prefix}/loss"], file[f"{prefix}/grad"])
        for name, expected in file.under(f"{prefix}/state_after").items():
            np.testing.assert_allclose(loss.get_buffer(name), expected, atol=tolerance)
        np.testing.assert_allclose(loss.indicator_diagonal(), file[f"{prefix}/correct_cls_ratio_after"], atol=1e-6)
        np.testing.assert_allclose(loss.scores(logits.detach()), file[f"{prefix}/scores"][:, :-1], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conditions", ["both", "misclassified", "overconfident"])
@pytest.mark.parametrize(
    ("n", "classes", "foreground", "scale"),
    [(40, 7, 15, 3.0), (40, 7, 40, 3.0), (30, 1, 20, 3.0), (64, 30, 50, 18.0), (20, 30, 0, 3.0), (24, 1203, 12, 6.0)],
)
def test_equals_the_plain_form(stats_of, n, classes, foreground, scale, conditions, dtype):
    loss = trained(stats_of, classes, conditions=conditions)
    check(loss, *rows(n, n, classes, foreground, scale, dtype))


@pytest.mark.parametrize("indicator", INDICATORS)
@pytest.mark.parametrize("reweight", [True, False])
def test_every_indicator_equals_the_plain_form(stats_of, indicator, reweight):
    loss = trained(stats_of, 9, indicator=indicator, reweight=reweight, prob_thr=0.5, alpha=0.6)
    check(loss, *rows(1, 30, 9, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_probabilities_compare_as_in_double_precision(stats_of, dtype):
    # row 0: both are 1, so the other class counts as misclassified although its logit is smaller;
    # row 1: 1 - p_background is 0, so all classes tie; row 2: 0.6 x 1 is below the threshold
    logits = torch.tensor([[45.0, 40.0, 3.0, 1.0], [2.0, -3.0, -9.0, 40.0], [60.0, 30.0, -9.0, -0.41]], dtype=dtype)
    loss = FCBL(stats_of([5, 5, 5]), alpha=0)
    labels = torch.zeros(3, dtype=torch.int64)
    assert loss.dropped(logits, labels).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    check(loss, logits.requires_grad_(), labels)


def test_a_margin_by_hand(stats_of):
    # frequencies 0.1 and 0.01: a row of the rare class moves the frequent one up by log 10, and the other way round
    loss = FCBL(stats_of([100, 10], num_images=1000), indicator="image", alpha=1.0, reweight=False)
    margins = loss.margins(torch.tensor([1, 0, 2]), torch.float64)
    np.testing.assert_allclose(margins, [[np.log(10), 0], [0, -np.log(10)], [0, 0]])


@pytest.mark.parametrize("matrix", ["soft", "hard"])
def test_statistics_of_three_iterations(stats_of, matrix):
    classes = 6
    losses = {name: FCBL(stats_of([9] * classes), indicator=name, matrix=matrix) for name in INDICATORS}
    numerator, count, hits = np.zeros((classes, classes)), np.zeros(classes), np.zeros(classes)
    score = np.full(classes, 0.01)
    for step in range(3):
        logits, labels = rows(step, 25, classes, 12)
        for loss in losses.values():
            loss(logits, labels)
        z, y = logits.detach().numpy()[:12, :classes], labels.numpy()[:12]
        predicted = softmax(z, axis=1) if matrix == "soft" else np.eye(classes)[z.argmax(1)]
        np.add.at(numerator, y, predicted)
        np.add.at(count, y, 1)
        np.add.at(hits, y, z.argmax(1) == y)
        for label in np.unique(y):
            score[label] = 0.9 * score[label] + 0.1 * expit(z[y == label, label]).mean()
    np.testing.assert_allclose(losses["confusion"].cm_numerator, numerator, rtol=1e-12)
    np.testing.assert_array_equal(losses["confusion"].num_gt, count)
    seen = np.maximum(count, 1)
    expected = {
        "confusion": numerator.diagonal() / seen,
        "image": np.full(classes, 1 / 6),
        "instance": np.full(classes, 1 / 6),
        "cumulative": count / count.sum(),
        "score": score,
        "tpr": hits / seen,
    }
    for name, loss in losses.items():
        np.testing.assert_allclose(loss.indicator_diagonal(), expected[name], rtol=1e-12, err_msg=name)


def test_counts_enter_the_sampling_as_shares(stats_of):
    stats = stats_of([30, 0, 70], [60, 0, 139], 500)
    np.testing.assert_allclose(FCBL(stats, indicator="image").indicator_diagonal(), [0.06, 0.002, 0.14])
    np.testing.assert_allclose(FCBL(stats, indicator="instance").indicator_diagonal(), [0.3, 0.005, 0.695])
    assert FCBL(stats, indicator="cumulative").indicator_diagonal().tolist() == [0, 0, 0]


def test_the_indicator_goes_on_without_margin_and_weight(stats_of):
    loss = FCBL(stats_of([9] * 5), alpha=0, reweight=False)
    logits, labels = rows(0, 20, 5, 10)
    loss(logits, labels)
    other = FCBL(stats_of([9] * 5))
    other(logits, labels)
    torch.testing.assert_close(loss.indicator_diagonal(), other.indicator_diagonal())
    assert loss.indicator_diagonal().sum() > 0


def test_order_of_update(stats_of):
    first, second = (FCBL(stats_of([9] * 5), update=update) for update in ("after", "before"))
    logits, labels = rows(3, 20, 5, 10)
    fresh = plain(first, logits, labels)[0]
    assert first(logits, labels).item() == pytest.approx(fresh)
    known = plain(first, logits, labels)[0]  # after the update
    assert known != pytest.approx(fresh)
    assert second(logits, labels).item() == pytest.approx(known)


@pytest.mark.parametrize("cut", [11, 22, 40, 0])  # rows on rank 0: some, all foreground, all, none
@pytest.mark.parametrize("indicator", ["confusion", "cumulative", "score", "tpr"])
def test_two_ranks_equal_one_process(stats_of, run_on_ranks, indicator, cut):
    def work(rank, alone=False):
        loss = FCBL(stats_of([9] * 7), indicator=indicator)
        values = []
        for step in range(3):
            foreground = 22 if step < 2 else 0
            logits, labels = rows(step, 40, 7, foreground)
            own = slice(None) if alone else slice(0, cut) if rank == 0 else slice(cut, None)
            value = loss(logits[own], labels[own])
            value.backward()
            values.append(value.item() * len(labels[own]))
        return values, {name: buffer.numpy().copy() for name, buffer in loss.named_buffers()}

    ranks = run_on_ranks(work)
    values, state = work(0, alone=True)
    for name, value in state.items():
        np.testing.assert_allclose(ranks[0][1][name], value, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(ranks[0][1][name], ranks[1][1][name])
    np.testing.assert_allclose(np.add(ranks[0][0], ranks[1][0]), values, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha must not be negative"),
        ({"prob_thr": 1.5}, "prob_thr must be between 0 and 1"),
        ({"reweight": "yes"}, "reweight must be true or false"),
        ({"score_momentum": 1}, "score_momentum must be"),
        ({"indicator": "images"}, 'no indicator "images" .did you mean "image"'),
        ({"conditions": "all"}, 'no conditions "all"'),
        ({"matrix": "sof"}, 'no matrix "sof" .did you mean "soft"'),
        ({"update": "never"}, 'no update "never"'),
    ],
)
def test_mistakes(stats_of, options, message):
    with pytest.raises(ValueError, match=message):
        FCBL(stats_of([1, 2]), **options)
