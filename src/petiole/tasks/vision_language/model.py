"""An encoder-decoder of texts whose encoder reads images, too: the model of Transformers as it is, and a visual embedding in front of it.

    encoder input of a row = [its text, its images, padding]

The tokens of the images stand right behind a row's own text, and padding comes last, so that no token's position depends on how long the
other texts of the batch are. A model with absolute positions (BART) goes on counting through them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petiole.errors import ConfigError
from petiole.tasks.vision_language.embedding import DEVIATION, VisualEmbedding

VISUAL_TOKENS = 100


class VisionLanguageModel(nn.Module):
    """A backbone that reads text and image features and writes text.

    The visual embedding is the task's own part: any method attached to this model trains it along.

    Args:
        backbone: an encoder-decoder of Transformers whose encoder takes `inputs_embeds`, such as `BartForConditionalGeneration` or
            `T5ForConditionalGeneration`, with visual tokens at the end of its vocabulary (`with_visual_tokens`).
        feature_size: width of the features of a region. num_images: most images of a row.
        visual_tokens: how many tokens at the end of the vocabulary stand for regions; the last is the first region's.
        seed: of the visual embedding; the global generator stays where it was.

    Raises:
        ConfigError: the backbone has no encoder of its own, or a vocabulary that small.
    """

    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    trained_entries: ClassVar[tuple[str, ...]] = ("visual_embedding",)  # known to `petiole.anatomy`

    def __init__(
        self,
        backbone: nn.Module,
        feature_size: int = 2048,
        *,
        num_images: int = 2,
        visual_tokens: int = VISUAL_TOKENS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config: Any = backbone.config
        if not getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"{type(backbone).__name__} is no encoder-decoder: BartForConditionalGeneration or T5ForConditionalGeneration will do"
            )
        self.config, self.backbone, self.visual_tokens = config, backbone, visual_tokens
        words = self.get_input_embeddings().weight
        if not 1 <= visual_tokens < len(words):
            raise ConfigError(f"visual_tokens = {visual_tokens}: from 1 to fewer than the vocabulary's {len(words)}")
        self.visual_embedding = VisualEmbedding(feature_size, words.shape[1], num_images, seed).to(words)

    def get_input_embeddings(self) -> Any:
        """Of the text."""
        return self.backbone.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> Any:
        """The language-model head."""
        return self.backbone.get_output_embeddings()  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        image_boxes: Tensor | None = None,
        image_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        decode: bool = True,
        **options: Any,
    ) -> Any:
        """What the backbone gives; with labels, the loss of a language model.

        Args:
            input_ids, attention_mask: (B, T).
            image_features: (B, images, regions, F); the text alone is read without any.
            image_boxes: (B, images, regions, 4) or (regions, 4), x₁, x₂, y₁, y₂ in [0, 1].
            image_mask: (B, images, regions), 0 where there is no region.
            labels: (B, answer), -100 where there is none.
            decode: False for the encoder's output, and which of its tokens are no padding.
            options: of the backbone.

        Raises:
            ConfigError: features without boxes, or of another shape.
        """
        h, mask = self.joined(input_ids, attention_mask, image_features, image_boxes, image_mask)
        if decode:
            return self.backbone(inputs_embeds=h, attention_mask=mask, labels=labels, **options)
        encoder: Any = self.backbone.get_encoder()  # type: ignore[operator]
        return encoder(inputs_embeds=h, attention_mask=mask, return_dict=True, **options), mask

    def joined(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        features: Tensor | None,
        boxes: Tensor | None,
        image_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T + images · regions, d) of text and images, and which of them are no padding."""
        text = self.get_input_embeddings()(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if features is None:
            return text, mask
        if boxes is None:
            raise ConfigError("image_features without image_boxes: where in the image is each region?")
        tokens = self.visual_embedding(features, boxes, self.object_order(features.shape[-2]))
        seen = mask.new_ones(tokens.shape[:2]) if image_mask is None else image_mask.flatten(1).to(mask)
        return behind(text, mask, tokens.to(text.dtype), seen)

    def object_order(self, regions: int) -> Tensor:
        """Embeddings (regions, d) of the visual tokens, from the vocabulary's end."""
        if regions > self.visual_tokens:
            raise ConfigError(f"{regions} regions in an image, but the vocabulary has {self.visual_tokens} for them")
        words = self.get_input_embeddings()
        last = words.weight.shape[0] - 1
        return words(torch.arange(last, last - regions, -1, device=words.weight.device))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Tokens of the answers (B, …), as `generate` of the backbone gives them.

        Args:
            inputs: `image_features`, `image_boxes`, `image_mask`, and options of the backbone's `generate`.
        """
        images = {name: inputs.pop(name) for name in list(inputs) if name.startswith("image_")}
        # Through a forward pass of this model, as methods know it.
        encoded, mask = self(input_ids, attention_mask, **images, decode=False)
        return self.backbone.generate(encoder_outputs=encoded, attention_mask=mask, **inputs)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the backbone."""
        self.backbone.gradient_checkpointing_enable(**options)  # type: ignore[operator]


def behind(text: Tensor, mask: Tensor, tokens: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, d) right behind each row's own text (B, T, d), padding last, and which of them all are no padding."""
    h, mask = torch.cat([text, tokens], 1), torch.cat([mask, seen], 1)
    order = (mask == 0).int().argsort(dim=1, stable=True)
    return h.gather(1, order[..., None].expand_as(h)), mask.gather(1, order)


def with_visual_tokens(backbone: Any, count: int = VISUAL_TOKENS, seed: int = 0) -> Any:
    """The backbone with so many tokens more at the end of its vocabulary, IN PLACE; the global generator stays where it was."""
    before = backbone.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        backbone.resize_token_embeddings(before + count, mean_resizing=False)
    words = backbone.get_input_embeddings().weight
    if not words.is_meta:
        with torch.no_grad():
            words[before:].normal_(0, DEVIATION, generator=torch.Generator().manual_seed(seed))
    return backbone
