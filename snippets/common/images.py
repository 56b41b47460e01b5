"""From an image file to the numbers a vision model reads: load, resize, crop, pad, normalise.

Equal to the image processors of transformers that use Pillow. All that changes pixels in whole
numbers (resize, crop, the coloured border) is done on Pillow's images, the rest on tensors.

Axes: n image, c channel, h row, w column; H, W rows and columns with padding.
"""

import dataclasses
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from snippets.common.checkpoint import CheckpointError, is_a, read_json

FILE, WHOLE = "preprocessor_config.json", "processor_config.json"
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
SIZES = ({"height", "width"}, {"shortest_edge"}, {"longest_edge"})
# Keys that don't change the numbers of an image, or that say what is done elsewhere: labels of
# segmentation, and `high_res_`, a second encoder's keys.
INERT = (
    "auto_map", "data_format", "device", "disable_grouping", "feature_extractor_type", "high_res_",
    "image_processor_type", "image_seq_length", "input_data_format", "mask_pad_size", "mask_size",
    "pan_and_scan_", "processor_class", "return_tensors",
)  # fmt: skip


class ImageError(ValueError):
    """An image can't be read or used; says which file, or "image", and what is wrong."""


def load_image(path: str | Path) -> Image.Image:
    """The first picture of a file, upright and in RGB; never half of one.

    A camera's orientation (EXIF) is applied; for colours see `to_rgb`.

    Raises:
        ImageError: no such file, not an image, damaged, cut short, or with more pixels than
            Pillow opens (`PIL.Image.MAX_IMAGE_PIXELS`, twice).
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: there is no such file")
    try:
        with Image.open(path) as opened:
            return to_rgb(ImageOps.exif_transpose(opened))  # which reads it to the end
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image that Pillow {Image.__version__} knows") from None
    except Image.DecompressionBombError as error:
        limit = f"PIL.Image.MAX_IMAGE_PIXELS={Image.MAX_IMAGE_PIXELS}"
        raise ImageError(f"{path}: too many pixels ({limit}): {error}") from None
    except Exception as error:  # each format has its own for damaged bytes
        raise ImageError(f"{path}: {error or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits from grey, palette, transparent, 16-bit grey or CMYK.

    What is transparent gets a white ground, as in transformers' image processors since version
    5; its `load_image`, and older processors, drop the alpha channel, and whatever colour lies
    below comes out. 16 bits are scaled to 8: Pillow's own conversion clips at 255, which leaves
    a white picture.

    Raises:
        ImageError: pixels without a known range: fractions, or whole numbers beyond 16 bits.
    """
    if image.mode in SIXTEEN_BITS:
        image = image.convert("I")
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise ImageError(f"image: mode I with values from {low} to {high}, not in 16 bits")
        return image.point(lambda v: v * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode == "F":
        raise ImageError("image: mode F, fractions whose range isn't known")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# Sizes: always height before width, while Pillow has width before height


def scaled_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """Height and width with the longer side brought to `longest_edge`; halves round up.

    Points and masks of SAM are mapped with these: x by new width / width, y by new height /
    height.
    """
    scale = longest_edge / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def covering_size(height: int, width: int, shortest_edge: int) -> tuple[int, int]:
    """Height and width with the shorter side brought to `shortest_edge`; the other is cut off."""
    if width <= height:
        return int(shortest_edge * height / width), shortest_edge
    return shortest_edge, int(shortest_edge * width / height)


def fitting_size(height: int, width: int, longest_edge: int, min_size: int) -> tuple[int, int]:
    """As `scaled_size`, but no side below `min_size`, and halves round to even (DeepSeek-VL)."""
    scale = longest_edge / max(height, width)
    return max(round(height * scale), min_size), max(round(width * scale), min_size)


# Whole numbers, on Pillow's images


def resize(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """Pillow's resize, which looks at all pixels when it makes an image smaller.

    Raises:
        ImageError: a side would be 0, or the result too large to be meant.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if not (height > 0 and width > 0) or (limit is not None and height * width > limit):
        raise ImageError(
            f"image: {image.height}x{image.width} would be resized to {height}x{width}"
        )
    return image.resize((width, height), resample)


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle; what an image lacks is black. Of an odd rest the larger half is at the end."""
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of one colour."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# Numbers with fractions, on tensors


def pixels(image: Image.Image) -> Float[Tensor, "c h w"]:
    """0 to 255."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1).float()


def rescale(x: Float[Tensor, "c h w"], factor: float) -> Float[Tensor, "c h w"]:
    """Through float64, as the reference does."""
    return (x.double() * factor).float()


def normalise(
    x: Float[Tensor, "c h w"], mean: Sequence[int | float], std: Sequence[int | float]
) -> Float[Tensor, "c h w"]:
    """(x - mean) / std, by channel.

    Raises:
        ImageError: not as many channels as means and deviations.
    """
    if not len(x) == len(mean) == len(std):
        raise ImageError(f"image: {len(x)} channels, {len(mean)} means, {len(std)} deviations")
    mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in (mean, std))  # c 1 1
    return (x - mean) / std


def pad_behind(x: Float[Tensor, "c h w"], height: int, width: int) -> Float[Tensor, "c H W"]:
    """Zeros at the right and at the bottom.

    Raises:
        ImageError: the image is larger.
    """
    if x.shape[1] > height or x.shape[2] > width:
        raise ImageError(f"image: {x.shape[1]}x{x.shape[2]} can't be padded to {height}x{width}")
    return F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]))


@dataclass(frozen=True)
class ImageProcessor:
    """The keys of preprocessor_config.json, and what they say done to images.

    By `size` and `min_size`:

    - `{"height", "width"}`: stretched to it (ViT, SigLIP, Gemma 3);
    - the same with `min_size` and `do_pad`: the longer side brought to it, and the rest filled
      with the mean colour on both sides (DeepSeek-VL);
    - `{"shortest_edge"}`: the shorter side brought to it, before a crop (CLIP, Llava);
    - `{"longest_edge"}` with `do_pad`: the longer side brought to it, then zeros behind (SAM).

    A number, as in old files, is the shortest edge if a crop follows, else height and width.

    Raises:
        ValueError: a value that can't be honoured.
    """

    size: dict[str, Any] | int | None = None
    resample: int | None = None  # Pillow's number: 2 bilinear, 3 bicubic
    do_convert_rgb: bool = True
    do_resize: bool = True
    do_center_crop: bool = False
    crop_size: dict[str, Any] | int | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[int | float] | None = None
    image_std: list[int | float] | None = None
    do_pad: bool = False
    pad_size: dict[str, Any] | int | None = None
    min_size: int | None = None
    background_color: list[int] | None = None
    do_pan_and_scan: bool = False

    def __post_init__(self):
        needed = {"do_resize": ["size", "resample"], "do_normalize": ["image_mean", "image_std"]}
        needed["do_center_crop"] = ["crop_size"]
        for switch, names in needed.items():
            for name in names:
                if getattr(self, switch) and getattr(self, name) is None:
                    raise ValueError(f"{switch} is on, and {name} isn't given")
        if self.do_resize:
            if self.resample not in list(Image.Resampling):
                raise ValueError(f"resample={self.resample} isn't one of Pillow's")
            if set(self.sides("size")) not in SIZES:
                known = ", ".join(" and ".join(sorted(keys)) for keys in SIZES)
                raise ValueError(f"size={self.size} isn't supported; known: {known}")
        for name in ("crop_size", "pad_size"):
            if getattr(self, name) is not None and set(self.sides(name)) != {"height", "width"}:
                raise ValueError(f"{name}={getattr(self, name)} isn't height and width")
        if self.do_normalize:
            if len(self.image_mean) != len(self.image_std):
                means, deviations = len(self.image_mean), len(self.image_std)
                raise ValueError(f"{means} means in image_mean, {deviations} in image_std")
            if 0 in self.image_std:
                raise ValueError(f"image_std={self.image_std} holds a 0")
        self.check_padding()
        if self.do_pan_and_scan:
            raise ValueError("do_pan_and_scan=True isn't supported")

    def check_padding(self) -> None:
        sides = set(self.sides("size")) if self.do_resize else set()
        if self.min_size is not None:
            height, width = (self.sides("size").get(side) for side in ("height", "width"))
            if not self.do_resize or self.do_center_crop or height != width or height is None:
                raise ValueError(f"min_size={self.min_size} needs a square size, and no crop")
        elif self.do_pad and (sides != {"longest_edge"} or self.pad_size is None):
            raise ValueError(
                f"do_pad=True isn't supported with size={self.size}, pad_size={self.pad_size}"
            )
        if self.background_color is not None and tuple(self.background_color) != self.mean_color:
            # Whatever the file says: so do the released code and transformers.
            raise ValueError(
                f"background_color={self.background_color} isn't image_mean as a colour, "
                f"{list(self.mean_color)}"
            )

    def sides(self, name: str) -> dict[str, int]:
        """Of a size, in the words of new files."""
        value = getattr(self, name)
        if isinstance(value, Mapping):
            sides = dict(value)
        elif name == "size" and self.do_center_crop:
            sides = {"shortest_edge": value}
        else:
            sides = {"height": value, "width": value}
        for side, pixels in sides.items():
            if value is not None and not (is_a(pixels, int) and pixels > 0):
                raise ValueError(f"{name}={value}: {side} isn't a whole number above 0")
        return sides

    @property
    def mean_color(self) -> tuple[int, ...]:
        """What DeepSeek-VL pads with, cut off to whole numbers."""
        return tuple(int(255 * x) for x in self.image_mean or (0.5, 0.5, 0.5))

    def __call__(
        self, images: Image.Image | str | Path | Sequence[Image.Image | str | Path]
    ) -> Float[Tensor, "n c h w"]:
        """One image or several, or their files.

        Raises:
            ImageError: a file that can't be read, an image that can't be brought to its size,
                or images that come out in several sizes.
        """
        if isinstance(images, Image.Image | str | Path):
            images = [images]
        if not images:
            raise ImageError("image: none given")
        tensors = [self.tensor(self.sized(image)) for image in images]
        if different := [x.shape for x in tensors if x.shape != tensors[0].shape]:
            one, other = ("x".join(map(str, shape)) for shape in (tensors[0].shape, different[0]))
            raise ImageError(f"image: {one} and {other} don't fit in one batch")
        return torch.stack(tensors)

    def sized(self, image: Image.Image | str | Path) -> Image.Image:
        """Colours converted, resized, cropped and padded in whole numbers."""
        if not isinstance(image, Image.Image):
            image = load_image(image)
        if self.do_convert_rgb:
            image = to_rgb(image)
        elif image.mode not in ("RGB", "L"):
            raise ImageError(f"image: mode {image.mode}, and do_convert_rgb is off")
        if self.do_resize:
            image = resize(image, *self.new_size(image.height, image.width), self.resample)
        if self.min_size is not None and self.do_pad:
            image = pad_to_square(image, self.mean_color)
        if self.do_center_crop:
            image = center_crop(image, **self.sides("crop_size"))
        return image

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        """To which height and width an image of these is resized."""
        sides = self.sides("size")
        if self.min_size is not None:
            return fitting_size(height, width, sides["height"], self.min_size)
        if "longest_edge" in sides:
            return scaled_size(height, width, sides["longest_edge"])
        if "shortest_edge" in sides:
            return covering_size(height, width, sides["shortest_edge"])
        return sides["height"], sides["width"]

    def tensor(self, image: Image.Image) -> Float[Tensor, "c h w"]:
        """Rescaled, normalised, and padded with zeros behind."""
        x = pixels(image)
        if self.do_rescale:
            x = rescale(x, self.rescale_factor)
        if self.do_normalize:
            x = normalise(x, self.image_mean, self.image_std)
        if self.do_pad and self.min_size is None:
            x = pad_behind(x, **self.sides("pad_size"))
        return x

    @classmethod
    def from_pretrained(cls, folder: str | Path, prefix: str = "") -> "ImageProcessor":
        """Read preprocessor_config.json, or the part of processor_config.json of the same name.

        A key without a field that could change the numbers is reported by a warning.

        Args:
            folder: the checkpoint's folder.
            prefix: `"high_res_"` for the second encoder of DeepSeek-VL 7B, whose keys begin so.

        Raises:
            CheckpointError: no such file, or a value that can't be honoured.
        """
        path = Path(folder) / FILE
        if not path.exists() and (Path(folder) / WHOLE).exists():
            path = Path(folder) / WHOLE
            found = read_json(path).get("image_processor")
            if not isinstance(found, dict):
                raise CheckpointError(f"{path} says nothing of an image_processor")
        else:
            found = read_json(path)
        found = {key: value for key, value in found.items() if value is not None}
        if prefix:
            second = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
            if not second:
                raise CheckpointError(f"{path} has no key that begins with {prefix}")
            found = {k: v for k, v in found.items() if k != "background_color"} | second
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        on = {key for key, value in found.items() if value is not False}
        if unknown := sorted(key for key in on - set(names) if not key.startswith(INERT)):
            warnings.warn(f"{path}: not read: {', '.join(unknown)}", stacklevel=2)
        values = {name: found[name] for name in names if name in found}
        for name, value in values.items():
            if not is_a(value, hints[name]):
                raise CheckpointError(f"{path}: {name}={value!r} isn't of type {hints[name]}")
        try:
            return cls(**values)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
