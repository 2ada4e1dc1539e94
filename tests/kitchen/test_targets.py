"""What can be run, and the file of a run that is run again."""

import dataclasses
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from crucible import ir, kitchen, models
from crucible.kitchen import Recipe, SupervisedConfig, sequence, stage, supervised
from crucible.kitchen.recipe import override, to_json
from crucible.kitchen.targets import (
    Target,
    experiment_of,
    find_recipe,
    list_recipes,
    read_experiment,
    resolve,
)
from recipes import sl_basic


@dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


@stage("x", host=True, plan=True)
def work(config):
    return config.seed


def recipe(**values):
    return Recipe(**{"name": "own", "workflow": lambda config: work, "config": Config(), **values})


def written(target, path, ports=None):
    path.write_text(ir.to_json(experiment_of(target, "a-run", ports or {})))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory whose `recipes` is the only one, and takes modules as they are written."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "recipes"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "recipes"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "recipes"]:
        del sys.modules[name]


# What can be run


def test_a_recipe_its_module_and_a_workflow_are_targets():
    one = resolve(sl_basic.RECIPE, {"seed": 3})
    two = resolve(sl_basic, {"seed": 3})
    assert (one.name, one.config, one.module) == (two.name, two.config, two.module)
    assert (one.name, one.config.seed, one.module) == ("sl_basic", 3, "recipes.sl_basic")
    assert repr(one.workflow) == repr(two.workflow)
    flow = resolve(work, {}, config=Config(seed=1), context={"y": 2})
    assert (flow.name, flow.workflow, flow.module) == ("workflow", work, None)
    assert dict(flow.context(z=3)) == {"config": Config(seed=1), "y": 2, "z": 3}
    assert dict(resolve(work, {}).context()) == {}
    assert resolve(work, {"seed": 4}, config=Config()).config.seed == 4
    assert resolve(recipe(), {"seed": 5}, config=Config(seed=1)).config.seed == 5
    assert resolve(recipe(), {}, config=Config(seed=1)).config.seed == 1


def test_what_cannot_be_run_is_said_to_be_so():
    with pytest.raises(TypeError, match="The module json has no RECIPE"):
        resolve(json, {})
    for wrong in ("sl_basic", supervised, None, 3):
        with pytest.raises(TypeError, match=r"run takes a Recipe.*find_recipe\('recipes"):
            resolve(wrong, {})
    with pytest.raises(TypeError, match=r"has no fields to change \(seed\)"):
        resolve(work, {"seed": 1})
    with pytest.raises(TypeError, match="Did you mean 'seed'"):
        resolve(recipe(), {"sed": 1})
    with pytest.raises(TypeError, match="recipe own made None, which is no stage"):
        resolve(recipe(workflow=lambda config: None), {})


def test_a_recipe_is_known_by_its_module_also_with_another_config_or_when_it_is_main(monkeypatch):
    changed = dataclasses.replace(sl_basic.RECIPE, config=SupervisedConfig(seed=9))
    assert resolve(changed, {}).module == "recipes.sl_basic"
    assert resolve(recipe(), {}).module is None
    main = types.ModuleType("__main__")
    main.__spec__ = types.SimpleNamespace(name="recipes.own")
    main.RECIPE = recipe()
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert resolve(main.RECIPE, {}).module == "recipes.own"
    assert (
        resolve(dataclasses.replace(main.RECIPE, config=Config(seed=1)), {}).module == "recipes.own"
    )
    script = types.ModuleType("__main__")
    script.RECIPE = recipe()
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert resolve(script.RECIPE, {}).module == "__main__"
    assert experiment_of(resolve(script.RECIPE, {}), "a", {}).pipeline[0].module is None


def test_a_copied_recipe_that_kept_its_name_is_not_taken_for_the_other(monkeypatch):
    copy = types.ModuleType("recipes.copy")
    copy.RECIPE = dataclasses.replace(sl_basic.RECIPE, config=SupervisedConfig(seed=9))
    monkeypatch.setitem(sys.modules, "recipes.copy", copy)
    assert resolve(copy.RECIPE, {}).module == "recipes.copy"
    assert resolve(copy, {}).module == "recipes.copy"
    assert resolve(sl_basic.RECIPE, {}).module == "recipes.sl_basic"
    neither = dataclasses.replace(sl_basic.RECIPE, config=SupervisedConfig(seed=8))
    assert resolve(neither, {}).module is None


# Finding recipes


def test_the_repository_has_its_recipes():
    found = list_recipes()
    assert {"recipes.sl_basic", "recipes.sl_smollm2"} <= set(found)
    assert list(found) == sorted(found)
    assert found["recipes.sl_basic"].startswith("A two-layer byte transformer")
    for name in ("sl_basic", "recipes.sl_basic", "recipes/sl_basic.py"):
        assert find_recipe(name) is sl_basic


def test_recipes_are_listed_without_being_imported(here):
    (here / "loud.py").write_text('"""Loud.\n\nMore."""\nraise SystemExit\nRECIPE: object = 1\n')
    (here / "plain.py").write_text("from json import dumps as RECIPE\n")
    (here / "helper.py").write_text('"""Not one."""\nrecipe = 1\n')
    (here / "broken.py").write_text("def (:\n")
    (here / "bits.py").write_bytes(b"RECIPE = '\xff\xfe'\n")
    (here / "group").mkdir()
    (here / "group" / "__init__.py").write_text('"""A group."""\nRECIPE = 1\n')
    found = list_recipes()
    assert list(found) == [f"recipes.{n}" for n in ("bits", "broken", "group", "loud", "plain")]
    assert found["recipes.loud"] == "Loud."
    assert found["recipes.plain"] == ""
    assert found["recipes.group"] == "A group."
    assert "cannot be read" in found["recipes.broken"]
    assert "broken.py, line 1" in found["recipes.broken"]
    assert "cannot be read" in found["recipes.bits"]


def test_a_misspelt_recipe_is_answered_by_its_short_name(here):
    with pytest.raises(ValueError, match=f"Recipes are looked for in {here}, where there are none"):
        find_recipe("own")
    (here / "own.py").write_text("RECIPE = 1\n")
    for wrong in ("onw", "recipes.onw", "recipes/onw.py"):
        with pytest.raises(ValueError, match=f"There is no recipe '{wrong}'. Did you mean 'own'?"):
            find_recipe(wrong)
    for wrong in ("", ".", "..", ".own", "a.b.c", "own.", "zzz", "/", "x/y.py"):
        with pytest.raises(ValueError, match="There is no recipe"):
            find_recipe(wrong)
    with pytest.raises(TypeError, match=r"The module recipes.own has no RECIPE = kitchen.Recipe"):
        find_recipe("own")


def test_a_recipe_that_fails_on_import_says_at_which_line(here):
    (here / "early.py").write_text("import json\nRECIPE = json.loads('{')\n")
    with pytest.raises(ImportError, match=r"JSONDecodeError.*\(at line 2 of .*early.py\)"):
        find_recipe("early")
    (here / "cut.py").write_text("x = 1\nRECIPE = (\n")
    with pytest.raises(ImportError, match=r"recipes.cut cannot be imported: SyntaxError.*line 2"):
        find_recipe("cut")
    (here / "needs.py").write_text("import nowhere\nRECIPE = 1\n")
    with pytest.raises(ImportError, match=r"No module named 'nowhere' \(at line 1 of"):
        find_recipe("needs")


# The file of a run


def test_a_run_s_file_makes_the_same_config_and_ports_again(tmp_path):
    changes = {
        "seed": 7,
        "learning_rate": 0.1 + 0.2,
        "data": Path("some/file.jsonl"),
        "chunk": "auto",
        "lora": models.LoraConfig(rank=2, targets=("query", "value")),
        "model": models.DecoderConfig(
            width=64, rope_scaling=models.RopeScaling(factor=4.0), head_dim=32
        ),
    }
    for model in (changes["model"], kitchen.PretrainedConfig(source="here", remat=True)):
        target = resolve(sl_basic.RECIPE, {**changes, "model": model})
        ports = {"dataset_store": "hf:name:train[:10]", "metrics_store": object()}
        path = written(target, tmp_path / "experiment.json", ports)
        module, settings, bound = read_experiment(path)
        assert module is sl_basic
        assert override(sl_basic.RECIPE.config, settings) == target.config
        assert bound == {"dataset_store": "hf:name:train[:10]"}
        again = resolve(module, settings)
        assert repr(again.workflow) == repr(target.workflow)


def test_a_run_s_own_directory_is_not_part_of_what_is_run_again(tmp_path):
    target = resolve(sl_basic.RECIPE, {"workdir": tmp_path / "run", "resume": True})
    _, settings, _ = read_experiment(written(target, tmp_path / "experiment.json"))
    assert not {"workdir", "resume"} & settings.keys()
    assert settings["num_steps"] == 500


def test_a_run_s_file_says_what_was_trained_on_what():
    target = resolve(sl_basic.RECIPE, {"data": Path("file.jsonl"), "max_grad_norm": 0.0})
    made = experiment_of(target, "a-run", {})
    assert (made.id, made.experiment_type) == ("a-run", "training")
    assert made.description == list_recipes()["recipes.sl_basic"]
    assert made.dataset == ir.DatasetRef(name="file.jsonl", provider="local")
    training = made.training_config
    assert (training.batch_size, training.learning_rate, training.seed) == (4, 5e-3, 0)
    assert (training.gradient_clipping, training.checkpoint_every) == (None, 100)
    assert training.validation_split == 0.05
    assert training.model_ref.id == "sl_basic-from-scratch"
    assert dict(training.options) == {"num_steps": 500}
    assert made.metadata["workflow"] == repr(target.workflow)
    bundled = experiment_of(resolve(sl_basic, {}), "a", {}).dataset
    assert bundled == ir.DatasetRef(name="conversations", provider="bundled")
    store = experiment_of(resolve(sl_basic, {}), "a", {"dataset_store": "hf:name"}).dataset
    assert store.name == "hf:name"
    pretrained = resolve(sl_basic, {"model": {"source": "somewhere"}})
    assert experiment_of(pretrained, "a", {}).training_config.model_ref.id == "somewhere"


def test_every_target_has_a_valid_file_also_one_that_json_or_the_definitions_cannot_say():
    @dataclass(frozen=True)
    class Odd:
        scale: float = float("inf")
        batch_size: object = (2, 3)
        learning_rate: float = 0.0
        num_steps: int = 1

    odd = experiment_of(resolve(work, {}, config=Odd()), "a", {})
    assert ir.problems(odd) == ()
    assert odd.training_config is None
    assert odd.pipeline[0].options["repr"].startswith("test_every_target")
    plain = experiment_of(resolve(work, {}), "a", {})
    assert (plain.pipeline[0].module, dict(plain.pipeline[0].options)) == (None, {"config": {}})
    finite = experiment_of(resolve(work, {}, config=Odd(scale=1.0)), "a", {})
    assert finite.pipeline[0].options["config"]["batch_size"] == (2, 3)
    assert finite.training_config is None


def test_only_a_recipe_that_is_here_is_run_again(tmp_path):
    path = written(resolve(work, {}, config=Config()), tmp_path / "workflow.json")
    with pytest.raises(ValueError, match=r"'workflow' \(which was no recipe's\): no recipe"):
        read_experiment(path)
    definition = json.loads(written(resolve(sl_basic, {}), path).read_text())
    stage_of = definition["definition"]["pipeline"][0]
    for module in ("os", "subprocess", "crucible.cli", "recipes", "recipes.sl_basic.x", "tests"):
        stage_of["module"] = module
        path.write_text(json.dumps(definition))
        before = set(sys.modules)
        with pytest.raises(ValueError, match=f"module '{module}'"):
            read_experiment(path)
        assert set(sys.modules) == before
    stage_of["module"] = "recipes.sl_basci"
    path.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"Did you mean 'recipes.sl_basic'"):
        read_experiment(path)


def test_a_file_of_several_stages_is_not_one_run(tmp_path):
    made = experiment_of(resolve(sl_basic, {}), "a", {})
    two = dataclasses.replace(made, pipeline=(*made.pipeline, *made.pipeline))
    path = tmp_path / "two.json"
    two = dataclasses.replace(
        two, pipeline=(two.pipeline[0], dataclasses.replace(two.pipeline[1], name="second"))
    )
    path.write_text(ir.to_json(two))
    with pytest.raises(ValueError, match="no recipe that is here"):
        read_experiment(path)


def test_a_file_that_cannot_be_read_says_which_and_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing.json"):
        read_experiment(tmp_path / "missing.json")
    cases = {"": "Not JSON", "{": "Not JSON", "[]": "must be", '{"kind": 1}': "must be"}
    for text, said in cases.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=f"bad.json: .*{said}"):
            read_experiment(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad.json: "):
        read_experiment(tmp_path / "bad.json")


@pytest.mark.parametrize("name", ["config", "ports"])
def test_settings_and_ports_of_a_file_are_objects(tmp_path, name):
    path = written(resolve(sl_basic, {}), tmp_path / "experiment.json")
    definition = json.loads(path.read_text())
    where = definition["definition"]
    (where["pipeline"][0]["options"] if name == "config" else where["metadata"])[name] = 3
    path.write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=f"{name} must be an object, not 3"):
        read_experiment(path)


def test_a_target_without_a_config_has_an_empty_one():
    target = Target("workflow", sequence(work), None, {"x": 1})
    assert dict(target.context()) == {"x": 1}
    assert to_json(Config()) == {"seed": 0}
