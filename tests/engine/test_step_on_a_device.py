"""A training step on an accelerator: nothing of two devices meets, and the host waits at most eight times.

Every small recipe is begun on the pretend device, as `benchmarks/step_profile.py` does, whose counts these are.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pretend_device import DEVICE, bring_back, pretend_device
from tailfin.data.synth import make_synthetic

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "step_profile.py"
MOST = 8  # reads back in a step, whatever the batch
SMALL = ["data.sizes=[64]", "data.photometric=false"]
ANCHORS = "detector.anchor_sizes=[8, 16, 32]"
RECIPES = {
    "fod/faster_rcnn_r18_softmax": [],
    "fod/faster_rcnn_r18_rfs": [],
    "fod/bacl_r18": [],
    "fod/losses:seesaw": [],
    "fod/losses:eqlv2": [],
    "fod/losses:fedloss": [],
    "fod/classifiers:tde": [],
    "fod/classifiers:forest": [],
    "fod/classifiers:pcb": [],
    "fod/features:rio": [],
    "fod/features:fasa": [],
    "fod/features:balms": [],
    "fod/decoupled:loce": [],
    "fod/decoupled:simcal": [],
    "fod/decoupled:disalign": [],
    "fod/decoupled:bags": [],
    "fod/decoupled:acsl": [],
    "fod/retinanet_r18": [],
    "fod/atss_r18": [],
    "fod/localizer_r18": [],
    "fod/drcl_r18": ["pretraining.views.sizes=[64]"],
    "fod/stepwise_faster_rcnn_r18": [],
    "fod/stepwise_tiny": [],
    "fod/d_fine_tiny": ["weights=none", "detector.norm=bn", "detector.frozen_layers=0"],
    "fod/d_fine_tiny:eqfl": ["weights=none", "detector.norm=bn", "detector.frozen_layers=0"],
    "road12/mask_rcnn_r18": [],
    "road12/cascade_mask_rcnn_r18": [],
}
STAGES = {"fod/bacl_r18": 2, "fod/drcl_r18": 2, "fod/stepwise_tiny": 3, "fod/stepwise_faster_rcnn_r18": 3}


@pytest.fixture(scope="module")
def profile() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT.name} comes with the source tree only")
    spec = importlib.util.spec_from_file_location("step_profile", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """A set whose objects have masks."""
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    make_synthetic(folder, images_train=40, images_val=4, classes=3, imbalance=2.0, size=64, objects=2.0)
    return folder / "train.json"


@pytest.mark.parametrize("recipe", RECIPES)
def test_reads_back(profile, tiny_set, masks, recipe):
    file = masks if "mask" in recipe else tiny_set[0]
    steps = profile.steps_of(recipe, file, [*SMALL, *RECIPES[recipe]], batch=4, iterations=1)
    assert len(steps) == STAGES.get(recipe, 2 if "decoupled" in recipe else 1)
    for step in steps:
        assert step.operations > 100 and step.multiply_adds > 1e6
        assert 1 <= step.reads.total() <= MOST, step.reads.most_common()


@pytest.mark.parametrize("recipe", ["fod/faster_rcnn_r18_softmax", "fod/deformable_detr_tiny"])
def test_the_batch_does_not_matter(profile, tiny_set, recipe):
    small, large = (profile.steps_of(recipe, tiny_set[0], SMALL, batch=batch, iterations=1)[0] for batch in (2, 8))
    assert small.reads == large.reads and large.views < large.operations < 1.1 * small.operations


# ---- the device itself -----------------------------------------------------------------------------------------------


def test_the_device_counts_and_computes():
    with pretend_device() as seen:
        here = torch.arange(6.0).to(DEVICE)
        assert here.device == DEVICE
        here += 1
        masked = here[here > 3]
        value = masked.sum().item()
        constant = torch.tensor([1.0, 2.0], device=DEVICE)
        listed = (here[:2] * constant).tolist()
        assert sum(seen.reads.values()) == 3 and sum(seen.uploads.values()) == 1
    assert (value, listed) == (15.0, [1.0, 4.0])


def test_tensors_of_two_devices_do_not_meet():
    with pretend_device():
        here, there = torch.ones(3).to(DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            here + there
        with pytest.raises(RuntimeError, match="index on the device"):
            there[here.long()]
        assert (here * torch.tensor(2.0)).sum().item() == 6  # a number may come from the host


def test_a_model_comes_back_trained():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pretend_device():
        model.to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(4, 3).to(DEVICE)).sum().backward()
        optimizer.step()
        bring_back(model)
    torch.testing.assert_close(model.weight.detach(), before - 0.4)
    with pytest.raises(RuntimeError, match="outside"):
        optimizer.param_groups[0]["params"][0] + 1
