"""Feature modules as keys of a recipe: each trains, loads, resumes to the bit, and is the same on every process."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tailfin
from tailfin import losses
from tailfin.checkpoint import load_resume_point
from tailfin.collectives import gather_over_ranks
from tailfin.config import load_recipe
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.errors import UserError
from tailfin.methods.stepwise import _copy
from tailfin.models import build_detector
from tailfin.models.features.base import ExtraRows, FeatureModule, Rows
from tailfin.models.features.fasa import FASA, AugmentedFeatures
from tailfin.models.features.feature_memory import FeatureMemory
from tailfin.models.features.meta_reweighting import PartneredDataset
from tailfin.models.features.rio import FeatureBank
from tailfin.models.roi_align import Places
from tailfin.schema.stages import second_recipe
from tailfin.stats import ClassStats

pytestmark = pytest.mark.usefixtures("quick_training")
SECOND = [
    "method=decoupled",
    "second.schedule.epochs=1",
    "second.schedule.batch=4",
    "second.schedule.lr=0.01",
    "second.schedule.warmup=0",
    "second.schedule.milestones=[]",
    "schedule.epochs=0.4",
]
EVERY = "logging.checkpoint_every=1"  # two iterations: there is a resume point of the first one
METHODS = {
    "hallucination": [*SECOND, "method=bacl", "loss=objectness", "second.loss=fcbl", "second.features=hallucination"],
    "feature_memory": [*SECOND, "second.loss=ebl", "second.features={name: feature_memory, size: 20}"],
    "fasa": ["schedule.epochs=2.2", "features=fasa", "features.instance_prob_scale=3"],
    "rio": ["schedule.epochs=1", "features={name: rio, max_images: 12}", "detector.classifier=weight_cosine"],
    "meta_reweighting": [
        *SECOND,
        "loss=sigmoid",
        "second.loss=balanced_sigmoid",
        "second.features=meta_reweighting",
        "second.trains=[classifier]",
    ],
}
STATE = {  # a buffer that must have moved
    "hallucination": "roi_heads.extra_rows.hallucination.statistics.mean",
    "feature_memory": "roi_heads.extra_rows.memory.written",
    "fasa": "roi_heads.extra_rows.fasa.adapted",
    "rio": "roi_heads.extra_rows.bank.written",
    "meta_reweighting": "roi_heads.loss.class_weight",
}


def weights(run):
    return load_file(run / "model.safetensors")


def memory(run):
    """What the last stage's resume point has beyond the model file: the stored rows."""
    state, filed = load_resume_point(max((run / "stages").iterdir()))["model"], weights(run)
    return {key: value for key, value in state.items() if key not in filed}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def three_classes(*counts):
    return ClassStats(image_count=np.array(counts), instance_count=np.array(counts), num_images=sum(counts))


class Stop(Exception):
    pass


def resumed(monkeypatch, run, stage, **arguments):
    """The run, stopped in stage `stage` and taken up again from its resume point."""
    from tailfin.training_log import TrainingLog

    add, seen = TrainingLog.add, []

    def stopping(self, parts, rate, done):
        add(self, parts, rate, done)
        if self.name == stage:
            seen.append(done)
            if len(seen) == 6:
                raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TrainingLog, "add", stopping)
        tailfin.train(out=run, **arguments)
    assert any((run / "stages").glob(f"*-{stage}/last/complete.json"))
    tailfin.train("", out=run, resume=True)


@pytest.mark.parametrize("name", METHODS)
def test_trains_loads_and_resumes_to_the_bit(name, tmp_path, monkeypatch, tiny_set, tiny_recipe):
    overrides = [*METHODS[name], "logging.checkpoint_every=4"]
    arguments = {"recipe": tiny_recipe, "train": tiny_set[0], "overrides": overrides}
    run = tmp_path / "run"
    tailfin.train(out=run, **arguments)
    after = weights(run)
    stored = memory(run)
    assert {**after, **stored}[STATE[name]].any()
    assert (STATE[name] in stored) == (name in ("feature_memory", "rio"))  # rows are no part of a model file
    assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())
    detections = tailfin.load(run).predict(torch.zeros((3, 60, 60), dtype=torch.uint8))[0]
    assert set(detections) == {"boxes", "scores", "labels"}

    two = (run / "stages" / "2-classifier").is_dir()
    resumed(monkeypatch, tmp_path / "again", "classifier" if two else "train", **arguments)
    assert_same(after, weights(tmp_path / "again"))
    assert_same(stored, memory(tmp_path / "again"))
    if two:  # frozen parts are those of the first stage
        before = load_file(run / "stages" / "1-representation" / "model.safetensors")
        kept = [key for key in before if key.startswith(("backbone.", "roi_heads.head."))]
        assert kept and all(torch.equal(before[key], after[key]) for key in kept)


@pytest.mark.parametrize("name", METHODS)
def test_trains_in_this_processors_precision(name, tmp_path, tiny_set, tiny_recipe):
    precision = ["schedule.precision=auto", "schedule.epochs=0.4"]
    if "method=decoupled" in METHODS[name]:
        precision += ["second.schedule.precision=auto", "second.schedule.epochs=0.4"]
    tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=[*METHODS[name], *precision])
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("name", ["hallucination", "feature_memory"])
def test_two_processes_resume_to_the_bit(name, tmp_path, tiny_set, tiny_recipe, train_on_ranks):
    """Both have the same state, or the resumed process 1 would go on with that of process 0."""
    run = tmp_path / "run"
    overrides = [*METHODS[name], "logging.checkpoint_every=4"]

    def on_rank(rank):
        tailfin.train(tiny_recipe, train=tiny_set[0], out=run, overrides=overrides)
        straight = {**weights(run), **memory(run)}
        torch.distributed.barrier()
        if rank == 0:
            assert (run / "stages" / "2-classifier" / "last" / "complete.json").exists()
            (run / "stages" / "2-classifier" / "model.safetensors").unlink()
            (run / "model.safetensors").unlink()
        torch.distributed.barrier()
        tailfin.train("", out=run, resume=True)
        assert_same(straight, {**weights(run), **memory(run)})

    train_on_ranks(on_rank)


def test_the_memory_is_full_of_every_class_before_the_second_stage(tmp_path, tiny_set, tiny_recipe):
    short = [*METHODS["feature_memory"], "second.schedule.epochs=0.3", "second.schedule.lr=1e-12", EVERY]
    for stores in ("shared", "pooled"):
        more = [f"second.features.stores={stores}", "second.features.dtype=float16"]
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / stores, overrides=[*short, *more])
    shared, pooled = memory(tmp_path / "shared"), memory(tmp_path / "pooled")
    key = "roi_heads.extra_rows.memory."
    assert (shared[key + "written"] >= 20).all()
    assert shared[key + "features"].dtype == torch.float16
    # behind frozen shared layers both are the same rows
    assert torch.equal(shared[key + "boxes"], pooled[key + "boxes"])
    module = build_detector(load_recipe(tiny_recipe), three_classes(1, 1, 1), start=False)[0]
    own = weights(tmp_path / "pooled")
    module.load_state_dict({name: value for name, value in own.items() if "extra_rows" not in name}, strict=False)
    embedded = module.roi_heads.head(pooled[key + "features"].flatten(0, 1).float()).view_as(shared[key + "features"])
    torch.testing.assert_close(embedded, shared[key + "features"].float(), rtol=5e-3, atol=5e-3)


def test_a_step_takes_over_weights_and_no_stored_rows(tiny_recipe):
    """A step that was finished before has no rows any more, one that ran just now has some: both go on alike."""
    recipe, stats = load_recipe(tiny_recipe, ["features=rio", "features.max_images=12"]), three_classes(20, 10, 5)
    trained = build_detector(recipe, stats, start=False)[0]
    trained.roi_heads.extra_rows.bank.written.fill_(3)
    copied = _copy(SimpleNamespace(stats=stats), recipe, trained).state_dict()
    assert not copied.pop(STATE["rio"]).any()
    before = trained.state_dict()
    assert before.pop(STATE["rio"]).all()
    assert_same(before, copied)


def test_without_prefill_the_memory_starts_empty(tmp_path, tiny_set, tiny_recipe):
    short = [*METHODS["feature_memory"], "second.schedule.epochs=0.3", "second.features.prefill=false", EVERY]
    tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=short)
    assert memory(tmp_path / "run")["roi_heads.extra_rows.memory.written"].sum() < 16 * 8  # of one batch


# ---- the box head ----------------------------------------------------------------------------------------------------


class Given(FeatureModule):
    def __init__(self, rows):
        super().__init__()
        self.given = rows

    def rows(self, seen):
        return self.given

    def losses(self, seen, logits):
        return {"loss_more": 0 * logits.sum()}


@pytest.fixture
def heads(tiny_recipe):
    torch.manual_seed(0)
    stats = three_classes(20, 10, 5)
    return build_detector(load_recipe(tiny_recipe), stats)[0].roi_heads.train()


def batch():
    features = {str(level): torch.randn(1, 16, size, size) for level, size in enumerate((8, 4))}
    target = {"boxes": torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 50]]), "labels": torch.tensor([2, 0])}
    return features, [torch.tensor([[5.0, 5, 31, 38], [0, 0, 10, 10]])], [(64, 64)], [target]


def test_rows_with_boxes_train_the_boxes_too(heads):
    arguments = batch()
    row = torch.randn(2, 32)
    box = torch.tensor([[0.0, 0, 20, 20], [10, 10, 30, 30]])
    labels = torch.tensor([1, 1])
    found = {}
    for name, rows in {
        "none": None,
        "features": ExtraRows(row, labels),
        "boxes": ExtraRows(row, labels, box, box + 5),
    }.items():
        heads.extra_rows = None if rows is None else Given(rows)
        torch.manual_seed(1)
        found[name] = heads(*arguments)[1]
    assert found["features"]["loss_more"] == 0
    assert found["features"]["loss_classifier"] == found["boxes"]["loss_classifier"] != found["none"]["loss_classifier"]
    assert found["features"]["loss_box_reg"] == found["none"]["loss_box_reg"]
    deltas = heads.predictor.bbox_pred(row).view(2, -1, 4)[:, 1]
    wanted = heads.box_coder.encode_single(box + 5, box)
    n = 4  # two objects, two proposals
    total = n * found["none"]["loss_box_reg"] + (deltas - wanted).abs().sum()
    torch.testing.assert_close(found["boxes"]["loss_box_reg"], total / (n + 2))


def test_facts_of_the_rows(heads):
    heads.loss.row_facts = ("gt_index", "memory", "quality", "picture")
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [2, 2, 8, 8], [0, 0, 10, 10]])
    matched = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [5, 5, 6, 6], [50, 50, 60, 60]])
    labels, gt_index = torch.tensor([0, 2, 3, 1]), torch.tensor([0, 1, -1])
    deltas = torch.zeros(4, 12)
    deltas[1, 4 * 2 + 3] = 5 * np.log(2)  # of its own class: twice as high, about the same centre
    places = Places(torch.tensor([0, 1, 1]), [3])
    rows = Rows([boxes[:1], boxes[1:3]], labels[:3], matched[:3], gt_index, torch.zeros(3, dtype=torch.bool), places)
    facts = heads.facts(deltas, boxes, torch.cat([labels, torch.tensor([1])]), matched, rows, memory=True)
    assert facts["gt_index"].tolist() == [0, 1, -1, -1, -1]
    assert facts["picture"].tolist() == [0, 1, 1, 2, 2]  # rows of no picture are together
    assert facts["memory"].tolist() == [False] * 3 + [True] * 2
    torch.testing.assert_close(facts["quality"], torch.tensor([1.0, 15 * 10 / (200 + 200 - 150), 0, 0, 1]))
    assert not heads.facts(deltas, boxes, labels, matched, rows)["memory"].any()


def test_eqfl_is_told_the_quality(heads):
    heads.loss = losses.build("eqfl", three_classes(20, 10, 5))
    heads.predictor.cls_score = torch.nn.Linear(32, 3)
    given = []
    heads.loss.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    heads(*batch())[1]["loss_classifier"].backward()
    assert set(given[0]) == {"quality", "every_row"} and given[0]["quality"].max() > 0.5
    assert heads.predictor.bbox_pred.weight.grad is None, "the quality is a constant"


# ---- processes -------------------------------------------------------------------------------------------------------


def stored_rows(seed, n=40):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 5, (n,), generator=generator)
    return torch.randn(n, 3, generator=generator), labels, *torch.rand(2, n, 4, generator=generator)


@pytest.mark.parametrize("cut", [17, 40])
def test_memories_of_two_processes_are_that_of_one(run_on_ranks, cut):
    batches = [stored_rows(seed) for seed in range(3)]

    def stored(rank):
        memories = FeatureMemory(4, (3,), size=6, dtype=torch.bfloat16), FeatureBank([3, 1], 3, size=6)
        for rows in batches:
            part = {0: slice(None, cut), 1: slice(cut, None), None: slice(None)}[rank]
            for memory in memories:
                memory.push(*(value[part] for value in rows))
        state = {f"{number}.{key}": value for number, m in enumerate(memories) for key, value in m.state_dict().items()}
        return {key: value.float().numpy() for key, value in state.items()}

    joined = stored(None)
    assert joined["0.written"].min() > 6
    for found in run_on_ranks(stored):
        for key, value in joined.items():
            np.testing.assert_array_equal(found[key], value)


def test_rows_of_any_type_are_gathered_in_order(run_on_ranks):
    def gathered(rank):
        rows = (3, 0)[rank]
        values = (
            torch.arange(rows) + 10 * rank,
            torch.full((rows, 2, 1), 1.5 + rank, dtype=torch.bfloat16),
            torch.ones(rows, dtype=torch.bool),
            torch.full((rows, 3), 1e-300, dtype=torch.float64),
        )
        return [
            (value.dtype == own.dtype, value.tolist())
            for value, own in zip(gather_over_ranks(*values), values, strict=True)
        ]

    expected = [[0, 1, 2], [[[1.5], [1.5]]] * 3, [True] * 3, [[1e-300] * 3] * 3]
    for found in run_on_ranks(gathered):
        assert found == [(True, value) for value in expected]


def test_fasa_of_two_processes_is_that_of_one(run_on_ranks):
    """Also in the middle of an epoch, where a run may stop."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.rand(20, generator=generator), torch.randn(20, 3, generator=generator), torch.arange(20) % 4)
        for _ in range(5)
    ]

    def state(part):
        module = AugmentedFeatures(FASA([9, 3, 1], 3))
        for iteration, (row_losses, features, labels) in enumerate(batches):
            module.at_epoch(iteration / 2)
            module.fasa.update(features[part], labels[part])
            module.fasa.observe(row_losses[part], labels[part])
        assert module.fasa.adapted == 2
        return {key: value.numpy() for key, value in module.state_dict().items()}

    joined = state(slice(None))
    assert joined["fasa.val_losses"].any()
    for found in run_on_ranks(lambda rank: state((slice(None, 7), slice(7, None))[rank])):
        for key, value in joined.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


# ---- the balanced stream ---------------------------------------------------------------------------------------------


def test_partners_are_drawn_against_the_frequency_of_their_rarest_class(tiny_set, tiny_recipe):
    recipe = load_recipe(tiny_recipe, {"data.train.annotations": str(tiny_set[0])})
    source = open_source(recipe.data.train, "", "train")
    dataset = PartneredDataset(source, recipe.data, recipe.seed)
    index = source.index
    pairs = {(int(image), int(label)) for image, label in zip(index.image_of, index.labels, strict=True)}
    images = {label: sum(own == label for _, own in pairs) for label in range(3)}
    expected = np.zeros(len(index))
    for image, label in pairs:
        expected[image] = max(expected[image], 1 / images[label])
    np.testing.assert_allclose(np.diff(dataset.cumulative, prepend=0), expected)
    assert expected[-1] == 0  # no object, never a partner

    image, target = dataset.sample(0, 3, 0)
    partners = [target["balanced_image"], *(dataset.sample(epoch, 3, 0)[1]["balanced_image"] for epoch in range(9))]
    assert torch.equal(partners[0], partners[1]), "a pure function of the key"
    assert partners[0].dtype == torch.uint8 and len(target["balanced_boxes"]) > 0
    assert any(not torch.equal(partners[0], other) for other in partners)
    assert torch.equal(image, TrainingDataset(source, recipe.data, recipe.seed).sample(0, 3, 0)[0])


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fasa={}", "rio={}"], "at most one feature module, these are set: fasa, rio"),
        (["features=fasa", "rio={}"], "at most one feature module, these are set: fasa, rio"),
        ([*SECOND, "second.fasa={}", "second.rio={}"], "at most one feature module"),
        (["features=feature_memory"], "feature_memory draws classes by the mean score of ebl: set loss=ebl"),
        (["features=fasa", "loss=seesaw"], "fasa adds a softmax cross-entropy of its own: set loss=softmax"),
        (["features=meta_reweighting"], "set loss=balanced_sigmoid"),
        (["features=rio", "features.sizes=3"], r'unknown key "features\.sizes" \(did you mean "size"\?\)'),
        (["features={name: fasa, start_epoch: -1}"], r"features\.start_epoch"),
        (["features=riot"], r'features\.name: "riot" is not a choice \(did you mean "rio"\?\)'),
        (["features.size=3"], r'features\.name: "" is not a choice \(choices: hallucination'),
        (["detector={name: deformable_detr, norm: bn, frozen_layers: 0}", "features=rio"],
         "rio needs a box head on proposals"),
    ],
)  # fmt: skip
def test_mistakes(overrides, message, tiny_recipe):
    with pytest.raises(UserError, match=message):
        load_recipe(tiny_recipe, overrides)


def test_a_second_stage_inherits_none(tiny_recipe):
    recipe = load_recipe(tiny_recipe, [*SECOND, "features=fasa"])
    assert recipe.features.name == "fasa" and second_recipe(recipe).features is None


def test_features_behind_layers_that_train_are_refused(tmp_path, tiny_set, tiny_recipe):
    overrides = ["loss=ebl", "features=feature_memory"]
    with pytest.raises(UserError, match=r"feature_memory\.stores: the shared layers train in this stage"):
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()
