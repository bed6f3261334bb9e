"""Calibration inside a detector: equal to the formulas on logits, for softmax and sigmoid scores; recipes; refusals."""

from __future__ import annotations

import pytest
import torch

from tailfin import ClassStats, losses
from tailfin.calibration import fracal, logit_adjusted, norcal, rescored
from tailfin.config import dump_recipe, load_recipe, parse_yaml, stored_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models.rescoring import rescorer, score_kind
from tailfin.schema.calibration import FRACAL, LogitAdjustment, NorCal, Power, Temperature

STATS = ClassStats(image_count=[400, 20, 0], instance_count=[400, 20, 0], num_images=420, names=["a", "b", "c"])
DIMENSION = {"c": 1.0, "a": 1.8, "b": 1.2}  # by name, not in the order of the labels
LOGITS = 3 * torch.randn((50, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moved(config, scores, kind):
    return rescorer(config, STATS, kind).double()(scores)


def test_softmax_scores_as_their_logits():
    scores = LOGITS.softmax(1)[:, :-1]
    close = {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(
        moved(NorCal(gamma=0.7), scores, "softmax"), norcal(LOGITS.softmax(1), STATS, 0.7), **close
    )
    expected = fracal(LOGITS, STATS, [1.8, 1.2, 1.0], lambda_=2.0)
    torch.testing.assert_close(moved(FRACAL(dimension=DIMENSION), scores, "softmax"), expected, **close)
    expected = logit_adjusted(LOGITS, STATS, 0.5).softmax(1)[:, :-1]
    torch.testing.assert_close(moved(LogitAdjustment(tau=0.5), scores, "softmax"), expected, **close)
    expected = (LOGITS / 2).softmax(1)[:, :-1]
    torch.testing.assert_close(moved(Temperature(value=2), scores, "softmax"), expected, **close)


def test_sigmoid_scores_as_their_logits():
    logits = LOGITS[:, :-1]
    scores, close = logits.sigmoid(), {"rtol": 1e-5, "atol": 1e-8}
    expected = fracal(logits, STATS, [1.8, 1.2, 1.0], "sigmoid", 2.0)
    torch.testing.assert_close(moved(FRACAL(dimension=DIMENSION), scores, "sigmoid"), expected, **close)
    expected = logit_adjusted(logits, STATS, 0.5).sigmoid()
    torch.testing.assert_close(moved(LogitAdjustment(tau=0.5), scores, "sigmoid"), expected, **close)
    torch.testing.assert_close(moved(Temperature(value=2), scores, "sigmoid"), (logits / 2).sigmoid(), **close)
    shift = 0.7 * torch.tensor([400.0, 20.0, 1.0], dtype=torch.float64).log()
    torch.testing.assert_close(moved(NorCal(gamma=0.7), scores, "sigmoid"), (logits - shift).sigmoid(), **close)


def test_power_follows_the_groups():
    # 400 images are frequent, 20 common, none counts as rare
    found = moved(Power(rare=0.5, common=2, frequent=1), torch.full((2, 3), 0.25, dtype=torch.float64), "sigmoid")
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.0625, 0.5]] * 2, dtype=torch.float64))


@pytest.mark.parametrize("config", [NorCal(gamma=0), Temperature(), Power()])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_without_strength_scores_stay(config, kind):
    scores = LOGITS.softmax(1)[:, :-1].unflatten(0, (5, 10))  # [5, 10, C], as of queries
    torch.testing.assert_close(moved(config, scores, kind), scores)


def test_scores_at_the_ends_stay_finite():
    for kind in ("softmax", "sigmoid"):
        ends = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        found = rescored(ends, torch.tensor([5.0, -300.0, 80.0]), kind, 0.5)
        assert found.isfinite().all() and found[1].eq(0).all() and found[0, 2] == 1
    with pytest.raises(ValueError, match='did you mean "softmax"'):
        rescored(ends, torch.zeros(3), "sofmax")
    with pytest.raises(ValueError, match="above 0"):
        rescored(ends, torch.zeros(3), "softmax", 0)


def test_kinds_of_losses():
    kinds = {
        name: score_kind(losses.build(name, STATS))
        for name in ("softmax", "seesaw", "ldam", "sigmoid", "eqlv2", "focal")
    }
    assert kinds == dict.fromkeys(("softmax", "seesaw", "ldam"), "softmax") | dict.fromkeys(
        ("sigmoid", "eqlv2", "focal"), "sigmoid"
    )


@pytest.mark.parametrize("loss", ["softmax", "objectness"])
def test_in_a_recipe(tiny_recipe, loss):
    torch.manual_seed(0)
    plain, _ = build_detector(load_recipe(tiny_recipe, [f"loss={loss}"]), STATS, start=False)
    recipe = load_recipe(tiny_recipe, [f"loss={loss}", "calibration={name: norcal, gamma: 0.7}"])
    model, _ = build_detector(recipe, STATS, start=False)
    model.load_state_dict(plain.state_dict())  # it has no state of its own
    pictures = [torch.rand(3, 64, 64)]
    before, after = plain.eval()(pictures)[0], model.eval()(pictures)[0]
    assert (after["labels"] == 2).float().mean() > (before["labels"] == 2).float().mean()  # the rarest


def test_fracal_is_kept_by_class_name(tiny_recipe):
    values = "calibration={name: fracal, lambda_: 1.5, dimension: {a: 1.8, b: 1.2, c: 1}}"
    recipe = load_recipe(tiny_recipe, [values])
    again = stored_recipe(parse_yaml(dump_recipe(recipe), "recipe"), "recipe")
    assert again.calibration == recipe.calibration == FRACAL(lambda_=1.5, dimension=DIMENSION)
    with pytest.raises(UserError, match='no dimension of the class "a".*--method fracal --train'):
        build_detector(load_recipe(tiny_recipe, ["calibration=fracal"]), STATS, start=False)


@pytest.mark.parametrize(
    "values", ["{name: power, rare: 0}", "{name: temperature, value: -1}", "{name: fracal, tau: 1}"]
)
def test_refused_recipes(tiny_recipe, values):
    with pytest.raises(UserError, match="calibration"):
        load_recipe(tiny_recipe, [f"calibration={values}"])
