import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers as tf
from tiny import MASK_IDS, lively

from space_cli.core.block import Block
from space_cli.core.choose import Chooser
from space_cli.core.costs import ASSUMED_COSTS, SIZES
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Step
from space_cli.errors import RunFailed, UsageProblem
from space_cli.models import engines
from space_cli.models.engines import measured, prepare
from space_cli.models.loading import LoadedModel

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which the compiled engine needs")
ENOUGH = 1_000_000
STEP = Step((1,), 0, (), (), 1, 0.25)


def loaded_model(**changes):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **changes
    )
    model = lively(tf.LlamaForCausalLM(config))
    return LoadedModel(
        name="tiny",
        source="tiny",
        model=model,
        tokenizer=None,
        space=None,
        dtype="float32",
        device="cpu",
        context_length=2048,
        eos_token_ids=frozenset(),
        mask_token_ids=MASK_IDS,
        candidates=2,
        masks_per_group=3,
        prompt_template=None,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A user's cache folder in which `loaded_model()` was compiled."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        assert measured(prepare(loaded_model(), engine="compiled")).program is not None
    return home


@pytest.fixture
def filled(cache, tmp_path, monkeypatch):
    """A copy of it, and its files by their beginnings."""
    home = shutil.copytree(cache, tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return lambda beginning: next((home / "space" / "engines").glob(f"{beginning}-*"))


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def never(*_):
    pytest.fail("it was compiled or measured again")


def tokens_of(loaded):
    steps = decode(
        loaded.model,
        [5, 9, 33],
        stop=StopRule(20),
        chooser=Chooser(),
        drafts=ChainDrafter(Block.chain(2, 2)),
        mask_token_ids=MASK_IDS,
        program=loaded.program,
    )
    return [token for step in steps for token in step.tokens]


@pytest.mark.usefixtures("filled")
def test_what_is_compiled_once_is_taken_by_auto_ever_after():
    loaded = prepare(loaded_model(), on_compile=never)

    assert loaded.program is not None
    assert tokens_of(loaded) == tokens_of(loaded_model())


@pytest.mark.usefixtures("empty")
def test_auto_compiles_only_where_enough_tokens_are_to_come():
    said = []

    few = prepare(loaded_model(), tokens=10, on_compile=lambda: said.append(1))
    assert (few.program, said) == (None, [])
    many = prepare(loaded_model(), tokens=ENOUGH, on_compile=lambda: said.append(1))

    assert many.program is not None
    assert said == [1]


@pytest.mark.usefixtures("filled")
def test_a_tuned_model_takes_the_program_of_its_base():
    tuned = loaded_model()
    with torch.no_grad():
        tuned.model.lm_head.weight.neg_()

    own = tokens_of(tuned)
    assert own != tokens_of(loaded_model())
    assert tokens_of(prepare(tuned, engine="compiled", on_compile=never)) == own


@pytest.mark.usefixtures("filled")
def test_eager_leaves_the_program_alone():
    assert prepare(loaded_model(), engine="eager").program is None


@pytest.mark.usefixtures("filled")
def test_costs_are_measured_once_and_kept():
    loaded = prepare(loaded_model())

    first = measured(loaded)
    again, anew = measured(loaded), measured(loaded, fresh=True)

    assert list(first.costs.seconds) == list(SIZES)
    assert all(seconds > 0 for seconds in first.costs.seconds.values())
    assert again.costs == first.costs
    assert anew.costs != first.costs


@pytest.mark.usefixtures("filled")
def test_costs_that_nobody_asks_for_are_not_measured(monkeypatch):
    monkeypatch.setattr(engines, "measure_costs", never)

    assert prepare(loaded_model(), engine="eager").costs is ASSUMED_COSTS


@pytest.mark.usefixtures("empty")
def test_slow_steps_are_timed_for_a_while_only(monkeypatch):
    steps = []
    monkeypatch.setattr(engines, "_PROBE_SECONDS", 0.0)
    monkeypatch.setattr(engines, "decode", lambda *_, **__: iter(steps.append(n) or STEP for n in range(99)))

    costs = measured(prepare(loaded_model(), engine="eager")).costs

    assert costs.overhead == max(0.0, STEP.seconds - costs.seconds[STEP.slots])
    assert len(steps) < 10


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"seconds": {"1": 2}}', b'{"seconds": 3, "overhead": 0}'])
def test_damaged_costs_are_measured_again(filled, content):
    file = filled("costs")
    file.write_bytes(content)

    measured(prepare(loaded_model()))

    assert json.loads(file.read_bytes())["seconds"]["1"] > 0


def test_a_damaged_program_is_removed_and_told(filled):
    package = filled("program")
    package.write_bytes(package.read_bytes()[:5000])

    with pytest.raises(RunFailed, match="cannot be run"):
        prepare(loaded_model(), engine="compiled", on_compile=never)

    assert not package.exists()


def test_a_program_that_computes_something_else_is_never_used(filled):
    other = loaded_model(hidden_act="relu")
    file = filled("program")
    shutil.copy(file, file.with_name(f"program-{engines.fingerprint(other.model)}.pt2"))

    with pytest.raises(RunFailed, match="computes something else"):
        prepare(other, engine="compiled", on_compile=never)
    assert prepare(other, on_compile=never).program is None


@pytest.mark.usefixtures("empty")
def test_without_a_compiler_auto_goes_on_eager_and_does_not_try_again(monkeypatch):
    monkeypatch.setattr(engines, "compile_program", lambda *_: (_ for _ in ()).throw(RunFailed("no C++ compiler")))

    with pytest.raises(RunFailed, match="no C"):
        prepare(loaded_model(), engine="compiled")
    assert prepare(loaded_model(), tokens=ENOUGH).program is None
    assert prepare(loaded_model(), tokens=ENOUGH, on_compile=never).program is None


@pytest.mark.usefixtures("empty")
def test_what_does_not_fit_is_not_compiled(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))

    with pytest.raises(RunFailed, match="of memory"):
        prepare(loaded_model(), engine="compiled", on_compile=never)


@pytest.mark.usefixtures("empty")
def test_a_model_that_cannot_be_compiled_says_why():
    loaded = loaded_model()
    loaded.model.half()

    with pytest.raises(UsageProblem, match="its dtype is float16"):
        prepare(replace(loaded, dtype="float16"), engine="compiled")
    assert prepare(replace(loaded, dtype="float16"), tokens=ENOUGH).program is None


def test_a_cache_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "space").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert prepare(loaded_model(), tokens=ENOUGH).program is None
    with pytest.raises(RunFailed):
        prepare(loaded_model(), engine="compiled")
