"""Forest R-CNN's trees: reference vectors, what each classifier learns from, clusters, tree files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tailfin.data.index import open_index
from tailfin.errors import UserError
from tailfin.models.heads.forest import (
    Forest,
    ForestPredictor,
    SharedLayer,
    class_geometry,
    class_means,
    cluster_classes,
    read_trees,
)
from tailfin.stats import ClassStats


def stats(classes):
    counts = np.ones(classes, dtype=np.int64)
    return ClassStats(image_count=counts, instance_count=counts, num_images=classes)


def last(array):
    """Background from the first to the last column."""
    return np.roll(array, -1, axis=-1)


@pytest.mark.parametrize(("dtype", "relative", "absolute"), [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-4, 1e-5)])
@pytest.mark.parametrize("case", ["a_typical", "b_small", "c_nofg"])
def test_reference_vectors(golden_dir, case, dtype, relative, absolute):
    file = np.load(golden_dir / "forest_rcnn.npz")
    classes = int(file[f"{case}/num_classes"])
    trees = file[f"{case}/parent_of_class"]
    assert (trees[:, 0] == 0).all()  # there, background is the parent 0 of the class 0
    loss = Forest(stats(classes), list(trees[:, 1:] - 1))
    blocks = [last(file[f"{case}/logits{tree}"]) for tree in range(4)]
    assert [block.shape[1] for block in blocks] == loss.widths
    logits = torch.from_numpy(np.concatenate(blocks, axis=1)).to(dtype).requires_grad_()
    labels = torch.from_numpy((file[f"{case}/labels"] - 1) % (classes + 1))
    value = loss(logits, labels)
    value.backward()
    assert value.item() == pytest.approx(float(file[f"{case}/loss"]), rel=relative)
    parts = [part.item() for part in loss.parts.values()]
    assert parts == pytest.approx(list(file[f"{case}/losses"]), rel=relative)
    assert list(loss.parts) == ["tree0", "tree1", "tree2", "classes"]
    grad = np.concatenate([last(file[f"{case}/grad{tree}"]) for tree in range(4)], axis=1)
    np.testing.assert_allclose(logits.grad, grad, atol=absolute)
    scores = loss.scores(logits.detach())
    np.testing.assert_allclose(scores, last(file[f"{case}/scores"])[:, :-1], atol=1e-6)


def test_gradcheck_and_empty_batch():
    loss = Forest(stats(4), [[0, 0, 1, 1], [0, 1, 2, 0]])
    logits = torch.randn((6, loss.num_logits), dtype=torch.float64, requires_grad=True)
    assert loss.num_logits == 3 + 4 + 5
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 1, 2, 3, 4, 4])), logits)
    empty = torch.zeros((0, loss.num_logits), requires_grad=True)
    value = loss(empty, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0


def test_scores_stay_finite_where_parents_rule_the_best_class_out():
    loss = Forest(stats(2), [[0, 1]])
    logits = torch.tensor([[-300.0, 300.0, 0.0, 300.0, -300.0, 0.0]])  # parents: class 1; classes: class 0
    scores = loss.scores(logits)
    assert torch.isfinite(scores).all()
    assert loss.scores(logits.bfloat16()).dtype == torch.float32
    even = torch.zeros((1, 6))
    torch.testing.assert_close(loss.scores(even), torch.full((1, 2), 1 / 3))


def test_parents_that_agree_leave_only_the_classes_to_decide():
    loss = Forest(stats(3), [[0, 0, 0]])
    logits = torch.randn((5, loss.num_logits))
    logits[:, :2] = 0  # all three classes' parent and background are equally likely
    torch.testing.assert_close(loss.scores(logits), logits[:, 2:].softmax(1)[:, :3])


def test_trees_learn_from_detached_features():
    loss = Forest(stats(4), [[0, 0, 1, 1], [0, 1, 1, 0]])
    shared, predictor = SharedLayer(8, 3, 16), ForestPredictor(16, loss)
    pooled = torch.randn((7, 8, 3, 3))
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 4])
    logits, deltas = predictor(shared(pooled))
    assert logits.shape == (7, loss.num_logits)
    assert deltas.shape == (7, 16)
    trees = loss.num_logits - 5
    (through_trees,) = torch.autograd.grad(logits[:, :trees].square().sum(), shared[1].weight, retain_graph=True)
    assert through_trees.abs().sum() == 0
    value = loss(logits, labels)
    value.backward()
    assert shared[1].weight.grad.abs().sum() > 0
    for layer in (*predictor.cls_score.hidden, *predictor.cls_score.classifiers):
        assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(predictor.cls_score(shared(pooled)), logits)
    assert ForestPredictor(16, loss, class_agnostic=True)(torch.zeros((2, 16)))[1].shape == (2, 4)


def test_clusters_find_the_groups_and_repeat():
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(5), 8))
    features = 20 * rng.normal(size=(5, 6))[groups] + rng.normal(size=(40, 6))
    tree = cluster_classes(features, 5)
    assert tree.tolist() == cluster_classes(features, 5).tolist()
    same = tree[:, None] == tree[None]
    assert (same == (groups[:, None] == groups[None])).all()
    assert tree[0] == 0
    assert set(tree) == set(range(5))
    # fewer different vectors than parents: the empty ones are left out
    flat = cluster_classes(np.zeros((6, 2)), 3)
    assert set(flat) == set(range(flat.max() + 1))
    with pytest.raises(ValueError, match=r"parents must lie in 1\.\.6"):
        cluster_classes(np.zeros((6, 2)), 7)
    with pytest.raises(ValueError, match="one vector of finite numbers"):
        cluster_classes([[np.nan]], 1)


def test_class_means_of_a_class_without_rows():
    means = class_means([[1.0, 2.0], [3.0, 4.0], [8.0, 0.0]], [0, 0, 2], 3)
    assert means.tolist() == [[2.0, 3.0], [5.0, 1.5], [8.0, 0.0]]


def test_class_geometry_of_a_file(tmp_path):
    boxes = [(1, [10, 10, 40, 10]), (1, [0, 0, 20, 20]), (2, [5, 5, 10, 40])]
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 50}],
                "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}, {"id": 3, "name": "none"}],
                "annotations": [
                    {"id": i, "image_id": 1, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                    for i, (label, box) in enumerate(boxes)
                ],
            }
        )
    )
    geometry = class_geometry(open_index(tmp_path / "a.json"))
    aspect, area = np.log([4, 1]), np.log(np.array([400, 400]) / 5000)
    expected = [aspect.mean(), area.mean(), aspect.std(), area.std()]
    np.testing.assert_allclose(geometry[0], expected, atol=1e-6)
    np.testing.assert_allclose(geometry[1], [np.log(1 / 4), np.log(400 / 5000), 0, 0], atol=1e-6)
    np.testing.assert_allclose(geometry[2, :2], geometry[:2, :2].mean(0), atol=1e-6)


def test_tree_files(tmp_path):
    path = tmp_path / "trees.json"
    path.write_text(
        '{"kind": {"cat": "animal", "car": "vehicle", "dog": "animal"}, "size": {"cat": 1, "car": 2, "dog": 2}}'
    )
    kind, size = read_trees(path, ["dog", "car", "cat"])
    assert kind.tolist() == [0, 1, 0]
    assert size.tolist() == [0, 0, 1]
    with pytest.raises(UserError, match=r'tree "kind" has no parent for the class "cats" \(did you mean "cat"\?\)'):
        read_trees(path, ["cats"])
    path.write_text("[]")
    with pytest.raises(UserError, match="trees are written"):
        read_trees(path, ["cat"])
    with pytest.raises(UserError, match="tree file"):
        read_trees(tmp_path / "none.json", ["cat"])


@pytest.mark.parametrize("trees", [[], [[0, 1]], [[0, -1, 1]], [[0.5, 1, 1]]])
def test_trees_that_make_no_sense(trees):
    with pytest.raises(ValueError, match="tree"):
        Forest(stats(3), trees)
