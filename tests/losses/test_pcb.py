"""pcb: reference vectors of its three bases, plain re-derivations, state over ranks, when it is active."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logsumexp, softmax, xlogy

from tailfin.losses.eqlv2 import EQLv2
from tailfin.losses.pcb import PCB
from tailfin.losses.seesaw import Seesaw
from tailfin.losses.softmax import Softmax

BASES = {"softmax": Softmax, "seesaw": Seesaw, "eqlv2": EQLv2}
FILES = {"pcb_ce": "softmax", "pcb_seesaw": "seesaw", "pcb_eqlv2": "eqlv2"}
CASES = [("pcb_ce", case) for case in ("a_typical_before_start", "a_typical_iter1")]
CASES += [(file, case) for file in FILES for case in ("a_typical", "b_small", "c_nofg")]


def make(stats_of, base, classes, **options):
    """A loss in mid-training: every class seen, some confusion."""
    loss = PCB(stats_of(np.ones(classes, dtype=np.int64)), base=base, **options)
    generator = torch.Generator().manual_seed(classes)
    matrix = torch.rand((classes, classes), generator=generator, dtype=torch.float64) + 3 * torch.eye(classes)
    loss.fg_confusion_matrix.copy_(matrix / matrix.sum(1, keepdim=True))
    loss.num_inst_cnt += 2
    loss.at_epoch(17)
    return loss


def rows(seed, n, loss, foreground, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, loss.num_logits), generator=generator, dtype=dtype)
    labels = torch.full((n,), loss.num_classes)
    labels[:foreground] = (torch.rand(foreground, generator=generator) ** 2 * loss.num_classes).long()
    return logits.requires_grad_(), labels


def plain(base, logits, labels, matrix, share, momentum=0.99):
    """Value, d value / d logits and confusion matrix after an active step whose base has no statistics yet."""
    z, matrix = np.asarray(logits, dtype=np.float64), np.array(matrix)
    rows, classes = len(z), len(matrix)
    foreground = np.flatnonzero(labels < classes)
    own = labels[foreground]
    predicted = (expit if base == "eqlv2" else lambda x: softmax(x, axis=1))(z[foreground, :classes])
    for label in np.unique(own):
        matrix[label] = momentum * matrix[label] + (1 - momentum) * predicted[own == label].mean(axis=0)
        if base != "eqlv2":
            matrix[label] /= matrix[label].sum()
    column = matrix[:, own].T
    if base == "eqlv2":
        target = np.zeros_like(z)
        target[np.arange(rows), labels] = 1
        target[foreground, :classes] = share * column + (1 - share) * target[foreground, :classes]
        # both weights are 1 before any gradient is accumulated
        value = (np.logaddexp(0, z) - z * target).sum() / rows
        return value, (expit(z) - target) / rows, matrix
    p = column / matrix.sum(axis=0)[own][:, None]
    onehot = np.eye(classes)[own]
    grad = np.zeros_like(z)
    if base == "softmax":
        log_q = log_softmax(z, axis=1)
        weight = np.where(labels < classes, 1 - share, 1)
        value = -(weight * log_q[np.arange(rows), labels]).sum()
        value += share * (xlogy(p, p) - p * log_q[foreground, :classes]).sum()
        target = np.zeros_like(z)
        target[np.arange(rows), labels] = weight
        target[foreground, :classes] += share * p
        return value / rows, (np.exp(log_q) - target) / rows, matrix
    seen = np.maximum(np.bincount(own, minlength=classes), 1)
    mitigation = np.minimum(seen[None] / seen[own][:, None], 1) ** 0.8
    q = softmax(z[foreground, :classes], axis=1)
    compensation = np.maximum(q / np.maximum((q * onehot).sum(1, keepdims=True), 0.01), 1) ** 2
    adjusted = z[foreground, :classes] + np.log(mitigation * compensation) * (1 - onehot)
    mixed = (1 - share) * onehot + share * p
    value = -(mixed * log_softmax(adjusted, axis=1)).sum() / rows
    grad[foreground, :classes] = (softmax(adjusted, axis=1) - mixed) / rows
    side = (labels == classes).astype(int)
    value += (logsumexp(z[:, classes:], axis=1) - z[np.arange(rows), classes + side]).sum() / rows
    grad[:, classes:] = (softmax(z[:, classes:], axis=1) - np.eye(2)[side]) / rows
    return value, grad, matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_reference_vectors(vectors, assert_close, stats_of, name, case, dtype):
    file = vectors(name)
    options = {key: value.item() for key, value in file.under(f"{case}/hp").items()}
    iter_id, epoch = options.pop("iter_id"), options.pop("epoch")
    if "alpha_pcb" in options:
        options["alpha"] = options.pop("alpha_pcb")
    loss = PCB(stats_of(np.ones(int(file[f"{case}/num_classes"]), dtype=int)), base=FILES[name], **options)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6

    def state(key):
        return (loss.base if key == "cum_samples" else loss).get_buffer(key)

    for key, value in file.under(f"{case}/step0/state_before").items():
        state(key).copy_(torch.from_numpy(value))
    for step in range(3):
        prefix = f"{case}/step{step}"
        logits = file.tensor(f"{prefix}/logits", dtype).requires_grad_()
        value = loss(logits, file.tensor(f"{prefix}/labels"), iter_id=iter_id, epoch=epoch)
        assert_close(value, logits, file[f"{prefix}/loss"], file[f"{prefix}/grad"])
        for key, expected in file.under(f"{prefix}/state_after").items():
            np.testing.assert_allclose(state(key), expected, atol=tolerance)
        scores = loss.scores(logits.detach())
        np.testing.assert_allclose(scores, file[f"{prefix}/scores"][:, : loss.num_classes], atol=1e-6)
        for ours, theirs in (("classes", "cls_classes"), ("pcb", "pcb_classes"), ("objectness", "cls_objectness")):
            if f"{prefix}/loss_parts/loss_{theirs}" in file:
                expected = float(file[f"{prefix}/loss_parts/loss_{theirs}"])
                assert loss.parts[ours].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "classes", "foreground", "scale"),
    [(40, 7, 15, 3.0), (40, 7, 40, 3.0), (30, 1, 20, 3.0), (48, 30, 20, 18.0), (48, 30, 0, 3.0), (40, 1203, 25, 6.0)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("base", BASES)
def test_equals_the_plain_form(stats_of, base, n, classes, foreground, scale, dtype):
    loss = make(stats_of, base, classes, alpha=0.3)
    before = loss.fg_confusion_matrix.numpy().copy()
    logits, labels = rows(n, n, loss, foreground, scale, dtype)
    value = loss(logits, labels, iter_id=1)
    value.backward()
    expected, grad, matrix = plain(base, logits.detach().numpy(), labels.numpy(), before, share=0.15)
    exact = dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-9 if exact else 1e-4)
    np.testing.assert_allclose(logits.grad, grad, atol=1e-10 if exact else 1e-5)
    np.testing.assert_allclose(loss.fg_confusion_matrix, matrix, atol=1e-12 if exact else 1e-7)
    seen = np.bincount(labels[labels < classes], minlength=classes)
    np.testing.assert_array_equal(loss.num_inst_cnt, 2 + seen)


@pytest.mark.parametrize("base", ["softmax", "eqlv2"])
def test_gradcheck(stats_of, base):
    loss = make(stats_of, base, 5).eval()
    logits, labels = rows(2, 9, loss, 5)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits)


@pytest.mark.parametrize("base", BASES)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 9), n=st.integers(1, 20))
def test_permuting_rows_and_classes(stats_of, base, seed, classes, n):
    generator = torch.Generator().manual_seed(seed)
    loss = make(stats_of, base, classes).eval()
    logits, labels = rows(seed, n, loss, n // 2)
    value = loss(logits, labels)
    (grad,) = torch.autograd.grad(value, logits)
    order = torch.randperm(n, generator=generator)
    torch.testing.assert_close(loss(logits[order], labels[order]), value)
    shuffled = torch.randperm(classes, generator=generator)
    loss.fg_confusion_matrix.copy_(loss.fg_confusion_matrix[shuffled][:, shuffled])
    columns = torch.cat([shuffled, torch.arange(classes, loss.num_logits)])
    new_labels = torch.argsort(torch.cat([shuffled, torch.tensor([classes])]))[labels]
    permuted = logits.detach()[:, columns].requires_grad_()
    (permuted_grad,) = torch.autograd.grad(loss(permuted, new_labels), permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


@pytest.mark.parametrize("base", BASES)
def test_when_it_is_active(stats_of, base):
    loss = make(stats_of, base, 4).eval()
    plain_base = BASES[base](stats_of([1, 1, 1, 1])).eval()
    logits, labels = rows(3, 12, loss, 8)
    reference = plain_base(logits, labels).item()
    assert loss(logits, labels).item() != pytest.approx(reference)
    assert loss(logits, labels, iter_id=2).item() == loss(logits, labels).item()  # the last step is the default
    assert loss(logits, labels, epoch=17).item() == loss(logits, labels).item()
    assert loss(logits, labels, iter_id=0).item() == pytest.approx(reference)
    assert loss(logits, labels, epoch=16.9).item() == pytest.approx(reference)
    loss.num_inst_cnt[2] = 0
    assert loss(logits, labels).item() == pytest.approx(reference)


def test_a_class_without_training_instances_is_not_waited_for(stats_of):
    loss = PCB(stats_of([5, 0, 3]), start_epoch=0)
    logits, labels = rows(0, 6, loss, 3)
    labels[:3] = torch.tensor([0, 2, 2])
    assert not loss.active()
    value = loss(logits, labels)
    assert loss.active()
    value.backward()
    assert torch.isfinite(logits.grad).all()


def test_the_first_sight_of_a_class_is_its_row(stats_of):
    loss = PCB(stats_of([1, 1, 1]))
    logits, labels = rows(0, 5, loss, 2)
    labels[:2] = 1
    loss(logits, labels)
    expected = logits.detach()[:2, :3].softmax(1).mean(0)
    torch.testing.assert_close(loss.fg_confusion_matrix[1], expected)
    assert loss.fg_confusion_matrix[[0, 2]].abs().sum() == 0
    assert loss.num_inst_cnt.tolist() == [0, 2, 0]


@pytest.mark.parametrize("base", BASES)
def test_state_moves_in_training_only_and_travels(stats_of, base):
    loss = make(stats_of, base, 4)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    logits, labels = rows(0, 10, loss, 6, dtype=torch.float32)
    loss.eval()(logits, labels, epoch=20)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name])
    loss.train()(logits, labels, epoch=20)
    assert loss._epoch.item() == 20
    assert not torch.equal(loss.fg_confusion_matrix, before["fg_confusion_matrix"])
    other = PCB(stats_of([1, 1, 1, 1]), base=base).to(torch.bfloat16)
    other.load_state_dict(loss.state_dict())
    for name, value in loss.state_dict().items():
        assert other.state_dict()[name].dtype == torch.float64
        assert torch.equal(other.state_dict()[name], value)
    assert other.eval()(logits, labels).item() == loss.eval()(logits, labels).item()


@pytest.mark.parametrize("share", [9, 12, 20])
@pytest.mark.parametrize("base", BASES)
def test_ranks_share_their_statistics(stats_of, run_on_ranks, base, share):
    """The second rank's part of the rows: mixed, background only, none."""
    joined = make(stats_of, base, 4)
    logits, labels = rows(1, 20, joined, 12)
    logits = logits.detach()
    for _ in range(2):
        joined(logits, labels)

    def on_rank(rank):
        part = slice(0, share) if rank == 0 else slice(share, None)
        loss = make(stats_of, base, 4)
        for _ in range(2):
            value = loss(logits[part].clone().requires_grad_(), labels[part])
            value.backward()
        return {name: value.tolist() for name, value in loss.state_dict().items()}

    for state in run_on_ranks(on_rank):
        for name, value in joined.state_dict().items():
            np.testing.assert_allclose(state[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("base", "alpha"), [("softmax", 0.4), ("seesaw", 0.05), ("eqlv2", 0.1)])
def test_defaults_and_interface_follow_the_base(stats_of, base, alpha):
    loss, plain_base = PCB(stats_of([9, 2]), base=base), BASES[base](stats_of([9, 2]))
    assert loss.alpha == alpha
    assert loss.num_logits == plain_base.num_logits
    assert torch.equal(loss.prior_bias(), plain_base.prior_bias())
    logits, _ = rows(0, 4, loss, 2)
    assert torch.equal(loss.scores(logits), plain_base.scores(logits))
    assert loss.scores(logits).shape == (4, 2)


def test_options(stats_of):
    stats = stats_of([3, 4])
    assert PCB(stats, base="seesaw", base_options={"p": 0.5}).base.p == 0.5
    for options, message in (
        ({"base": "softmx"}, r'no base "softmx" \(did you mean "softmax"\?\)'),
        ({"base": "seesaw", "base_options": {"epss": 1}}, r'has no option "epss" \(did you mean "eps"\?\)'),
        ({"base_options": {"p": 1}}, 'loss softmax has no option "p"'),
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"n_iter": 1}, "n_iter must be a whole number of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            PCB(stats, **options)
    with pytest.raises(ValueError, match=r"iter_id must lie in 0\.\.2 \(given: 3\)"):
        PCB(stats)(torch.zeros((1, 3)), torch.tensor([0]), iter_id=3)
