"""TDE head: reference vectors of the released behaviour, the intended one by itself, its embedding over processes."""

from __future__ import annotations

import multiprocessing
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed
from torch.nn import functional as F

from tailfin.models.heads.tde import TDEHead, keep_background

CASES = ["a_typical", "b_small", "c_nofg"]


@pytest.fixture(scope="module")
def data(golden_dir):
    return np.load(golden_dir / "tde.npz")


def from_vectors(data, case, dtype=torch.float64, **options):
    weight = torch.from_numpy(data[f"{case}/weight"]).to(dtype)
    hp = {name: float(data[f"{case}/hp/{name}"]) for name in ("gamma", "alpha", "mu")}
    heads = int(data[f"{case}/hp/num_head"])
    head = TDEHead(
        weight.shape[1], len(weight) - 1, num_heads=heads, tau=float(data[f"{case}/hp/tau_total"]), **hp, **options
    ).to(dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def rows(seed, n, width=8, classes=3):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn((n, width), generator=generator, dtype=torch.float64) + 0.5
    return features, torch.randint(0, classes + 1, (n,), generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 3e-5)])
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors_of_the_released_code(data, case, dtype, tolerance):
    head = from_vectors(data, case, dtype, released=True)
    np.testing.assert_array_equal(head.embedding, data[f"{case}/step0/state_before/causal_embed"])
    for step in range(3):
        at = f"{case}/step{step}"
        features = torch.from_numpy(data[f"{at}/features"]).to(dtype).requires_grad_()
        labels = torch.from_numpy(data[f"{at}/labels"])
        head.train().zero_grad()
        logits = head(features, labels)
        value = F.cross_entropy(logits, labels)
        value.backward()
        assert value.item() == pytest.approx(float(data[f"{at}/loss"]), rel=tolerance)
        np.testing.assert_allclose(logits.detach(), data[f"{at}/logits"], atol=tolerance)
        # one feature is tiny (length 0.003), so its gradient is in the hundreds: relative there
        np.testing.assert_allclose(features.grad, data[f"{at}/grad_features"], atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(head.weight.grad, data[f"{at}/grad_weight"], atol=tolerance)
        np.testing.assert_allclose(head.embedding, data[f"{at}/state_after/causal_embed"], rtol=1e-12)
        with torch.no_grad():
            kept = head.eval()(features)
            head.keep_background = False
            debiased = head(features)
            head.keep_background = True
        np.testing.assert_allclose(debiased, data[f"{at}/infer_logits_nokeep"], atol=tolerance)
        np.testing.assert_allclose(kept, data[f"{at}/infer_keepfg"], atol=tolerance)
        np.testing.assert_allclose(
            kept.softmax(dim=1), data[f"{at}/scores_official_after_second_softmax"], atol=tolerance
        )


@pytest.mark.parametrize("case", CASES)
def test_softmax_of_the_logits_is_the_intended_probability(data, case):
    head = from_vectors(data, case).eval()
    for step in range(3):
        head.embedding.copy_(torch.from_numpy(data[f"{case}/step{step}/state_after/causal_embed"]))
        features = torch.from_numpy(data[f"{case}/step{step}/features"]).double()
        probability = head(features).softmax(dim=1)
        np.testing.assert_allclose(probability.detach(), data[f"{case}/step{step}/infer_keepfg"], atol=1e-6)


def test_foreground_is_every_class_and_no_background():
    features, _ = rows(0, 6)
    labels = torch.tensor([0, 2, 3, -1, 1, 3])  # 3 is background
    head, released = (TDEHead(8, 3, mu=0.5, released=released).double() for released in (False, True))
    for _ in range(2):
        head(features, labels)
        released(features, labels)
    torch.testing.assert_close(head.embedding[0], 1.5 * features[[0, 1, 4]].mean(dim=0))
    torch.testing.assert_close(released.embedding[0], 1.5 * features[[1, 2, 4, 5]].mean(dim=0))


def reference(features, weight, embedding, num_heads=2, tau=16.0, gamma=1 / 32, alpha=1.5):
    """(training logits, debiased logits) in NumPy, a head, a row and a class at a time."""
    size = features.shape[1] // num_heads
    logits, debiased = np.zeros((len(features), len(weight))), np.zeros((len(features), len(weight)))
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        e = embedding[part]
        for row, x in enumerate(features[:, part]):
            for label, w in enumerate(weight[:, part]):
                w = w / (np.linalg.norm(w) + gamma)
                cos = x @ e / (np.linalg.norm(x) * np.linalg.norm(e))
                z = tau / num_heads * x @ w / np.linalg.norm(x)
                logits[row, label] += z
                debiased[row, label] += z - tau / num_heads * alpha * cos * (e / np.linalg.norm(e)) @ w
    return logits, debiased


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_against_the_formula(num_heads):
    head = TDEHead(8, 3, num_heads=num_heads, alpha=0.7, tau=10.0, keep_background=False).double()
    features, labels = rows(1, 7)
    trained = head(features, labels)
    wanted, debiased = reference(
        features.numpy(), head.weight.detach().numpy(), head.embedding[0].numpy(), num_heads, tau=10.0, alpha=0.7
    )
    np.testing.assert_allclose(trained.detach(), wanted, atol=1e-7)
    np.testing.assert_allclose(head.eval()(features).detach(), debiased, atol=1e-7)


def test_background_keeps_its_probability():
    before, debiased = rows(2, 5, 4)[0], rows(3, 5, 4)[0]
    log_probability = keep_background(before, debiased)
    probability, original = log_probability.exp(), before.softmax(dim=1)
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(probability[:, 3], original[:, 3])
    shares = debiased.softmax(dim=1)[:, :3]
    expected = shares / shares.sum(dim=1, keepdim=True) * original[:, :3].sum(dim=1, keepdim=True)
    torch.testing.assert_close(probability[:, :3], expected)


def test_the_embedding_moves_in_training_with_labels_only():
    head = TDEHead(8, 3).double()
    features, labels = rows(4, 9)
    head(features)
    head.eval()(features, labels)
    assert head.embedding.abs().sum() == 0
    head.train()(features, labels)
    before = head.embedding.clone()
    assert before.abs().sum() > 0
    head(features, torch.full_like(labels, 3))  # no foreground
    head(features[:0], labels[:0])
    assert torch.equal(head.embedding, before)
    other = TDEHead(8, 3).double()
    other.load_state_dict(head.state_dict())
    assert set(head.state_dict()) == {"weight", "embedding"}
    torch.testing.assert_close(other.eval()(features), head.eval()(features), rtol=0, atol=0)
    for change in (head.half, head.bfloat16, head.float):
        assert change().embedding.dtype == torch.float64
        torch.testing.assert_close(head.embedding, before, rtol=0, atol=0)
    assert torch.nn.Sequential(head).to("meta")[0].embedding.device.type == "meta"


def test_without_history_nothing_is_removed():
    head = TDEHead(8, 3, keep_background=False).double()
    features, _ = rows(5, 6)
    torch.testing.assert_close(head(features), head.eval()(features))
    kept = TDEHead(8, 3).double()
    torch.testing.assert_close(kept.eval()(features).exp(), kept.train()(features).softmax(dim=1))


@pytest.mark.parametrize("training", [True, False])
def test_zero_huge_and_half_precision_features_stay_finite(training):
    head = TDEHead(8, 3)
    head(*(value.float() if value.is_floating_point() else value for value in rows(6, 9)))
    head.train(training)
    for features in (
        torch.zeros((2, 8)),
        torch.cat((torch.zeros((2, 4)), torch.ones((2, 4))), dim=1),
        torch.full((2, 8), 1e4).half(),
        torch.full((2, 8), 1e15),
        torch.zeros((0, 8)),
    ):
        features.requires_grad_()
        logits = head(features, torch.zeros(len(features), dtype=torch.int64))
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        head.zero_grad()
        logits.square().sum().backward()
        assert torch.isfinite(features.grad).all()
        assert features.grad.abs().max() < 1e6 if len(features) else True
        assert torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    torch.manual_seed(0)
    head = TDEHead(4, 3).double()
    head.embedding.normal_()
    head.train(training)
    features = torch.randn((5, 4), dtype=torch.float64, requires_grad=True)

    def call(value, weight):
        return torch.func.functional_call(head, {"weight": weight}, (value,))

    assert torch.autograd.gradcheck(call, (features, head.weight))


def on_rank(rank, batches, folder, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    head = TDEHead(8, 3).double()
    for batch in batches:
        head(*batch[rank])
    queue.put(head.embedding.numpy())
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("situation", ["both", "no foreground on one", "no rows on one"])
def test_two_processes_are_one_on_the_joined_batch(situation):
    batches = []
    for step in range(3):
        first, second = rows(10 + step, 9), rows(20 + step, 14)
        if situation == "no foreground on one":
            second = second[0], torch.full_like(second[1], 3)
        if situation == "no rows on one":
            second = second[0][:0], second[1][:0]
        batches.append((first, second))
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [context.Process(target=on_rank, args=(rank, batches, folder, queue)) for rank in range(2)]
        for process in processes:
            process.start()
        embeddings = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(timeout=60)
    joined = TDEHead(8, 3).double()
    for first, second in batches:
        joined(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    np.testing.assert_array_equal(*embeddings)
    np.testing.assert_allclose(embeddings[0], joined.embedding, rtol=1e-12)


def test_first_weights_and_options():
    torch.manual_seed(0)
    head = TDEHead(256, 100)
    assert head.weight.shape == (101, 256)
    assert -1 / 16 <= head.weight.min() < -0.99 / 16
    with pytest.raises(ValueError, match="in_features 9 cannot be shared by 2 heads"):
        TDEHead(9, 3)
    with pytest.raises(ValueError, match="mu must be in"):
        TDEHead(8, 3, mu=1.5)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        TDEHead(8, 3, gamma=-1.0)
