"""Models that see against transformers: same checkpoint folder, same images, interleaved.

A forward pass and a training step of each, at sizes where the matrices dominate, printed without
a bound. transformers has no DeepSeek-VL2, so it has no peer here.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from snippets.multimodal.clip import CLIP
from snippets.multimodal.deepseek_vl import DeepseekVL, DeepseekVLHybrid
from snippets.multimodal.gemma3_vision import Gemma3Vision
from snippets.multimodal.llava import Llava
from snippets.multimodal.sam import Sam
from snippets.multimodal.siglip import SigLIP
from snippets.multimodal.vit import ViT

from .modules import Fresh, Pair, Run

V, IMAGE = 2048, 2000  # vocabulary; the placeholder's id
TOWER = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
}
CAPTION = {k: v for k, v in TOWER.items() if "size" not in k} | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "vocab_size": V,
    "max_position_embeddings": 64,
}
TEXT = {
    "vocab_size": V,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
EYE = {
    "hidden_size": 256,
    "output_channels": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 256,
    "patch_size": 16,
    "window_size": 7,
    "global_attn_indexes": [1, 3],
}
PATCHES = (128 // 16) ** 2


class Seeing(NamedTuple):
    name: str
    ours: type[nn.Module]
    theirs: type[nn.Module]
    config: transformers.PreTrainedConfig
    inputs: dict[str, Tensor]
    output: Callable  # what of the reference's output is ours
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - for the reference alone


def models() -> Iterator[Seeing]:
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 128, 128, generator=drawn)
    large = torch.randn(2, 3, 256, 256, generator=drawn)
    captions = torch.randint(3, IMAGE, (2, 64), generator=drawn)

    def prompt(n: int) -> Tensor:
        ids = torch.randint(3, IMAGE, (2, n + 128), generator=drawn)
        ids[:, 8 : 8 + n] = IMAGE
        return ids

    logits = lambda out: out.logits  # noqa: E731
    both = lambda out: (out.logits_per_image, out.logits_per_text)  # noqa: E731
    pairs = {"input_ids": captions, "pixel_values": images}
    seen = {"input_ids": prompt(PATCHES), "pixel_values": images}
    vision = TOWER | {"model_type": "siglip_vision_model"}
    text = TEXT | {"model_type": "llama"}
    t = transformers
    yield Seeing("vit", ViT, t.ViTForImageClassification, t.ViTConfig(**TOWER),
                 {"pixel_values": images}, logits)  # fmt: skip
    yield Seeing(
        "clip",
        CLIP,
        t.CLIPModel,
        t.CLIPConfig(text_config=CAPTION, vision_config=TOWER),
        pairs,
        both,
    )
    ends = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    siglip = t.SiglipConfig(text_config=CAPTION | ends, vision_config=TOWER)
    yield Seeing("siglip", SigLIP, t.SiglipModel, siglip, pairs, both)
    decoder = {"hidden_size": 128, "num_attention_heads": 4}
    sam = t.SamConfig(
        vision_config=EYE | {"num_pos_feats": 64},
        prompt_encoder_config={"hidden_size": 128, "image_size": 256, "patch_size": 16},
        mask_decoder_config=decoder,
    )
    points = {"input_points": torch.rand(2, 1, 2, 2, generator=drawn) * 256}
    points["input_labels"] = torch.ones(2, 1, 2, dtype=torch.long)
    yield Seeing("sam", Sam, t.SamModel, sam, {"pixel_values": large} | points,
                 lambda out: (out.pred_masks, out.iou_scores))  # fmt: skip
    llava = t.LlavaConfig(
        text_config=text,
        vision_config=TOWER | {"model_type": "clip_vision_model"},
        image_token_index=IMAGE,
    )
    yield Seeing("llava", Llava, t.LlavaForConditionalGeneration, llava, seen, logits)
    gemma = t.Gemma3Config(
        text_config=TEXT | {"sliding_window": 64},
        vision_config=vision | {"vision_use_head": False},
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )
    few = {"input_ids": prompt(16), "pixel_values": images}
    kinds = {"token_type_ids": (few["input_ids"] == IMAGE).long()}
    yield Seeing("gemma3_vision", Gemma3Vision, t.Gemma3ForConditionalGeneration, gemma, few,
                 logits, kinds)  # fmt: skip
    sizes = {"text_config": text, "vision_config": vision, "image_token_id": IMAGE}
    yield Seeing("deepseek_vl", DeepseekVL, t.DeepseekVLForConditionalGeneration,
                 t.DeepseekVLConfig(**sizes), seen, logits)  # fmt: skip
    hybrid = t.DeepseekVLHybridConfig(
        **sizes, high_res_vision_config=EYE | {"model_type": "sam_vision_model"}
    )
    yield Seeing("deepseek_vl, hybrid", DeepseekVLHybrid,
                 t.DeepseekVLHybridForConditionalGeneration, hybrid,
                 seen | {"high_res_pixel_values": large}, logits)  # fmt: skip


def pairs() -> Iterator[Pair]:
    for model in models():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            model.theirs(model.config).save_pretrained(folder)
            ours = model.ours.from_pretrained(folder)
            theirs = model.theirs.from_pretrained(folder).eval()
        calls = (
            (ours, lambda m=model, o=ours: o(**m.inputs)),
            (theirs, lambda m=model, o=theirs: m.output(o(**m.inputs, **m.extra))),
        )
        forward = [seen(call) for _, call in calls]
        yield Pair(f"{model.name}, forward", "transformers", None, *forward)
        steps = [trained(module, call) for module, call in calls]
        yield Pair(f"{model.name}, training step", "transformers", None, *steps)


def flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.flatten() for part in parts])


def seen(call: Callable) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return flat(call())

    return run


def trained(model: nn.Module, call: Callable) -> Fresh:
    """Forward, backward and a step of AdamW; the loss, a mean of squares, is given back."""

    def prepare() -> Run:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the same work each round

        @torch.enable_grad()
        def step() -> Tensor:
            loss = flat(call()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    return Fresh(prepare)
