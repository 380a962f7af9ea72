"""Dense prediction, several tasks at once: a value for every pixel, on generated scenes whose labels are exact.

>>> from petiole.tasks.dense import Scenes
>>> scene = Scenes(1, size=32)[0]
>>> sorted(scene["labels"]), tuple(scene["labels"]["normals"].shape)
(['depth', 'edge', 'human_parts', 'normals', 'saliency', 'semseg'], (3, 32, 32))
"""

from petiole.tasks.dense.metrics import METRICS, DenseMetric, delta_m
from petiole.tasks.dense.model import Decoder, DenseModel, DenseOutput
from petiole.tasks.dense.prediction import DensePrediction
from petiole.tasks.dense.scenes import Scenes
from petiole.tasks.dense.targets import TARGETS, Target

__all__ = [
    "METRICS", "TARGETS", "Decoder", "DenseMetric", "DenseModel", "DenseOutput", "DensePrediction", "Scenes", "Target", "delta_m",
]  # fmt: skip
