import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from crucible import kitchen, models
from crucible.kitchen.recipe import to_json


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of nothing in particular."""

    workdir: Path | None = None
    resume: bool = False
    amount: int = 3

    def __post_init__(self):
        if self.amount < 0:
            raise ValueError(f"amount={self.amount} must not be negative.")


def command_line(monkeypatch, workflow, *arguments):
    started = SimpleNamespace(name="recipes.nothing")  # by python -m recipes.nothing
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", started)
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    kitchen.main(kitchen.Recipe(name="nothing", workflow=workflow, config=Settings()))


def fails_with(error):
    @kitchen.stage(host=True)
    def fails():
        raise error

    return fails


@pytest.mark.parametrize(
    "error", [ValueError("what it said"), OSError("what it said"), ImportError("what it said")]
)
def test_an_error_before_the_loop_is_said_without_a_traceback(tmp_path, monkeypatch, capsys, error):
    with pytest.raises(SystemExit) as caught:
        command_line(
            monkeypatch, lambda config: fails_with(error), "--workdir", str(tmp_path / "run")
        )
    assert caught.value.code == 1
    assert "python -m recipes.nothing: what it said" in capsys.readouterr().err


def test_an_error_inside_the_loop_is_raised_with_its_traceback(tmp_path, monkeypatch):
    loop = kitchen.repeat(3, fails_with(ValueError("what it said")))
    with pytest.raises(ValueError, match="what it said") as caught:
        command_line(monkeypatch, lambda config: loop, "--workdir", str(tmp_path / "run"))
    assert "At step 0 of 3." in caught.value.__notes__


def test_an_error_that_is_nobodys_mistake_is_raised_as_it_is(tmp_path, monkeypatch):
    broken = fails_with(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        command_line(monkeypatch, lambda config: broken, "--workdir", str(tmp_path / "run"))


def test_a_fields_own_check_ends_the_command_with_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line(monkeypatch, lambda config: fails_with(ValueError()), "--amount", "-1")
    assert caught.value.code == 2
    assert "amount=-1 must not be negative" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_with_130(tmp_path, monkeypatch, capsys):
    stop = fails_with(KeyboardInterrupt())
    with pytest.raises(SystemExit) as caught:
        command_line(monkeypatch, lambda config: stop, "--workdir", str(tmp_path / "run"))
    assert caught.value.code == 130
    assert "Interrupted." in capsys.readouterr().err


def test_a_config_is_said_in_json_and_stays_the_same_when_read_back():
    config = kitchen.SupervisedConfig(
        lora=models.LoraConfig(targets=("query", "down")), workdir=Path("/somewhere/run")
    )
    said = to_json(config)
    assert json.loads(json.dumps(said)) == said
    assert said["lora"]["targets"] == ["query", "down"]
    assert said["workdir"] == "/somewhere/run"
    assert said["model"]["width"] == 128


def test_a_workflow_that_lacks_something_is_refused_before_anything_runs(tmp_path):
    ran = []
    first = kitchen.stage(host=True)(lambda: ran.append(1))
    lacking = kitchen.stage(host=True)(lambda stat: None)
    recipe = kitchen.Recipe(
        name="nothing",
        workflow=lambda config: kitchen.sequence(first, lacking),
        config=Settings(workdir=tmp_path / "run"),
    )
    with pytest.raises(ValueError, match="needs 'stat', which nothing gives"):
        kitchen.run(recipe)
    assert ran == []


def test_a_file_in_the_place_of_the_runs_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    recipe = kitchen.Recipe(
        name="nothing",
        workflow=lambda config: fails_with(AssertionError()),
        config=Settings(workdir=tmp_path / "run"),
    )
    with pytest.raises(OSError, match="is a file"):
        kitchen.run(recipe)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("trace", ["config.json", "metrics.jsonl", "checkpoints"])
def test_any_trace_of_a_run_protects_its_directory(tmp_path, trace):
    workdir = tmp_path / "run"
    (workdir / trace).mkdir(parents=True)
    recipe = kitchen.Recipe(
        name="nothing",
        workflow=lambda config: fails_with(AssertionError()),
        config=Settings(workdir=workdir),
    )
    with pytest.raises(FileExistsError, match="has a run in it"):
        kitchen.run(recipe)
