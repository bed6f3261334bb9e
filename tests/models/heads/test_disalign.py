"""DisAlign: reference vectors, what trains and what does not, and its re-weighted loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tailfin.models.heads.disalign import DisAlign, GeneralizedReweight
from tailfin.stats import ClassStats

CASES = ["a_typical", "b_small", "c_nofg"]


def reweight(count, **options):
    count = np.asarray(count)
    stats = ClassStats(image_count=(count + 1) // 2, instance_count=count, num_images=10**6)
    return GeneralizedReweight(stats, **options)


def rows(n, width, classes):
    generator = torch.Generator().manual_seed(n)
    return torch.randn((n, width), generator=generator), torch.randint(0, classes + 1, (n,), generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(golden_dir, case, dtype, tolerance):
    data = np.load(golden_dir / "disalign.npz")
    classes, width = int(data[f"{case}/num_classes"]), data[f"{case}/features"].shape[1]
    head = DisAlign(nn.Linear(width, classes + 1), width, classes).to(dtype)
    state = {
        "classifier.weight": "cls_weight",
        "classifier.bias": "cls_bias",
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "confidence.weight": "confidence_weight",
        "confidence.bias": "confidence_bias",
    }
    head.load_state_dict({name: torch.from_numpy(data[f"{case}/{key}"]) for name, key in state.items()})
    loss = reweight(data[f"{case}/class_count"], exponent=float(data[f"{case}/hp/grw_scale"]))
    np.testing.assert_allclose(loss.weight, data[f"{case}/grw_class_weight"], rtol=1e-6)
    logits = head(torch.from_numpy(data[f"{case}/features"]).to(dtype))
    value = loss(logits, torch.from_numpy(data[f"{case}/labels"]))
    value.backward()
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits.detach(), data[f"{case}/aligned_logits"], atol=tolerance)
    assert value.item() == pytest.approx(float(data[f"{case}/loss"]), rel=tolerance)
    for name, key in (("logit_scale", "logit_scale"), ("logit_bias", "logit_bias")):
        np.testing.assert_allclose(getattr(head, name).grad, data[f"{case}/grad_{key}"], atol=tolerance)
    for name in ("weight", "bias"):
        found = getattr(head.confidence, name).grad
        np.testing.assert_allclose(found, data[f"{case}/grad_confidence_{name}"], atol=tolerance)
    np.testing.assert_allclose(loss.scores(logits.detach()), data[f"{case}/scores"][:, :-1], atol=tolerance)


def test_it_starts_as_the_classifier_and_trains_only_the_alignment():
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4))
    head = DisAlign(classifier, 6, 3)
    features, labels = rows(20, 6, 3)
    assert head.training
    torch.testing.assert_close(head(features), classifier[1](features))  # no dropout either
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert trained == {"logit_scale", "logit_bias", "confidence.weight", "confidence.bias"}
    assert head.train().classifier.training is False
    frozen = classifier[1].weight.clone()
    loss = reweight([100, 10, 1])
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.5)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(head(features), labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.01
    assert torch.equal(classifier[1].weight, frozen)
    torch.testing.assert_close(head(features)[:, 3], classifier[1](features)[:, 3])  # background is untouched


def test_first_parameters():
    torch.manual_seed(0)
    head = DisAlign(nn.Linear(4096, 3), 4096, 2)
    assert (head.logit_scale.tolist(), head.logit_bias.tolist()) == ([1, 1], [0, 0])
    assert head.confidence.bias.item() == 0
    assert head.confidence.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_wrong_classifier_width_is_said():
    with pytest.raises(ValueError, match="must give 4 logits, it gives 5"):
        DisAlign(nn.Linear(6, 5), 6, 3)(torch.zeros((1, 6)))


def test_alignment_by_hand():
    head = DisAlign(nn.Linear(1, 3), 1, 2).double()
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        head.logit_scale.copy_(torch.tensor([3.0, 1.0]))
        head.logit_bias.copy_(torch.tensor([0.0, -1.0]))
        head.confidence.weight.fill_(1.0)
    # confidence 1/2: half way from z to (3 * 1, 2 - 1)
    np.testing.assert_allclose(head(torch.zeros((1, 1), dtype=torch.float64)).detach(), [[2.0, 1.5, 3.0]])


def test_gradcheck():
    torch.manual_seed(0)
    head = DisAlign(nn.Linear(4, 4), 4, 3).double()
    names = ["logit_scale", "logit_bias", "confidence.weight", "confidence.bias"]
    features = torch.randn((5, 4), dtype=torch.float64, requires_grad=True)
    labels, loss = torch.tensor([0, 3, 2, 1, 3]), reweight([5, 50, 1])

    def call(value, *parameters):
        logits = torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (value,))
        return loss(logits, labels)

    assert torch.autograd.gradcheck(call, (features, *(head.get_parameter(name) for name in names)))


def test_reweighted_loss():
    loss = reweight([16, 1, 0], exponent=0.5)  # weights 1/4, 1, 1 with mean 3/4; background 1
    np.testing.assert_allclose(loss.weight, [1 / 3, 4 / 3, 4 / 3, 1])
    assert (loss.num_logits, loss.state_dict()) == (4, {})
    logits, labels = torch.zeros((3, 4), dtype=torch.float64), torch.tensor([0, 1, 3])
    logits[0, 0] = 2.0
    # weighted mean: (1/3 CE_0 + 4/3 log 4 + log 4) / (1/3 + 4/3 + 1)
    expected = ((np.log(np.e**2 + 3) - 2) / 3 + 7 / 3 * np.log(4)) / (8 / 3)
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    plain = reweight([16, 1, 0], exponent=0.0)(logits, labels)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="exponent"):
        reweight([1, 2], exponent=-1.0)


@pytest.mark.parametrize("labels", [[], [-1, -1], [3, 3], [0], [-1, 2, 3, 0]])
def test_reweighted_loss_without_rows_or_foreground(labels):
    logits = torch.randn((len(labels), 4), generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = reweight([5, 0, 2])(60 * logits, torch.tensor(labels, dtype=torch.int64))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    if not any(label >= 0 for label in labels):
        assert value.item() == 0
