"""`tailfin predict` killed with `kill -9` at random moments and given again, against one that was left alone.

    python benchmarks/faults/kill_predict.py                        # 2,000 pictures, 3 kills
    python benchmarks/faults/kill_predict.py --pictures 500 --kills 5 --seed 3

Pictures are drawn, weights are random with scores that are spread out: what counts is whether the file of the killed
calls is, byte for byte, that of the straight call, and whether anything else is left in the folder. Exit code 1 where
not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tailfin.checkpoint import save_model
from tailfin.config import load_recipe
from tailfin.models import build_detector
from tailfin.stats import ClassStats

SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = ["predict", made(folder / "model.safetensors"), drawn(folder / "pictures", options.pictures)]
        began = time.monotonic()
        run([*words, "--out", folder / "straight" / "found.json"])
        seconds = time.monotonic() - began
        out, kills, calls = folder / "killed" / "found.json", 0, 0
        rng = random.Random(options.seed)
        while not out.exists():
            calls += 1
            after = rng.uniform(0.25, 0.6) * seconds if kills < options.kills else None
            kills += run([*words, "--out", out], after)
            print(f"call {calls}: {len(list(folder.glob('killed/.*/**/*.piece')))} pieces, {kills} kills", flush=True)
        same = out.read_bytes() == (folder / "straight" / "found.json").read_bytes()
        left = sorted(path.name for path in out.parent.iterdir())
        entries = (folder / "straight" / "found.json").read_bytes().count(b'"image_id"')
        print(
            f"{options.pictures} pictures, {entries} detections, {seconds:.0f} s at once; {kills} kills, {calls} calls:"
        )
        print(f"the same file: {same}; in the folder: {', '.join(left)}")
        sys.exit(0 if same and left == ["found.images.json", "found.json"] else 1)


def made(path: Path) -> Path:
    """A model file of random weights."""
    recipe = load_recipe("fod/faster_rcnn_r18_softmax", {"data.sizes": [SIZE]})
    counts = [9, 9, 9]
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=9, names=["red", "green", "blue"])
    torch.manual_seed(0)
    model, _ = build_detector(recipe, stats, start=False)
    with torch.no_grad():
        model.roi_heads.predictor.cls_score.weight.normal_(0, 2.0)
    save_model(path, model.eval(), recipe, stats)
    return path


def drawn(folder: Path, count: int) -> Path:
    """Pictures of coloured cells, of three sizes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        cells = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(cells).resize((56 + 8 * (number % 3), SIZE), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.png")
    return folder


def run(words: list[object], after: float | None = None) -> int:
    """Call tailfin; 1 where it was killed, `after` seconds from its start."""
    command = [sys.executable, "-m", "tailfin", *map(str, words), "--score", "0.1", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 1
    assert code == 0, code
    return 0


if __name__ == "__main__":
    main()
