"""A progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import rich.progress
from rich.console import Console

from tailfin.errors import printable

LINE_EVERY = 15.0  # seconds between plain lines


class Progress:
    """Progress of `total` steps with the loss, the speed and the time left."""

    def __init__(self, name: str, total: int, start: int = 0, *, enabled: bool = True) -> None:
        self.name, self.total, self.start, self.enabled = name, total, start, enabled
        self.console = Console(file=sys.stderr)
        self.began = self.printed = time.monotonic()
        self.bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        if self.enabled and self.console.is_terminal:
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
                rich.progress.TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.start, note="")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, loss: float | None = None, images_per_second: float = 0.0) -> None:
        """Show that `done` steps are finished."""
        if not self.enabled:
            return
        note = f"loss {loss:.3f}  {images_per_second:.1f} img/s" if loss is not None and loss == loss else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY or done == self.total:
            self.printed = now
            left = (now - self.began) / max(done - self.start, 1) * (self.total - done)
            self.note(f"{self.name}: {done}/{self.total}  {note}  {_clock(left)} left".replace("    ", "  "))

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.enabled:
            (self.bar.console if self.bar is not None else self.console).print(
                printable(text), highlight=False, markup=False, soft_wrap=True
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
