import json

import pytest

from space_cli.models.inventory import inventory

SPACE = {"format": 1, "method": "full", "mask_token_ids": [9], "candidates": 3, "masks_per_group": 4}


@pytest.fixture
def status_of(tmp_path):
    def status(**fields):
        file = tmp_path / "models.toml"
        file.write_text("[models.x]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items()))
        return next(each for each in inventory(file) if each.name == "x")

    return status


@pytest.fixture
def folder(tmp_path):
    """A folder with the names of a model's files."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").touch()
    return place


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A Hub cache with `org/name`, its weights downloaded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    return repository


def test_the_bundled_model_comes_first_and_is_known():
    nano = inventory()[0]

    assert (nano.name, nano.kind) == ("nano", "bundled")


def test_a_folder_with_space_config_is_present_and_trained(status_of, folder):
    (folder / "space_config.json").write_text(json.dumps(SPACE))

    status = status_of(source=str(folder))

    assert (status.kind, status.present, status.problem) == ("folder", True, None)
    assert (status.trained, status.candidates, status.masks_per_group) == (True, 3, 4)


def test_a_plain_folder_is_present_and_not_trained(status_of, folder):
    status = status_of(source="./model")

    assert (status.source, status.present, status.trained) == (str(folder), True, False)


def test_a_folder_that_models_toml_describes_is_trained(status_of, folder):
    status = status_of(source=str(folder), mask_token_ids=[7], candidates=2)

    assert (status.trained, status.candidates, status.masks_per_group) == (True, 2, 2)


def test_a_missing_folder_is_absent_and_unknown(status_of):
    status = status_of(source="./absent")

    assert (status.kind, status.present, status.trained, status.problem) == ("folder", False, None, None)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_reported(status_of, folder, lost):
    (folder / lost).unlink()

    status = status_of(source=str(folder))

    assert (status.present, status.problem) == (False, f"no {lost}")


def test_every_shard_must_be_there(status_of, folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()

    assert status_of(source=str(folder)).problem == "no model-2.safetensors"

    (folder / "model-2.safetensors").touch()

    assert status_of(source=str(folder)).present


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("space_config.json", "{", "space_config.json: the file: Invalid JSON"),
        ("space_config.json", json.dumps(SPACE | {"candidates": 0}), "candidates: Input should be greater"),
        ("model.safetensors.index.json", "[", "Expecting value"),
    ],
)
def test_a_malformed_file_is_a_problem_of_its_model_alone(status_of, folder, name, text, message):
    (folder / name).write_text(text)

    status = status_of(source=str(folder))

    assert message in status.problem
    assert not status.present


@pytest.mark.usefixtures("cached")
def test_a_hub_model_is_looked_up_in_the_cache(status_of):
    status = status_of(source="org/name")

    assert (status.kind, status.present, status.trained) == ("hub", True, None)


def test_a_hub_model_known_to_have_no_space_config_is_not_trained(status_of, cached):
    (cached / ".no_exist" / "abc").mkdir(parents=True)
    (cached / ".no_exist" / "abc" / "space_config.json").touch()

    assert status_of(source="org/name").trained is False


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("fields", [{"source": "org/name", "revision": "v2"}, {"source": "org/other"}])
def test_another_revision_or_repository_is_absent(status_of, fields):
    status = status_of(**fields)

    assert (status.present, status.trained, status.problem) == (False, None, None)


def test_a_source_that_is_nothing_is_reported(status_of):
    status = status_of(source="a/b/c")

    assert not status.present
    assert "a/b/c" in status.problem
