"""The list of stages: what every recipe's says, and that methods train it."""

from __future__ import annotations

import pytest

from tailfin import ClassStats, recipes
from tailfin.config import load_recipe
from tailfin.data.smooth_tail import divide, planned_steps
from tailfin.errors import UserError
from tailfin.methods import METHODS
from tailfin.models import build_detector
from tailfin.schema.stages import METHODS as PLANS
from tailfin.schema.stages import WEIGHTS, final_stage, stages


def test_every_method_has_a_plan():
    assert METHODS.keys() == PLANS.keys()


@pytest.mark.parametrize("name", recipes.names())
def test_each_stage_starts_where_an_earlier_one_ends(name):
    plan = stages(load_recipe(name))
    assert [stage.number for stage in plan] == list(range(plan[0].number, plan[0].number + len(plan)))
    known = {WEIGHTS}
    for stage in plan:
        assert stage.starts_from in known and stage.name not in known
        assert stage.inputs and stage.hands_on
        known.add(stage.name)
    assert plan[0].starts_from == WEIGHTS and final_stage(load_recipe(name)) == plan[-1]


def test_what_the_lists_say():
    plan = stages(load_recipe("fod/drcl_bacl_r18"))
    assert [(stage.folder, stage.starts_from) for stage in plan] == [
        ("1-pretrain", WEIGHTS),
        ("2-representation", "pretrain"),
        ("3-classifier", "representation"),
    ]
    assert plan[2].trains == ("classifier", "box", "rpn") and plan[2].recipe.loss.name == "fcbl"
    assert plan[0].hands_on == ("backbone", "fpn", "rpn", "head")
    plan = stages(load_recipe("fod/stepwise_tiny", ["stepwise.division=[10, 30, 100]"]))
    assert [stage.folder for stage in plan] == ["1-base", "2-head", "3-tail1", "4-tail2", "5-tail3"]
    assert plan[1].trains == ("class-specific",) and list(plan[0].files) == ["exemplars.json"]


def test_the_steps_of_a_data_set_are_those_of_the_list():
    recipe = load_recipe(
        "fod/stepwise_tiny", ["stepwise.division=[10, 30]", "stepwise.both={per_head_class: 1, per_tail_class: all}"]
    )
    steps = planned_steps(recipe.stepwise, divide([400, 20, 5], recipe.stepwise.division))
    assert [step.name for step in steps] == [stage.name for stage in stages(recipe)][1:]
    assert [step.own.tolist() for step in steps] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [True, True, True],
    ]


@pytest.mark.parametrize("name", ["fod/faster_rcnn_r18_softmax", "fod/deformable_detr_tiny", "fod/localizer_r18"])
def test_parts_of_the_schema_are_those_of_the_detector(name):
    recipe = load_recipe(name)
    stats = ClassStats(image_count=[20, 10], instance_count=[20, 10], num_images=30)
    model, _ = build_detector(recipe, stats, start=False)
    assert set(recipe.detector.PARTS) == set(model.parts())


def test_mistakes():
    with pytest.raises(UserError, match=r'method: "bakl" is not a choice.*bacl'):
        load_recipe("fod/bacl_r18", ["method=bakl"])
    with pytest.raises(UserError, match="method baseline has no section `second`"):
        load_recipe("fod/bacl_r18", ["method=baseline"])
    with pytest.raises(UserError, match=r'second.trains: faster_rcnn has no part "hed"'):
        load_recipe("fod/bacl_r18", ["second.trains=[hed]"])
