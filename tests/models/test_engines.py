import ctypes
import json
import os
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers as tf
from tiny import MASK_IDS, lively

from space_cli.compile import toolchain
from space_cli.compile.compiled_model import CompiledEngine
from space_cli.compile.toolchain import build_kernels
from space_cli.compile.workplace import tidy
from space_cli.core.block import Block
from space_cli.core.costs import ASSUMED_COSTS, SIZES
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.engine import EagerEngine, engine_for
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Step
from space_cli.errors import RunFailed, UsageProblem
from space_cli.models import engines, refusals
from space_cli.models.engines import measured, prepare
from space_cli.models.loading import LoadedModel
from space_cli.models.memory import available_memory
from space_cli.models.speeds import Speed, measure_speed

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
        assert measured(prepare(loaded_model(), engine="compiled")).compiled is not None
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
        sampler=Sampler(),
        drafts=ChainDrafter(Block.chain(2, 2)),
        mask_token_ids=MASK_IDS,
        compiled=loaded.compiled,
    )
    return [token for step in steps for token in step.tokens]


@pytest.mark.usefixtures("filled")
def test_what_is_compiled_once_is_taken_by_auto_ever_after():
    loaded = prepare(loaded_model(), on_compile=never)

    assert loaded.compiled is not None
    assert tokens_of(loaded) == tokens_of(loaded_model())


@pytest.mark.usefixtures("empty")
def test_auto_compiles_only_where_enough_tokens_are_to_come():
    said = []

    few = prepare(loaded_model(), tokens=10, on_compile=lambda: said.append(1))
    assert (few.compiled, said) == (None, [])
    many = prepare(loaded_model(), tokens=ENOUGH, on_compile=lambda: said.append(1))

    assert many.compiled is not None
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
    assert prepare(loaded_model(), engine="eager").compiled is None


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


def test_a_damaged_program_is_made_again(filled):
    package, said = filled("program"), []
    package.write_bytes(package.read_bytes()[:5000])

    assert prepare(loaded_model(), on_compile=never).compiled is None  # a short run goes on without
    loaded = prepare(loaded_model(), engine="compiled", on_compile=lambda: said.append(1))

    assert said == [1]
    assert tokens_of(loaded) == tokens_of(loaded_model())
    assert prepare(loaded_model(), engine="compiled", on_compile=never).compiled is not None


def test_a_program_that_computes_something_else_is_never_used(filled):
    other = loaded_model(hidden_act="relu")
    wrong = filled("program").with_name(f"program-{engines.fingerprint(other.model)}.pt2")
    shutil.copy(filled("program"), wrong)

    assert prepare(other, on_compile=never).compiled is None
    assert not wrong.exists()


def test_half_a_library_of_kernels_is_never_loaded(filled):
    library = next(filled("program").parent.glob("kernels-*.so"))
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])

    built = build_kernels(library.parent)

    assert built == library
    assert ctypes.CDLL(str(built)).space_linear_float32


def test_a_library_that_cannot_be_loaded_is_reported_and_costs_auto_nothing(filled, monkeypatch):
    def refuse(*_, **__):
        raise OSError("failed to map segment from shared object")  # as on a file system mounted noexec

    monkeypatch.setattr(toolchain, "_loaded", {})
    monkeypatch.setattr(toolchain.ctypes, "CDLL", refuse)

    assert prepare(loaded_model(), on_compile=never).compiled is None
    with pytest.raises(RunFailed, match="kernels cannot be loaded: failed to map segment"):
        prepare(loaded_model(), engine="compiled", on_compile=never)
    assert filled("program").exists()


@pytest.mark.usefixtures("empty")
def test_a_processor_that_this_one_is_not_is_reported_before_anything_is_compiled(monkeypatch):
    monkeypatch.setenv("SPACE_CPU", "x86-64-v4")
    monkeypatch.setattr(toolchain, "processor_field", lambda _: "sse2 fma avx2 bmi2 avx512f")

    assert prepare(loaded_model(), tokens=ENOUGH).compiled is None
    with pytest.raises(RunFailed, match="x86-64-v4: this processor does not have avx512bw, avx512dq, avx512vl"):
        prepare(loaded_model(), engine="compiled")


def timed(monkeypatch, *, eager, program):
    """Pretend that engines take so long; return of which kinds were timed."""
    kinds = []

    def measure(engine, _):
        kinds.append(type(engine))
        return Speed(*(program if isinstance(engine, CompiledEngine) else eager))

    monkeypatch.setattr(engines, "measure_speed", measure)
    return kinds


@pytest.mark.parametrize(
    ("eager", "program", "is_compiled"),
    [
        ((0.010, 0.1), (0.002, 0.1), True),
        ((0.002, 0.1), (0.010, 0.1), False),
        # a step that is a little faster does not make up for a prompt that takes ten times as long
        ((0.003, 0.1), (0.002, 1.0), False),
    ],
)
def test_auto_takes_the_engine_whose_answers_take_less_time_as_timed_once(
    filled, monkeypatch, eager, program, is_compiled
):
    for file in filled("program").parent.glob("speeds-*"):
        file.unlink()
    kinds = timed(monkeypatch, eager=eager, program=program)

    first, second = prepare(loaded_model()), prepare(loaded_model())

    assert (first.compiled is not None, second.compiled is not None) == (is_compiled, is_compiled)
    # in turn, so that a busy moment meets both
    assert kinds == [EagerEngine, CompiledEngine] * 3
    assert prepare(loaded_model(), engine="compiled").compiled is not None


@pytest.mark.usefixtures("filled")
def test_engines_are_timed_on_a_step_and_a_prompt():
    loaded = prepare(loaded_model(), engine="compiled")
    for program in (None, loaded.compiled):
        speed = measure_speed(engine_for(loaded.model, program, max_length=64, max_slots=1))
        assert 0 < speed.step < speed.answer
        assert 0 < speed.prompt < speed.answer


@pytest.mark.parametrize("content", ["", "{", "[]", '{"eager": {"step": 1}}', '{"eager": 1, "compiled": 2}'])
def test_damaged_speeds_are_measured_again(filled, content, monkeypatch):
    kinds = timed(monkeypatch, eager=(2, 2), program=(1, 1))
    prepare(loaded_model())
    folder = filled("program").parent
    for file in folder.glob("speeds-*"):
        file.write_text(content)
    kinds.clear()

    prepare(loaded_model())

    assert kinds == [EagerEngine, CompiledEngine] * 3


def test_a_close_loss_is_not_remembered(filled, monkeypatch):
    for file in filled("program").parent.glob("speeds-*"):
        file.unlink()
    kinds = timed(monkeypatch, eager=(0.010, 0.1), program=(0.011, 0.1))

    assert prepare(loaded_model()).compiled is None
    kinds.clear()
    prepare(loaded_model())

    assert kinds


def test_what_is_in_use_is_never_too_old_to_keep(filled):
    folder = filled("program").parent
    for file in folder.iterdir():
        os.utime(file, (0, 0))

    assert prepare(loaded_model(), engine="compiled", on_compile=never).compiled is not None
    tidy(folder)

    assert sorted(file.suffix for file in folder.iterdir()) == [".pt2", ".sha256", ".so"]


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine without a C++ compiler."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.usefixtures("empty", "no_compiler")
def test_without_a_compiler_auto_says_each_time_what_is_missing_and_how_to_get_it():
    said = []

    runs = [prepare(loaded_model(), tokens=ENOUGH, on_compile=never, on_eager=said.append) for _ in range(2)]

    assert [run.compiled for run in runs] == [None, None]
    assert (
        said
        == [
            "no C++ compiler that works: there is no c++; apt install g++ (Debian), dnf install gcc-c++ (Fedora) "
            "or xcode-select --install (macOS) brings one"
        ]
        * 2
    )


@pytest.mark.usefixtures("empty", "no_compiler")
def test_where_no_compiler_is_needed_its_absence_is_not_told():
    prepare(loaded_model(), tokens=10, on_eager=never)
    prepare(loaded_model(), engine="eager", tokens=ENOUGH, on_eager=never)


@pytest.mark.usefixtures("filled", "no_compiler")
def test_what_is_compiled_already_needs_no_compiler():
    assert prepare(loaded_model(), on_compile=never, on_eager=never).compiled is not None


@pytest.mark.usefixtures("empty")
def test_a_failure_on_record_is_told_without_another_try(monkeypatch):
    tried, said = failing_compiler(monkeypatch), []

    for _ in range(2):
        prepare(loaded_model(), tokens=ENOUGH, on_eager=said.append)

    assert said == ["no C++ compiler"] * 2
    assert tried == [1]


def failing_compiler(monkeypatch):
    """Make compilations fail; return a list of those tried."""
    tried = []

    def fail(*_):
        tried.append(1)
        raise RunFailed("no C++ compiler")

    monkeypatch.setattr(engines, "build_kernels", fail)
    return tried


@pytest.mark.usefixtures("empty")
def test_a_compiler_that_fails_without_a_word_is_reported_in_a_few(monkeypatch):
    monkeypatch.setenv("CXX", "false")

    with pytest.raises(RunFailed, match=r"works: false ends with exit code 1$"):
        prepare(loaded_model(), engine="compiled")


@pytest.mark.usefixtures("empty")
def test_without_a_compiler_auto_goes_on_eager_and_does_not_try_again(monkeypatch):
    tried = failing_compiler(monkeypatch)

    with pytest.raises(RunFailed, match="no C"):
        prepare(loaded_model(), engine="compiled")
    assert prepare(loaded_model(), tokens=ENOUGH, on_compile=never).compiled is None
    assert tried == [1]


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("change", ["compiler", "memory", "time", "damage"])
def test_what_was_refused_is_tried_again_once_something_has_changed(monkeypatch, tmp_path, change):
    tried = failing_compiler(monkeypatch)
    monkeypatch.setattr(refusals, "available_memory", lambda: 2**30)
    prepare(loaded_model(), tokens=ENOUGH)
    prepare(loaded_model(), tokens=ENOUGH)
    assert tried == [1]

    if change == "compiler":
        monkeypatch.setenv("CXX", "true")
    elif change == "memory":
        monkeypatch.setattr(refusals, "available_memory", lambda: 2**32)
    elif change == "time":
        now = time.time()
        monkeypatch.setattr(refusals.time, "time", lambda: now + 30 * 24 * 3600)
    else:  # a mark of an earlier version
        next(tmp_path.rglob("*.refused")).write_text("no C++ compiler that works")
    prepare(loaded_model(), tokens=ENOUGH)

    assert tried == [1, 1]


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
    assert prepare(replace(loaded, dtype="float16"), tokens=ENOUGH).compiled is None


def test_a_cache_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "space").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert prepare(loaded_model(), tokens=ENOUGH).compiled is None
    with pytest.raises(RunFailed):
        prepare(loaded_model(), engine="compiled")


def control_group(root, version, path, limit, used, cached):
    """Lay out a control group as Linux does."""
    top, names = (
        ("sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file"))
        if version == 2
        else ("sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    )
    folder = root / top / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("0::/a/b\n" if version == 2 else "9:cpu:/x\n4:memory:/a/b\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_no_more_memory_than_its_limits_leave(tmp_path, monkeypatch, version):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert available_memory(tmp_path) == 10_000

    control_group(tmp_path, version, "a/b", "max", 500, 0)
    assert available_memory(tmp_path) == 10_000
    control_group(tmp_path, version, "a/b", 6000, 1500, 500)
    assert available_memory(tmp_path) == 5000
    control_group(tmp_path, version, "a", 4000, 3000, 0)  # of the group around it
    assert available_memory(tmp_path) == 1000
    control_group(tmp_path, version, "a/b", 1000, 2000, 0)
    assert available_memory(tmp_path) == 0


@pytest.mark.usefixtures("empty")
def test_a_large_model_is_compiled_for_a_shorter_run(monkeypatch):
    tried = failing_compiler(monkeypatch)
    monkeypatch.setattr(engines, "_BYTES_THAT_SAVE_AS_MUCH", engines._size(loaded_model()) / 10)

    prepare(loaded_model(), tokens=390)
    assert tried == []
    prepare(loaded_model(), tokens=410)
    assert tried == [1]
