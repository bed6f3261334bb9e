"""Self-EMD's transport between maps: exact costs, BYOL as its limit, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from small_shell import samples, shell, total
from torch.nn import functional as F

from tailfin.pretraining.contrast import cosine_distance
from tailfin.pretraining.transport import earth_mover, masses_of, sinkhorn
from tailfin.schema.pretraining import TransportContrast


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_a_small_epsilon_gives_the_exact_cost():
    cost = 1 - unit(2, 4, 6) @ unit(2, 5, 6, seed=1).transpose(1, 2)
    generator = torch.Generator().manual_seed(2)
    rows, columns = (torch.rand(2, n, generator=generator, dtype=torch.float64) + 0.1 for n in (4, 5))
    rows, columns = rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True)
    flow = sinkhorn(cost, rows, columns, 0.003, 10_000)
    torch.testing.assert_close(flow.sum(1), columns)
    torch.testing.assert_close(flow.sum(2), rows, rtol=0, atol=1e-3)
    for picture in range(2):
        marginals = [np.kron(np.eye(4), np.ones(5)), np.kron(np.ones(4), np.eye(5))]
        exact = linprog(
            cost[picture].flatten().numpy(),
            A_eq=np.concatenate(marginals),
            b_eq=np.concatenate([rows[picture].numpy(), columns[picture].numpy()]),
        )
        assert float((flow[picture] * cost[picture]).sum()) == pytest.approx(exact.fun, abs=5e-3)


def test_maps_of_one_cell_are_byol():
    own, other = unit(3, 1, 8), unit(3, 1, 8, seed=1)
    real = torch.ones(3, 1, dtype=torch.bool)
    found = earth_mover(own, real, other, real, TransportContrast())
    torch.testing.assert_close(found.float(), cosine_distance(own[:, 0], other[:, 0]))


def test_masses_are_likeness_to_the_other_maps_mean():
    own, other = unit(1, 4, 6), unit(1, 3, 6, seed=1)
    real = torch.tensor([[True, True, True, False]])
    found = masses_of(own, real, other, torch.tensor([[True, True, False]]))
    by_hand = [max(float(own[0, i] @ ((other[0, 0] + other[0, 1]) / 2)), 0) + 1e-3 for i in range(3)]
    torch.testing.assert_close(found[0, :3], torch.tensor(by_hand, dtype=torch.float64) / sum(by_hand))
    assert found[0, 3] == 0


def test_padding_does_not_matter():
    own, other = unit(1, 4, 6), unit(1, 3, 6, seed=1)
    config = TransportContrast(iterations=200)
    plain = earth_mover(own, torch.ones(1, 4, dtype=torch.bool), other, torch.ones(1, 3, dtype=torch.bool), config)
    padded = torch.cat([own, unit(1, 2, 6, seed=2)], 1)
    real = torch.tensor([[True] * 4 + [False] * 2])
    found = earth_mover(padded, real, other, torch.ones(1, 3, dtype=torch.bool), config)
    torch.testing.assert_close(found, plain)


def test_a_shuffled_map_costs_nothing():
    own = unit(1, 5, 6)
    other = own[:, torch.tensor([3, 1, 4, 0, 2])]
    real = torch.ones(1, 5, dtype=torch.bool)
    near = earth_mover(own, real, other, real, TransportContrast(epsilon=0.005, iterations=500))
    assert float(near) < 0.05 < float(earth_mover(own, real, unit(1, 5, 6, seed=4), real, TransportContrast()))


def test_a_few_steps_of_training():
    own = shell(preset="self_emd")
    optimizer = torch.optim.Adam([p for p in own.parameters() if p.requires_grad], lr=2e-3)
    images, targets = samples()
    values = []
    for _ in range(10):
        loss = total(own(images, targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert sum(values[-3:]) < 0.9 * sum(values[:3]), values
