"""Cosine classifiers: reference vectors, invariances, first weights, and what they may not break on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tailfin.models.heads.cosine import NormedLinear, WeightNormCosine


@pytest.fixture(scope="module")
def data(golden_dir):
    return np.load(golden_dir / "cosine_heads.npz")


def tensor(values, dtype):
    return torch.from_numpy(np.asarray(values)).to(dtype)


def normed_linear(data, case, dtype):
    weight = tensor(data[f"{case}/weight"], dtype)
    options = {name: float(data[f"{case}/hp/{name}"]) for name in ("temperature", "power", "eps")}
    head = NormedLinear(weight.shape[1], weight.shape[0], **options).to(dtype)
    head.load_state_dict({"weight": weight, "bias": tensor(data[f"{case}/bias"], dtype)})
    return head, {"weight": head.weight}


def weight_norm(data, case, dtype):
    v, g = tensor(data[f"{case}/weight_v"], dtype), tensor(data[f"{case}/weight_g"], dtype)
    options = {"temperature": float(data[f"{case}/hp/temp"]), "eps": float(data[f"{case}/hp/eps"])}
    head = WeightNormCosine(v.shape[1], v.shape[0], **options).to(dtype)
    head.load_state_dict({"weight_v": v, "weight_g": g})
    return head, {"weight_v": head.weight_v, "weight_g": head.weight_g}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("name", "make"), [("normed_linear", normed_linear), ("rio_cosine", weight_norm)])
def test_reference_vectors(data, name, make, number, dtype, tolerance):
    case = f"{name}{number}"
    head, parameters = make(data, case, dtype)
    features = tensor(data[f"{case}/features"], dtype).requires_grad_()
    logits = head(features)
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits.detach(), data[f"{case}/logits"], atol=tolerance)
    F.cross_entropy(logits, torch.from_numpy(data[f"{case}/labels"])).backward()
    # row 0 is a feature of zeros, whose gradient is in the hundred thousands
    np.testing.assert_allclose(features.grad, data[f"{case}/ce_grad_features"], rtol=tolerance, atol=tolerance)
    for key, parameter in parameters.items():
        np.testing.assert_allclose(parameter.grad, data[f"{case}/ce_grad_{key}"], atol=tolerance)


def test_logits_are_cosines():
    head = NormedLinear(6, 4, bias=False, temperature=1.0, eps=1e-30).double()
    features = torch.randn((5, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(7 * features), expected)
    flat = NormedLinear(6, 4, temperature=1.0, power=0.0, eps=1e-30).double()
    torch.testing.assert_close(flat(features), features @ flat.weight.T)  # power 0: lengths do not matter


def test_learnt_lengths_scale_their_class():
    head = WeightNormCosine(6, 4).double()
    features = torch.randn((5, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = head(features)
    with torch.no_grad():
        head.weight_v *= 3
        head.weight_g[2] *= 2
    after = head(features)
    torch.testing.assert_close(after, before * torch.tensor([1, 1, 2, 1]))


def test_first_weights():
    torch.manual_seed(0)
    head = NormedLinear(256, 200)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.bias.abs().sum() == 0
    assert NormedLinear(4, 3, bias=False).bias is None
    other = WeightNormCosine(256, 200)
    bound = 1 / 16
    assert -bound <= other.weight_v.min() < -0.99 * bound
    torch.testing.assert_close(other.weight_g, other.weight_v.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("kind", [NormedLinear, WeightNormCosine])
def test_gradcheck(kind):
    torch.manual_seed(1)
    head = kind(4, 3).double()
    features = torch.randn((5, 4), dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in head.named_parameters()]

    def call(value, *parameters):
        return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (value,))

    assert torch.autograd.gradcheck(call, (features, *head.parameters()))


@pytest.mark.parametrize("kind", [NormedLinear, WeightNormCosine])
def test_zero_huge_and_half_precision_features_stay_finite(kind):
    head = kind(8, 5)
    for features in (
        torch.zeros((2, 8)),
        torch.full((2, 8), 1e4).half(),  # lengths beyond half precision
        torch.full((2, 8), 1e15),
        torch.ones((2, 8), dtype=torch.bfloat16),
        torch.zeros((0, 8)),
    ):
        features.requires_grad_()
        logits = head(features)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        logits.sum().backward()
        assert torch.isfinite(features.grad).all()
        assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_autocast_takes_lengths_in_float32():
    head = NormedLinear(512, 5)
    features = 300 * torch.rand((4, 512), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features.bfloat16())
    torch.testing.assert_close(logits.float(), head(features), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("kind", [NormedLinear, WeightNormCosine])
def test_options(kind):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        kind(4, 3, temperature=0.0)
    with pytest.raises(ValueError, match="eps must be above 0"):
        kind(4, 3, eps=-1.0)
    assert "temperature" in repr(kind(4, 3))
