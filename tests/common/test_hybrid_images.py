"""Images for two eyes, against the image processor of transformers' hybrid DeepSeek-VL."""

import json

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from snippets.common.checkpoint import CheckpointError
from snippets.common.hybrid_images import HybridImageProcessor
from snippets.common.images import ImageError

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
PROCESSORS = {
    "as published": DeepseekVLHybridImageProcessorPil(
        size={"height": 24, "width": 24}, high_res_size={"height": 64, "width": 64}, min_size=7
    ),
    "other colours": DeepseekVLHybridImageProcessorPil(
        size={"height": 21, "width": 21}, high_res_size={"height": 50, "width": 50}, min_size=3,
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], high_res_image_mean=MEAN,
        high_res_image_std=STD, resample=2,
    ),
}  # fmt: skip
SIZES = [(64, 64), (90, 41), (20, 33), (1, 1), (200, 20), (19, 190)]


def noise(width: int, height: int) -> Image.Image:
    drawn = torch.Generator().manual_seed(width)
    values = torch.randint(256, (height, width, 3), generator=drawn, dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), values.numpy().tobytes())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("theirs", PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_equal_transformers(theirs, size, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, image = HybridImageProcessor.from_pretrained(tmp_path), noise(*size)
    expected, found = theirs(image, return_tensors="pt"), ours(image)
    assert found.keys() == {"pixel_values", "high_res_pixel_values"}
    for name, pixels in found.items():
        assert_close(pixels, expected[name], atol=1e-5, rtol=0)
    low, high = found["pixel_values"], found["high_res_pixel_values"]
    assert low.shape[2] < high.shape[2] == theirs.high_res_size["height"]


def test_several_images_and_files_are_one_batch(tmp_path):
    theirs = PROCESSORS["as published"]
    theirs.save_pretrained(tmp_path)
    ours, images = HybridImageProcessor.from_pretrained(tmp_path), [noise(31, 50), noise(70, 9)]
    images[1].save(tmp_path / "second.png")
    found = ours([images[0], tmp_path / "second.png"])
    expected = theirs(images, return_tensors="pt")
    for name, pixels in found.items():
        assert_close(pixels, expected[name], atol=1e-5, rtol=0)
    (tmp_path / "second.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"second\.png: not an image"):
        ours([images[0], tmp_path / "second.png"])


def test_the_folder_of_a_single_eye_is_refused(tmp_path):
    PROCESSORS["as published"].save_pretrained(tmp_path)
    path = next(tmp_path.glob("*processor_config.json"))
    kept = {k: v for k, v in json.loads(path.read_text()).items() if "high_res" not in k}
    path.write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match="has no key that begins with high_res_"):
        HybridImageProcessor.from_pretrained(tmp_path)
