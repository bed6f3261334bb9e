"""BALMS's meta reweighter: the authors' loss, the outer gradient, what it learns, state and ranks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.special import expit

from tailfin.models.features.meta_reweighting import MetaReweighter
from tailfin.stats import ClassStats


def stats_of(counts, images=None):
    counts = np.asarray(counts)
    return ClassStats(image_count=counts, instance_count=counts, num_images=images or int(counts.sum()))


def episode(seed, classes=4, n=30, width=6, dtype=torch.float64):
    """A classifier, training rows and balanced rows."""
    generator = torch.Generator().manual_seed(seed)
    classifier = torch.nn.Linear(width, classes, dtype=dtype)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    features = torch.randn((2 * n, width), generator=generator, dtype=dtype)
    labels = torch.randint(0, classes + 1, (2 * n,), generator=generator)
    return classifier, (features[:n], labels[:n], features[n:], labels[n:])


def outer_loss(loss, classifier, rows, v, inner_lr):
    """Plain sigmoid loss on the balanced rows after an inner step with the class weights v, in NumPy."""
    w, b = (parameter.detach().numpy().copy() for parameter in (classifier.weight, classifier.bias))
    x, y, balanced_x, balanced_y = (value.numpy() for value in rows)
    classes = len(b)
    target = np.eye(classes + 1)[y][:, :-1]
    foreground = y < classes
    moved = x @ w.T + b + np.outer(foreground, loss.log_odds.numpy())
    weight = np.ones(len(y))
    weight[foreground] = expit(v)[y[foreground]]
    weight[foreground] *= foreground.sum() / weight[foreground].sum()
    slope = weight[:, None] * (expit(moved) - target) / len(y)
    z = balanced_x @ (w - inner_lr * slope.T @ x).T + b - inner_lr * slope.sum(0)
    return (np.logaddexp(0, z) - z * np.eye(classes + 1)[balanced_y][:, :-1]).sum() / len(balanced_y)


def numeric_gradient(loss, classifier, rows, inner_lr):
    v = loss.class_weight.numpy().copy()
    gradient = np.zeros_like(v)
    for index in range(len(v)):
        step = 1e-5 * np.eye(len(v))[index]
        up, down = (outer_loss(loss, classifier, rows, v + sign * step, inner_lr) for sign in (1, -1))
        gradient[index] = (up - down) / 2e-5
    return gradient


@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "grad_tolerance"), [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-4, 1e-5)]
)
@pytest.mark.parametrize("case", ["a_typical", "b_small"])
def test_reference_vectors(golden_dir, case, dtype, value_tolerance, grad_tolerance):
    file = np.load(golden_dir / "balms.npz")
    prefix = f"{case}/balms_meta"
    counts = file[f"{case}/class_count"]
    loss = MetaReweighter(stats_of(counts, round(counts[0] / file[f"{case}/image_count_frequency"][0])))
    logits = torch.from_numpy(file[f"{case}/logits"]).to(dtype).requires_grad_()
    labels = torch.from_numpy(file[f"{case}/labels"])
    v = torch.from_numpy(file[f"{prefix}/learner_weight"])[0].requires_grad_()
    value = loss.reweighted(logits, labels, v)
    grad, grad_v = torch.autograd.grad(value, [logits, v])
    assert value.item() == pytest.approx(float(file[f"{prefix}/loss"]), rel=value_tolerance)
    np.testing.assert_allclose(grad, file[f"{prefix}/grad"], atol=grad_tolerance)
    np.testing.assert_allclose(grad_v, file[f"{prefix}/grad_learner_weight"][0], atol=grad_tolerance)
    loss.class_weight.copy_(v.detach())
    torch.testing.assert_close(loss(logits, labels), value)


def test_equal_weights_are_the_balanced_sigmoid_loss():
    loss = MetaReweighter(stats_of([5, 60, 900, 1]))
    classifier, (features, labels, *_) = episode(0)
    logits = classifier(features)
    torch.testing.assert_close(loss(logits, labels), super(MetaReweighter, loss).loss(logits, labels))
    torch.testing.assert_close(loss.scores(logits), logits.sigmoid())


def test_outer_gradient_and_adam_step():
    loss = MetaReweighter(stats_of([5, 60, 900, 1]), lr=0.05)
    v = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    adam = torch.optim.Adam([v], lr=0.05)
    for step in range(4):
        classifier, rows = episode(step)
        expected = outer_loss(loss, classifier, rows, loss.class_weight.numpy(), 0.3)
        v.grad = torch.from_numpy(numeric_gradient(loss, classifier, rows, 0.3))
        assert np.abs(v.grad).max() > 1e-4
        adam.step()
        assert loss.learn(classifier, *rows, inner_lr=0.3).item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(loss.class_weight, v.detach(), rtol=0, atol=1e-7)
    assert loss.step.item() == 4


def test_the_classifier_is_left_alone_and_the_weights_are_no_parameters():
    loss = MetaReweighter(stats_of([5, 60, 900, 1]))
    classifier, rows = episode(1)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    with torch.no_grad():
        loss.learn(classifier, *rows, inner_lr=0.3)
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert not list(loss.parameters())
    assert loss.class_weight.abs().sum() > 0
    assert not loss.class_weight.requires_grad


def test_what_nobody_looked_for_teaches_the_weights_nothing():
    """A class unchecked in every row but its own is as one whose logit no row without it sees."""
    classifier, (features, labels, balanced, balanced_labels) = episode(2)

    def moved(known, weights=None):
        loss = MetaReweighter(stats_of([5, 60, 900, 1]))
        own = None if known is None else (known.expand(len(labels), -1), known.expand(len(balanced_labels), -1))
        keywords = {} if own is None else {"known": own[0], "balanced_known": own[1]}
        value = loss.learn(weights or classifier, features, labels, balanced, balanced_labels, inner_lr=0.3, **keywords)
        return value, loss.class_weight

    plain = moved(None)
    torch.testing.assert_close(moved(torch.ones(1, 4, dtype=torch.bool)), plain)
    some = torch.tensor([[True, True, False, True]])
    value, weight = moved(some)
    assert value < plain[0] and not torch.equal(weight, plain[1])
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        other.bias[2] += 1.0
    keep, balanced_keep = labels != 2, balanced_labels != 2
    features, labels = features[keep], labels[keep]
    balanced, balanced_labels = balanced[balanced_keep], balanced_labels[balanced_keep]
    torch.testing.assert_close(moved(some, other), moved(some))  # nothing looks at its logit any more


def test_a_class_whose_training_rows_mislead_loses_weight():
    # rows of class 0 look like class 1 in the training stream, not in the balanced one
    loss = MetaReweighter(stats_of([500, 500]))
    classifier = torch.nn.Linear(2, 2, dtype=torch.float64)
    torch.nn.init.zeros_(classifier.weight)
    torch.nn.init.zeros_(classifier.bias)
    eye = torch.eye(2, dtype=torch.float64)
    labels = torch.tensor([0, 1] * 8)
    for _ in range(30):
        loss.learn(classifier, eye[torch.ones_like(labels)], labels, eye[labels], labels, inner_lr=1.0)
    assert loss.class_weight[0] < -0.1
    assert loss.class_weight[1] > 0.1


@pytest.mark.parametrize("lacking", ["rows", "balanced rows", "foreground", "balanced foreground", "known labels"])
def test_batches_that_lack_something(lacking):
    loss = MetaReweighter(stats_of([5, 60, 900, 1]))
    classifier, (x, y, balanced_x, balanced_y) = episode(2, dtype=torch.float32)
    if lacking == "rows":
        x, y = x[:0], y[:0]
    elif lacking == "balanced rows":
        balanced_x, balanced_y = balanced_x[:0], balanced_y[:0]
    elif lacking == "foreground":
        y = torch.full_like(y, 4)
    elif lacking == "balanced foreground":
        balanced_y = torch.full_like(y, 4)
    else:
        y, balanced_y = torch.full_like(y, -1), torch.full_like(y, -1)
    assert torch.isfinite(loss.learn(classifier, x.bfloat16(), y, balanced_x, balanced_y, inner_lr=0.3))
    assert torch.isfinite(loss.class_weight).all()
    assert torch.isfinite(loss(classifier(x), y))


def test_state_dict_goes_on_where_it_was():
    one = MetaReweighter(stats_of([5, 60, 900, 1]))
    classifier, rows = episode(3)
    for _ in range(3):
        one.learn(classifier, *rows, inner_lr=0.3)
    other = MetaReweighter(stats_of([5, 60, 900, 1]))
    other.load_state_dict(one.state_dict())
    other.half().float()
    for loss in (one, other):
        loss.learn(classifier, *rows, inner_lr=0.3)
    torch.testing.assert_close(other.class_weight, one.class_weight, rtol=0, atol=0)


def test_two_ranks_step_by_the_mean_gradient(run_on_ranks):
    def work(rank):
        loss = MetaReweighter(stats_of([5, 60, 900, 1]))
        classifier, rows = episode(rank)
        if rank == 1:
            rows = (rows[0][:0], rows[1][:0], *rows[2:])  # nothing to learn from here
        loss.learn(classifier, *rows, inner_lr=0.3)
        return loss.exp_avg.numpy().copy(), loss.class_weight.numpy().copy()

    loss = MetaReweighter(stats_of([5, 60, 900, 1]))
    classifier, rows = episode(0)
    loss.learn(classifier, *rows, inner_lr=0.3)
    first, second = run_on_ranks(work)
    np.testing.assert_allclose(first[0], loss.exp_avg.numpy() / 2, rtol=1e-12)
    np.testing.assert_array_equal(first[1], second[1])


def test_mistakes():
    with pytest.raises(ValueError, match="lr must be positive"):
        MetaReweighter(stats_of([1, 2]), lr=0)
