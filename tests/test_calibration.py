"""calibration: reference vectors, NorCal's two forms, dimensions of known sets, absent classes, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin import ClassStats, calibration
from tailfin.calibration import fracal, fractal_dimension, logit_adjusted, norcal, norcal_foreground

DTYPES = (torch.float64, torch.float32)


@pytest.fixture(scope="module")
def file(golden_dir) -> dict[str, np.ndarray]:
    vectors = np.load(golden_dir / "calibration.npz")
    return {key.removeprefix("a_stats/"): vectors[key] for key in vectors.files}


@pytest.fixture(scope="module")
def train_json(file, tmp_path_factory):
    path = tmp_path_factory.mktemp("fracal") / "train.json"
    path.write_bytes(file["annotation_json"].tobytes())
    return path


@pytest.fixture(scope="module")
def stats(train_json) -> ClassStats:
    return ClassStats.from_json(train_json)  # its images have no names: counts need none


def logits_of(file, dtype):
    return torch.from_numpy(file["logits"]).to(dtype)


def close(found, expected, dtype):
    assert found.dtype == dtype
    # parts of the released code run in float32
    np.testing.assert_allclose(found, expected, **({"rtol": 1e-6} if dtype == torch.float64 else {"atol": 1e-5}))


# ---- FRACAL


def test_fractal_dimension(file, train_json, stats):
    found = fractal_dimension(train_json)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, file["fracal/dimension_box_dim"], rtol=1e-7)
    np.testing.assert_allclose(fractal_dimension(str(train_json)), found)
    np.testing.assert_array_equal(stats.image_count, file["norcal/image_count"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lambda_", [1, 2])
def test_fracal_softmax(file, stats, dtype, lambda_):
    logits = logits_of(file, dtype)
    before = logits.clone()
    found = fracal(logits, stats, file["fracal_input/dimension"], lambda_=lambda_)
    close(found, file[f"fracal_softmax/base10_lambda{lambda_}/scores"][:, :-1], dtype)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fracal_sigmoid(file, stats, dtype):
    logits = logits_of(file, dtype)[:, :-1]
    dimension = torch.from_numpy(file["fracal_input/dimension"])
    found = fracal(logits, stats, dimension, "sigmoid", 2.0)
    close(found, file["fracal_sigmoid/base10_lambda2/scores_with_dummy_bg"][:, :-1], dtype)


def test_known_dimensions():
    rng = np.random.default_rng(0)
    plane, line = rng.random((20_000, 2)), np.repeat(rng.random((20_000, 1)), 2, axis=1)
    point, outside = np.full((100, 2), 0.3), np.ones((50, 2))
    few = rng.random((3, 2))
    sets = (plane, line, point, outside, few)
    labels = np.repeat(np.arange(5), [len(centres) for centres in sets])
    found = calibration.box_counting(np.concatenate(sets), labels, 6)
    assert 1.9 < found[0] <= 2 and 0.95 < found[1] < 1.1
    np.testing.assert_array_equal(found[2:], 1.0)  # also for the class without objects


def test_by_hand():
    # 4 objects: G = 1, 2 alone; 1 and 4 cells: slope 2. On two cells: slope 1; at the border: no cell
    corners = np.array([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    beside = np.array([[0.1, 0.1], [0.9, 0.1], [0.2, 0.2], [1.0, 0.9]])
    found = calibration.box_counting(np.concatenate([corners, beside]), np.repeat([0, 1], 4), 2)
    np.testing.assert_allclose(found, [2, 1], rtol=1e-12)


def test_fracal_of_absent_and_rare_classes():
    stats = ClassStats(image_count=[900, 1, 0], instance_count=[900, 1, 0], num_images=1000)
    for kind, width in (("softmax", 4), ("sigmoid", 3)):
        logits = torch.zeros((2, width))
        found = fracal(logits.half(), stats, [1.0, 1.0, 1.0], kind)
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        assert found[0, 0] < found[0, 1] == found[0, 2]
        even = fracal(logits, stats, [1.0, 2.0, 1.0], kind)
        assert even[0, 1] < even[0, 2]  # where objects are everywhere scores go down
        assert fracal(logits[:0], stats, [1.0, 1.0, 1.0], kind).shape == (0, 3)
    logits = torch.zeros((2, 4), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z: fracal(z, stats, [1.0, 1.5, 2.0]), logits)


# ---- NorCal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.6, 1, 0])
def test_norcal_vectors(file, stats, dtype, gamma):
    scores = logits_of(file, dtype).softmax(1)
    before = scores.clone()
    close(norcal(scores, stats, gamma), file[f"norcal/gamma{gamma}_exps_renorm/scores"][:, :-1], dtype)
    assert torch.equal(scores, before)


def test_norcal_by_hand():
    # p = 0.6, 0.2, background 0.2; sizes 16 and 1, gamma 1/2: 0.15, 0.2, 0.2 over their sum
    scores = torch.tensor([[0.6, 0.2]], dtype=torch.float64)
    np.testing.assert_allclose(norcal_foreground(scores, [16, 1], gamma=0.5), [[0.15 / 0.55, 0.2 / 0.55]])
    np.testing.assert_allclose(norcal_foreground(scores, [16, 0], gamma=0.5), [[0.15 / 0.55, 0.2 / 0.55]])
    given_background = norcal_foreground(scores, torch.tensor([16, 1]), gamma=0.5, background=torch.tensor([0.65]))
    np.testing.assert_allclose(given_background, [[0.15, 0.2]], rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), classes=st.integers(1, 20), gamma=st.floats(0, 2), scale=st.floats(0.1, 30))
def test_is_a_shift_of_the_foreground_logits(seed, classes, gamma, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((7, classes + 1), generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 10_000, (classes,), generator=generator)
    shift = torch.cat([gamma * counts.double().log(), torch.zeros(1, dtype=torch.float64)])
    expected = (logits - shift).softmax(1)[:, :-1]
    probability = logits.softmax(1)
    found = norcal_foreground(probability[:, :-1], counts, gamma, background=probability[:, -1])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert ((found >= 0) & (found <= 1)).all()


def test_without_strength_scores_stay():
    probability = torch.randn((9, 5), generator=torch.Generator().manual_seed(0)).softmax(1)
    torch.testing.assert_close(norcal_foreground(probability[:, :-1], [1, 10, 100, 1000], gamma=0), probability[:, :-1])


def test_classes_of_one_size_keep_their_order_and_a_sure_background_stays():
    probability = torch.tensor([[0.5, 0.3, 0.2], [1e-9, 1e-9, 1 - 2e-9]], dtype=torch.float64)
    found = norcal_foreground(probability[:, :-1], [100, 100], gamma=0.6)
    assert found[0, 0] / found[0, 1] == pytest.approx(5 / 3)
    assert found[1].max() < 1e-9


def test_half_precision_and_nothing_at_all_stay_finite():
    for scores in (torch.zeros((2, 3)), torch.ones((2, 3)), torch.rand((2, 3)).half(), torch.zeros((0, 3))):
        found = norcal_foreground(scores, np.array([0, 5, 10**9]), background=torch.zeros(len(scores)))
        assert found.dtype == torch.float32
        assert found.shape == scores.shape
        assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -0.1}, "gamma must not be negative"),
        ({"class_count": [1, 2]}, "one number per column of scores"),
        ({"background": torch.zeros(3)}, r"background must be \[2\]"),
    ],
)
def test_norcal_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        norcal_foreground(torch.zeros((2, 3)), **({"class_count": [1, 2, 3]} | arguments))


# ---- logit adjustment


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", ["0.5", "1", "2"])
def test_logit_adjusted(file, stats, dtype, tau):
    logits, prefix = logits_of(file, dtype), f"PAPER_logit_adjustment/tau{tau}"
    before = logits.clone()
    found = logit_adjusted(logits, stats, float(tau))
    exact = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found[:, :-1], file[f"{prefix}/adjusted_logits_fg"], **exact)
    np.testing.assert_allclose(found.softmax(1), file[f"{prefix}/scores_softmax_bg_untouched"], **exact)
    assert torch.equal(found[:, -1], logits[:, -1]) and torch.equal(logits, before) and found.dtype == dtype
    foreground = logit_adjusted(logits[:, :-1], stats, float(tau))
    np.testing.assert_allclose(foreground.softmax(1), file[f"{prefix}/scores_softmax_fg_only"], **exact)
    np.testing.assert_allclose(foreground.sigmoid(), file[f"{prefix}/scores_sigmoid"], **exact)


def test_logit_adjusted_of_absent_classes_and_none():
    stats = ClassStats(image_count=[9, 1, 0], instance_count=[9, 1, 0], num_images=10)
    found = logit_adjusted(torch.zeros((1, 4)).bfloat16(), stats)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, [[-np.log(9 / 11), np.log(11), np.log(11), 0]], rtol=1e-6)
    assert logit_adjusted(torch.zeros((0, 3)), stats).shape == (0, 3)
    np.testing.assert_allclose(logit_adjusted(torch.ones((1, 3)), stats, tau=0), torch.ones((1, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda stats: fracal(torch.zeros((2, 3)), stats, [1, 1, 1]), r"logits must be \[N, 4\]"),
        (lambda stats: fracal(torch.zeros((2, 4)), stats, [1, 1]), "3 positive numbers"),
        (lambda stats: fracal(torch.zeros((2, 4)), stats, [1, 1, float("nan")]), "3 positive numbers"),
        (lambda stats: fracal(torch.zeros((2, 4)), stats, [1, 1, 1], "sofmax"), 'did you mean "softmax"'),
        (lambda stats: fracal(torch.zeros((2, 4)), stats, [1, 1, 1], lambda_=-1), "lambda_ must not be negative"),
        (lambda stats: norcal(torch.zeros((2, 3)), stats, 0.6), r"scores must be \[N, 4\]"),
        (lambda stats: logit_adjusted(torch.zeros((2, 5)), stats), r"\[N, 3\] or \[N, 4\]"),
        (lambda stats: logit_adjusted(torch.zeros((2, 3)), stats, -1), "tau must not be negative"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(ClassStats(image_count=[9, 1, 0], instance_count=[9, 1, 0], num_images=10))


def test_files_without_image_names(train_json):
    """Counts and geometry need none; training does, and a stored index does not hide it."""
    from tailfin.data.index import open_index
    from tailfin.errors import UserError

    assert ClassStats.from_json(train_json).num_images == len(json.loads(train_json.read_text())["images"])
    with pytest.raises(UserError, match="file_name"):
        open_index(train_json)


def test_needs_nothing_of_the_detectors():
    code = (
        "import sys, tailfin.calibration; "
        "print([m for m in sys.modules if m.startswith(('tailfin.models', 'tailfin.run', 'tailfin.engine', "
        "'tailfin.evaluation', 'tailfin.losses'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
