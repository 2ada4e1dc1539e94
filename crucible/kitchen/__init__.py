"""How a run goes: context, stages, workflows, recipes and their command line.

A stage here holds context, routing and errors; the arithmetic it needs lives in `crucible.train`.
"""

from crucible.kitchen.context import Context
from crucible.kitchen.recipe import Recipe, main, override
from crucible.kitchen.runner import Kit, Result, Run, run, steps
from crucible.kitchen.stage import Stage, stage
from crucible.kitchen.workflow import check, every, repeat, sequence, when
from crucible.kitchen.workflows.supervised import PretrainedConfig, SupervisedConfig, supervised

__all__ = [
    "Context",
    "Kit",
    "PretrainedConfig",
    "Recipe",
    "Result",
    "Run",
    "Stage",
    "SupervisedConfig",
    "check",
    "every",
    "main",
    "override",
    "repeat",
    "run",
    "sequence",
    "stage",
    "steps",
    "supervised",
    "when",
]
