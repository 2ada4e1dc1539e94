"""The definitions: frozen data, with the rules that it must keep riding on its types."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, NamedTuple

__all__ = [
    "DatasetRef",
    "Experiment",
    "Frozen",
    "ModelRef",
    "ModelVersion",
    "OutputSpec",
    "Rule",
    "StageDef",
    "TrainingConfig",
    "TrainingRun",
    "fields_of",
]

DEPTH = 64  # of nesting inside a map


class Frozen(Mapping[str, Any]):
    """A mapping that cannot change: equal to a dict of the same items, hashable, picklable."""

    def __init__(self, items: dict[str, Any]):
        self._items = items  # of nobody else: `_freeze` has made it

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def _freeze(value: Any, parents: tuple[int, ...] = ()) -> Any:
    if isinstance(value, datetime) and (offset := value.utcoffset()) is not None:
        # ISO-8601 has no zone names; and a named zone's repeated hour equals no other zone's time.
        return value.replace(tzinfo=timezone(offset), fold=0)
    if id(value) in parents or len(parents) > DEPTH:
        return value  # for `problems` to find
    parents = (*parents, id(value))
    if isinstance(value, Mapping):
        return Frozen({key: _freeze(item, parents) for key, item in value.items()})
    return tuple(_freeze(v, parents) for v in value) if isinstance(value, list | tuple) else value


def _freeze_fields(self: Any) -> None:
    for name, value in fields_of(self).items():
        object.__setattr__(self, name, _freeze(value))


def fields_of(struct: Any) -> dict[str, Any]:
    """A struct's values by name."""
    return {field.name: getattr(struct, field.name) for field in dataclasses.fields(struct)}


class Rule(NamedTuple):
    """What a value must be beside its type; it rides on the type, as `Annotated[type, rule]`."""

    holds: Callable[[Any], Any]
    says: str


_AT_LEAST_0 = Rule(lambda n: n >= 0, "at least 0")
_AT_LEAST_1 = Rule(lambda n: n >= 1, "at least 1")
_POSITIVE = Rule(lambda x: x > 0, "above 0")
_FRACTION = Rule(lambda x: 0 <= x < 1, "at least 0 and below 1")
_SEMVER = Rule(re.compile(r"[0-9]+\.[0-9]+\.[0-9]+").match, "a version like '1.2.3' or '1.2.3-rc1'")
_SOME = Rule(len, "a list of at least one")
_Name = Annotated[str, Rule(str.strip, "text that is not empty")]
_Map = Mapping[str, Any]
_EMPTY = Frozen({})


@dataclass(frozen=True, kw_only=True)
class DatasetRef:
    """Which data.

    Attributes:
        name: of the dataset at its provider; None where the provider needs none.
        version: at its provider; None for the newest.
        format: of its files; None to let the provider tell.
        schema: what its columns are; None where that is not known.
    """

    name: _Name | None = None
    provider: Literal["local", "huggingface", "bundled"] = "local"
    split: _Name = "train"
    version: _Name | None = None
    format: Literal["parquet", "csv", "jsonl", "arrow"] | None = None
    schema: _Map | None = None
    options: _Map = _EMPTY
    __post_init__ = _freeze_fields


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Which model.

    Attributes:
        name: of the model at its provider.
        version: a tag or a revision, in the provider's own words.
        framework: what its weights are written in.
        architecture: such as "decoder".
        task: such as "text-generation".
    """

    id: _Name
    name: _Name | None = None
    version: _Name | None = None
    provider: Literal["local", "huggingface", "openai", "anthropic", "s3", "gcs"] = "local"
    framework: Literal["jax", "safetensors", "gguf", "pytorch"] = "jax"
    architecture: _Name | None = None
    task: _Name | None = None
    artifact_uri: _Name | None = None
    metadata: _Map = _EMPTY
    options: _Map = _EMPTY
    __post_init__ = _freeze_fields


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A trained model, as a registry knows it.

    Attributes:
        version: three numbers with dots between them, then anything.
        stage: how far it has come.
        metrics: what it scores.
        parent_version: the version it was trained from.
    """

    id: _Name
    model_id: _Name
    version: Annotated[str, _SEMVER]
    stage: Literal["development", "staging", "production", "archived"] = "development"
    training_run_id: _Name | None = None
    metrics: _Map = _EMPTY
    artifact_uri: _Name | None = None
    parent_version: _Name | None = None
    description: str | None = None
    created_at: datetime | None = None
    created_by: _Name | None = None
    options: _Map = _EMPTY
    __post_init__ = _freeze_fields


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        batch_size: examples in a step.
        learning_rate: the peak, where a schedule varies it.
        optimizer: a name of Optax, such as "adam" or "adamw".
        loss_function: the name of a loss.
        metrics: names of what to report.
        validation_split: the fraction of the data to hold out.
        seed: of every random choice; None to let the run choose.
        mixed_precision: compute in bfloat16, keep parameters in float32.
        gradient_clipping: the largest global norm of the gradient; None for no clipping.
        early_stopping: when to stop early; None for never.
        checkpoint_every: period in steps, 0 for never; None to let the run choose.
    """

    id: _Name
    model_ref: ModelRef
    dataset_ref: DatasetRef
    epochs: Annotated[int, _AT_LEAST_1] = 1
    batch_size: Annotated[int, _AT_LEAST_1] = 32
    learning_rate: Annotated[float, _POSITIVE] = 0.001
    optimizer: _Name = "adam"
    loss_function: _Name = "cross_entropy"
    metrics: tuple[_Name, ...] = ("loss", "accuracy")
    validation_split: Annotated[float, _FRACTION] | None = None
    device: Literal["cpu", "gpu", "tpu", "any"] = "any"
    seed: int | None = None
    mixed_precision: bool = False
    gradient_clipping: Annotated[float, _POSITIVE] | None = None
    early_stopping: _Map | None = None
    checkpoint_every: Annotated[int, _AT_LEAST_0] | None = None
    options: _Map = _EMPTY
    __post_init__ = _freeze_fields


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What came of a training.

    Attributes:
        config: what was asked for.
        current_epoch: epochs completed; None before the first begins.
        metrics_history: a map for each report, in order; a loss that is not finite is None there.
        best_metrics: the best of these reports.
        final_model_version: what the run made.
        error_message: why it failed.
    """

    id: _Name
    config: TrainingConfig
    status: Literal["pending", "running", "completed", "failed", "cancelled"] = "pending"
    current_epoch: Annotated[int, _AT_LEAST_0] | None = None
    metrics_history: tuple[_Map, ...] = ()
    best_metrics: _Map = _EMPTY
    checkpoint_uris: tuple[_Name, ...] = ()
    final_model_version: ModelVersion | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    error_message: str | None = None
    options: _Map = _EMPTY
    __post_init__ = _freeze_fields


@dataclass(frozen=True, kw_only=True)
class StageDef:
    """One step of a pipeline.

    Attributes:
        module: where its code is; None where the name tells.
        options: interpreted by the stage, and by it alone.
        enabled: whether it runs.
    """

    name: _Name
    module: _Name | None = None
    options: _Map = _EMPTY
    enabled: bool = True
    __post_init__ = _freeze_fields


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What to write when the experiment is done.

    Attributes:
        formats: to write it in, each of them; one at least.
        sink: where to.
    """

    name: _Name
    formats: Annotated[tuple[Literal["markdown", "json", "html", "latex", "csv"], ...], _SOME] = (
        "markdown",
    )
    sink: Literal["file", "stdout", "s3", "postgres"] = "file"
    options: _Map = _EMPTY
    __post_init__ = _freeze_fields


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is to be done, whole.

    Attributes:
        pipeline: the stages in order, one at least.
        backend: what runs it.
        owner: who answers for it.
        tags: words to find it by.
        model_version: the version it examines.
        training_config: how it trains.
        baseline: the model to compare with.

    Example:
        >>> from crucible.ir import from_json, to_json
        >>> stage = StageDef(name="train", options={"layers": [1, 2]})
        >>> stage.options["layers"]
        (1, 2)
        >>> experiment = Experiment(id="first", pipeline=(stage,))
        >>> from_json(to_json(experiment)) == experiment
        True
    """

    id: _Name
    pipeline: Annotated[tuple[StageDef, ...], _SOME]
    backend: _Name = "jax"
    description: str | None = None
    owner: _Name | None = None
    tags: tuple[_Name, ...] = ()
    metadata: _Map = _EMPTY
    dataset: DatasetRef | None = None
    outputs: tuple[OutputSpec, ...] = ()
    created_at: datetime | None = None
    updated_at: datetime | None = None
    experiment_type: Literal["evaluation", "training", "comparison", "ablation"] | None = None
    model_version: ModelVersion | None = None
    training_config: TrainingConfig | None = None
    baseline: ModelRef | None = None
    __post_init__ = _freeze_fields
