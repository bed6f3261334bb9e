"""What losses that weigh, shift or drop elements share: gradients, symmetry, safety, and the fused cross-entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tailfin.losses.balanced_sigmoid import BalancedSigmoid
from tailfin.losses.balanced_softmax import BalancedSoftmax
from tailfin.losses.base import one_hot
from tailfin.losses.class_balanced import ClassBalanced
from tailfin.losses.droploss import DropLoss
from tailfin.losses.eql import EQL
from tailfin.losses.eqlv2 import EQLv2
from tailfin.losses.fcbl import FCBL
from tailfin.losses.fused import one_hot_bce, softplus
from tailfin.losses.logit_adjusted import LogitAdjusted
from tailfin.models.features.meta_reweighting import MetaReweighter

LOSSES = {
    "fcbl": (FCBL, {}),
    "fcbl hard": (FCBL, {"matrix": "hard", "conditions": "misclassified"}),
    "fcbl tpr": (FCBL, {"indicator": "tpr", "conditions": "overconfident"}),
    "fcbl score": (FCBL, {"indicator": "score"}),
    "fcbl instance": (FCBL, {"indicator": "instance"}),
    "eqlv2": (EQLv2, {}),
    "eql": (EQL, {"lambda_": 0.05}),
    "droploss": (DropLoss, {"lambda_": 0.05}),
    "balanced_sigmoid": (BalancedSigmoid, {}),
    "meta_reweighter": (MetaReweighter, {}),
    "balanced_softmax": (BalancedSoftmax, {}),
    "class_balanced": (ClassBalanced, {}),
    "class_balanced sigmoid": (ClassBalanced, {"base": "sigmoid"}),
    "logit_adjusted": (LogitAdjusted, {}),
    "logit_adjusted post_hoc": (LogitAdjusted, {"variant": "post_hoc"}),
}
SOFTMAX = {"balanced_softmax", "class_balanced", "logit_adjusted", "logit_adjusted post_hoc"}
OBJECTNESS = {name for name in LOSSES if name.startswith("fcbl")} | {"eqlv2"}


def make(stats_of, name, counts, trained=True):
    """The loss for these class counts; `trained`: with statistics that depend on the class count alone."""
    kind, options = LOSSES[name]
    counts = np.asarray(counts)
    loss = kind(stats_of(counts, 2 * counts, max(int(counts.sum()), 1)), **options)
    if trained:
        level = torch.from_numpy(counts % 13 / 13)
        for key, value in loss.state_dict().items():
            if key == "cm_numerator":
                value.copy_(torch.outer(level, 1 - level))
            elif key != "step":
                value.copy_(1 + level)
    return loss


def rows(seed, n, loss, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((n, loss.num_logits), generator=generator, dtype=dtype)
    return logits, torch.randint(0, loss.num_classes + 1, (n,), generator=generator)


def draws_for(name, seed, logits):
    """Fixed draws where the loss takes any."""
    if name != "droploss":
        return {}
    return {"draws": torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("foreground", [True, False])
def test_gradcheck(stats_of, name, foreground):
    loss = make(stats_of, name, [1, 40, 3, 90, 7]).eval()
    logits, labels = rows(2, 7, loss)
    labels = labels if foreground else torch.full_like(labels, 5)
    draws = draws_for(name, 0, logits)
    assert torch.autograd.gradcheck(lambda z: 3 * loss(z, labels, **draws), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 9), n=st.integers(1, 20))
def test_permuting_rows_and_classes(stats_of, name, seed, classes, n):
    counts = np.random.default_rng(seed).integers(0, 100, classes)
    loss = make(stats_of, name, counts).eval()
    logits, labels = rows(seed, n, loss)
    draws = draws_for(name, seed, logits)
    value = loss(logits.requires_grad_(), labels, **draws)
    (grad,) = torch.autograd.grad(value, logits)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    moved = {key: u[order] for key, u in draws.items()}
    torch.testing.assert_close(loss(logits[order], labels[order], **moved), value)
    perm = torch.randperm(classes, generator=generator)
    columns = torch.cat([perm, torch.arange(classes, loss.num_logits)])
    new_labels = torch.cat([torch.argsort(perm), torch.tensor([classes])])[labels]
    permuted = logits.detach()[:, columns].requires_grad_()
    other = make(stats_of, name, counts[perm.numpy()]).eval()
    again = other(permuted, new_labels, **{key: u[:, columns] for key, u in draws.items()})
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(torch.autograd.grad(again, permuted)[0], grad[:, columns])
    torch.testing.assert_close(other.scores(permuted), loss.scores(logits)[:, perm])


@pytest.mark.parametrize("name", LOSSES)
def test_scores_and_prior(stats_of, name):
    loss = make(stats_of, name, [50] * 6)
    bias = loss.prior_bias()
    assert bias.shape == (loss.num_logits,)
    scores = loss.scores(bias[None])
    assert scores.shape == (1, 6)
    expected = 1 / 7 if name in SOFTMAX else 0.001 * 0.999 if name in OBJECTNESS else 0.001
    if name == "logit_adjusted post_hoc":
        expected = 24 / (6 * 24 + 4 / 3)  # the priors 1 / 24 and 3 / 4 are taken off
    torch.testing.assert_close(scores, torch.full((1, 6), expected))


@pytest.mark.parametrize("name", LOSSES)
def test_modules_keep_exact_values_in_any_precision(stats_of, name):
    loss, plain = (make(stats_of, name, [1, 40, 3, 2000]) for _ in range(2))
    logits, labels = rows(5, 20, loss)
    draws = draws_for(name, 0, logits)
    loss.half().bfloat16().double()
    torch.testing.assert_close(loss(logits, labels, **draws), plain(logits, labels, **draws), rtol=0, atol=0)
    fresh = make(stats_of, name, [1, 40, 3, 2000], trained=False)
    fresh.load_state_dict(loss.state_dict())
    torch.testing.assert_close(fresh(logits, labels, **draws), plain(logits, labels, **draws), rtol=0, atol=0)


# ---- the fused cross-entropy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("background_column", [True, False])
def test_one_hot_bce_is_binary_cross_entropy(dtype, background_column):
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn((50, 9), generator=generator, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, 9 if background_column else 10, (50,), generator=generator)
    expected = F.binary_cross_entropy_with_logits(logits, one_hot(labels, 9, dtype), reduction="sum")
    value = one_hot_bce(logits, labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(2 * value, logits), torch.autograd.grad(2 * expected, logits))


def test_moved_elements_count_except_at_the_own_label():
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    moved = torch.tensor([[9.0, -1e30, 5.0], [-1e30, 9.0, 0.5]], dtype=torch.float64)
    value = one_hot_bce(logits, torch.tensor([0, 3]), moved)
    value.backward()
    parts = softplus(torch.tensor([-1.0, 5.0, 9.0, 0.5], dtype=torch.float64))
    assert value.item() == pytest.approx(parts.sum().item(), rel=1e-14)
    s = torch.sigmoid(torch.tensor([-1.0, 5.0, 9.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(logits.grad, torch.tensor([[-s[0], 0, s[1]], [0, s[2], s[3]]], dtype=torch.float64))


def test_a_second_derivative_is_refused():
    logits = torch.zeros((2, 3), requires_grad=True)
    value = one_hot_bce(logits, torch.tensor([0, 1])) + (logits**2).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, logits, create_graph=True)


def test_without_gradient_nothing_is_attached():
    value = one_hot_bce(torch.zeros((2, 3)), torch.tensor([0, 1]))
    assert not value.requires_grad
    assert value.item() == pytest.approx(6 * np.log(2))
