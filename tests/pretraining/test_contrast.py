"""Contrastive losses against closed forms, the ring queue against a deque, gathering over processes."""

from __future__ import annotations

import copy
import math
from collections import deque

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tailfin.collectives import gather_over_ranks
from tailfin.pretraining.contrast import (
    ContrastHeads,
    ProjectionMLP,
    RingQueue,
    box_nt_xent,
    cosine_distance,
    info_nce,
    nt_xent,
    same_class,
)
from tailfin.schema.pretraining import Contrast


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


# ---- InfoNCE ---------------------------------------------------------------------------------------------------------


def test_two_negatives_by_hand():
    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    expected = -math.log(math.exp(0.6 / 0.2) / (math.exp(0.6 / 0.2) + math.exp(0.0) + math.exp(-1 / 0.2)))
    assert info_nce(query, key, negatives, 0.2).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 7, 65536])
def test_equal_cosines_give_log_of_one_plus_k(count):
    row = torch.tensor([[1.0, 0.0, 0.0]])
    assert info_nce(row, row, row.expand(count, 3), 0.07).item() == pytest.approx(math.log(1 + count), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), negatives=st.integers(0, 9), seed=st.integers(0, 99), temperature=st.floats(0.05, 2))
def test_it_is_the_cross_entropy_with_the_positive_first(rows, negatives, seed, temperature):
    query = unit(rows, 4, seed=seed).requires_grad_()
    key = unit(rows, 4, seed=seed + 1).requires_grad_()
    others = unit(negatives, 4, seed=seed + 2)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ others.T], 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64))
    found = info_nce(query, key, others, temperature)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(*(torch.autograd.grad(value, (query, key)) for value in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)


def test_gradcheck():
    others = unit(11, 5, seed=2)
    inputs = (unit(4, 5).requires_grad_(), unit(4, 5, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, others, 0.2), inputs)


def test_the_negatives_may_be_overwritten_before_the_backward_pass():
    query, key, others = unit(3, 8).requires_grad_(), unit(3, 8, seed=1), unit(6, 8, seed=2)
    (expected,) = torch.autograd.grad(info_nce(query, key, others, 0.2), query)
    loss = info_nce(query, key, others, 0.2)
    others.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, query)[0], expected, atol=0, rtol=0)


def test_no_rows_give_zero_in_the_graph_and_the_divisor_can_be_given():
    query, key, others = unit(3, 8).requires_grad_(), unit(3, 8, seed=1), unit(6, 8, seed=2)
    nothing = info_nce(query[:0], key[:0], others, 0.2)
    nothing.backward()
    assert nothing.item() == 0 and query.grad is not None and not query.grad.any()
    mean, shared = info_nce(query, key, others, 0.2), info_nce(query, key, others, 0.2, rows=6)
    torch.testing.assert_close(shared, mean / 2)
    assert cosine_distance(query[:0], key[:0]).item() == 0


def test_half_precision_is_computed_in_float32():
    query, key, others = (unit(3, 8, seed=seed, dtype=torch.float32) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        value = info_nce(query, key, others, 0.2)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, info_nce(query, key, others, 0.2), atol=0, rtol=0)


# ---- the others ------------------------------------------------------------------------------------------------------


def test_nt_xent_by_hand():
    first, second = unit(3, 4), unit(3, 4, seed=1)
    rows = torch.cat([first, second])
    total = 0.0
    for i in range(6):
        positive = math.exp(float(rows[i] @ rows[(i + 3) % 6]) / 0.5)
        others = sum(math.exp(float(rows[i] @ rows[j]) / 0.5) for j in range(6) if j != i)
        total -= math.log(positive / others) / 6
    assert nt_xent(first, second, 0.5).item() == pytest.approx(total, rel=1e-6)


def test_box_nt_xent_by_hand():
    """Box 7 has two queries and one key, box 8 one query and two keys, box 9 a query without a key."""
    queries, keys = unit(4, 5, dtype=torch.float32), unit(3, 5, seed=1, dtype=torch.float32)
    query_ids, key_ids = torch.tensor([7, 7, 8, 9]), torch.tensor([7, 8, 8])
    every, ids = torch.cat([keys, queries]), torch.cat([key_ids, query_ids])
    means = []
    for query, own in zip(queries[:3], query_ids[:3], strict=True):
        others = sum(math.exp(float(query @ row) / 0.5) for row, other in zip(every, ids, strict=True) if other != own)
        pairs = [math.exp(float(query @ key) / 0.5) for key, other in zip(keys, key_ids, strict=True) if other == own]
        means.append(sum(-math.log(pair / (pair + others)) for pair in pairs) / len(pairs))
    found = box_nt_xent(queries, query_ids, keys, key_ids, 0.5)
    assert found.item() == pytest.approx(sum(means) / 3, rel=1e-5)
    queries.requires_grad_()
    lonely = box_nt_xent(queries, query_ids, keys[:0], key_ids[:0], 0.5)
    lonely.backward()
    assert lonely.item() == 0 and not queries.grad.any()


@pytest.mark.parametrize("counts", [(3, 2), (5, 0)])
def test_boxes_of_two_processes_are_contrasted_as_of_one(run_on_ranks, counts):
    """Boxes are counted on each process; the second may have no row."""
    queries, keys = unit(5, 6, dtype=torch.float32), unit(6, 6, seed=1, dtype=torch.float32)
    query_ids, key_ids = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0, 1, 1, 0, 0, 1])
    cut = {0: (slice(0, counts[0]), slice(0, 3)), 1: (slice(counts[0], None), slice(3, None))}

    def on_rank(rank):
        own = queries[cut[rank][0]].clone().requires_grad_()
        loss = box_nt_xent(own, query_ids[cut[rank][0]], keys[cut[rank][1]], key_ids[cut[rank][1]], 0.5)
        loss.backward()
        return float(loss), own.grad.numpy()

    found = run_on_ranks(on_rank)
    joined = queries.clone().requires_grad_()
    process = (torch.arange(5) >= counts[0]) * 2
    loss = box_nt_xent(joined, query_ids + process, keys, key_ids + (torch.arange(6) >= 3) * 2, 0.5)
    loss.backward()
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(loss.item(), rel=1e-5)
    mean = torch.cat([torch.from_numpy(own) for _, own in found]) / 2
    torch.testing.assert_close(mean, joined.grad, atol=1e-6, rtol=1e-4)


@given(seed=st.integers(0, 50))
def test_cosine_distance_is_the_squared_distance_of_unit_rows(seed):
    queries, keys = unit(5, 6, seed=seed), unit(5, 6, seed=seed + 1)
    torch.testing.assert_close(
        cosine_distance(queries, keys), ((queries - keys) ** 2).sum(1).mean().float(), atol=1e-5, rtol=1e-5
    )


# ---- the queue -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 20), max_size=6))
def test_a_queue_is_a_deque_that_forgets_the_oldest(size, batches):
    queue = RingQueue(size, 3)
    model = deque(queue.rows.clone().unbind(), maxlen=size)
    for number, count in enumerate(batches):
        keys = unit(count, 3, seed=number, dtype=torch.float32).requires_grad_()
        queue.enqueue(keys)
        model.extend(keys.detach().unbind())
    assert queue.rows.shape == (size, 3) and not queue.rows.requires_grad
    assert int(queue.place) == sum(batches) % size
    in_order = queue.rows.roll(-int(queue.place), 0)  # the oldest is where the next one goes
    torch.testing.assert_close(in_order, torch.stack(list(model)), atol=0, rtol=0)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(size))


def test_a_queue_travels_in_the_checkpoint():
    queue, other = RingQueue(5, 3), RingQueue(5, 3)
    queue.enqueue(unit(7, 3, dtype=torch.float32))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(queue.rows, other.rows) and torch.equal(queue.place, other.place)
    assert queue.rows.dtype == torch.float32


def test_projectors_take_any_number_of_rows():
    projector = ProjectionMLP(6, 5, 4).train()
    for rows in (0, 1, 3):
        projector.zero_grad(set_to_none=True)
        out = projector(torch.randn(rows, 6))
        out.sum().backward()
        assert out.shape == (rows, 4)
        assert all(p.grad is not None for p in projector.parameters())


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_norms_of_a_projector(norm):
    """Without a batch norm a row's output is its own; with it two rows are told apart by each other's values alone."""
    projector, rows = ProjectionMLP(6, 5, 4, norm=norm).train(), torch.randn(3, 6)
    alone, together = projector(rows[:1]), projector(rows)[:1]
    assert torch.allclose(alone, together, atol=1e-6) == (norm != "batch")
    assert ("running_mean" in str(projector.state_dict().keys())) == (norm == "batch")


@pytest.mark.parametrize("counts", [(3, 4), (7, 0), (1, 0)])
def test_batch_norm_of_two_processes_is_that_of_the_joined_rows(run_on_ranks, counts):
    """Values, gradients and running statistics; a single row in all is normed by the running ones."""
    torch.manual_seed(0)
    rows, wanted = torch.randn(sum(counts), 5) * 3 + 2, torch.randn(sum(counts), 4)
    projector = ProjectionMLP(5, 8, 4).train()
    rows_of = {0: slice(0, counts[0]), 1: slice(counts[0], None), None: slice(None)}

    def trained(rank):
        own, given = copy.deepcopy(projector), rows[rows_of[rank]].clone().requires_grad_()
        for _ in range(2):
            out = own(given)
        (out * wanted[rows_of[rank]]).sum().backward()
        state = {key: value.numpy() for key, value in own.state_dict().items() if key.startswith("norm.")}
        return out.detach().numpy(), given.grad.numpy(), state, [p.grad.numpy() for p in own.parameters()]

    out, grad, state, weights = trained(None)
    ranks = run_on_ranks(trained)
    for number, expected in enumerate((out, grad)):
        np.testing.assert_allclose(np.concatenate([own[number] for own in ranks]), expected, rtol=1e-4, atol=1e-5)
    for own in ranks:
        for key, value in state.items():
            np.testing.assert_allclose(own[2][key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for own, expected in zip(zip(*(own[3] for own in ranks), strict=True), weights, strict=True):
        np.testing.assert_allclose(sum(own), expected, rtol=1e-4, atol=1e-4)


# ---- several processes -----------------------------------------------------------------------------------------------


def _two_processes(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    queue = RingQueue(7, 4)
    for step, counts in enumerate([(2, 3), (0, 4), (5, 1)]):
        keys = unit(5, 4, seed=10 * step + rank, dtype=torch.float32)[: counts[rank]]
        queue.enqueue(gather_over_ranks(keys)[0])
    first = unit(4, 4, dtype=torch.float32)[2 * rank : 2 * rank + 2].clone().requires_grad_()
    second = unit(4, 4, seed=1, dtype=torch.float32)[2 * rank : 2 * rank + 2]
    loss = nt_xent(first, second, 0.5)
    loss.backward()
    return {"rows": queue.rows.numpy(), "place": int(queue.place), "loss": float(loss), "grad": first.grad.numpy()}


def test_two_processes_keep_the_same_queue_and_see_one_batch(run_on_ranks):
    one, two = run_on_ranks(_two_processes)
    assert (one["rows"] == two["rows"]).all() and one["place"] == two["place"] == 15 % 7
    torch.manual_seed(0)
    queue = RingQueue(7, 4)
    for step, counts in enumerate([(2, 3), (0, 4), (5, 1)]):
        keys = [unit(5, 4, seed=10 * step + rank, dtype=torch.float32)[: counts[rank]] for rank in (0, 1)]
        queue.enqueue(torch.cat(keys))
    assert (queue.rows.numpy() == one["rows"]).all()
    first, second = unit(4, 4, dtype=torch.float32).requires_grad_(), unit(4, 4, seed=1, dtype=torch.float32)
    loss = nt_xent(first, second, 0.5)
    loss.backward()
    assert (one["loss"] + two["loss"]) / 2 == pytest.approx(loss.item(), rel=1e-6)
    mean = torch.cat([torch.from_numpy(part["grad"]) for part in (one, two)]) / 2  # as gradients are averaged
    torch.testing.assert_close(mean, first.grad, atol=1e-6, rtol=1e-5)


def test_negatives_of_the_same_class_are_left_out():
    torch.manual_seed(0)
    queries, keys, negatives = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (3, 3, 8))
    labels, others = torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1, 2, -1, -1, 1, 0])
    out = same_class(labels, others)
    assert out.tolist()[0] == [True, True, False, False, False, False, False, True] and not out[2].any()
    each = [
        info_nce(queries[row : row + 1], keys[row : row + 1], negatives[~out[row]], 0.2) for row in range(len(queries))
    ]
    value = info_nce(queries, keys, negatives, 0.2, left_out=out)
    torch.testing.assert_close(value, torch.stack(each).mean())
    every = info_nce(queries, keys, negatives, 0.2, left_out=torch.ones(3, 8, dtype=torch.bool))
    assert every.item() == pytest.approx(0)  # nothing is left to confuse it with
    free = queries.requires_grad_()
    assert torch.autograd.gradcheck(lambda own: info_nce(own, keys, negatives, 0.2, left_out=out), free)


def test_a_queue_remembers_the_class_of_its_keys():
    queue = RingQueue(4, 2)
    assert queue.labels.tolist() == [-1] * 4
    queue.enqueue(torch.eye(2), torch.tensor([5, 1202]))
    queue.enqueue(torch.eye(2)[:1])
    assert queue.labels.tolist() == [5, 1202, -1, -1]
    queue.enqueue(torch.ones(6, 2), torch.arange(6))
    assert sorted(queue.labels.tolist()) == [2, 3, 4, 5] and int(queue.place) == 1


def test_diagnosis_of_a_contrast():
    rows = F.normalize(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    heads = ContrastHeads({"image": (Contrast(queue=50, hidden=8, dim=16), 8)})
    own = heads["image"].diagnosed(rows[:500], rows[:500])
    assert own["spread"].item() == pytest.approx(1, abs=0.02) and own["accuracy"].item() == 1
    far = heads["image"].diagnosed(rows[:500], -rows[:500])
    one = heads["image"].diagnosed(rows[:1].expand(9, -1), rows[:9])
    assert far["accuracy"].item() == 0 and one["spread"].item() == pytest.approx(0, abs=1e-3)
    assert heads["image"].diagnosed(rows[:0], rows[:0]) == {}
