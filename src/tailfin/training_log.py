"""What a stage writes while it trains: `metrics.jsonl`, the trackers, and the figures of the progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tailfin.files import write_atomic, write_json, writing
from tailfin.progress import Progress
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.recipe import Recipe


def all_skipped(own: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Pictures that all processes have left out, those of before a resumption too, with how many samples; to be called
    on every process."""
    total = dict(before)
    for message, count in gather_object(sorted(own.items())):
        total[message] = total.get(message, 0) + count
    return total


class TrainingLog:
    """`metrics.jsonl`, the trackers, and the figures of the progress bar."""

    def __init__(
        self, accelerator: Accelerator, name: str, folder: Path, plan: BatchPlan, recipe: Recipe, start: int
    ) -> None:
        self.accelerator, self.name, self.plan, self.batch = accelerator, name, plan, recipe.schedule.batch
        self.path = folder / "metrics.jsonl"
        self.every = recipe.logging.every
        self.sums: list[tuple[list[str], Tensor]] = []
        self.notes: dict[str, list[Tensor]] = {}
        self.loss, self.images_per_second = math.nan, 0.0
        self.clock, self.counted = time.perf_counter(), 0
        if accelerator.is_main_process:
            self._forget_after(start)

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Figures of an iteration that are no losses, for the next line; not every iteration has them."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(value.detach().float())

    def add(self, parts: dict[str, Tensor], rate: float, done: int) -> None:
        self.counted += 1
        self.sums.append((list(parts), torch.stack([value.float() for value in parts.values()])))
        if done % self.every and done < self.plan.iterations:
            return
        names = self.sums[0][0]
        means = torch.stack([values for own, values in self.sums if own == names]).mean(dim=0)
        means = self.accelerator.reduce(means, reduction="mean")  # over the processes' shares of the batch
        values = dict(zip(names, means.tolist(), strict=True))
        elapsed = time.perf_counter() - self.clock
        self.images_per_second = self.counted * self.batch / max(elapsed, 1e-9)
        self.loss = sum(value for name, value in values.items() if name != "grad_norm")
        line: dict[str, Any] = {
            "iteration": done,
            "epoch": round(self.plan.epoch_at(done), 4),
            "lr": rate,
            "loss": self.loss,
            **values,
            "images_per_second": round(self.images_per_second, 2),
            "seconds": round(elapsed, 3),
        }
        if self.notes:
            noted = torch.stack([torch.stack(values).mean() for values in self.notes.values()])
            noted = self.accelerator.reduce(noted, reduction="mean")
            line |= dict(zip(self.notes, (round(value, 6) for value in noted.tolist()), strict=True))
            self.notes = {}
        if torch.cuda.is_available():
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self._write(line)
        self.accelerator.log({f"{self.name}/{k}": v for k, v in line.items() if k != "iteration"}, step=done)
        self.sums, self.counted, self.clock = [], 0, time.perf_counter()

    def evaluation(self, metrics: dict[str, Any], done: int, best: dict[str, Any]) -> dict[str, Any]:
        """Write an evaluation; returns the best so far and for how many evaluations it has stood."""
        types = {kind: metrics[kind] for kind in ("bbox", "segm") if kind in metrics}
        self._write({"iteration": done, "epoch": round(self.plan.epoch_at(done), 4), "eval": types})
        flat = {f"eval/{kind}/{name}": value for kind, values in types.items() for name, value in values.items()}
        self.accelerator.log(flat, step=done)
        self.clock = time.perf_counter()
        value = next(iter(types.values()))["AP"]
        if value > best["AP"]:
            return {"AP": value, "iteration": done, "waited": 0}
        return {**best, "waited": best["waited"] + 1}

    def close(self, total: dict[str, int]) -> None:
        """The end of the stage. `total` are the pictures that the stage has left out (`all_skipped`), with how many
        samples; they are listed in `skipped.json`."""
        self.sums = []
        if total and self.accelerator.is_main_process:
            path = self.path.with_name("skipped.json")
            write_json(path, [{"picture": message, "samples": total[message]} for message in sorted(total)], indent=1)
            pictures = "1 picture" if len(total) == 1 else f"{len(total)} pictures"
            Progress("", 1).note(
                f"stage {self.name}: {pictures} skipped in {sum(total.values())} samples of "
                f"{self.plan.iterations * self.batch}, listed in {path}"
            )

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _forget_after(self, start: int) -> None:
        """Drop lines of iterations that will be run again, and a line that a kill left half-written."""
        lines = self.path.read_text("utf-8", "replace").splitlines() if self.path.exists() else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["iteration"] <= start:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_atomic(self.path, "".join(line + "\n" for line in kept))
