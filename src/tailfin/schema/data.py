"""`data`: files, and how pictures are turned into batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tailfin.schema.base import Count, Fraction, NotNegative, Positive, Section, Size


class DataFiles(Section):
    """An annotation file and its image folder; `images` empty means the folder rule of the documentation."""

    annotations: str = ""
    images: str = ""


class Data(Section):
    """Files, and how pictures are turned into batches. Relative paths start at `root`."""

    root: str = ""
    train: DataFiles = DataFiles()
    val: DataFiles = DataFiles()
    synthesize: Literal["", "demo"] = ""  # make the embedded synthetic set where `train` and `val` do not exist

    # training pictures keep their aspect, but for "stretch", which makes each a square of `sizes[0]`, at test time too;
    # "multiscale": one of `sizes` becomes the short side; "square": they fit into
    # a square of `sizes[0]`; "jitter" (large-scale jitter): a random scale in `jitter_scale` of it, then a crop to it;
    # "detr": "multiscale", in half of the cases after a resize to one of `crop_resize` and a crop with sides in `crop`
    resize: Literal["multiscale", "square", "stretch", "jitter", "detr"] = "multiscale"
    sizes: tuple[Size, ...] = (640, 672, 704, 736, 768, 800)
    max_size: Size = 1333
    jitter_scale: tuple[Positive, Positive] = (0.1, 2.0)
    canvas: bool = False  # of jitter: smaller pictures are filled up to the window with black, as mmdetection pads them
    crop_resize: Annotated[tuple[Size, ...], Field(min_length=1)] = (400, 500, 600)
    crop: tuple[Size, Size] = (384, 600)
    flip: Fraction = 0.5
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0  # strength of brightness, contrast and saturation changes
    photometric: bool = False  # jitter of colours (p .8), grey (.2), blur (.5), as contrastive learning does
    # what they change: the picture as the detector sees it, or that of the file, before it is resized (released code of
    # step-wise learning; a blur is then one of the file's pixels)
    photometric_on: Literal["resized", "file"] = "resized"
    # a crop without an object: a picture of background, or the next training picture takes its place (released code of
    # step-wise learning)
    empty_crop: Literal["keep", "next"] = "keep"
    copy_paste: bool = False  # simple copy-paste: objects of a second picture, with their masks where the file has them
    # classes are drawn with weights n^-paste_power, n their training objects, then a picture with one; 0: all pictures
    # alike and any of their objects, as published
    paste_power: NotNegative = 0.0
    paste_crops: str = ""  # folder CLASS/PICTURE of crops that are pasted in the place of a second picture's objects
    paste_most: Count = 3  # crops per picture, one at least
    paste_scale: tuple[Positive, Positive] = (0.5, 1.5)  # of a crop's size
    mosaic: Fraction = 0.0  # share of training pictures that become a mosaic of four
    mosaic_scale: tuple[Positive, Positive] = (0.5, 1.0)  # of each of the four
    mixup: Fraction = 0.0  # share that are added to a second picture
    mixup_alpha: Positive = 8.0  # the weight comes from Beta(alpha, alpha): the larger, the nearer to one half
    mixed_epochs: Annotated[int, Field(ge=0)] = 0  # mosaic and mixup in the first so many epochs of a stage; 0: in all
    # test pictures: short side and bound of the long side; 0 takes the largest size that training uses
    test_size: Annotated[int, Field(ge=0)] = 0
    test_max_size: Annotated[int, Field(ge=0)] = 0

    group_by_aspect: bool = True  # batches hold only upright or only wide pictures
    keep_empty: bool = False  # train on images without annotations too (not on those whose annotations a step hides)
    # where a file has neg_category_ids (LVIS), a class that nobody looked for in a picture: a negative there, as
    # released, or without a part in the classification loss
    unchecked_classes: Literal["negative", "ignore"] = "negative"
    workers: Annotated[int, Field(ge=0)] = 2
    max_pixels: Count = 64_000_000  # a larger picture is refused
    # values of 16-bit pictures that become 0 and 255; none: 0 and what the bits of the picture's largest value hold
    value_range: tuple[Annotated[int, Field(ge=0)], Count] | None = None
    # a training picture that is missing, damaged or of another size ends training, or the next one takes its place
    on_bad_image: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _check(self) -> Data:
        if not self.sizes:
            raise ValueError("sizes must name at least one size")
        if self.jitter_scale[0] > self.jitter_scale[1]:
            raise ValueError("jitter_scale must be (smaller, larger)")
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ValueError("value_range must be (smaller, larger)")
        for key in ("paste_scale", "mosaic_scale"):
            if getattr(self, key)[0] > getattr(self, key)[1]:
                raise ValueError(f"{key} must be (smaller, larger)")
        if (self.paste_power or self.paste_crops) and not self.copy_paste:
            raise ValueError("paste_power and paste_crops say what copy_paste pastes: set copy_paste=true")
        if self.crop[0] > self.crop[1]:
            raise ValueError("crop must be (smaller, larger)")
        return self

    @property
    def used_sizes(self) -> tuple[int, ...]:
        """Those of `sizes` that `resize` draws from: all, or the first alone."""
        return self.sizes if self.resize in ("multiscale", "detr") else self.sizes[:1]

    @property
    def inference_size(self) -> tuple[int, int]:
        """(short side, bound of the long side) at test time."""
        short = self.test_size or max(self.used_sizes)
        bound = self.test_max_size or (short if self.resize in ("square", "stretch", "jitter") else self.max_size)
        return short, max(short, bound)
