"""Images in two resolutions against transformers' image processor."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from snippets.common.checkpoint import CheckpointError
from snippets.common.hybrid_images import HybridImageProcessor
from snippets.common.images import ImageError, ImageProcessor
from tests.common.test_images import IMAGES, MEAN, STD

PROCESSORS = {
    "small": dict(size={"height": 24, "width": 24}, high_res_size={"height": 64, "width": 64}),
    "the high one is lower": dict(
        size={"height": 49, "width": 49}, high_res_size={"height": 33, "width": 33}
    ),
    "a large min_size": dict(
        size={"height": 20, "width": 20}, high_res_size={"height": 40, "width": 40}, min_size=45
    ),
    "as published": dict(),
}


@pytest.fixture(params=PROCESSORS)
def processor(request):
    numbers = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
    high = dict(high_res_image_mean=MEAN, high_res_image_std=STD)
    return DeepseekVLHybridImageProcessorPil(**numbers, **high, **PROCESSORS[request.param])


@pytest.mark.parametrize("name", ["smaller", "larger, odd", "one pixel", "panorama", "tower"])
def test_both_resolutions_equal_transformers_to_the_bit(processor, name, tmp_path):
    processor.save_pretrained(tmp_path)
    ours = HybridImageProcessor.from_pretrained(tmp_path)
    expected = processor([IMAGES[name]], return_tensors="pt")
    found = ours(IMAGES[name])
    assert found.keys() == {"pixel_values", "high_res_pixel_values"}
    for key in found:
        assert torch.equal(found[key], expected[key])


def test_a_batch_is_its_images_whatever_their_sizes(tmp_path):
    DeepseekVLHybridImageProcessorPil(**PROCESSORS["small"]).save_pretrained(tmp_path)
    ours = HybridImageProcessor.from_pretrained(tmp_path)
    found = ours([IMAGES["panorama"], IMAGES["transparent"]])
    assert found["pixel_values"].shape == (2, 3, 24, 24)
    assert found["high_res_pixel_values"].shape == (2, 3, 64, 64)
    for key, alone in ours(IMAGES["transparent"]).items():
        assert torch.equal(found[key][1:], alone)
    # The border is grey in both: the mean colour, which is close to 0 when it is normalised.
    for pixels in found.values():
        assert_close(pixels[0, :, 0], torch.zeros_like(pixels[0, :, 0]), atol=0.02, rtol=0)


def test_files_and_images_that_do_not_fit_are_refused(tmp_path):
    numbers = dict(resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    one = ImageProcessor(size={"height": 8, "width": 8}, **numbers)
    with pytest.raises(ImageError, match="none given"):
        HybridImageProcessor(one, one)([])
    with pytest.raises(ImageError, match="there is no such file"):
        HybridImageProcessor(one, one)(tmp_path / "none.png")
    DeepseekVLHybridImageProcessorPil(**PROCESSORS["small"]).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    found = json.loads(path.read_text())
    low = {key: value for key, value in found.items() if not key.startswith("high_res_")}
    path.write_text(json.dumps(low))
    with pytest.raises(CheckpointError, match="no key that begins with high_res_"):
        HybridImageProcessor.from_pretrained(tmp_path)
