"""Experiment definitions: frozen data that says what is to be done, and its way to JSON and back.

Pure data, no behaviour: nothing here runs a stage or loads a model. A definition can always be
constructed; `problems` then lists everything that is wrong with it, `validate` raises that list,
and only a valid definition goes into JSON or comes out of it. What the fields have in common:

* `options`, `metadata`, `metrics` and the other **maps** are opaque: JSON values under string keys,
  read by whoever the definition is for. Construction copies them into a mapping that cannot change
  and has a hash and a pickle (a `MappingProxyType` has neither, and shows its owner's changes).
* **Lists** become tuples, inside maps too and on the way back from JSON: the round trip is exact.
* `..._at` is a **time** with a zone; the offset is kept, the zone's name is not.
* An `id` names a definition among its kind, a `uri` says where a thing is, a `description` is free
  text; other text is never empty, since None says that there is none.
"""

from crucible.ir.checks import from_json, problems, to_json, validate
from crucible.ir.definitions import (
    DatasetRef,
    Experiment,
    ModelRef,
    ModelVersion,
    OutputSpec,
    StageDef,
    TrainingConfig,
    TrainingRun,
)

__all__ = [
    "DatasetRef",
    "Experiment",
    "ModelRef",
    "ModelVersion",
    "OutputSpec",
    "StageDef",
    "TrainingConfig",
    "TrainingRun",
    "from_json",
    "problems",
    "to_json",
    "validate",
]
