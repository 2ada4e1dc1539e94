import ast
import copy
import dataclasses
import functools
import inspect
import json
import math
import pickle
import sys
import typing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible import ir

MODEL = ir.ModelRef(id="m")
DATA = ir.DatasetRef(name="d")
CONFIG = ir.TrainingConfig(id="c", model_ref=MODEL, dataset_ref=DATA)
VERSION = ir.ModelVersion(id="v", model_id="m", version="1.2.3")
STAGE = ir.StageDef(name="train")
SMALLEST: list[Any] = [
    ir.DatasetRef(),
    ir.Experiment(id="e", pipeline=(STAGE,)),
    MODEL,
    VERSION,
    ir.OutputSpec(name="o"),
    STAGE,
    CONFIG,
    ir.TrainingRun(id="r", config=CONFIG),
]
STRUCTS: list[Any] = [type(value) for value in SMALLEST]
EXPERIMENT = SMALLEST[1]

every_struct = pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
every_smallest = pytest.mark.parametrize("value", SMALLEST, ids=lambda v: type(v).__name__)


def split(hint):
    """Base type, rules and whether None will do: read here without the help of the module."""
    optional = type(None) in typing.get_args(hint)
    hint = typing.get_args(hint)[0] if optional else hint
    rules = getattr(hint, "__metadata__", ())
    return (hint.__origin__ if rules else hint), rules, optional


def fields(struct):
    for name, hint in typing.get_type_hints(struct, include_extras=True).items():
        yield name, *split(hint)


def fields_of(wanted):
    """`(smallest, field)` for every field whose base type `wanted` accepts."""
    return [
        pytest.param(value, name, id=f"{type(value).__name__}.{name}")
        for value in SMALLEST
        for name, base, _, _ in fields(type(value))
        if wanted(base)
    ]


def with_definition(value, change) -> str:
    """The JSON of a value after `change` has edited the fields of its definition."""
    whole = json.loads(ir.to_json(value))
    change(whole["definition"])
    return json.dumps(whole)


def refusal(text, kind=None) -> list[str]:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller looks at every line
        ir.from_json(text, kind)
    assert type(error.value) is ValueError
    return str(error.value).split("\n  ")


# Strategies, from the types of the fields.

plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).filter(math.isfinite)
)
maps = st.dictionaries(
    st.text(),
    st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
SCALARS: dict[Any, Any] = {
    str: st.text(),
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    datetime: st.datetimes(timezones=st.timezones()),
}


def values_of(hint):
    base, rules, optional = split(hint)
    if base in STRUCTS:
        strategy = structs_of(base)
    elif typing.get_origin(base) is Literal:
        strategy = st.sampled_from(typing.get_args(base))
    elif typing.get_origin(base) is tuple:
        strategy = st.lists(values_of(typing.get_args(base)[0]), max_size=2).map(tuple)
    elif base in SCALARS:
        strategy = SCALARS[base]
    else:
        strategy = maps
    for rule in rules:
        if "version" in rule.says:
            strategy = st.from_regex(r"\A[0-9]{1,3}(\.[0-9]{1,3}){2}(-rc[0-9])?\Z")
        strategy = strategy.filter(lambda value, rule=rule: rule.holds(value))
    return st.none() | strategy if optional else strategy


@functools.cache
def structs_of(struct):
    hints = typing.get_type_hints(struct, include_extras=True)
    return st.builds(struct, **{name: values_of(hint) for name, hint in hints.items()})


@every_struct
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_json_brings_back_exactly_what_was_written(struct, data):
    value = data.draw(structs_of(struct))
    assert ir.problems(value) == ()
    text = ir.to_json(value)
    again = ir.from_json(text, struct)
    assert again == value
    assert hash(again) == hash(value)
    assert repr(again) == repr(value)  # 1 is not 1.0 nor True; offsets and the order of keys stay
    assert ir.to_json(again) == text


@every_smallest
def test_the_required_fields_are_enough(value):
    assert ir.validate(value) is value
    assert ir.from_json(ir.to_json(value)) == value
    required = [f.name for f in dataclasses.fields(value) if f.default is dataclasses.MISSING]
    given_alone = {name: json.loads(ir.to_json(value))["definition"][name] for name in required}
    text = json.dumps({"kind": type(value).__name__, "format": 1, "definition": given_alone})
    assert ir.from_json(text) == (value if value != DATA else ir.DatasetRef())


def test_the_fields_and_their_defaults_are_these():
    def defaults(struct):
        missing = dataclasses.MISSING
        return {
            f.name: ... if f.default is missing else f.default for f in dataclasses.fields(struct)
        }

    nothing = dict.fromkeys
    assert defaults(ir.Experiment) == {
        "id": ...,
        "pipeline": ...,
        "backend": "jax",
        "tags": (),
        "metadata": {},
        "outputs": (),
        **nothing(["description", "owner", "dataset", "created_at", "updated_at"]),
        **nothing(["experiment_type", "model_version", "training_config", "baseline"]),
    }
    assert defaults(ir.StageDef) == {"name": ..., "module": None, "options": {}, "enabled": True}
    assert defaults(ir.TrainingConfig) == {
        "id": ...,
        "model_ref": ...,
        "dataset_ref": ...,
        "epochs": 1,
        "batch_size": 32,
        "learning_rate": 0.001,
        "optimizer": "adam",
        "loss_function": "cross_entropy",
        "metrics": ("loss", "accuracy"),
        "device": "any",
        "mixed_precision": False,
        "options": {},
        **nothing(["validation_split", "seed", "gradient_clipping", "early_stopping"]),
        "checkpoint_every": None,
    }
    assert defaults(ir.TrainingRun) == {
        "id": ...,
        "config": ...,
        "status": "pending",
        "metrics_history": (),
        "best_metrics": {},
        "checkpoint_uris": (),
        "options": {},
        **nothing(["current_epoch", "final_model_version", "started_at", "completed_at"]),
        "error_message": None,
    }
    assert defaults(ir.DatasetRef) == {
        "provider": "local",
        "split": "train",
        "options": {},
        **nothing(["name", "version", "format", "schema"]),
    }
    assert defaults(ir.ModelRef) == {
        "id": ...,
        "provider": "local",
        "framework": "jax",
        "metadata": {},
        "options": {},
        **nothing(["name", "version", "architecture", "task", "artifact_uri"]),
    }
    assert defaults(ir.ModelVersion) == {
        "id": ...,
        "model_id": ...,
        "version": ...,
        "stage": "development",
        "metrics": {},
        "options": {},
        **nothing(["training_run_id", "artifact_uri", "parent_version", "description"]),
        **nothing(["created_at", "created_by"]),
    }
    assert defaults(ir.OutputSpec) == {
        "name": ...,
        "formats": ("markdown",),
        "sink": "file",
        "options": {},
    }


def test_the_words_of_each_choice_are_these():
    words = {
        f"{struct.__name__}.{name}": " ".join(
            typing.get_args(typing.get_args(base)[0] if name == "formats" else base)
        )
        for struct in STRUCTS
        for name, base, _, _ in fields(struct)
        if "Literal" in repr(base)
    }
    assert words == {
        "DatasetRef.provider": "local huggingface bundled",
        "DatasetRef.format": "parquet csv jsonl arrow",
        "Experiment.experiment_type": "evaluation training comparison ablation",
        "ModelRef.provider": "local huggingface openai anthropic s3 gcs",
        "ModelRef.framework": "jax safetensors gguf pytorch",
        "ModelVersion.stage": "development staging production archived",
        "OutputSpec.formats": "markdown json html latex csv",
        "OutputSpec.sink": "file stdout s3 postgres",
        "TrainingConfig.device": "cpu gpu tpu any",
        "TrainingRun.status": "pending running completed failed cancelled",
    }


# Each rule says what it wants.

TIME = "a time with its zone, like 2026-01-31T12:00:00+01:00"
NAIVE = datetime(2026, 1, 31)
RULES = [
    (CONFIG, "epochs", 0, "at least 1, not 0"),
    (CONFIG, "epochs", True, "an integer, not True"),
    (CONFIG, "epochs", 1.0, "an integer, not 1.0"),
    (CONFIG, "batch_size", -1, "at least 1, not -1"),
    (CONFIG, "learning_rate", 0.0, "above 0, not 0.0"),
    (CONFIG, "learning_rate", math.nan, "finite, or None: JSON has no NaN or infinity, not nan"),
    (CONFIG, "learning_rate", math.inf, "finite, or None: JSON has no NaN or infinity, not inf"),
    (CONFIG, "learning_rate", True, "a number, not True"),
    (CONFIG, "learning_rate", "1e-3", "a number, not '1e-3'"),
    (CONFIG, "validation_split", 1.0, "at least 0 and below 1, not 1.0"),
    (CONFIG, "validation_split", -0.1, "at least 0 and below 1, not -0.1"),
    (CONFIG, "gradient_clipping", 0, "above 0, not 0"),
    (CONFIG, "checkpoint_every", -1, "at least 0, not -1"),
    (CONFIG, "seed", 2**1024, "an integer of at most 1024 bits, not 1797"),
    (CONFIG, "mixed_precision", 1, "True or False, not 1"),
    (CONFIG, "optimizer", "", "text that is not empty, not ''"),
    (CONFIG, "loss_function", "  ", "text that is not empty, not '  '"),
    (CONFIG, "device", "cuda", "one of 'cpu', 'gpu', 'tpu', 'any', not 'cuda'."),
    (CONFIG, "early_stopping", 3, "a map, not 3"),
    (CONFIG, "options", None, "a map, not None"),
    (CONFIG, "model_ref", "gpt2", "ModelRef(...), not 'gpt2'"),
    (CONFIG, "dataset_ref", None, "DatasetRef(...), not None"),
    (CONFIG, "metrics", "loss", "a list, not 'loss'"),
    (SMALLEST[7], "current_epoch", -1, "at least 0, not -1"),
    (SMALLEST[7], "config", MODEL, "TrainingConfig(...), not ModelRef(id='m'"),
    (SMALLEST[7], "started_at", NAIVE, f"{TIME}, not datetime.datetime(2026, 1, 31, 0, 0)"),
    (SMALLEST[7], "started_at", "today", f"{TIME}, not 'today'"),
    (VERSION, "version", "1.2", "a version like '1.2.3' or '1.2.3-rc1', not '1.2'"),
    (VERSION, "version", "v1.2.3", "a version like '1.2.3' or '1.2.3-rc1', not 'v1.2.3'"),
    (VERSION, "version", None, "text, not None"),
    (DATA, "name", "", "text that is not empty, not ''"),
    (DATA, "split", "", "text that is not empty, not ''"),
    (STAGE, "name", "\ud800", "text without half characters (lone surrogates), not '\\ud800'"),
    (EXPERIMENT, "pipeline", (), "a list of at least one, not ()"),
    (EXPERIMENT, "backend", "", "text that is not empty, not ''"),
    (SMALLEST[4], "formats", (), "a list of at least one, not ()"),
]


@pytest.mark.parametrize(("value", "field", "bad", "says"), RULES, ids=lambda x: repr(x)[:30])
def test_a_broken_rule_says_what_it_wants_and_what_it_got(value, field, bad, says):
    found = ir.problems(dataclasses.replace(value, **{field: bad}))
    assert len(found) == 1
    assert found[0].startswith(f"{field}: must be {says}")
    assert found[0].endswith(".") or "Did you mean" in found[0]


GOOD = [
    (CONFIG, "validation_split", 0),
    (CONFIG, "learning_rate", 1),
    (CONFIG, "checkpoint_every", 0),
    (CONFIG, "seed", -(2**63)),
    (CONFIG, "metrics", ()),
    (CONFIG, "early_stopping", {}),
    (SMALLEST[7], "current_epoch", 0),
    (VERSION, "version", "0.10.0-rc1+build"),
    (VERSION, "description", ""),
    (DATA, "split", "train[:10%]"),
]


@pytest.mark.parametrize(("value", "field", "good"), GOOD, ids=lambda x: repr(x)[:30])
def test_the_edge_of_each_rule_is_allowed(value, field, good):
    assert ir.problems(dataclasses.replace(value, **{field: good})) == ()


@pytest.mark.parametrize(("value", "field"), fields_of(lambda base: True))
def test_every_field_checks_its_type(value, field):
    wrong = dataclasses.replace(value, **{field: object()})
    (found,) = ir.problems(wrong)
    assert found.startswith(f"{field}: must be ")
    with pytest.raises(ValueError, match=f"{type(value).__name__} has a problem:\n  {field}: must"):
        ir.to_json(wrong)


@pytest.mark.parametrize(("value", "field"), fields_of(lambda b: typing.get_origin(b) is Literal))
def test_a_misspelt_word_is_answered_in_python_and_in_json(value, field):
    (base,) = (base for name, base, _, _ in fields(type(value)) if name == field)
    for word in typing.get_args(base):
        if len(word) < 4:  # too short to be close to anything
            continue
        bad = word[:-1].upper()
        (found,) = ir.problems(dataclasses.replace(value, **{field: bad}))
        assert found.endswith(f", not {bad!r}. Did you mean {word!r}?")
        text = with_definition(value, lambda d, bad=bad: d.update({field: bad}))
        assert refusal(text)[1:] == [found]


def test_a_word_without_a_close_one_lists_them_all():
    (found,) = ir.problems(dataclasses.replace(CONFIG, device="abacus"))
    assert found == "device: must be one of 'cpu', 'gpu', 'tpu', 'any', not 'abacus'."


def broken_experiment():
    return ir.Experiment(
        id="",
        pipeline=[STAGE, ir.StageDef(name=""), "eval", ir.StageDef(name="x", options={"a b": {3}})],
        tags=("ok", ""),
        metadata={"rate": [1.0, math.nan]},
        dataset=ir.DatasetRef(provider="hugging_face"),
        outputs=(ir.OutputSpec(name="o", formats=("markdown", "pdf")),),
        updated_at=NAIVE,
        model_version=ir.ModelVersion(id="v", model_id="m", version="one"),
        training_config=dataclasses.replace(
            CONFIG, batch_size=0, model_ref=ir.ModelRef(id=7), metrics=(None,)
        ),
        baseline=ir.ModelRef(id="b", framework="nx"),
    )


BROKEN = [
    "id",
    "pipeline[1].name",
    "pipeline[2]",
    "pipeline[3].options['a b']",
    "tags[1]",
    "metadata.rate[1]",
    "dataset.provider",
    "outputs[0].formats[1]",
    "updated_at",
    "model_version.version",
    "training_config.model_ref.id",
    "training_config.batch_size",
    "training_config.metrics[0]",
    "baseline.framework",
]


def test_all_problems_are_found_in_the_order_of_the_fields_each_with_its_path():
    found = ir.problems(broken_experiment())
    assert [message.split(": must")[0] for message in found] == BROKEN


def test_a_value_is_shown_on_one_line_and_not_at_length():
    class Grid:
        def __repr__(self):
            return "[[1],\n [2]]"

    found = ir.problems(ir.StageDef(name="s", options={"a": Grid(), "b": {"x" * 1000}}))
    assert found[0].endswith("a list or a map, not [[1], [2]].")
    assert found[1].endswith(f"a list or a map, not {{'{'x' * 95}....")


def test_a_run_is_checked_through_its_config_and_its_final_version():
    run = ir.TrainingRun(
        id="r",
        config=dataclasses.replace(CONFIG, epochs=0),
        metrics_history=[{"loss": 1.0}, {"loss": -math.inf}, 3],
        final_model_version=ir.ModelVersion(id="v", model_id="m", version=""),
    )
    assert [message.split(": must")[0] for message in ir.problems(run)] == [
        "config.epochs",
        "metrics_history[1].loss",
        "metrics_history[2]",
        "final_model_version.version",
    ]


def test_validate_raises_one_error_with_a_line_for_each_problem():
    broken = broken_experiment()
    with pytest.raises(ValueError, match="Experiment has 14 problems:") as error:
        ir.validate(broken)
    assert str(error.value).split("\n  ")[1:] == list(ir.problems(broken))


def test_what_is_no_definition_is_refused():
    for function in (ir.problems, ir.validate, ir.to_json):
        with pytest.raises(TypeError, match=r"3 is no definition\. There are: DatasetRef, Exp"):
            function(3)
    with pytest.raises(TypeError, match="is no definition"):
        ir.problems(ir.StageDef)
    with pytest.raises(TypeError, match="kind='StageDef' is no definition"):
        ir.from_json(ir.to_json(STAGE), "StageDef")


# What JSON cannot say.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate": math.nan}, "options.rate: must be finite, or None: JSON has no NaN"),
        ({"a": [0, {"b": -math.inf}]}, "options.a[1].b: must be finite, or None: JSON has no NaN"),
        ({"a": {1, 2}}, "options.a: must be text, a number, True, False, None, a list or a map"),
        ({"a": b"x"}, "options.a: must be text, a number, True, False, None, a list or a map"),
        ({"a": NAIVE}, "options.a: must be text, a number, True, False, None, a list or a map"),
        ({"a": STAGE}, "options.a: must be text, a number, True, False, None, a list or a map"),
        ({"a": "\udc00"}, "options.a: must be text without half characters"),
        (
            {"a": 10**5000},
            "options.a: must be an integer of at most 1024 bits, not a value of type",
        ),
        ({3: "x"}, "options: has the key 3, but must have whole strings for keys."),
        ({"a": {None: 1}}, "options.a: has the key None, but must have whole strings for keys."),
        ({"\ud800": 1}, "options: has the key '\\ud800', but must have whole strings for keys."),
        ({"a": {"": 1j}}, "options.a['']: must be text, a number"),
    ],
    ids=lambda x: repr(x)[:30] if isinstance(x, str) else None,
)
def test_a_map_holds_only_what_json_can_bring_back(options, says):
    value = ir.StageDef(name="s", options=options)
    (found,) = ir.problems(value)
    assert found.startswith(says)
    with pytest.raises(ValueError, match="StageDef has a problem"):
        ir.to_json(value)


def test_a_map_that_holds_itself_or_lies_too_deep_is_a_problem_not_a_crash():
    endless: dict[str, Any] = {}
    endless["again"] = endless
    (found,) = ir.problems(ir.StageDef(name="s", options=endless))
    assert found == "options.again: holds itself, or lies more than 64 deep."
    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    (found,) = ir.problems(ir.StageDef(name="s", options={"x": deep}))
    assert found.endswith("holds itself, or lies more than 64 deep.")
    shared = [1]
    assert ir.problems(ir.StageDef(name="s", options={"a": shared, "b": shared})) == ()


def test_nan_in_the_text_is_a_problem_with_its_path():
    for word, shown in [("NaN", "nan"), ("-Infinity", "-inf"), ("1e999", "inf")]:
        text = ir.to_json(ir.StageDef(name="s", options={"x": [7]})).replace("7", word)
        (found,) = refusal(text)[1:]
        assert found.startswith("options.x[0]: must be finite")
        assert found.endswith(f"not {shown}.")


# Reading JSON.


def test_the_text_has_the_kind_the_format_and_the_fields_in_order():
    whole = json.loads(ir.to_json(dataclasses.replace(DATA, format="csv")))
    assert list(whole) == ["kind", "format", "definition"]
    assert (whole["kind"], whole["format"]) == ("DatasetRef", 1)
    assert list(whole["definition"]) == [f.name for f in dataclasses.fields(ir.DatasetRef)]
    assert whole["definition"]["format"] == "csv"
    assert '\n  "kind": "DatasetRef",\n' in ir.to_json(DATA)


def test_an_unknown_key_is_an_error_with_its_path_and_the_closest_field():
    def change(fields):
        fields["ownr"] = "me"
        fields["zzz"] = 1
        fields["pipeline"][0]["nam"] = "x"
        fields["training_config"] = {"dataset_ref": {"splt": "x"}, "id": "c", "epoch": "two"}

    assert refusal(with_definition(EXPERIMENT, change)) == [
        "Experiment has 6 problems:",
        "ownr: Experiment has no such field. Did you mean 'owner'?",
        "zzz: Experiment has no such field. There are: "
        + ", ".join(f.name for f in dataclasses.fields(ir.Experiment))
        + ".",
        "pipeline[0].nam: StageDef has no such field. Did you mean 'name'?",
        "training_config.epoch: TrainingConfig has no such field. Did you mean 'epochs'?",
        "training_config.dataset_ref.splt: DatasetRef has no such field. Did you mean 'split'?",
        "training_config.model_ref: is missing.",
    ]


@every_smallest
def test_a_field_that_is_missing_is_named(value):
    for field in dataclasses.fields(value):
        if field.default is dataclasses.MISSING:
            text = with_definition(value, lambda d, name=field.name: d.pop(name))
            assert refusal(text)[1:] == [f"{field.name}: is missing."]


def test_wrong_kinds_in_the_text_are_all_collected():
    def change(fields):
        fields.update(
            id=None,
            pipeline=[{"name": "a", "enabled": "yes"}, "b"],
            tags="x",
            metadata=[1],
            dataset="mnist",
            created_at="yesterday",
            updated_at="2026-01-31T12:00:00",
            baseline=[{"id": "b"}],
        )

    assert [line.split(", not")[0] for line in refusal(with_definition(EXPERIMENT, change))] == [
        "Experiment has 9 problems:",
        "id: must be text",
        "pipeline[0].enabled: must be True or False",
        "pipeline[1]: must be StageDef(...)",
        "tags: must be a list",
        "metadata: must be a map",
        "dataset: must be DatasetRef(...)",
        f"created_at: must be {TIME}",
        f"updated_at: must be {TIME}",
        "baseline: must be ModelRef(...)",
    ]


def test_a_key_that_is_written_twice_is_an_error():
    text = ir.to_json(STAGE).replace('"module": null', '"name": "eval"')
    assert refusal(text)[1:] == ["'name' is written twice in one object: 'train', then 'eval'."]


def test_every_torn_text_is_refused_with_its_line_and_column():
    text = ir.to_json(EXPERIMENT)
    for length in range(len(text)):
        (message,) = refusal(text[:length])
        assert message.startswith("Not JSON at line ")
    assert refusal(text[: text.index("1") + 1]) == [
        "Not JSON at line 3, column 14: Expecting ',' delimiter. "
        "The text ends there: was it cut off?"
    ]
    assert refusal('{\n  "kind": }') == ["Not JSON at line 2, column 11: Expecting value."]


def test_json_that_python_cannot_read_is_a_value_error():
    assert refusal("[" * 200_000)[0].startswith("JSON that cannot be read: ")
    assert refusal("9" * 5000)[0].startswith("JSON that cannot be read: ")


@pytest.mark.parametrize("number", [2, 0, "1", 1.0, True, None])
def test_another_format_is_refused(number):
    whole = json.loads(ir.to_json(STAGE)) | {"format": number}
    (message,) = refusal(json.dumps(whole))
    assert message == (
        f"The JSON has format {number!r}, and this version of crucible reads 1 only. "
        "Read it with the version that wrote it."
    )


def test_another_kind_is_refused():
    text = ir.to_json(STAGE)
    assert refusal(text, ir.Experiment) == ["The JSON is of kind StageDef, not Experiment."]
    assert refusal(text.replace('"StageDef"', '"StageDeff"')) == [
        "No definition is of kind 'StageDeff'. Did you mean 'StageDef'?"
    ]
    assert refusal(text.replace('"StageDef"', "[7]"))[0].startswith(
        "No definition is of kind [7]. There are: DatasetRef, Experiment, "
    )


def test_the_outer_object_must_be_as_it_is_written():
    must = 'The JSON must be {"kind": "Experiment", "format": 1, "definition": {...}}, but has'
    assert refusal("[3]") == [f"{must} [3]."]
    assert refusal('{"kind": "StageDef", "format": 1, "name": "x"}') == [
        f"{must} the keys 'kind', 'format', 'name'."
    ]
    whole = json.loads(ir.to_json(STAGE))
    assert refusal(json.dumps(whole | {"more": 1}))[0].startswith(must)
    assert refusal(json.dumps(whole | {"definition": []})) == [
        "The 'definition' must be an object of fields, not []."
    ]


# Nothing changes behind the back of a definition.


def test_a_definition_does_not_change_with_what_it_was_made_from():
    options: dict[str, Any] = {"layers": [1, {"deep": [2]}]}
    tags = ["a"]
    stage = ir.StageDef(name="s", options=options)
    experiment = ir.Experiment(id="e", pipeline=[stage], tags=tags)
    before = ir.to_json(experiment)
    options["layers"][1]["deep"].append(3)
    options["more"] = 1
    tags.append("b")
    assert ir.to_json(experiment) == before
    assert stage.options == {"layers": (1, {"deep": (2,)})}
    assert experiment.tags == ("a",)
    assert type(experiment.pipeline) is tuple


@every_smallest
def test_a_definition_cannot_be_changed(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)
        held = getattr(value, field.name)
        if isinstance(held, typing.Mapping):
            with pytest.raises(TypeError):
                held["x"] = 1
            assert not hasattr(held, "update")
            assert not hasattr(held, "pop")
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters(type(value)))


def parameters(struct):
    return inspect.signature(struct).parameters.values()


def test_a_map_is_equal_hashable_and_survives_copies():
    one, other = ({"a": [1, {"b": 2}], "c": 3}, {"c": 3, "a": (1, {"b": 2})})
    first, second = (ir.StageDef(name="s", options=options) for options in (one, other))
    assert first == second
    assert hash(first) == hash(second)
    assert first != ir.StageDef(name="s", options={"a": (1, {"b": 3}), "c": 3})
    assert repr(first.options) == "{'a': (1, {'b': 2}), 'c': 3}"
    for again in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first), copy.copy(first)):
        assert again == first
        assert hash(again) == hash(first)
    assert dataclasses.replace(first, name="t").options == first.options


def test_a_time_keeps_its_offset_even_in_an_hour_that_comes_twice():
    berlin = ZoneInfo("Europe/Berlin")
    for fold, hours in [(0, 2), (1, 1)]:
        twice = datetime(2026, 10, 25, 2, 30, tzinfo=berlin, fold=fold)
        value = dataclasses.replace(VERSION, created_at=twice)
        again = ir.from_json(ir.to_json(value))
        assert again == value
        assert f"2026-10-25T02:30:00+0{hours}:00" in ir.to_json(value)
        assert again.created_at.utcoffset() == timedelta(hours=hours)
    odd = datetime(1900, 1, 1, 0, 0, 0, 1, tzinfo=timezone(timedelta(hours=-3, seconds=7)))
    value = dataclasses.replace(VERSION, created_at=odd)
    assert repr(ir.from_json(ir.to_json(value)).created_at) == repr(odd)
    zulu = with_definition(VERSION, lambda d: d.update(created_at="2026-01-31T12:00:00Z"))
    assert ir.from_json(zulu).created_at == datetime(2026, 1, 31, 12, tzinfo=UTC)


# The room.


def test_the_module_imports_nothing_of_ours_and_nothing_but_the_standard_library():
    imported = set()
    for path in Path(ir.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                if not str(node.module).startswith("crucible.ir"):
                    imported.add(str(node.module).split(".")[0])
    assert "dataclasses" in imported
    assert imported <= sys.stdlib_module_names


def test_each_struct_is_public_documented_and_its_attributes_are_fields():
    public = {name for name in ir.__all__ if inspect.isclass(getattr(ir, name))}
    assert public == {struct.__name__ for struct in STRUCTS}
    for struct in STRUCTS:
        section = inspect.getdoc(struct).split("Attributes:\n")[1].split("\n\n")[0]
        documented = {line.split(":")[0].strip() for line in section.splitlines()}
        assert documented <= {field.name for field in dataclasses.fields(struct)}
