"""ACSL: reference vectors, the formula by itself, its random rows, gradients, and what it may not break on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.acsl import ACSL
from tailfin.stats import ClassStats


def build(frequency, **options):
    classes = len(frequency)
    return ACSL(
        ClassStats(image_count=[5] * classes, instance_count=[5] * classes, num_images=9, frequency=frequency),
        **options,
    )


def groups(classes, seed=0):
    return tuple(np.random.default_rng(seed).choice(["r", "c", "f"], classes).tolist())


def rows(seed, n, classes, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes + 1), generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes + 1, (n,), generator=generator)


def some_rows(labels, classes, seed=0):
    """(rare, common): row numbers of background rows, at least one of each where there is one."""
    background = np.flatnonzero(np.asarray(labels) == classes)
    rng = np.random.default_rng(seed)
    sizes = [min(len(background), 1 + len(background) // share) for share in (10, 4)]
    return tuple(rng.choice(background, size, replace=False) for size in sizes)


def reference(logits, labels, frequency, draws, score_thr=0.7):
    """(loss, gradient, weight) in NumPy float64, a row at a time."""
    z = np.asarray(logits, dtype=np.float64)
    classes = z.shape[1] - 1
    p = np.exp(-np.logaddexp(0, -z))
    letters = np.array(frequency)
    weight, target = np.zeros_like(z), np.zeros_like(z)
    for row, label in enumerate(np.asarray(labels)):
        target[row, label] = 1
        if label < classes:
            weight[row] = p[row] >= score_thr
            weight[row, label] = 1
        else:
            weight[row, classes] = 1
            weight[row, :classes][letters == "f"] = 1
            weight[row, :classes][np.isin(letters, ["r", ""])] = row in draws[0]
            weight[row, :classes][letters == "c"] = row in draws[1]
    element = np.logaddexp(0, np.where(target == 1, -z, z))
    return (weight * element).sum() / len(z), weight * (p - target) / len(z), weight


def from_vectors(data, case, dtype=torch.float64):
    """Logits, labels, groups and row choices of a case whose background is column and label 0, in tailfin's order."""
    logits = data.tensor(f"{case}/logits", dtype).roll(-1, dims=1)
    labels = data.tensor(f"{case}/labels")
    labels = torch.where(labels == 0, int(data[f"{case}/num_classes"]), labels - 1)
    frequency = tuple("rcf"[group] for group in data[f"{case}/freq_group"][1:])
    draws = {name: rows for name, rows in data.under(case).items() if name.startswith("bg_rows_for_")}
    return logits, labels, frequency, draws


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["a_typical", "a_typical_thr3", "b_small", "c_nofg"])
def test_reference_vectors(vectors, assert_close, case, dtype):
    data = vectors("acsl")
    logits, labels, frequency, draws = from_vectors(data, case, dtype)
    loss = build(frequency, score_thr=float(data[f"{case}/hp/score_thr"]))
    value = loss(logits.requires_grad_(), labels, draws=draws)
    assert value.dtype == dtype
    grad = np.roll(data[f"{case}/grad"], -1, axis=1)
    assert_close(value, logits, data[f"{case}/loss"], grad)
    (found,) = torch.autograd.grad(value, logits)
    mask = np.roll(data[f"{case}/weight_mask"], -1, axis=1)
    np.testing.assert_array_equal(found.numpy() != 0, mask)
    np.testing.assert_allclose(loss.scores(logits.detach()), data[f"{case}/scores"][:, 1:], atol=1e-6)


def test_row_choices_may_be_given_in_several_ways(vectors):
    logits, labels, frequency, stored = from_vectors(vectors("acsl"), "a_typical")
    loss = build(frequency)
    value = loss(logits, labels, draws=stored)
    rare, common = stored["bg_rows_for_rare"], stored["bg_rows_for_common"]
    masks = torch.zeros((2, len(labels)), dtype=torch.bool)
    masks[0, torch.from_numpy(rare)] = True
    masks[1, torch.from_numpy(common)] = True
    for draws in (
        {"rare": rare, "common": common},
        (rare, common, stored["bg_rows_for_freq"]),
        [rare.tolist(), common.tolist()],
        masks,
    ):
        assert loss(logits, labels, draws=draws).item() == value.item()
    assert loss(logits, labels, draws=([], [])).item() < value.item()


@pytest.mark.parametrize(
    ("classes", "n", "scale", "background"),
    [(1, 24, 2.0, True), (1, 24, 2.0, False), (7, 40, 2.0, False), (30, 48, 12.0, True), (1203, 64, 2.0, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(assert_close, classes, n, scale, background, dtype):
    logits, labels = rows(classes, n, classes, dtype, scale)
    labels = labels.clamp(max=classes - 1) if not background else torch.where(labels % 3 == 0, classes, labels)
    draws = some_rows(labels, classes)
    for frequency in (groups(classes), ("",) * classes, ("c",) * classes, ("f",) * classes):
        value = build(frequency)(logits.requires_grad_(), labels, draws=draws)
        assert_close(value, logits, *reference(logits.detach(), labels, frequency, draws)[:2])


def test_by_hand():
    # one rare, one frequent class; a row of the rare one with p = 1/2 everywhere, then p = 3/4 on the frequent one
    loss = build(("r", "f"))
    logits = torch.zeros((1, 3), dtype=torch.float64)
    assert loss(logits, torch.tensor([0])).item() == pytest.approx(np.log(2), rel=1e-12)
    logits[0, 1] = np.log(3)
    assert loss(logits, torch.tensor([0])).item() == pytest.approx(np.log(2) + np.log(4), rel=1e-12)
    # a background row: its own column and the frequent class, whatever their probabilities
    assert loss(logits, torch.tensor([2])).item() == pytest.approx(np.log(2) + np.log(4), rel=1e-12)


@pytest.mark.parametrize("n", [9, 99, 100, 287, 1000])
def test_random_rows_have_the_shares_of_the_released_code(n):
    loss = build(("r", "c", "f"))
    labels = torch.full((n + 5,), 3)
    labels[::2][:5] = 0  # five foreground rows in between
    background = labels == 3
    logits = torch.zeros((n + 5, 4), requires_grad=True)

    def chosen(seed):
        value = loss(logits, labels, generator=torch.Generator().manual_seed(seed))
        (grad,) = torch.autograd.grad(value, logits)
        return (grad != 0)[background][:, :3].T

    rare, common, frequent = chosen(0)
    assert (rare.sum().item(), common.sum().item()) == (n // 100, n // 10)
    assert frequent.all()
    assert torch.equal(chosen(0), chosen(0))
    if n > 100:
        assert not torch.equal(chosen(0)[1], chosen(1)[1])
        # every row has its chance, and the two choices do not go together
        often = torch.stack([chosen(seed)[1] for seed in range(60)]).sum(dim=0)
        assert (often > 0).float().mean() > 0.95
        assert (rare & common).sum() < max(2, n // 200)


def test_random_rows_come_from_torch_by_default():
    loss = build(("r", "c", "f"))
    logits, labels = torch.zeros((300, 4), requires_grad=True), torch.full((300,), 3)

    def grad():
        torch.manual_seed(5)
        return torch.autograd.grad(loss(logits, labels), logits)[0]

    assert torch.equal(grad(), grad())
    assert not torch.equal(grad(), torch.autograd.grad(loss(logits, labels), logits)[0])


def test_gradcheck():
    logits, labels = rows(1, 12, 5)
    labels[:4] = 5
    loss = build(groups(5))
    draws = some_rows(labels, 5)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, draws=draws), logits.requires_grad_())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 8), n=st.integers(1, 20))
def test_permuting_rows_and_classes(seed, classes, n):
    generator = torch.Generator().manual_seed(seed)
    frequency = groups(classes, seed)
    logits, labels = rows(seed, n, classes)
    draws = some_rows(labels, classes, seed)
    loss = build(frequency)
    value = loss(logits.requires_grad_(), labels, draws=draws)
    (grad,) = torch.autograd.grad(value, logits)
    order, columns = torch.randperm(n, generator=generator), torch.randperm(classes, generator=generator)
    place = torch.argsort(order).numpy()
    torch.testing.assert_close(loss(logits[order], labels[order], draws=[place[chosen] for chosen in draws]), value)
    renamed = build(tuple(frequency[column] for column in columns))
    columns = torch.cat([columns, torch.tensor([classes])])
    permuted = logits.detach()[:, columns].requires_grad_()
    other = renamed(permuted, torch.argsort(columns)[labels], draws=draws)
    torch.testing.assert_close(other, value)
    (permuted_grad,) = torch.autograd.grad(other, permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


def test_ignored_rows_are_removed_first():
    logits, labels = rows(6, 30, 4)
    padded = torch.cat([torch.full((3, 5), 50.0, dtype=logits.dtype), logits])
    loss, draws = build(groups(4)), some_rows(labels, 4)
    other = loss(padded, torch.cat([torch.full((3,), -1), labels]), draws=draws)
    torch.testing.assert_close(other, loss(logits, labels, draws=draws))


def test_state_prior_and_options():
    loss = build(groups(6))
    assert loss.state_dict() == {}
    torch.testing.assert_close(loss.scores(loss.prior_bias()[None]), torch.full((1, 6), 0.01))
    logits = torch.full((1, 7), 3.0)
    everything = build(groups(6), score_thr=0.0)(logits, torch.tensor([0]))
    own_column = build(groups(6), score_thr=1.0)(logits, torch.tensor([0]))
    assert everything.item() == pytest.approx(6 * np.log1p(np.exp(3)) + np.log1p(np.exp(-3)), rel=1e-5)
    assert own_column.item() == pytest.approx(np.log1p(np.exp(-3)), rel=1e-5)
    for score_thr in (-0.1, 1.1):
        with pytest.raises(ValueError, match="score_thr"):
            build(groups(3), score_thr=score_thr)
