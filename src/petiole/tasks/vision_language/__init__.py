"""Text from images: questions, statements about two images, and captions, all answered in words by one encoder-decoder.

>>> from petiole.tasks.vision_language import VisualEmbedding
>>> sum(parameter.numel() for parameter in VisualEmbedding(feature_size=2048, hidden_size=768).parameters())
1582848
"""

from petiole.tasks.vision_language.embedding import VisualEmbedding
from petiole.tasks.vision_language.model import VisionLanguageModel, with_visual_tokens

__all__ = ["VisionLanguageModel", "VisualEmbedding", "with_visual_tokens"]
