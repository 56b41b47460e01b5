"""From an image file to the pixels of two encoders, one of high and one of low resolution.

As the image processor of DeepSeek-VL 7B does it: what the second encoder reads is made smaller
for the first one, so both see the same square, with the same border.

Axes: n image, c channel, h w row and column at low, H W at high resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from snippets.common.images import ImageProcessor


@dataclass(frozen=True)
class HybridImageProcessor:
    """One image processor for each resolution, one after the other."""

    low: ImageProcessor
    high: ImageProcessor

    def __call__(
        self, images: Image.Image | str | Path | Sequence[Image.Image | str | Path]
    ) -> dict[str, Tensor]:
        """`pixel_values` n c h w and `high_res_pixel_values` n c H W, by these names.

        Raises:
            ImageError: as `ImageProcessor`.
        """
        if isinstance(images, Image.Image | str | Path):
            images = [images]
        large = [self.high.sized(image) for image in images]
        # The second time, `high` finds nothing to resize and to pad.
        return {"pixel_values": self.low(large), "high_res_pixel_values": self.high(large)}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "HybridImageProcessor":
        """Read preprocessor_config.json, whose keys `high_res_` are the second encoder's.

        Raises:
            CheckpointError: no such file or keys, or a value that can't be honoured.
        """
        high = ImageProcessor.from_pretrained(folder, prefix="high_res_")
        return cls(low=ImageProcessor.from_pretrained(folder), high=high)
