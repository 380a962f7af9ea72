"""Data in, metrics out: load a data set for a task, bind it to a backbone, measure a model on it.

>>> from petiole.tasks import load_data, registry
>>> "text-classification" in registry()
True
"""

from petiole.tasks.base import Task, prepare, registry
from petiole.tasks.columns import Column
from petiole.tasks.data import TaskData, load_data
from petiole.tasks.metrics import METRICS, Metric
from petiole.tasks.names import locate_model

__all__ = ["METRICS", "Column", "Metric", "Task", "TaskData", "load_data", "locate_model", "prepare", "registry"]
