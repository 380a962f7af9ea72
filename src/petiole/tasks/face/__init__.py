"""Face recognition: embeddings that tell people apart whom training never saw, also where the picture is small or blurred.

>>> from petiole.tasks.face import Faces
>>> row = Faces(identities=3, images=2, size=32)[0]
>>> tuple(row["pixel_values"].shape), row["labels"]
((3, 32, 32), 0)
"""

from petiole.tasks.face.faces import Faces
from petiole.tasks.face.margin import Margin
from petiole.tasks.face.metrics import fused, identification, verification
from petiole.tasks.face.model import FaceEncoder, FaceModel, FaceOutput, without_classes
from petiole.tasks.face.recognition import FaceRecognition, Scored, embed, recognise

__all__ = [
    "FaceEncoder", "FaceModel", "FaceOutput", "FaceRecognition", "Faces", "Margin", "Scored", "embed", "fused", "identification", "recognise",
    "verification", "without_classes",
]  # fmt: skip
