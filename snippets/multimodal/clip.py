"""CLIP (Radford et al. 2021, arXiv:2103.00020): one space for pictures and their captions.

A vision transformer reads the picture, a text transformer the caption; each gives one vector of
length 1. Training makes the product of a picture's vector and its own caption's larger than
with every other caption of the batch. `snippets/multimodal/siglip.py` has the same encoder.

Axes: b batch (of images or of texts), i image, j text, c channel, y x pixel, n patch token (and
the class token), t s text token, d hidden size, h head, k head dim, p projected feature.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.multi_head import allowed_pairs
from snippets.common.checkpoint import CheckpointError, filled, read_config, read_tensors
from snippets.layers.layer_norm import LayerNorm
from snippets.layers.swiglu import ACTIVATIONS


@dataclass(frozen=True)
class EncoderConfig:
    """What both towers have, of CLIP and of SigLIP.

    Raises:
        ValueError: a size below 1, heads that don't divide the hidden size, an unknown
            activation.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        for size in fields(self):
            if size.type is int and size.name != "eos_token_id" and getattr(self, size.name) < 1:
                raise ValueError(f"{size.name}={getattr(self, size.name)} is below 1")
        d, h = self.hidden_size, self.num_attention_heads
        if d % h:
            raise ValueError(f"uneven: hidden_size={d}, num_attention_heads={h}")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"hidden_act={self.hidden_act!r} isn't supported; known: {known}")


class EncoderAttention(nn.Module):
    """Multi-head self-attention with biases, named as in CLIP's and SigLIP's files."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.v_proj, self.out_proj = nn.Linear(d, d), nn.Linear(d, d)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "t s"] | Bool[Tensor, "#b 1 #t s"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))  # b t d each
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # b h t k
        return self.out_proj(y.transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    """y = act(x W_1^T + b_1) W_2^T + b_2."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        norm = {"hidden_size": config.hidden_size, "eps": config.layer_norm_eps}
        self.layer_norm1, self.layer_norm2 = LayerNorm(**norm), LayerNorm(**norm)
        self.self_attn = EncoderAttention(config)
        self.mlp = EncoderMLP(config)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "t s"] | Bool[Tensor, "#b 1 #t s"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, without a norm behind them. A mask says True = attend."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "t s"] | Bool[Tensor, "#b 1 #t s"] | None = None,
        *,
        layer: int = -1,
    ) -> Float[Tensor, "b t d"]:
        """Hidden state number `layer`; those behind it aren't computed.

        0 is x itself, 1 what the first layer makes of it, -1 what the last one gives.

        Raises:
            ValueError: there is no such state.
        """
        states = len(self.layers) + 1
        if not -states <= layer < states:
            raise ValueError(f"no hidden state {layer} of {states}, those of x and each layer")
        for block in self.layers[: layer % states]:
            x = block(x, mask)
        return x


# Vision


@dataclass(frozen=True)
class CLIPVisionConfig(EncoderConfig):
    """`vision_config` of config.json, with the defaults of ViT-B/32."""

    num_channels: int = 3
    image_size: int = 224  # the side of a square
    patch_size: int = 32

    # The composite's own keys count.
    INERT: ClassVar[set[str]] = {"dropout", "projection_dim", "tie_word_embeddings", "vocab_size"}

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size={self.patch_size} of image_size={self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along a side; pixels that fill no whole patch are left out."""
        return self.image_size // self.patch_size


def refuse_images(
    pixel_values: Tensor, *, channels: int, size: int, patch: int, any_size: bool = False
) -> None:
    """Raise ValueError for images of another shape than the tower takes; names both."""
    wanted = f"{channels}x{size}x{size}" + (" or another size" if any_size else "")
    shape = tuple(pixel_values.shape)
    fits = len(shape) == 4 and shape[1] == channels
    fits = fits and (min(shape[2:]) >= patch if any_size else shape[2:] == (size, size))
    if not fits:
        raise ValueError(f"pixel_values of shape {shape}, the config wants b images of {wanted}")


def resized_positions(table: Float[Tensor, "n d"], rows: int, columns: int) -> Tensor:
    """Positions of a square grid as those of rows x columns, bicubic in between."""
    side = int(len(table) ** 0.5)
    grid = table.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # 1 d side side
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1)  # rows*columns d


class CLIPVisionEmbeddings(nn.Module):
    """Patches through a linear map, the class token before them, positions added to all."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        d, p = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(d) * d**-0.5)
        # A convolution whose stride is its kernel: a linear map of each patch alone.
        self.patch_embedding = nn.Conv2d(config.num_channels, d, p, stride=p, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, d)
        # About as large as a patch is: at 0.02 the norm behind would leave patches without a place.
        nn.init.normal_(self.position_embedding.weight, std=0.5)

    def forward(
        self, pixel_values: Float[Tensor, "b c y x"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b n d"]:
        config, weight = self.config, self.patch_embedding.weight
        refuse_images(
            pixel_values,
            channels=config.num_channels,
            size=config.image_size,
            patch=config.patch_size,
            any_size=interpolate_pos_encoding,
        )
        patches = self.patch_embedding(pixel_values.to(weight.dtype))  # b d rows columns
        rows, columns = patches.shape[2:]
        x = patches.flatten(2).transpose(1, 2)  # b rows*columns d
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)  # b n d
        positions = self.position_embedding.weight  # n d
        if (rows, columns) != (config.grid, config.grid):
            of_patches = resized_positions(positions[1:], rows, columns)
            positions = torch.cat((positions[:1], of_patches))  # n d
        return x + positions


class CLIPVisionTransformer(nn.Module):
    """From pixels to a vector a token, and one for the whole picture: the class token's."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        norm = {"hidden_size": config.hidden_size, "eps": config.layer_norm_eps}
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(**norm)  # published with this typing error
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(**norm)

    def forward(
        self, pixel_values: Float[Tensor, "b c y x"], *, interpolate_pos_encoding: bool = False
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b d"]]:
        """The last layer's tokens as they are, and the class token behind one more norm.

        Args:
            pixel_values: normalised images.
            interpolate_pos_encoding: take images of any size, and stretch the positions.

        Raises:
            ValueError: images of another shape than the config's.
        """
        y = self.states(pixel_values, -1, interpolate_pos_encoding=interpolate_pos_encoding)
        return y, self.post_layernorm(y[:, 0])

    def states(
        self,
        pixel_values: Float[Tensor, "b c y x"],
        layer: int,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, "b n d"]:
        """Hidden state number `layer`, which composites name `vision_feature_layer`.

        0 is what goes into the first layer, -1 what the last one gives, -2 what the one
        before gives; layers behind it aren't computed.

        Raises:
            ValueError: there is no such state, or images of another shape.
        """
        x = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.encoder(self.pre_layrnorm(x), layer=layer)


# Text


@dataclass(frozen=True)
class CLIPTextConfig(EncoderConfig):
    """`text_config` of config.json, with the defaults of ViT-B/32."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    eos_token_id: int = 49407  # 2, in files of 2021 to 2023, means the largest id of a text

    INERT: ClassVar[set[str]] = {"dropout", "projection_dim", "tie_word_embeddings"}


class TextEmbeddings(nn.Module):
    """The token's row plus its position's, as SigLIP has them too."""

    def __init__(self, *, vocab_size: int, max_position_embeddings: int, hidden_size: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_position_embeddings, hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        t, most = input_ids.shape[1], self.position_embedding.num_embeddings
        if not 0 < t <= most:
            raise ValueError(f"texts of {t} tokens, the config has positions for 1 to {most}")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:t]


class CLIPTextTransformer(nn.Module):
    """A causal transformer over the caption; its vector is that of the end-of-text token."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            hidden_size=config.hidden_size,
        )
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(hidden_size=config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
        """All tokens, and the pooled one.

        A text without the end-of-text token is pooled at its first token, as in the
        reference: let the tokenizer cut a text before that token, not behind it.

        Raises:
            ValueError: more tokens than positions, or a mask of another shape.
        """
        b, t = input_ids.shape
        x = self.embeddings(input_ids)
        heads = self.config.num_attention_heads
        mask = allowed_pairs(attention_mask, b, t, t, num_heads=heads, causal=True, device=x.device)
        x = self.final_layer_norm(self.encoder(x, mask))  # b t d
        return x, x[torch.arange(b, device=x.device), self.ends(input_ids)]

    def ends(self, input_ids: Int[Tensor, "b t"]) -> Int[Tensor, " b"]:
        """Where each text is pooled: at its first end-of-text token.

        CLIP's own tokenizer gives that token the largest id of all, and the first configs
        said eos_token_id=2, which no text contains: there the largest id is taken.
        """
        if self.config.eos_token_id == 2:
            return input_ids.argmax(-1)
        return (input_ids == self.config.eos_token_id).int().argmax(-1)


# Both


@dataclass(frozen=True)
class CLIPConfig:
    """The keys of config.json that matter here, with the defaults of ViT-B/32.

    Files of 2022 hold a tower's config twice; `text_config_dict` and `vision_config_dict`
    are those that count then, as in the reference.

    Raises:
        ValueError: a projection without features.
    """

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # log(1 / 0.07)
    text_config_dict: CLIPTextConfig | None = None
    vision_config_dict: CLIPVisionConfig | None = None

    INERT: ClassVar[set[str]] = {"tie_word_embeddings"}

    def __post_init__(self):
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim={self.projection_dim} is below 1")
        for name in ("text_config", "vision_config"):
            if (counts := getattr(self, f"{name}_dict")) is not None:
                object.__setattr__(self, name, counts)


class CLIP(nn.Module):
    """Two towers and a map from each into one space; named as in published checkpoints."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        text, vision = config.text_config, config.vision_config
        self.text_model = CLIPTextTransformer(text)
        self.vision_model = CLIPVisionTransformer(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        # The logarithm is what is learned, so that the scale stays positive.
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def forward(
        self,
        input_ids: Int[Tensor, "j t"],
        pixel_values: Float[Tensor, "i c y x"],
        attention_mask: Int[Tensor, "j t"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Float[Tensor, "i j"], Float[Tensor, "j i"]]:
        """How well each image goes with each text: logits_per_image, logits_per_text.

        exp(logit_scale) times the cosine; the second is the first transposed.

        Args:
            input_ids: the texts, of whatever number.
            pixel_values: the images, normalised.
            attention_mask: 1 for tokens and 0 for padding.
            interpolate_pos_encoding: take images of any size.

        Raises:
            ValueError: images, texts or a mask of a shape that doesn't fit.
        """
        texts = self.encode_text(input_ids, attention_mask)  # j p
        images = self.encode_image(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )  # i p
        logits_per_text = self.logit_scale.exp() * (texts @ images.T)  # j i
        return logits_per_text.T, logits_per_text

    def encode_image(
        self, pixel_values: Float[Tensor, "b c y x"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b p"]:
        """A vector of length 1 for each image."""
        _, pooled = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )
        return unit(self.visual_projection(pooled))

    def encode_text(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b p"]:
        """A vector of length 1 for each text."""
        _, pooled = self.text_model(input_ids, attention_mask)
        return unit(self.text_projection(pooled))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "CLIP":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, CLIPConfig, model_types=("clip",))
        tensors = read_tensors(folder, dtype)
        drop_position_ids(tensors, "text_model.", "vision_model.")
        return filled(cls, config, tensors, source=folder)


def unit(x: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
    """x / |x|, each row by itself."""
    return x / x.norm(dim=-1, keepdim=True)


def contrastive_loss(logits_per_text: Float[Tensor, "j i"]) -> Float[Tensor, ""]:
    """Each text has to find its image among the batch's, and each image its text.

    (CE(logits, 0..b-1) + CE(logits^T, 0..b-1)) / 2, pair i being row and column i.

    Raises:
        ValueError: not as many texts as images.
    """
    j, i = logits_per_text.shape
    if j != i:
        raise ValueError(f"{j} texts and {i} images are no pairs")
    own = torch.arange(j, device=logits_per_text.device)
    to_images, to_texts = (F.cross_entropy(m, own) for m in (logits_per_text, logits_per_text.T))
    return (to_images + to_texts) / 2


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    loss: Callable[[Tensor], Tensor] = contrastive_loss,
    max_scale: float = 100.0,
) -> list[tuple[float, float]]:
    """Train in place: the loss and the scale exp(logit_scale) at each step.

    AdamW, gradients clipped to a norm of 1; a tenth of the steps for the rise to the learning
    rate and a cosine down. The scale is kept from growing above `max_scale`, as in the paper.

    Args:
        model: gives logits_per_image and logits_per_text.
        batches: input_ids (b t) and pixel_values (b c y x), row i of both being a pair.
        steps: how many batches are taken.
        learning_rate: the highest.
        loss: of logits_per_text.
        max_scale: 100 in the paper.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=0.1, cycle_momentum=False
    )
    history = []
    for _, (input_ids, pixel_values) in zip(range(steps), batches, strict=False):
        value = loss(model(input_ids, pixel_values)[1])
        history.append((value.item(), model.logit_scale.exp().item()))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(max_scale))
    return history


# Files


def drop_position_ids(tensors: dict[str, Tensor], *towers: str) -> None:
    """Remove the counter 0, 1, 2 … that older files hold among the weights of a tower."""
    for tower in towers:
        tensors.pop(f"{tower}embeddings.position_ids", None)


def layout(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A vision tower's tensors under `prefix`, whichever of the two published layouts it has.

    Older files have one level more, `PREFIX vision_model.encoder…` for `PREFIX encoder…`;
    it is taken out. The tower's counter of positions goes. Other tensors stay as they are.

    Args:
        prefix: of the tower within the composite, "vision_tower." for instance.

    Raises:
        CheckpointError: a tensor is there in both layouts.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name
        if name.startswith(f"{prefix}vision_model."):
            plain = prefix + name.removeprefix(f"{prefix}vision_model.")
            if plain in tensors:
                raise CheckpointError(f"both {name} and {plain} are there: one tower, two layouts")
        found[plain] = tensor
    drop_position_ids(found, prefix)
    return found
