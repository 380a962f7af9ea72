"""Text from images: questions, statements about two images, and captions, all answered in words by one encoder-decoder.

>>> from petiole.tasks.vision_language import VisualEmbedding, example
>>> sum(parameter.numel() for parameter in VisualEmbedding(feature_size=2048, hidden_size=768).parameters())
1582848
>>> example("vqa", seed=0, number=1).prompt
'vqa: is there a blue cross ?'
"""

from petiole.tasks.vision_language.embedding import VisualEmbedding
from petiole.tasks.vision_language.features import grid, pixels, states
from petiole.tasks.vision_language.model import VisionLanguageModel, with_visual_tokens
from petiole.tasks.vision_language.pretraining import pretrained
from petiole.tasks.vision_language.questions import TASKS, Example, example
from petiole.tasks.vision_language.scenes import Scene, Thing, render, scene
from petiole.tasks.vision_language.task import VisionLanguage
from petiole.tasks.vision_language.words import word_tokenizer

__all__ = [
    "TASKS", "Example", "Scene", "Thing", "VisionLanguage", "VisionLanguageModel", "VisualEmbedding", "example", "grid", "pixels",
    "pretrained", "render", "scene", "states", "with_visual_tokens", "word_tokenizer",
]  # fmt: skip
