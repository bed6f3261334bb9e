"""What the section of every detector has, and what it says of its detector to the rest of the schema."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tailfin.schema.base import Section


class DetectorSection(Section):
    """What the section of every detector has, and what it says of its detector."""

    PARTS: ClassVar[tuple[str, ...]] = ("classifier", "box", "backbone")  # that a stage may train
    BOX_HEAD: ClassVar[bool] = False  # a box head on proposals: what classifiers, feature modules and 2DRCL work on
    DENSE: ClassVar[bool] = False  # anchors on a pyramid, no proposals: 2DRCL pools boxes with layers of its own
    CASCADE: ClassVar[bool] = False  # several box heads, one after another
    CLASSES: ClassVar[bool] = True  # it tells classes apart
    COCO: ClassVar[str] = ""  # the backbone that `weights: coco` has for it; empty: none
    name: str
    # of the backbone; "frozen_bn" fixes statistics, scale and shift, "frozen_stats" the statistics alone (mmdetection);
    # a random start needs another than these; "own": those of a timm backbone, trained
    norm: Literal["frozen_bn", "frozen_stats", "bn", "gn", "own"] = "frozen_bn"
    frozen_layers: Annotated[int, Field(ge=0, le=5)] = 2  # of stem, layer1..layer4, from below; 2 = stem and layer1

    @property
    def coco_backbone(self) -> str:
        """The backbone that `weights: coco` has for this section; empty: none."""
        return self.COCO
