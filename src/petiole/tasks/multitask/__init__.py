"""Several tasks of text on one backbone: joined data sets, a head for each task, and transfer from some tasks to another."""

from petiole.tasks.multitask.data import load_tasks
from petiole.tasks.multitask.model import MultiTaskModel, TaskHeads
from petiole.tasks.multitask.task import MultiTaskText
from petiole.tasks.multitask.transfer import train_sources, transfer

__all__ = ["MultiTaskModel", "MultiTaskText", "TaskHeads", "load_tasks", "train_sources", "transfer"]
