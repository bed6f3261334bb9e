"""BACL's feature hallucination: reference vectors, statistics by batch and process, drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tailfin.models.features.hallucination import FeatureHallucination, FeatureStatistics, inverse_cdf

CASES = ["a_typical", "b_small", "c_nofg"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(golden_dir: Path, case: str, dtype: torch.dtype):
    data = np.load(golden_dir / "bacl_fhm.npz")
    hp = {key: data[f"{case}/hp/{key}"].item() for key in ("beta", "sampled_num_classes", "sampled_num_features")}
    module = FeatureHallucination(int(data[f"{case}/num_classes"]), int(data[f"{case}/feat_dim"]), **hp).to(dtype)
    statistics, names = module.statistics, {"mean": "prototype", "variance": "variance", "used": "used"}
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    for own, official in names.items():
        np.testing.assert_array_equal(getattr(statistics, own), data[f"{case}/step0/state_before/{official}"])
    for step in range(3):
        at = f"{case}/step{step}"
        module.update(torch.from_numpy(data[f"{at}/features"]), torch.from_numpy(data[f"{at}/labels"]))
        for own, official in names.items():
            np.testing.assert_allclose(getattr(statistics, own), data[f"{at}/state_after/{official}"], **tolerance)
        ratio = torch.from_numpy(data[f"{at}/correct_cls_ratio"])
        uniform = torch.from_numpy(data[f"{at}/uniform_sorted"])
        np.testing.assert_array_equal(inverse_cdf(1 - ratio, uniform), data[f"{at}/selected_classes"])
        share = (1 - ratio) / (1 - ratio).sum()
        np.testing.assert_allclose(share, data[f"{at}/sample_probability"], rtol=1e-12)
        features, labels = module.sample(ratio, draws=(uniform, torch.from_numpy(data[f"{at}/noise"])))
        np.testing.assert_allclose(features, data[f"{at}/hallucinated"], **tolerance)
        np.testing.assert_array_equal(labels, data[f"{at}/hallucinated_labels"])


def test_statistics_by_hand():
    statistics = FeatureStatistics(3, 1, momentum=0.5)
    statistics.update(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 2]))
    assert statistics.mean.flatten().tolist() == [2, 0, 7]
    assert statistics.variance.flatten().tolist() == [2, 0, 0]
    assert statistics.used.tolist() == [True, False, True]
    # background, ignored rows and other classes are left out; class 0 moves half the way
    statistics.update(torch.tensor([[4.0], [4.0], [9.0], [9.0]]), torch.tensor([0, 0, 3, -1]))
    assert statistics.mean.flatten().tolist() == [3, 0, 7]
    assert statistics.variance.flatten().tolist() == [1, 0, 0]


def test_variance_keeps_its_digits_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    features = 1000 + 0.01 * torch.randn((50, 4), generator=generator)
    statistics = FeatureStatistics(1, 4)
    statistics.update(features, torch.zeros(50, dtype=torch.int64))
    torch.testing.assert_close(statistics.variance[0], features.double().var(dim=0).float(), rtol=1e-3, atol=0)


def test_spread_is_deviation_or_variance():
    draws = torch.tensor([0.5]), torch.full((12, 1), 2.0)
    for spread, wanted in (("deviation", 2 + 2 * 3), ("variance", 2 + 2 * 9)):
        module = FeatureHallucination(1, 1, spread=spread, sampled_num_classes=1)
        module.statistics.mean.fill_(2)
        module.statistics.variance.fill_(9)
        module.statistics.used.fill_(True)
        features, labels = module.sample(torch.zeros(1), draws=draws)
        assert features.flatten().tolist() == [wanted] * 12
        assert labels.tolist() == [0] * 12


def test_classes_are_drawn_in_proportion():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0])
    uniform = torch.tensor([0.0, 0.1, 0.25, 0.2500001, 1.0], dtype=torch.float64)
    # the sum reaches 0 with class 0 already; a uniform of exactly 0 has probability 0
    assert inverse_cdf(weights, uniform).tolist() == [0, 1, 1, 3, 3]
    drawn = inverse_cdf(weights, torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0, 0.25, 0, 0.75]), rtol=0, atol=0.03)
    # nothing is positive: all alike
    assert inverse_cdf(torch.zeros(4), torch.tensor([0.1, 0.3, 0.6, 0.9])).tolist() == [0, 1, 2, 3]


def test_class_1203_is_reached():
    assert inverse_cdf(torch.rand(1203), torch.tensor([1.0], dtype=torch.float64)).tolist() == [1202]


def test_many_drawn_features_have_the_class_distribution():
    module = FeatureHallucination(2, 3, sampled_num_features=4000)
    generator = torch.Generator().manual_seed(0)
    features = torch.tensor([1.0, -2.0, 5.0]) + torch.randn((200, 3), generator=generator) * torch.tensor(
        [1.0, 2.0, 0.1]
    )
    module.update(features, torch.ones(200, dtype=torch.int64))
    drawn, labels = module.sample(torch.tensor([0.9, 0.2]), generator=generator)
    assert set(labels.tolist()) == {1}  # class 0 has no statistics
    torch.testing.assert_close(drawn.mean(dim=0), features.mean(dim=0), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.var(dim=0), features.var(dim=0), rtol=0.05, atol=0)
    again, _ = module.sample(torch.tensor([0.9, 0.2]), generator=torch.Generator().manual_seed(5))
    same, _ = module.sample(torch.tensor([0.9, 0.2]), generator=torch.Generator().manual_seed(5))
    assert torch.equal(again, same)


def test_nothing_known_gives_nothing():
    module = FeatureHallucination(4, 3)
    features, labels = module.sample(torch.zeros(4))
    assert features.shape == (0, 3)
    assert labels.shape == (0,)
    module.update(torch.zeros((0, 3)), torch.zeros(0, dtype=torch.int64))
    assert not module.statistics.used.any()


def test_state_is_saved_and_changes_in_train_mode_only():
    module = FeatureHallucination(4, 3)
    module.update(torch.randn(6, 3), torch.tensor([0, 1, 1, 2, 2, 2]))
    other = FeatureHallucination(4, 3)
    other.load_state_dict(module.state_dict())
    module.eval()
    module.update(torch.randn(6, 3), torch.tensor([0, 1, 1, 3, 2, 2]))
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    draws = torch.rand(8), torch.randn(96, 3)
    one, labels = module.sample(torch.tensor([0.0, 0, 0, 1]), draws=draws)
    another, _ = other.sample(torch.tensor([0.0, 0, 0, 1]), draws=draws)
    assert torch.equal(one, another)
    assert 3 not in labels


def test_no_gradient_and_half_precision_features():
    module = FeatureHallucination(2, 3)
    features = torch.randn((5, 3), dtype=torch.bfloat16).requires_grad_()
    module.update(features, torch.tensor([0, 0, 1, 1, 1]))
    assert module.statistics.mean.dtype == torch.float32
    assert not module.sample(torch.zeros(2))[0].requires_grad


@pytest.mark.parametrize("rows", [(9, 14), (9, 0)])
def test_statistics_over_processes_are_those_of_the_joined_batch(run_on_ranks, rows):
    generator = torch.Generator().manual_seed(0)
    batches = [
        [(torch.randn((n, 3), generator=generator), torch.randint(0, 5, (n,), generator=generator)) for n in rows]
        for _ in range(3)
    ]

    def on_rank(rank):
        found = []
        for across in (True, False):
            statistics = FeatureStatistics(5, 3, across_ranks=across).double()
            for batch in batches:
                statistics.update(*batch[rank])
            found.append({name: value.numpy() for name, value in statistics.state_dict().items()})
        return found

    joined, alone = FeatureStatistics(5, 3).double(), FeatureStatistics(5, 3).double()
    for batch in batches:
        joined.update(*(torch.cat(parts) for parts in zip(*batch, strict=True)))
        alone.update(*batch[0])
    results = run_on_ranks(on_rank)
    for across, _ in results:
        for name, value in joined.state_dict().items():
            np.testing.assert_allclose(across[name], value, rtol=1e-12, atol=1e-14)
    for name, value in alone.state_dict().items():
        np.testing.assert_array_equal(results[0][1][name], value)


def test_mistakes():
    with pytest.raises(ValueError, match='spread must be "deviation" or "variance"'):
        FeatureHallucination(2, 2, spread="sigma")
    with pytest.raises(ValueError, match="momentum"):
        FeatureHallucination(2, 2, beta=1.0)
    with pytest.raises(ValueError, match=r"features must be \[n, 2\]"):
        FeatureHallucination(2, 2).update(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("cuts", [(3, 5), (0, 8), (4, 4, 4), (11,)])
def test_accumulation_steps_are_one_batch(cuts):
    """Statistics of a batch in pieces are those of the whole one, whichever classes a piece has."""
    generator = torch.Generator().manual_seed(0)
    whole, pieces = (FeatureStatistics(6, 3) for _ in range(2))
    for _ in range(4):
        features = torch.randn(12, 3, generator=generator) + 5
        labels = torch.randint(-1, 7, (12,), generator=generator)
        whole.update(features, labels)
        for number, part in enumerate(torch.tensor_split(torch.arange(12), cuts)):
            pieces.update(features[part], labels[part], again=number > 0)
    assert whole.used.any()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[key], value, rtol=1e-5, atol=1e-5)
