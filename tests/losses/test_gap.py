"""gap: reference vectors, a plain re-derivation, the interval search, state over ranks, unsafe situations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.losses.gap import GAP, _corners_below

CASES = ("a_typical", "a_typical_g5", "b_small", "c_nofg")


def ones(classes, stats_of):
    return stats_of(np.ones(classes, dtype=np.int64))


def plain(logits, labels, samples, gamma=1.0, delta=0.5, lam=0.1):
    """The documented loss and gradient, one foreground row after another, in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    classes = len(samples) - 1
    weight = np.maximum(samples[:-1], 1.0) ** -gamma
    weight *= classes / weight.sum()
    foreground = np.flatnonzero(labels < classes)
    negative = np.ones((len(logits), classes), dtype=bool)
    negative[foreground, labels[foreground]] = False
    present = np.unique(labels[foreground])
    value, grad = 0.0, np.zeros_like(logits)
    for label in present:
        rows = np.flatnonzero(labels == label)
        for row in rows:
            threshold = logits[row, label]
            above = np.clip((logits[:, :classes] - threshold) / (2 * delta) + 0.5, 0, 1) * negative
            own = np.clip((logits[rows, label] - threshold) / (2 * delta) + 0.5, 0, 1).sum()
            rank = above.sum() + own
            value += above.sum() / rank / len(rows) / len(present)
            step = lam * weight[label] / len(rows) / len(present)
            grad[row, label] -= step * above.sum() / rank
            grad[:, :classes] += step * above / rank
    return value, grad


def rows(seed, n, classes, foreground, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((n, classes + 1), generator=generator, dtype=dtype)
    labels = torch.full((n,), classes)
    labels[:foreground] = (torch.rand(foreground, generator=generator) ** 2 * classes).long()
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(vectors, assert_close, stats_of, case, dtype):
    file = vectors("rog_gap")
    options = {key: float(value) for key, value in file.under(f"{case}/hp").items()}
    loss = GAP(ones(int(file[f"{case}/num_classes"]), stats_of), **options)
    np.testing.assert_array_equal(loss.num_samples, file[f"{case}/step0/state_before/num_samples"])
    for step in range(3):
        prefix = f"{case}/step{step}"
        logits = file.tensor(f"{prefix}/logits", dtype).requires_grad_()
        value = loss(logits, file.tensor(f"{prefix}/labels"))
        np.testing.assert_array_equal(loss.num_samples, file[f"{prefix}/state_after/num_samples"])
        if f"{prefix}/rank_loss_skipped" in file:
            assert value.item() == 0
            assert torch.autograd.grad(value, logits)[0].abs().max() == 0
        else:
            assert value.dtype == dtype
            assert_close(value, logits, file[f"{prefix}/loss"], file[f"{prefix}/grad"])


@pytest.mark.parametrize(
    ("n", "classes", "foreground", "scale", "options"),
    [
        (40, 7, 15, 3.0, {}),
        (40, 7, 40, 3.0, {"gamma": 0.5, "delta": 0.25, "lam": 2.0}),  # no background
        (30, 1, 20, 3.0, {}),  # one class
        (1, 1, 1, 3.0, {}),  # no negative at all
        (48, 30, 20, 18.0, {}),  # logits x6
        (48, 30, 20, 180.0, {}),  # logits x60
        (48, 30, 20, 1e-3, {}),  # all logits alike: corners crowd together
        (48, 30, 20, 0.0, {}),  # all logits equal
        (40, 1203, 25, 6.0, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_plain_form(stats_of, n, classes, foreground, scale, options, dtype):
    loss = GAP(ones(classes, stats_of), **options)
    logits, labels = rows(n, n, classes, foreground, scale, dtype)
    value = loss(logits, labels)
    value.backward()
    expected, grad = plain(logits.detach().numpy(), labels.numpy(), loss.num_samples.numpy(), **options)
    exact = dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-9 if exact else 1e-4, abs=1e-12)
    np.testing.assert_allclose(logits.grad, grad, atol=1e-12 if exact else 2e-6)


def test_gradient_is_scaled_by_what_follows(stats_of):
    loss = GAP(ones(5, stats_of)).eval()
    logits, labels = rows(0, 20, 5, 8)
    (once,) = torch.autograd.grad(loss(logits, labels), logits)
    (thrice,) = torch.autograd.grad(3 * loss(logits, labels), logits)
    torch.testing.assert_close(thrice, 3 * once)
    assert once[:, -1].abs().max() == 0
    with torch.no_grad():
        assert loss(logits, labels).item() == loss(logits, labels).item()


def test_a_perfect_ranking_has_no_loss(stats_of):
    loss = GAP(ones(3, stats_of))
    logits = torch.full((6, 4), -5.0)
    labels = torch.tensor([0, 1, 2, 2, 3, 3])
    logits[torch.arange(4), labels[:4]] = 5.0
    logits.requires_grad_()
    value = loss(logits, labels)
    assert value.item() == 0
    assert torch.autograd.grad(value, logits)[0].abs().max() == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), classes=st.integers(1, 9), n=st.integers(1, 20))
def test_permuting_rows_and_classes(stats_of, seed, classes, n):
    generator = torch.Generator().manual_seed(seed)
    loss = GAP(ones(classes, stats_of)).eval()
    loss.num_samples += torch.randint(0, 50, (classes + 1,), generator=generator)
    logits, labels = rows(seed, n, classes, n // 2)
    value = loss(logits, labels)
    (grad,) = torch.autograd.grad(value, logits)
    order = torch.randperm(n, generator=generator)
    torch.testing.assert_close(loss(logits[order], labels[order]), value)
    shuffled = torch.randperm(classes, generator=generator)
    columns = torch.cat([shuffled, torch.tensor([classes])])
    new_labels = torch.argsort(columns)[labels]
    loss.num_samples.copy_(loss.num_samples[columns])
    permuted = logits.detach()[:, columns].requires_grad_()
    (permuted_grad,) = torch.autograd.grad(loss(permuted, new_labels), permuted)
    torch.testing.assert_close(permuted_grad, grad[:, columns])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    edges=st.integers(2, 60),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    outlier=st.sampled_from([0.0, 1.0, 1e8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_interval_search_is_a_binary_search(seed, edges, scale, outlier, dtype):
    generator = torch.Generator().manual_seed(seed)
    corners = scale * torch.randn(edges, generator=generator, dtype=dtype)
    corners[0] += 1 + outlier  # some edges crowd together
    corners = corners.sort().values
    values = torch.cat([corners, 2 * scale * torch.randn(300, generator=generator, dtype=dtype)])
    values = torch.cat([values, corners[-1:] + 1, corners[:1] - 1, corners.nextafter(corners + 1)])
    found = _corners_below(values, corners)
    assert torch.equal(found.long(), torch.bucketize(values, corners))


def test_counts_move_in_training_only_and_travel(stats_of):
    loss = GAP(ones(3, stats_of))
    logits, labels = rows(0, 6, 3, 4, dtype=torch.float32)
    loss.eval()(logits, labels)
    assert loss.num_samples.sum() == 0
    loss.train()(logits, labels)
    assert loss.num_samples.tolist() == torch.bincount(labels, minlength=4).tolist()
    other = GAP(ones(3, stats_of)).half()
    other.load_state_dict(loss.state_dict())
    assert other.num_samples.dtype == torch.float64
    assert torch.equal(other.num_samples, loss.num_samples)


@pytest.mark.parametrize("share", [6, 12, 20])
def test_ranks_share_their_counts(stats_of, run_on_ranks, share):
    """The second rank's part of the rows: mixed, background only, none."""
    logits, labels = rows(1, 20, 4, 12)
    joined = GAP(ones(4, stats_of))
    joined(logits, labels)

    def on_rank(rank):
        part = slice(0, share) if rank == 0 else slice(share, None)
        loss = GAP(ones(4, stats_of))
        value = loss(logits[part], labels[part])
        value.backward()
        return loss.num_samples.tolist(), value.item()

    (counts, value), (same, _) = run_on_ranks(on_rank)
    assert counts == same == joined.num_samples.tolist()
    expected, _ = plain(logits.detach().numpy()[:share], labels.numpy()[:share], np.array(counts))
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("labels", [[], [-1, -1], [3, 3, 3]])
def test_no_foreground_is_zero_and_attached(stats_of, labels):
    loss = GAP(ones(3, stats_of))
    logits = torch.zeros((len(labels), 4), requires_grad=True)
    value = loss(logits, torch.tensor(labels, dtype=torch.int64))
    assert value.item() == 0
    value.backward()
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 3), (19, 1)])  # a positive, a negative, a background row
def test_logits_that_are_not_finite_are_seen_in_the_loss(stats_of, value, place):
    loss = GAP(ones(5, stats_of))
    logits, labels = rows(0, 20, 5, 8)
    labels[0] = 0
    broken = logits.detach().clone()
    broken[place] = value
    assert loss(broken.requires_grad_(), labels).isnan()


def test_it_has_no_scores_and_checks_its_options(stats_of):
    loss = GAP(ones(3, stats_of))
    assert loss.num_logits == 4
    assert loss.prior_bias().tolist() == pytest.approx([-np.log(999)] * 4)
    with pytest.raises(TypeError, match="use the loss rog"):
        loss.scores(torch.zeros((1, 4)))
    for options, message in (
        ({"gamma": -1}, "gamma must not be negative"),
        ({"delta": 0}, "delta must be positive"),
        ({"lam": -0.1}, "lam must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            GAP(ones(3, stats_of), **options)
