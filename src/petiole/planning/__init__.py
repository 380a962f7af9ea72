"""What every method would cost on a backbone that is known by its configuration alone: no weights, nothing computed, nothing allocated.

    plan = pt.plan("folder/with/config.json", batch_size=8, length=512, dtype="bfloat16", budget="params=0.5%,memory=24GB")
    print(plan)                     # a row for each method: parameters, file, FLOPs, bytes saved for backward, memory, what fits
    plan.fits(), plan.front()       # rows within the budget; rows that no other row undercuts on every axis

One training step runs on shapes alone (`petiole.cost`), for deep models on copies with a few of their blocks: see `depth`.
"""

from petiole.planning.budget import Budget
from petiole.planning.planner import plan
from petiole.planning.table import Plan, Row

__all__ = ["Budget", "Plan", "Row", "plan"]
