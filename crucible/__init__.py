"""Crucible: functional training of language models in JAX.

A step is a jitted function; a stage is a pure function that names what it gives; a workflow is a
stage; a metrics tree adds. The rooms:

* `crucible.metrics`: `Mean` and the metrics tree, the contract between producer and consumer.
* `crucible.models`: what a model is (decoders, LoRA, loading, tokenizers, sampling).
* `crucible.train`: what a step means (steps, losses, data, checkpoints).
* `crucible.telemetry`: where numbers go (stream, stores, sinks).
* `crucible.kitchen`: how a run goes (context, stages, workflows, plans, recipes, command line).
* `crucible.ir`: frozen definitions of experiments, to and from JSON.
"""

from crucible import ir, kitchen, metrics, models, telemetry, train

__all__ = ["ir", "kitchen", "metrics", "models", "telemetry", "train"]
