"""Our image processor against those of transformers, from the folders that they write."""

import json
import warnings
from io import BytesIO

import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from torch.testing import assert_close
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from snippets.common.checkpoint import CheckpointError
from snippets.common.images import (
    ImageError,
    ImageProcessor,
    covering_size,
    fitting_size,
    load_image,
    pad_to_square,
    pixels,
    resize,
    scaled_size,
    to_rgb,
)

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 33, "width": 47}, do_convert_rgb=True),
    "vit, uneven": ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, do_convert_rgb=True,
        resample=0,
    ),
    "siglip": SiglipImageProcessorPil(size={"height": 34, "width": 35}),
    "gemma3": Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
    "clip": CLIPImageProcessorPil(
        size={"shortest_edge": 37}, crop_size={"height": 36, "width": 37}
    ),
    "clip, crop larger than the image": CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 31, "width": 26}
    ),
    "clip, nothing normalised": CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_normalize=False
    ),
    "clip, nothing rescaled": CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_rescale=False
    ),
    "clip, another factor": CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, rescale_factor=0.01
    ),
    "crop alone": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 25, "width": 40}),
    "llava": LlavaImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ),
    "sam": SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 70},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    ),
    "deepseek_vl": DeepseekVLImageProcessorPil(size={"height": 48, "width": 48}, min_size=7),
    "deepseek_vl, means of a half": DeepseekVLImageProcessorPil(
        size={"height": 49, "width": 49}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ),
    "deepseek_vl, not padded": DeepseekVLImageProcessorPil(
        size={"height": 40, "width": 40}, do_pad=False
    ),
    "deepseek_vl, a large min_size": DeepseekVLImageProcessorPil(
        size={"height": 40, "width": 40}, min_size=50
    ),
}  # fmt: skip


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Soft noise: all frequencies, so that another filter shows."""
    drawn = torch.Generator().manual_seed(seed + 97 * width + height)
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = torch.randint(256, (height, width, bands), generator=drawn, dtype=torch.uint8)
    return Image.frombytes(mode, (width, height), values.numpy().tobytes())


def palette() -> Image.Image:
    image = noise(61, 43).quantize(16)
    image.info["transparency"] = 3
    return image


IMAGES = {
    "smaller": noise(19, 23),
    "larger, odd": noise(131, 97),
    "upright": noise(57, 203),
    "as large": noise(48, 48),
    "one pixel": noise(1, 1),
    "panorama": noise(400, 40),
    "tower": noise(40, 400),
    "grey": noise(80, 61, "L"),
    "black and white": noise(80, 61, "L").convert("1"),
    "transparent": noise(80, 61, "RGBA"),
    "grey, transparent": noise(33, 61, "LA"),
    "palette": noise(61, 43).quantize(16),
    "palette, transparent": palette(),
    "for print": noise(61, 43, "CMYK"),
    "other colours": noise(61, 43, "YCbCr"),
}


def theirs(processor, images) -> torch.Tensor:
    if not isinstance(images, list):
        images = [images]
    return torch.stack([torch.tensor(x) for x in processor(images)["pixel_values"]])


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_equal_transformers(processor, image, tmp_path):
    processor.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = ImageProcessor.from_pretrained(tmp_path)
    if not processor.do_convert_rgb:  # DeepSeek-VL's leaves that to its caller
        image = to_rgb(image)
    expected = theirs(processor, image)
    assert expected.dtype == torch.float32
    found = ours(image)
    assert found.shape == expected.shape
    # The bound that is promised; in fact all sums are the same, so it is to the bit.
    assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(found, expected)
    assert ours.sized(image).mode == "RGB"


def test_a_batch_is_its_images():
    ours = ImageProcessor(
        size={"height": 20, "width": 30}, resample=3, image_mean=MEAN, image_std=STD
    )
    batch = ours([IMAGES["larger, odd"], IMAGES["grey"]])
    assert batch.shape == (2, 3, 20, 30)
    assert torch.equal(batch[1:], ours(IMAGES["grey"]))


def test_the_hybrid_looks_at_the_large_image_twice(tmp_path):
    processor = DeepseekVLHybridImageProcessorPil(
        size={"height": 24, "width": 24}, high_res_size={"height": 64, "width": 64}, min_size=5,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, high_res_image_mean=MEAN,
        high_res_image_std=STD, high_res_resample=2,
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    low = ImageProcessor.from_pretrained(tmp_path)
    high = ImageProcessor.from_pretrained(tmp_path, prefix="high_res_")
    for name in ("larger, odd", "panorama", "smaller"):
        expected = processor([IMAGES[name]], return_tensors="pt")
        large = high.sized(IMAGES[name])
        assert_close(high(IMAGES[name]), expected["high_res_pixel_values"], atol=1e-5, rtol=0)
        assert_close(low(large), expected["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("edge", [64, 224, 1024])
def test_sizes_round_as_in_the_reference(edge):
    sam = SamImageProcessorPil()
    for height in range(1, 40):
        for width in (1, 2, 7, 13, 37, 64, 101):
            assert scaled_size(height, width, edge) == sam._get_preprocess_shape(
                (height, width), edge
            )
    # The three rules on the same image: 32.5 rows.
    assert scaled_size(65, 200, 100) == (33, 100)
    assert fitting_size(65, 200, 100, 14) == (32, 100)
    assert fitting_size(3, 200, 100, 14) == (14, 100)
    assert covering_size(200, 101, 50) == (99, 50)
    assert covering_size(101, 200, 50) == (50, 99)
    assert covering_size(50, 50, 7) == (7, 7)


def test_a_point_of_sam_is_mapped_with_the_scaled_size():
    sam = SamImageProcessorPil()
    sizes = sam([IMAGES["larger, odd"]])
    assert scaled_size(97, 131, 1024) == tuple(sizes["reshaped_input_sizes"][0])


# Files


def save(image: Image.Image, path, **how) -> str:
    image.save(path, **how)
    return path


@pytest.mark.parametrize("name", IMAGES)
def test_a_file_is_its_image(name, tmp_path):
    image = IMAGES[name]
    path = tmp_path / ("image.tiff" if image.mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    found = load_image(path)
    assert found.mode == "RGB" and found.size == image.size
    assert found.tobytes() == to_rgb(image).tobytes()
    assert load_image(str(path)).tobytes() == found.tobytes()


def test_what_is_transparent_gets_a_white_ground(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))  # red that nobody sees
    image.putpixel((1, 0), (0, 0, 255, 255))
    found = pixels(load_image(save(image, tmp_path / "image.png")))
    assert found[:, 0].T.tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_not_clipped(suffix, tmp_path):
    values = torch.arange(65536).to(torch.uint16).view(256, 256)
    image = Image.frombytes("I;16", (256, 256), values.numpy().tobytes())
    path = tmp_path / f"image.{suffix}"
    (image.convert("I") if suffix == "pgm" else image).save(path)
    with Image.open(path) as opened:
        assert opened.mode in ("I;16", "I")
        clipped = opened.convert("L")  # the trap
    found = pixels(load_image(path))
    assert torch.equal(found[0], (values.double() / 257).add(0.5).floor().float())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert pixels(clipped).mean() > 250 and 126 < found.mean() < 129


def test_the_camera_s_orientation_is_applied(tmp_path):
    image = noise(5, 3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[TiffImagePlugin.Image.ExifTags.Base.Orientation] = orientation
        path = save(image, tmp_path / f"{orientation}.png", exif=exif)
        with Image.open(path) as opened:
            expected = ImageOps.exif_transpose(opened)
        found = load_image(path)
        assert found.tobytes() == expected.tobytes()
        assert found.size == ((5, 3) if orientation < 5 else (3, 5))
    assert load_image(tmp_path / "3.png").tobytes() == image.rotate(180).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_half_an_image_is_none(kind, tmp_path):
    stream = BytesIO()
    noise(61, 43).save(stream, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(stream.getvalue())
    assert load_image(path).size == (61, 43)
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(stream.getvalue()[: int(share * len(stream.getvalue()))])
        with pytest.raises(ImageError, match=rf"cut\.{kind.lower()}: ."):
            load_image(path)


def test_damaged_bytes_are_refused(tmp_path):
    stream = BytesIO()
    noise(61, 43).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[200] ^= 255
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"bad\.png: "):
        load_image(tmp_path / "bad.png")


def test_no_image_at_all_is_refused(tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"note\.png: not an image that Pillow"):
        load_image(tmp_path / "note.png")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match=r"empty\.jpg: not an image"):
        load_image(tmp_path / "empty.jpg")
    for absent in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(ImageError, match="there is no such file"):
            load_image(absent)


def test_absurd_sizes_are_refused(tmp_path, monkeypatch):
    path = save(noise(61, 43), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"large\.png: too many pixels .*MAX_IMAGE_PIXELS=1000"):
        load_image(path)
    # A thread: its short side brought to 40 would make it too long.
    ours = ImageProcessor(
        size=40, resample=3, do_center_crop=True, crop_size=40, do_normalize=False
    )
    with pytest.raises(ImageError, match="image: 1x50 would be resized to 40x2000"):
        ours(noise(50, 1))
    # Its long side brought to 40 leaves nothing of the other.
    with pytest.raises(ImageError, match="image: 1x400 would be resized to 0x40"):
        resize(noise(400, 1), *scaled_size(1, 400, 40), 2)


@pytest.mark.parametrize("value", [-1, 65536])
def test_pixels_without_a_known_range_are_refused(value, tmp_path):
    with pytest.raises(ImageError, match=f"{value}.*not in 16 bits"):
        to_rgb(Image.new("I", (3, 2), value))
    with pytest.raises(ImageError, match=r"f\.tiff: .*mode F"):
        load_image(save(Image.new("F", (3, 2), 0.5), tmp_path / "f.tiff"))


def test_other_channels_than_means_are_refused():
    grey = {"size": 8, "resample": 2, "image_mean": [0.4], "image_std": [0.2]}
    ours = ImageProcessor(**grey, do_convert_rgb=False)
    assert ours(noise(9, 9, "L")).shape == (1, 1, 8, 8)
    assert_close(ours.tensor(Image.new("L", (1, 1), 51)).item(), (0.2 - 0.4) / 0.2)
    with pytest.raises(ImageError, match="3 channels, 1 means, 1 deviations"):
        ours(noise(9, 9))
    with pytest.raises(ImageError, match="mode RGBA, and do_convert_rgb is off"):
        ours(noise(9, 9, "RGBA"))
    with pytest.raises(ImageError, match="none given"):
        ours([])


def test_images_of_several_sizes_are_no_batch():
    ours = ImageProcessor(do_resize=False, do_normalize=False)
    with pytest.raises(ImageError, match="3x5x4 and 3x5x6 don't fit in one batch"):
        ours([noise(4, 5), noise(6, 5)])
    ours = ImageProcessor(
        do_normalize=False, size={"longest_edge": 9}, do_pad=True, pad_size=8, resample=2
    )
    with pytest.raises(ImageError, match="9x9 can't be padded to 8x8"):
        ours(noise(4, 4))
    for width, height in ((4, 3), (3, 4)):
        with pytest.raises(ImageError, match="can't be padded to 8x8"):
            ours(noise(width, height))


def test_the_square_has_the_image_in_its_middle():
    square = pixels(pad_to_square(Image.new("RGB", (2, 5), (9, 9, 9)), (1, 2, 3)))
    assert square.shape == (3, 5, 5)
    assert square[:, 0].T.tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 9], [1, 2, 3], [1, 2, 3]]


# preprocessor_config.json


def write(folder, **keys):
    (folder / "preprocessor_config.json").write_text(json.dumps(keys))
    return folder


NUMBERS = {"resample": 3, "image_mean": MEAN, "image_std": STD}


def test_old_spellings_are_read_as_transformers_reads_them(tmp_path):
    write(
        tmp_path, size=24, crop_size=20, do_center_crop=True, do_resize=True, do_normalize=True,
        feature_extractor_type="CLIPFeatureExtractor", **NUMBERS,
    )  # fmt: skip
    image = IMAGES["larger, odd"]
    expected = theirs(CLIPImageProcessorPil.from_pretrained(tmp_path), image)
    assert torch.equal(ImageProcessor.from_pretrained(tmp_path)(image), expected)
    write(tmp_path, size=24, do_resize=True, do_normalize=True, **NUMBERS)
    expected = theirs(ViTImageProcessorPil.from_pretrained(tmp_path), image)
    assert torch.equal(ImageProcessor.from_pretrained(tmp_path)(image), expected)


def test_a_processor_s_own_file_is_read_too(tmp_path):
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": {"size": 8, **NUMBERS}}))
    assert ImageProcessor.from_pretrained(tmp_path).size == 8
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="says nothing of an image_processor"):
        ImageProcessor.from_pretrained(tmp_path)
    write(tmp_path, size=9, **NUMBERS)
    assert ImageProcessor.from_pretrained(tmp_path).size == 9


def test_a_key_that_could_matter_is_reported(tmp_path):
    write(
        tmp_path,
        size=8,
        do_flip=True,
        do_mirror=False,
        image_seq_length=7,
        high_res_size=3,
        null=None,
        **NUMBERS,
    )
    with pytest.warns(UserWarning, match=r"preprocessor_config\.json: not read: do_flip$"):
        ImageProcessor.from_pretrained(tmp_path)


PAD = {"do_pad": True, "do_normalize": False, "resample": 2}
REFUSED = [
    ({"size": {"max_height": 3, "max_width": 4}}, "size={'max_height'.* isn't supported; known"),
    ({"size": {"shortest_edge": 3, "longest_edge": 4}}, "isn't supported; known: height and"),
    ({"size": 0}, "size=0: height isn't a whole number above 0"),
    ({"size": {"height": 3.5, "width": 3}}, "height isn't a whole number"),
    ({"size": "large"}, "size='large' isn't of type"),
    ({"resample": 99}, "resample=99 isn't one of Pillow's"),
    ({"resample": None}, "do_resize is on, and resample isn't given"),
    ({"size": None}, "do_resize is on, and size isn't given"),
    ({"image_std": None}, "do_normalize is on, and image_std isn't given"),
    ({"do_center_crop": True}, "do_center_crop is on, and crop_size isn't given"),
    ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size=.* isn't height and"),
    ({"image_mean": [0.5]}, "1 means in image_mean, 3 in image_std"),
    ({"image_std": [0.5, 0, 1]}, "holds a 0"),
    ({"do_pad": True}, "do_pad=True isn't supported with size=8, pad_size=None"),
    ({"do_pad": True, "size": {"longest_edge": 8}}, "isn't supported with .*pad_size=None"),
    ({"do_pad": True, "pad_size": 8}, "do_pad=True isn't supported with size=8, pad_size=8"),
    ({"min_size": 4, "size": {"height": 8, "width": 9}}, "min_size=4 needs a square size"),
    ({"min_size": 4, "size": {"longest_edge": 8}}, "min_size=4 needs a square size"),
    ({"min_size": 4, "do_center_crop": True, "crop_size": 3}, "min_size=4 needs .* no crop"),
    ({"background_color": [0, 0, 0]}, r"isn't image_mean as a colour, \[122, 117, 104\]"),
    ({"do_pan_and_scan": True}, "do_pan_and_scan=True isn't supported"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(changes, said, tmp_path):
    write(tmp_path, **({"size": 8} | NUMBERS | changes))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: .*{said}"):
        ImageProcessor.from_pretrained(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*preprocessor_config\.json"):
        ImageProcessor.from_pretrained(tmp_path)
    write(tmp_path, size=8, **NUMBERS)
    with pytest.raises(CheckpointError, match="no key that begins with high_res_"):
        ImageProcessor.from_pretrained(tmp_path, prefix="high_res_")
