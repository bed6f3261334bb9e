"""How long the report of a large run takes to build and to open, and how large it is: made-up detections.

    python benchmarks/report_speed.py       # 1,203 classes, 20,000 pictures, 300 detections each
    python benchmarks/report_speed.py --short       # 1,000 pictures
    python benchmarks/report_speed.py --data DATA/fod31-lt/val.json --per-image 20 --runs 2 --out page.html

Without --data the pictures have no files, so that no example is drawn. Objects are found with a chance that falls along
the tail; the other detections are near misses, other classes and noise. Opening is measured in headless Chromium,
where it is installed: from the start of the page's loading until it is loaded, and until all its charts are drawn.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from short_form import line, short

from tailfin.config import check_recipe, dump_recipe
from tailfin.evaluation import evaluate
from tailfin.report import write_report

TIMER = """<script>
const loaded = new Promise(done => addEventListener("load", () => setTimeout(() => done(performance.now()), 0)));
loaded.then(first => setInterval(() => {
  const charts = document.querySelectorAll("figure.chart:not(.picked)").length;
  if (document.querySelectorAll(".js-plotly-plot .main-svg").length < charts) return;
  fetch(`/done?${first.toFixed(0)},${performance.now().toFixed(0)},${document.querySelectorAll("*").length}`);
}, 50));
</script>"""


def made_up(classes: int, pictures: int, rng: np.random.Generator) -> dict[str, Any]:
    """An annotation file: classes by a Zipf law, about 12 objects a picture, counts of a made-up training set."""
    share = 1 / np.arange(1, classes + 1) ** 1.1
    counts = np.maximum(1, (60000 * share / share[0])).astype(int)
    frequency = np.where(counts <= 10, "r", np.where(counts <= 100, "c", "f"))
    number = rng.poisson(12, pictures)
    image = np.repeat(np.arange(1, pictures + 1), number)
    label = np.concatenate([rng.permutation(classes), rng.choice(classes, len(image), p=share / share.sum())])[
        : len(image)
    ]
    size = rng.uniform(20, 200, (len(image), 2))
    corner = rng.uniform(0, 1, (len(image), 2)) * (np.array([640, 480]) - size)
    boxes = np.concatenate([corner, size], axis=1).round(1)
    return {
        "images": [{"id": k, "width": 640, "height": 480, "file_name": f"{k}.jpg"} for k in range(1, pictures + 1)],
        "categories": [
            {
                "id": k + 1,
                "name": f"class {k + 1}",
                "frequency": str(frequency[k]),
                "image_count": int(counts[k]),
                "instance_count": int(2 * counts[k]),
            }
            for k in range(classes)
        ],
        "annotations": [
            {"id": k + 1, "image_id": int(i), "category_id": int(c) + 1, "bbox": b}
            for k, (i, c, b) in enumerate(zip(image, label, boxes.tolist(), strict=True))
        ],
    }


def detections(
    document: dict[str, Any], per_image: int, skill: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """About `per_image` detections of every picture."""
    ids = np.array([row["id"] for row in document["categories"]])
    place = {int(number): row for row, number in enumerate(ids)}
    own = document["annotations"]
    label = np.array([place[row["category_id"]] for row in own])
    boxes = np.array([row["bbox"] for row in own], dtype=float)
    image = np.array([row["image_id"] for row in own])
    rank = np.argsort(np.argsort(-np.bincount(label, minlength=len(ids)), kind="stable"), kind="stable") / len(ids)
    found = rng.random(len(own)) < skill * (1 - 0.7 * rank[label])
    swallowed = ~found & (rng.random(len(own)) < 0.6)
    near = found | swallowed
    head = np.argsort(rank)[: max(2, len(ids) // 20)]
    seen = np.where(found, label, rng.choice(head, len(own)))[near]
    moved = boxes[near] + rng.normal(0, 0.06, (near.sum(), 4)) * np.tile(boxes[near][:, 2:], 2)
    scores = np.clip(rng.beta(5, 3, near.sum()), 0.01, 1)
    extra = max(0, per_image * len(document["images"]) - int(near.sum()))
    at = rng.integers(0, len(own), extra)
    spread = boxes[at] + rng.normal(0, 0.5, (extra, 4)) * np.tile(boxes[at][:, 2:], 2)
    every = np.concatenate([moved, spread])
    every[:, 2:] = np.maximum(every[:, 2:], 4)
    images = np.concatenate([image[near], image[at]])
    labels = np.concatenate([seen, rng.choice(len(ids), extra)])
    scores = np.concatenate([scores, rng.beta(1, 9, extra)])
    order = np.lexsort((-scores, images))
    return [
        {"image_id": int(i), "category_id": int(c), "bbox": b, "score": s}
        for i, c, b, s in zip(
            images[order].tolist(),
            ids[labels[order]].tolist(),
            every[order].round(2).tolist(),
            scores[order].round(5).tolist(),
            strict=True,
        )
    ]


def write_run(
    folder: Path, annotations: Path, document: dict[str, Any], found: list[dict[str, Any]], seed: int
) -> Path:
    """A run directory as training leaves it, without a model."""
    stage = folder / "stages" / "1-baseline"
    stage.mkdir(parents=True)
    data = {
        "root": str(annotations.parent),
        "train": {"annotations": annotations.name},
        "val": {"annotations": annotations.name},
    }
    recipe = {
        "name": f"made-up/{folder.name.rpartition('-')[0]}",
        "seed": seed,
        "detector": {"norm": "bn", "frozen_layers": 0},
        "schedule": {"epochs": 4},
        "data": data,
    }
    (folder / "recipe.yaml").write_text(dump_recipe(check_recipe(recipe, "made up")))
    lines = [
        {
            "iteration": 10 * k,
            "epoch": k / 250,
            "lr": 0.02,
            "loss": 2 / k**0.3,
            "classification": 1 / k**0.3,
            "box": 1 / k**0.3,
        }
        for k in range(1, 1001)
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.bbox.json").write_text(json.dumps(found))
    (folder / "metrics.json").write_text(json.dumps(evaluate(document, folder / "results.bbox.json")))
    return folder


def opened(page: Path) -> str:
    """Seconds until the page is loaded and until all its charts are drawn, and its elements; or what hinders."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return "not measured: Chromium is not installed"
    text = page.read_text().replace("</body>", f"{TIMER}</body>")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text, count=1)  # it forbids the message
    found: queue.Queue[str] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/done?"):
                found.put(self.path.partition("?")[2])
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"" if self.path.startswith("/done") else text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="tailfin-browser-", ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", "--window-size=1300,900", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [*command, f"http://127.0.0.1:{server.server_port}/"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            first, last, elements = found.get(timeout=120).split(",")
        except queue.Empty:
            return "not measured: the charts were not drawn within two minutes"
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    return f"{int(first) / 1000:.2f} s, with all charts in {int(last) / 1000:.2f} s ({int(elements):,} elements)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--per-image", type=int, default=300)
    parser.add_argument("--runs", type=int, default=1, help="two of each recipe are seeds")
    parser.add_argument("--data", type=Path, help="an annotation file with pictures instead of made-up ones")
    parser.add_argument("--out", type=Path, help="keep the page here")
    short(parser, pictures=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tailfin-report-") as scratch:
        root, rng = Path(scratch), np.random.default_rng(0)
        if given.data:
            annotations, document = given.data.resolve(), json.loads(given.data.read_text())
        else:
            document, annotations = made_up(given.classes, given.pictures, rng), root / "val.json"
            annotations.write_text(json.dumps(document))
        runs = []
        for number in range(given.runs):
            found = detections(document, given.per_image, 0.55 + 0.15 * (number // 2), rng)
            name = f"{('plain', 'better', 'best')[min(number // 2, 2)]}-{number % 2}"
            runs.append(write_run(root / "runs" / name, annotations, document, found, number % 2))
        del found
        start, own = time.perf_counter(), time.process_time()
        page = write_report(runs)
        took, own = time.perf_counter() - start, time.process_time() - own
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{len(document['categories']):,} classes, {len(document['images']):,} pictures, {given.runs} runs of "
            f"{given.per_image} detections a picture: {took:.1f} s, peak memory {peak:.2f} GiB, "
            f"{page.stat().st_size / 1e6:.2f} MB; opens in {opened(page)}"
        )
        if given.short:
            size = f"{given.pictures:,} pictures x {given.per_image} detections"
            what = f"report, {len(document['categories']):,} classes, {size}"
            line(what, f"{own:.1f} CPU s, {peak:.2f} GiB, a page of {page.stat().st_size / 1e6:.1f} MB")
        if given.out:
            shutil.copy(page, given.out)


if __name__ == "__main__":
    main()
