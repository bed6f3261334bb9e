"""softmax, sigmoid, objectness, focal: reference vectors, gradients, properties, and the interface they share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tailfin import losses
from tailfin.errors import UserError
from tailfin.stats import ClassStats

NAMES = ("softmax", "sigmoid", "objectness", "focal")


def stats_of(classes: int) -> ClassStats:
    counts = np.arange(1, classes + 1)
    return ClassStats(image_count=counts, instance_count=2 * counts, num_images=int(counts.sum()))


def rows(seed: int, n: int, width: int, classes: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((n, width), generator=generator, dtype=dtype)
    labels = torch.randint(0, classes + 1, (n,), generator=generator)
    return logits, labels


@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
@pytest.mark.parametrize("name", ["objectness", "sigmoid"])
@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "grad_tolerance"), [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-4, 1e-5)]
)
def test_reference_vectors(golden_dir, name, case, dtype, value_tolerance, grad_tolerance):
    file, prefix = {"objectness": ("bacl_bce_objectness", ""), "sigmoid": ("balms", "sigmoid_baseline/")}[name]
    data = np.load(golden_dir / f"{file}.npz")
    loss = losses.build(name, stats_of(int(data[f"{case}/num_classes"])))
    logits = torch.from_numpy(data[f"{case}/logits"]).to(dtype).requires_grad_()
    value = loss(logits, torch.from_numpy(data[f"{case}/labels"]))
    value.backward()
    assert value.item() == pytest.approx(float(data[f"{case}/{prefix}loss"]), rel=value_tolerance)
    np.testing.assert_allclose(logits.grad.numpy(), data[f"{case}/{prefix}grad"], atol=grad_tolerance)
    if name == "objectness":
        scores = loss.scores(logits.detach()).numpy()
        np.testing.assert_allclose(scores, data[f"{case}/scores"][:, :-1], atol=1e-6)


def test_softmax_is_cross_entropy_with_background_last():
    loss = losses.build("softmax", stats_of(4))
    logits, labels = rows(0, 9, 5, 4)
    assert loss(logits, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item())
    torch.testing.assert_close(loss.scores(logits), logits.softmax(1)[:, :4])


def test_focal_by_hand():
    # one foreground row (label 0) and one background row, one class, p = sigmoid(0) = 1/2 and sigmoid(log 3) = 3/4
    loss = losses.build("focal", stats_of(1))
    logits = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    value = loss(logits, torch.tensor([0, 1]))
    expected = 0.25 * 0.5**2 * math.log(2) + 0.75 * 0.75**2 * math.log(4)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert loss(logits, torch.tensor([0, 1]), normalizer=4).item() == pytest.approx(expected / 4)


def test_focal_without_its_extras_is_the_sigmoid_loss():
    logits, labels = rows(1, 12, 6, 6)
    focal = losses.build("focal", stats_of(6), focal_alpha=-1, focal_gamma=0)
    sigmoid = losses.build("sigmoid", stats_of(6))
    assert focal(logits, labels, normalizer=12.0).item() == pytest.approx(sigmoid(logits, labels).item())


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    loss = losses.build(name, stats_of(5))
    logits, labels = rows(2, 7, loss.num_logits, 5)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 9), n=st.integers(1, 20))
def test_permuting_rows_and_classes(name, seed, classes, n):
    loss = losses.build(name, stats_of(classes))
    logits, labels = rows(seed, n, loss.num_logits, classes)
    logits.requires_grad_()
    value = loss(logits, labels)
    (grad,) = torch.autograd.grad(value, logits)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(logits[order], labels[order]), value)
    classes_order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed + 1))
    columns = torch.cat([classes_order, torch.arange(classes, loss.num_logits)])
    new_label = torch.cat([torch.argsort(classes_order), torch.tensor([classes])])[labels]
    permuted = logits.detach()[:, columns].requires_grad_()
    (permuted_grad,) = torch.autograd.grad(loss(permuted, new_label), permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_prior(name):
    loss = losses.build(name, stats_of(6))
    bias = loss.prior_bias()
    assert bias.shape == (loss.num_logits,)
    scores = loss.scores(bias[None])
    assert scores.shape == (1, 6)
    expected = {"softmax": 1 / 7, "objectness": 0.001 * 0.999}.get(name, 0.001)
    torch.testing.assert_close(scores, torch.full((1, 6), expected))


def test_mistakes_are_one_message():
    with pytest.raises(UserError, match=r'there is no loss "sofmax" \(did you mean "softmax"\?\)'):
        losses.build("sofmax", stats_of(2))
    with pytest.raises(UserError, match=r'no option "gamma" \(did you mean "focal_gamma"\?\)'):
        losses.build("focal", stats_of(2), gamma=1.0)
    with pytest.raises(UserError, match="no option"):
        losses.build("softmax", stats_of(2), alpha=1.0)
    with pytest.raises(UserError, match="focal_gamma must not be negative"):
        losses.build("focal", stats_of(2), focal_gamma=-1.0)
    loss = losses.build("softmax", stats_of(2))
    with pytest.raises(ValueError, match=r"logits must be \[N, 3\]"):
        loss(torch.zeros((1, 2)), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be \[1\]"):
        loss(torch.zeros((1, 3)), torch.zeros(2, dtype=torch.int64))


def test_names_lists_every_loss():
    assert set(NAMES) <= set(losses.names())


def test_exact_buffers_keep_their_precision_and_follow_the_device():
    loss = losses.build("softmax", stats_of(3))
    loss.register_exact("total", [1.0, 2.0, 1e-12])
    loss.register_exact("constant", torch.ones(2), persistent=False)
    for change in (loss.half, loss.bfloat16, loss.float, loss.double):
        change()
        assert loss.total.dtype == torch.float64
    assert loss.total.tolist() == [1.0, 2.0, 1e-12]
    assert set(loss.state_dict()) == {"total"}
    outer = torch.nn.Sequential(loss).to(torch.bfloat16).to("meta")
    assert outer[0].total.dtype == torch.float64
    assert outer[0].total.device.type == "meta"
