"""NormedConv2d: reference vectors with gradients, its start, powers below 1, mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tailfin.models.normed_conv import NormedConv2d

KINDS = ("k1", "k1_power2", "k3", "k3_over_kernel")


@pytest.fixture(scope="module")
def file(golden_dir) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "mask_head.npz"))


def predictor(weight, bias, dtype, **options) -> NormedConv2d:
    out, channels, kernel, _ = weight.shape
    layer = NormedConv2d(channels, out, kernel, padding=kernel // 2, **options).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_vectors(file, kind, dtype):
    values = {key.rpartition(f"/{kind}/")[2]: file[key] for key in file if f"normed_predictor/{kind}/" in key}
    layer = predictor(
        values["weight"],
        values["bias"],
        dtype,
        temperature=float(values["hp/temperature"]),
        power=float(values["hp/power"]),
        eps=float(values["hp/eps"]),
        norm_over_kernel=bool(values["hp/norm_over_kernel"]),
    )
    x = torch.from_numpy(values["x"]).to(dtype).requires_grad_()
    out = layer(x)
    (out * torch.from_numpy(values["cotangent"])).sum().backward()
    exact = dtype == torch.float64
    np.testing.assert_allclose(out.detach(), values["out"], rtol=1e-6 if exact else 1e-4, atol=1e-6 if exact else 1e-4)
    np.testing.assert_allclose(layer.weight.grad, values["grad_weight"], rtol=1e-5 if exact else 1e-3, atol=1e-4)
    # the pixel of zeros has a gradient of temperature / eps
    np.testing.assert_allclose(x.grad, values["grad_x"], rtol=1e-6 if exact else 2e-4, atol=1e-5 if exact else 1e-3)


def test_learnt_temperature(file):
    values = {key.rpartition("/fracal_learnable/")[2]: file[key] for key in file if "/fracal_learnable/" in key}
    start = float(values["hp/init_temperature_parameter"])
    layer = predictor(values["weight"], values["bias"], torch.float64, temperature=start**2, learnable=True)
    assert layer.temperature_parameter.item() == float(values["temperature_parameter"])
    out = layer(torch.from_numpy(values["x"]).double())
    (out * torch.from_numpy(values["cotangent"])).sum().backward()
    np.testing.assert_allclose(out.detach(), values["out"], rtol=1e-6, atol=1e-6)
    assert layer.temperature_parameter.grad.item() == pytest.approx(float(values["grad_temperature"]), rel=1e-6)
    np.testing.assert_allclose(layer.weight.grad, values["grad_weight"], rtol=1e-5, atol=1e-5)


def test_a_whole_mask_head(file):
    weights = {key.removeprefix("head_normed/param/"): file[key] for key in file if key.startswith("head_normed/param")}
    x = torch.from_numpy(file["head_normed/x"]).double()
    given = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    for layer in (0, 1):
        x = F.relu(F.conv2d(x, given[f"convs.{layer}.conv.weight"], given[f"convs.{layer}.conv.bias"], padding=1))
    x = F.relu(F.conv_transpose2d(x, given["upsample.weight"], given["upsample.bias"], stride=2))
    layer = predictor(weights["conv_logits.weight"], weights["conv_logits.bias"], torch.float64)
    np.testing.assert_allclose(layer(x).detach(), file["head_normed/out"], rtol=1e-5, atol=1e-5)


def test_start_and_kernels_of_one():
    torch.manual_seed(0)
    layer = NormedConv2d(64, 256, 1)
    assert layer.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not layer.bias.any()
    other = NormedConv2d(64, 256, 1, norm_over_kernel=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64, 3, 3)
    torch.testing.assert_close(layer(x), other(x))
    assert NormedConv2d(4, 2, 1, bias=False)(torch.randn(1, 4, 2, 2)).shape == (1, 2, 2, 2)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("over_kernel", [False, True])
def test_gradient(power, over_kernel):
    torch.manual_seed(1)
    layer = NormedConv2d(3, 2, 3, power=power, norm_over_kernel=over_kernel, temperature=2, eps=0.1, padding=1).double()
    x = torch.randn((1, 3, 4, 4), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, x)
    zeros = torch.zeros((1, 3, 4, 4), dtype=torch.float64, requires_grad=True)
    layer(zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()


def test_half_precision_input():
    found = NormedConv2d(4, 2, 1)(torch.randn(1, 4, 2, 2).half())
    assert found.dtype == torch.float32 and torch.isfinite(found).all()


@pytest.mark.parametrize("name", ["temperature", "power", "eps"])
def test_mistakes(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        NormedConv2d(4, 2, 1, **{name: 0.0})
