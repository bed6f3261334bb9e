"""What survives a kill: finished pieces of a prediction in a folder beside the file that they will become.

The inputs are parted into pieces of a fixed number, whatever the number of processes, and a piece appears when it is
whole. A prediction that is given again with the same inputs, model and options goes on with the pieces that are
missing; so nothing is done twice, nothing is lost, and the file is the one that a single go would have written.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tailfin.errors import UserError
from tailfin.files import read_object, write_atomic, write_json

PIECE = 64  # inputs of a piece


class Record(msgspec.Struct, array_like=True):
    """What was found in one picture, or why it could not be read."""

    number: int  # of the input
    frame: int  # of a video, else -1
    height: int
    width: int
    boxes: bytes = b""  # float32 [D, 4] xyxy
    scores: bytes = b""  # float32 [D]
    labels: bytes = b""  # int32 [D]
    counts: list[bytes] | None = None  # D compressed RLEs
    bad: str = ""

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes [D, 4], scores [D], labels [D]."""
        boxes = np.frombuffer(self.boxes, np.float32).reshape(-1, 4)
        return boxes, np.frombuffer(self.scores, np.float32), np.frombuffer(self.labels, np.int32)


class Pieces:
    """The pieces of a prediction in `folder`."""

    def __init__(self, folder: Path, inputs: Sequence[str]) -> None:
        self.folder, self.inputs = folder, inputs
        self.count = -(-len(inputs) // PIECE)

    def begin(self, settings: dict[str, Any]) -> int:
        """Make the folder, or take up one that the same call has left; returns the pieces that are there."""
        listing = hashlib.sha256("\0".join(self.inputs).encode()).hexdigest()
        plan = {**settings, "inputs": len(self.inputs), "listing": listing}
        file = self.folder / "plan.json"
        if file.is_file():
            before = read_object(file)
            changed = [key for key in plan if before.get(key) != plan[key]]
            if changed:
                raise UserError(
                    f"{self.folder} has the pieces of a prediction with other {', '.join(changed)}: give the same call "
                    "again to finish it, or --overwrite to begin anew"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, plan)
        return sum(self.path(number).is_file() for number in range(self.count))

    def path(self, number: int) -> Path:
        """File of a piece."""
        return self.folder / f"{number // 1000:04d}" / f"{number:07d}.piece"

    def missing(self, rank: int, processes: int) -> list[int]:
        """Pieces that this process has to do: every process its share of those that are not there."""
        return [number for number in range(self.count) if not self.path(number).is_file()][rank::processes]

    def numbers(self, piece: int) -> range:
        """The inputs of a piece."""
        return range(piece * PIECE, min((piece + 1) * PIECE, len(self.inputs)))

    def write(self, piece: int, records: Sequence[Record]) -> None:
        """Make a piece appear, whole."""
        path = self.path(piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.msgpack.encode(list(records)))

    def records(self) -> Iterator[Record]:
        """What all pieces hold, in the order of the inputs; a missing or damaged one is a `UserError`."""
        for number in range(self.count):
            path = self.path(number)
            try:
                yield from msgspec.msgpack.decode(path.read_bytes(), type=list[Record])
            except (OSError, msgspec.MsgspecError):
                raise UserError(f"{path} is missing or damaged: remove it and give the same call again") from None

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Remove the folder where no piece was finished, so that a call that failed at once leaves nothing."""
        if not any(self.path(number).is_file() for number in range(self.count)):
            self.remove()
