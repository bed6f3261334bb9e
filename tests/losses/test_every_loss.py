"""What holds for all losses: unsafe input stays finite, ignored rows are removed, statistics are state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tailfin import losses
from tailfin.errors import UserError
from tailfin.stats import ClassStats

# every loss, and forms that take another path
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in losses.names()},
    "ldam with deferred weights": ("ldam", {"drw_beta": 0.9999}),
    "class_balanced on sigmoid": ("class_balanced", {"base": "sigmoid"}),
    "logit_adjusted post hoc": ("logit_adjusted", {"variant": "post_hoc"}),
    "fedloss on focal": ("fedloss", {"base": "focal"}),
    "fedloss of two classes": ("fedloss", {"num_classes": 2}),
    "efl without alpha": ("efl", {"focal_alpha": -1.0}),
    "rog on seesaw": ("rog", {"base": "seesaw"}),
    **{f"pcb on {base}": ("pcb", {"base": base, "start_epoch": 0}) for base in ("softmax", "seesaw", "eqlv2")},
    **{
        f"fcbl by {indicator}": ("fcbl", {"indicator": indicator})
        for indicator in ("image", "instance", "cumulative", "score", "tpr")
    },
}


@pytest.fixture(params=KINDS)
def build(request, stats_of):
    """`build(image_count, trained=False)`: the loss in training mode, `trained` with statistics of two batches."""
    name, options = KINDS[request.param]

    def make(counts: Any, trained: bool = False) -> losses.ClassificationLoss:
        loss = losses.build(name, stats_of(np.asarray(counts), num_images=2000), **options).train()
        for seed in range(2 * trained):
            loss(*rows(loss, 20, len(counts), seed))
        return loss

    return make


def rows(loss: losses.ClassificationLoss, n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes + 1, (n,), generator=generator)
    labels[: n // 3] = classes
    return torch.randn((n, loss.num_logits), generator=generator), labels


def finite_and_attached(loss: losses.ClassificationLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """The value, twice on the same rows as statistics move, with its gradient and state checked."""
    logits = logits.detach().requires_grad_()
    for _ in range(2):
        logits.grad = None
        value = loss(logits, labels)
        value.backward()
        assert value.dtype == torch.float32 and torch.isfinite(value)
        assert torch.isfinite(logits.grad).all()
    assert all(torch.isfinite(state).all() for state in loss.state_dict().values())
    if loss.alone:
        assert torch.isfinite(loss.scores(logits.detach())).all()
    return value.detach()


@pytest.mark.parametrize("classes", [1, 1203])
def test_extreme_logits_and_half_precision_stay_finite(build, classes):
    for change in (
        lambda z: 60 * z,
        lambda z: 1e4 * z,
        lambda z: z.bfloat16(),
        lambda z: z.half(),
        lambda z: 0 * z - 300,
    ):
        loss = build(np.arange(classes) % 60)
        logits, labels = rows(loss, 16, classes)
        finite_and_attached(loss, change(logits), labels)


@pytest.mark.parametrize("trained", [False, True])
def test_batches_that_lack_something(build, trained):
    """Without rows, foreground, background, or some classes; a class without training images."""
    loss = build([0, 40, 3], trained)
    for labels in ([], [-1, -1], [3, 3, 3], [0], [2, 2], [-1, 2, 3, 0]):
        logits, _ = rows(loss, len(labels), 3)
        value = finite_and_attached(loss, logits, torch.tensor(labels, dtype=torch.int64))
        assert value == 0 or max(labels, default=-1) >= 0


def test_ignored_rows_are_removed_first(build):
    one, other = build([1, 40, 3]), build([1, 40, 3])
    logits, labels = rows(one, 12, 3)
    padded = torch.cat([torch.full((4, one.num_logits), 50.0), logits])
    torch.manual_seed(0)
    alone = one(logits, labels)
    torch.manual_seed(0)
    torch.testing.assert_close(other(padded, torch.cat([torch.full((4,), -1), labels])), alone)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_statistics_change_in_training_mode_only_and_are_saved(build):
    loss, fresh = build([1, 40, 3], trained=True), build([1, 40, 3])
    start = {key: value.clone() for key, value in fresh.state_dict().items()}
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    assert not state or any(not torch.equal(value, start[key]) for key, value in state.items())
    fresh.to(torch.bfloat16).load_state_dict(loss.state_dict())  # which keeps the precision of its statistics
    logits, labels = rows(loss, 12, 3, seed=5)
    found = []
    for one in (loss.eval(), fresh.eval()):
        torch.manual_seed(0)
        found.append(one(logits, labels))
    assert torch.equal(*found)
    for key, value in state.items():
        assert torch.equal(loss.state_dict()[key], value) and torch.equal(fresh.state_dict()[key], value)
        assert fresh.state_dict()[key].dtype == value.dtype


@pytest.mark.parametrize("name", losses.names())
def test_a_loss_lists_the_facts_that_it_takes(name, stats_of):
    """A detector fills what is listed in `row_facts` and nothing else."""
    code = type(losses.build(name, stats_of(np.array([20, 10])))).loss.__code__
    keywords = code.co_varnames[3 : code.co_argcount]  # after self, logits, labels
    known = {"gt_index", "memory", "quality", "iter_id", "normalizer", "picture", "pictures"}
    assert set(losses.LOSSES[name].row_facts) == known & set(keywords)


def test_options_are_the_keyword_only_arguments(monkeypatch, stats_of):
    class Mine(losses.LOSSES["softmax"]):
        def __init__(self, stats, scale=1, *, power, bias: float = 0.0):
            unrelated = 3
            super().__init__(stats)
            self.power = power + bias * scale * unrelated

    monkeypatch.setitem(losses.LOSSES, "mine", Mine)
    assert losses.option_names("mine") == ["power", "bias"]
    assert losses.build("mine", stats_of(np.array([20, 10])), power=2).power == 2
    with pytest.raises(UserError, match=r'loss mine: the loss mine has no option "powr" \(did you mean "power"\?\)'):
        losses.build("mine", stats_of(np.array([20, 10])), powr=2)
    with pytest.raises(ValueError, match="power"):
        losses.check_options("mine", {})


def test_classes_that_nobody_looked_for_have_no_part(build):
    """Where `known` is false, but for a row's own label: no gradient, and the logit may be anything."""
    loss = build(np.arange(1, 13))
    logits, labels = rows(loss, 24, 12)
    known = torch.rand((24, 12), generator=torch.Generator().manual_seed(3)) < 0.5
    if not loss.classes_first:
        with pytest.raises(ValueError, match="no logit per class"):
            loss(logits, labels, known=known)
        return
    values, gradients = [], []
    out = ~known
    foreground = labels < 12
    out[foreground, labels[foreground]] = False
    for shift in (0.0, 5.0):
        fresh = build(np.arange(1, 13))
        moved = logits.clone()
        moved[:, :12] += shift * out
        moved.requires_grad_()
        torch.manual_seed(1)
        value = fresh(moved, labels, known=known)
        value.backward()
        values.append(value.item())
        gradients.append(moved.grad)
    assert np.isfinite(values[0]) and values[0] == values[1]
    assert torch.equal(gradients[0], gradients[1]) and not gradients[0][:, :12][out].any()
    assert gradients[0].any() or not loss.alone


def test_all_classes_known_changes_nothing(build):
    loss = build(np.arange(1, 13))
    if not loss.classes_first:
        return
    logits, labels = rows(loss, 24, 12)
    values = []
    for keywords in ({}, {"known": torch.ones((24, 12), dtype=torch.bool)}):
        torch.manual_seed(1)
        values.append(build(np.arange(1, 13))(logits, labels, **keywords).item())
    assert values[0] == values[1]


@pytest.mark.parametrize("name", ["bags", "fedloss"])
def test_a_stated_number_of_pictures_changes_nothing(name):
    stats = ClassStats(image_count=[50, 5, 500], instance_count=[60, 6, 900], num_images=600)
    loss = losses.build(name, stats, **({"num_classes": 2} if name == "fedloss" else {}))
    logits = torch.randn(12, loss.num_logits, generator=torch.Generator().manual_seed(0))
    labels, picture = torch.arange(12) % 4, torch.arange(12) // 3
    values = []
    for more in ({}, {"pictures": 4}):
        torch.manual_seed(1)
        values.append(loss(logits, labels, picture=picture, **more))
    assert torch.equal(*values)
