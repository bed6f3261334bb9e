"""Pictures per second of `tailfin predict`, from files to a results file, against torchvision's plain loop.

    python benchmarks/predict_speed.py --photos DATA/coco-sample/val                 # R18-FPN, 160 px, 31 classes
    python benchmarks/predict_speed.py --photos DATA/coco-sample/val --size 320 --rounds 3
    python benchmarks/predict_speed.py --short                 # coco-sample of TAILFIN_DATA, else the demo set

The peer is what torchvision's reference code does: open a picture with Pillow, make a float tensor, call the detector
on it, append what it finds to a list, and write JSON at the end. Both have the same weights, settings, size and
threshold, run in one process and take turns on the same pictures (A B, B A, ...); the clock on the wall counts, and the
ratio is the median over the rounds. CPU seconds of all threads, which other work on the machine moves less, are beside
it. `predict` decodes in threads beside the detector, on a second core where there is one; with `taskset -c 0` both have
one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import training_speed as twins
from PIL import Image
from short_form import data, line, short
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.functional import to_tensor

from tailfin.checkpoint import save_model
from tailfin.config import load_recipe
from tailfin.data.synth import demo_set
from tailfin.models import build_detector
from tailfin.predicting.run import predict
from tailfin.stats import ClassStats

SCORE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of pictures")
    parser.add_argument("--most", type=int, default=200, help="pictures of it")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--classes", type=int, default=31)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--decoders", type=int, default=2, help="threads of `predict` that decode")
    parser.add_argument("--rounds", type=int, default=5)
    short(parser, rounds=3, most=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.photos = (
            options.photos or data("coco-sample", "val") or demo_set(Path(folder) / "demo")[0].with_suffix("")
        )
        compare(options)


def compare(options: argparse.Namespace) -> None:
    files = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    files = files[: options.most]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, twin = pair(folder, files, options)
        ratios, work, speeds = [], [], {"tailfin": [], "torchvision": []}
        processor: dict[str, list[float]] = {"tailfin": [], "torchvision": []}
        for number in range(options.rounds + 1):  # the first one warms up
            took, cpu = {}, {}
            for name in ("tailfin", "torchvision") if number % 2 else ("torchvision", "tailfin"):
                began, own = time.perf_counter(), time.process_time()
                if name == "tailfin":
                    found = predict(model, files, folder / f"{number}.json", score=SCORE, batch=options.batch,
                                    threads=options.decoders, device="cpu").detections  # fmt: skip
                else:
                    plain = plain_loop(twin, files, folder / "plain.json")
                took[name], cpu[name] = time.perf_counter() - began, time.process_time() - own
            if number:
                ratios.append(took["torchvision"] / took["tailfin"])
                work.append(cpu["torchvision"] / cpu["tailfin"])
                for name, seconds in took.items():
                    speeds[name].append(len(files) / seconds)
                    processor[name].append(len(files) / cpu[name])
            print(f"round {number}: {took}, detections {found} and {plain}", flush=True)
    middle = {name: f"{statistics.median(values):.1f}" for name, values in speeds.items()}
    print(f"{len(files)} pictures at {options.size} px, {options.threads} thread(s), batch {options.batch}: {middle}")
    for what, values in (("pictures per second", ratios), ("CPU seconds of all threads", work)):
        print(f"ratio of {what}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    if options.short:
        ours, theirs = (f"{statistics.median(values):.1f} pictures per CPU s" for values in processor.values())
        what = f"`predict`, {len(files)} photos to JSON, R18, {options.size} px"
        ratio = f"{statistics.median(work):.2f} ({min(work):.2f} to {max(work):.2f})"
        line(what, ours, f"torchvision, plain loop {theirs}", ratio)


def pair(folder: Path, files: list[Path], options: argparse.Namespace) -> tuple[Path, torch.nn.Module]:
    """A model file with weights that behave like trained ones, and torchvision's detector with the same."""
    changes = {
        "weights": "none",
        "data.sizes": [options.size],
        "evaluation.score_threshold": SCORE,
        "schedule.channels_last": False,
    }
    recipe = load_recipe(twins.SMALL, changes)
    counts = [100] * options.classes
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=100 * options.classes)
    torch.manual_seed(0)
    model, _ = build_detector(recipe, stats, start=False)
    side = (options.size, options.size)
    pictures = [to_tensor(Image.open(file).convert("RGB").resize(side)) for file in files[:8]]
    twins.settle(model.train(), pictures)
    path = folder / "model.safetensors"
    save_model(path, model.eval(), recipe, stats)
    twin = twins.torchvision_twin(model, recipe).eval()
    mean, std = twin.transform.image_mean, twin.transform.image_std
    twin.transform = GeneralizedRCNNTransform(options.size, options.size, mean, std)
    return path, twin


@torch.no_grad()
def plain_loop(model: torch.nn.Module, files: list[Path], out: Path) -> int:
    """torchvision's detector on one picture after another; COCO results in `out`."""
    results = []
    for number, file in enumerate(files, start=1):
        picture = to_tensor(Image.open(file).convert("RGB"))
        found = model([picture])[0]
        boxes = found["boxes"].tolist()
        for box, score, label in zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True):
            x, y, right, bottom = box
            results.append(
                {"image_id": number, "category_id": label, "bbox": [x, y, right - x, bottom - y], "score": score}
            )
    out.write_text(json.dumps(results))
    return len(results)


if __name__ == "__main__":
    main()
