"""Cut-outs of evaluated pictures, for strips in the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tailfin.data.images import read_image
from tailfin.data.index import image_folder, image_path
from tailfin.errors import UserError
from tailfin.evaluation.truth import GroundTruth
from tailfin.report.draw import Color, data_uri, draw_detections
from tailfin.report.evaluated import annotations_file
from tailfin.report.runs import Run

AROUND = 0.6  # of a box's longer side, shown around it
SIDE = 150  # pixels of the long side


@dataclass(frozen=True)
class Pictures:
    """Where the evaluated pictures are."""

    truth: GroundTruth
    folder: Path
    max_pixels: int

    @classmethod
    def of(cls, run: Run, truth: GroundTruth) -> Pictures:
        """Those of a run; a run without a recipe is a `UserError`."""
        annotations = annotations_file(run.recipe, run.name)
        assert run.recipe is not None
        images = Path(run.recipe.data.root) / run.recipe.data.val.images if run.recipe.data.val.images else None
        return cls(truth, image_folder(annotations, images), run.recipe.data.max_pixels)

    def read(self, row: int) -> np.ndarray:
        """A picture, uint8 [H, W, 3]."""
        name = self.truth.image_names[row]
        if name is None:
            raise UserError(f"{self.truth.label}: image {self.truth.image_ids[row]} has no file name")
        height, width = (int(side) for side in self.truth.image_sizes[row])
        return read_image(image_path(self.folder, name), width=width, height=height, max_pixels=self.max_pixels)

    def cut_out(
        self,
        row: int,
        box: tuple[float, float, float, float],
        color: Color = (46, 204, 113),
        *,
        dashed: bool = False,
        side: int = SIDE,
    ) -> str:
        """A box xywh of an image row with what is around it, as a data URI."""
        picture = self.read(row)
        left, top, width, height = box
        half = max(width, height, 16) * (0.5 + AROUND)
        x, y = left + width / 2, top + height / 2
        x0, y0 = int(max(0, x - half)), int(max(0, y - half))
        cut = picture[y0 : int(y + half) + 1, x0 : int(x + half) + 1]
        if not cut.size:
            raise UserError(f"{self.truth.label}: a box lies outside image {self.truth.image_ids[row]}")
        drawn = draw_detections(
            np.ascontiguousarray(cut),
            [[left - x0, top - y0, left - x0 + width, top - y0 + height]],
            [0],
            [],
            size=side,
            texts=[""],
            colors=[color],
            dashed=[dashed],
        )
        return data_uri(drawn)
