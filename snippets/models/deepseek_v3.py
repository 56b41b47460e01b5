"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437).

DeepSeek-V2 with another router: sigmoid scores, a bias that keeps the experts' load even, and
groups judged by their two best. Published in float8, one scale for each block of a matrix, and
with a layer more that guesses the token after the next one.

Axes: as in `snippets/models/llama.py`; o outputs and i inputs of a matrix, p and q its blocks.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import LayerCache
from snippets.common.checkpoint import CheckpointError, read_tensors
from snippets.layers.rmsnorm import RMSNorm
from snippets.models.deepseek_v2 import DeepseekV2, DeepseekV2Config, DeepseekV2Layer
from snippets.moe.multi_token_prediction import generate_with_drafter

SCALE = "_scale_inv"  # behind a weight's name: what its blocks are multiplied by
BIAS = "e_score_correction_bias"  # stays in float32: its steps are finer than bfloat16's


@dataclass(frozen=True)
class DeepseekV3Config(DeepseekV2Config):
    """DeepSeek-V2's keys with V3's defaults.

    Raises:
        ValueError: a value that this model can't honour.
    """

    first_k_dense_replace: int = 3
    moe_intermediate_size: int = 2048
    n_routed_experts: int | None = 256
    num_experts_per_tok: int | None = 8
    n_shared_experts: int | None = 1
    n_group: int | None = 8
    topk_group: int | None = 4
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rope_interleave: bool = True
    num_nextn_predict_layers: int = 0  # MTP layers, behind the others
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.rope_interleave:
            raise ValueError("rope_interleave=False isn't supported")
        if self.num_nextn_predict_layers < 0:
            raise ValueError(f"num_nextn_predict_layers={self.num_nextn_predict_layers} is below 0")
        self.block_size  # noqa: B018 - refuses what it can't read

    def refuse_routing(self) -> None:
        if (self.scoring_func, self.topk_method) != ("sigmoid", "noaux_tc"):
            raise ValueError(
                f"scoring_func={self.scoring_func!r} with topk_method={self.topk_method!r} "
                "isn't DeepSeek-V3's"
            )

    @property
    def block_size(self) -> tuple[int, int] | None:
        """Outputs and inputs of a block with a scale of its own; None where nothing is scaled."""
        if self.quantization_config is None:
            return None
        method = self.quantization_config.get("quant_method")
        block = self.quantization_config.get("weight_block_size")
        sizes = (
            isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) for n in block)
        )
        if method != "fp8" or not sizes or min(block) < 1:
            raise ValueError(
                f"quant_method={method!r} with weight_block_size={block} isn't supported"
            )
        return tuple(block)


def scale_blocks(
    weight: Float[Tensor, "o i"], scale: Float[Tensor, "p q"], block_size: tuple[int, int]
) -> Float[Tensor, "o i"]:
    """weight · scale in float32, each scale for one block; the last blocks may be cut off.

    Files call the scale `weight_scale_inv`: the inverse of what the weight was multiplied by.

    Raises:
        ValueError: not one scale for each block.
    """
    o, i = weight.shape
    wanted = tuple(-(-n // size) for n, size in zip(weight.shape, block_size, strict=True))
    if tuple(scale.shape) != wanted:
        raise ValueError(
            f"{tuple(scale.shape)} scales for {wanted} blocks of {tuple(weight.shape)}"
        )
    rows, columns = block_size
    wide = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)  # ≥o ≥i
    return weight.float() * wide[:o, :i]


class MTPLayer(DeepseekV2Layer):
    """A layer as `MTPModule` with its own embedding and head, all named as in checkpoints.

    The report has the model's embedding and head here; the files hold both a second time.
    """

    def __init__(self, config: DeepseekV3Config, number: int):
        super().__init__(config, number)
        norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.enorm, self.hnorm = RMSNorm(**norm), RMSNorm(**norm)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(**norm), "head": head})

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        hidden: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "b 1 t s"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """States of which the head makes its guesses.

        Args:
            input_ids: the token after each of the t.
            hidden: of each of the t tokens, from the model, behind its last norm.
            rotation: of so many positions; only their differences count.
            mask: as in other layers.
            cache: of this layer.
        """
        embedded = self.embed_tokens(input_ids)
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return self.shared_head["norm"](super().forward(x, rotation, mask, cache))


class DeepseekV3(DeepseekV2):
    """A DeepSeek-V3 that gives logits; parameters are named as in published checkpoints.

    MTP layers stand behind the others in `model.layers`. They take no part in the logits; the
    first of them drafts.
    """

    config_class = DeepseekV3Config
    model_types = ("deepseek_v3",)

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        first = config.num_hidden_layers
        numbers = range(first, first + config.num_nextn_predict_layers)
        self.model.layers.extend(MTPLayer(config, number) for number in numbers)

    @property
    def mtp_layers(self) -> list[MTPLayer]:
        """One for each depth, from 1; none where the checkpoint holds none."""
        return list(self.model.layers[self.config.num_hidden_layers :])

    def drafter(self) -> MTPLayer:
        """The MTP layer that drafts, the first.

        Raises:
            ValueError: there is none.
        """
        if not self.mtp_layers:
            raise ValueError("no MTP layer to draft with: num_nextn_predict_layers=0")
        return self.mtp_layers[0]

    def draft(
        self,
        input_ids: Int[Tensor, "b t"],
        hidden: Float[Tensor, "b t d"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """The first MTP layer's logits of the token after each of these.

        Args:
            input_ids: the token after each of the t.
            hidden: of each of the t, from the model, behind its last norm.
            cache: of the MTP layer; the t come behind those that it has seen.

        Raises:
            ValueError: there is no MTP layer.
        """
        layer, past = self.drafter(), 0 if cache is None else cache.length
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        rotation = self.model.rotation(positions, hidden.dtype)
        return layer.shared_head["head"](layer(input_ids, hidden, rotation, None, cache))

    def generate_with_drafter(
        self,
        input_ids: Int[Tensor, "1 t"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Int[Tensor, "1 tn"], list[bool]]:
        """What the model writes alone, with fewer passes; and which guesses stayed.

        Args:
            input_ids: one prompt.
            max_new_tokens: how many tokens to write.
            temperature: 0 takes the most probable token.
            generator: the source of randomness.

        Raises:
            ValueError: no MTP layer, several prompts, an empty one, or no token to write.
        """
        self.drafter()  # refuses before anything is read
        return generate_with_drafter(
            lambda ids, cache: self.model(ids, cache=cache),
            self.head,
            self.draft,
            self.new_cache(),
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
        )

    @classmethod
    def from_tensors(
        cls, config: DeepseekV3Config, tensors: dict[str, Tensor], *, source: str | Path
    ) -> "DeepseekV3":
        """A model of exactly these tensors; those of the MTP layers are all there, or none."""
        numbers = range(config.num_nextn_predict_layers)
        prefixes = [f"model.layers.{config.num_hidden_layers + number}." for number in numbers]
        if not any(name.startswith(tuple(prefixes)) for name in tensors):
            config = replace(config, num_nextn_predict_layers=0)
        return super().from_tensors(config, tensors, source=source)

    @staticmethod
    def tensors(
        folder: str | Path, config: DeepseekV3Config, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """The folder's weights by name; those in float8 come in `dtype`, else in bfloat16.

        Raises:
            CheckpointError: a weight in float8 without scales, or scales that don't fit.
        """
        # Read as they are: in bfloat16 the scales would lose their last bits.
        tensors = read_tensors(folder)
        scales = {n: tensors.pop(n) for n in list(tensors) if n.endswith(SCALE)}
        for name, weight in tensors.items():
            scale = scales.pop(name + SCALE, None)
            if weight.dtype == torch.float8_e4m3fn:
                if scale is None or config.block_size is None:
                    raise CheckpointError(f"{folder}: {name} is in float8, without scales")
                try:
                    weight = scale_blocks(weight, scale, config.block_size)
                except ValueError as error:
                    raise CheckpointError(f"{folder}: {name}: {error}") from None
                tensors[name] = weight.to(dtype or torch.bfloat16)
            elif scale is not None:
                raise CheckpointError(f"{folder}: {name} is in {weight.dtype}, with scales")
            elif dtype is not None and not name.endswith(BIAS):
                tensors[name] = weight.to(dtype)
        if scales:
            raise CheckpointError(f"{folder}: scales without a weight: {', '.join(scales)}")
        return tensors
