"""The C++ kernels, built for each instruction set that can be run here, against numpy; aarch64 under an emulator."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from space_cli.compile import toolchain
from space_cli.core.quantized import WeightType
from space_cli.core.sampling import TOP_K

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which the compiled engine needs")

SOURCES = [toolchain.KERNELS / name for name in ("linear.cpp", "attend.cpp", "likely.cpp", "quantized.cpp")]
NEEDS = {"x86-64": ("sse2",), "native": ()} | toolchain.LEVELS
ROWS = [*range(1, 41), 128]
DTYPES = ["float32", "bfloat16"]
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}


def narrowed(values):
    """bfloat16 as its bits, rounded to nearest with ties to even."""
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def stored(values, dtype):
    return np.ascontiguousarray(values, dtype=np.float32) if dtype == "float32" else narrowed(values)


def wide(values):
    return (
        values.astype(np.float64) if values.dtype == np.float32 else (values.astype(np.uint32) << 16).view(np.float32)
    )


class Loaded:
    """Kernels that this process can call."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))

    def threads(self, count):
        self._library.omp_set_num_threads(count)

    def call(self, name, *arguments):
        getattr(self._library, name)(*map(self._passed, arguments))

    def _passed(self, argument):
        if isinstance(argument, np.ndarray):
            return argument.ctypes.data_as(ctypes.c_void_p)
        if isinstance(argument, tuple):  # a structure
            values = [self._passed(each) for each in argument]
            fields = [(f"field{place}", type(value)) for place, value in enumerate(values)]
            return ctypes.byref(type("Passed", (ctypes.Structure,), {"_fields_": fields})(*values))
        return {int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}[type(argument)](argument)


class Emulated:
    """Kernels in a program for another processor."""

    def __init__(self, program):
        self._program, self._threads = program, 1

    def threads(self, count):
        self._threads = count

    def call(self, name, *arguments):
        message = [f"{name}\n".encode()]
        arguments = [field for each in arguments for field in (each if isinstance(each, tuple) else [each])]
        for each in arguments:
            if each is None:
                message.append(b"0")
            elif isinstance(each, np.ndarray):
                message += [b"p", struct.pack("q", each.nbytes), each.tobytes()]
            else:
                message.append(
                    b"f" + struct.pack("f", each) if isinstance(each, float) else b"i" + struct.pack("q", each)
                )
        command, environment = ["qemu-aarch64", str(self._program)], {"OMP_NUM_THREADS": str(self._threads)}
        said = subprocess.run(command, input=b"".join(message), capture_output=True, check=True, env=environment)
        at = 0
        for each in arguments:
            if isinstance(each, np.ndarray):
                each.flat = np.frombuffer(said.stdout, each.dtype, each.size, at)
                at += each.nbytes


def built_for(processor, folder):
    known = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    if not set(NEEDS[processor]) <= set(known.split()):
        pytest.skip(f"this machine does not run {processor}")
    library = folder / "kernels.so"
    subprocess.run([*toolchain.compiler_command(processor), "-o", str(library), *map(str, SOURCES)], check=True)
    return Loaded(library)


def emulated(folder):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("no cross compiler for aarch64, or no qemu-user")
    flags = [flag for flag in toolchain.compiler_command("armv8-a")[1:] if flag not in ("-shared", "-fPIC")]
    runner, program = Path(__file__).with_name("kernels_runner.cpp"), folder / "runner"
    sources = map(str, [runner, *SOURCES])
    subprocess.run([compiler, *flags, "-static", f"-I{toolchain.KERNELS}", "-o", str(program), *sources], check=True)
    return Emulated(program)


SLOW = ("x86-64", "x86-64-v4", "aarch64")  # half a minute each to compile


@pytest.fixture(
    scope="module", params=["native", "x86-64-v3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def kernels(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return emulated(folder) if request.param == "aarch64" else built_for(request.param, folder)


def packed(weights, dtype):
    """(outputs / 16, width / depth, 16, depth) of (outputs, width) weights."""
    depth = 1 if dtype == "float32" else 2
    tiles = weights.reshape(-1, 16, weights.shape[1] // depth, depth).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles)


def linear(kernels, dtype, states, weights, bias=None):
    outputs, width = weights.shape
    found = np.empty((len(states), outputs), dtype=states.dtype)
    sizes = len(states), width, outputs
    kernels.call(f"space_linear_{dtype}", states, packed(weights, dtype), bias, found, *sizes)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
# fewer inputs than a block of them, more that do not fill the last, more than a cache holds of 128 rows; tiles that
# fill groups and threads, or not
@pytest.mark.parametrize(("width", "outputs"), [(34, 16), (600, 9 * 16), (5000, 18 * 16)])
def test_a_row_of_a_linear_layer_is_right_and_has_the_same_bits_whatever_stands_beside_it(
    kernels, dtype, width, outputs
):
    random = np.random.default_rng(width)
    states = stored(random.standard_normal((max(ROWS), width)), dtype)
    weights = stored(random.standard_normal((outputs, width)) / width**0.5, dtype)
    bias = stored(random.standard_normal(outputs), dtype)

    kernels.threads(1)
    alone = np.concatenate([linear(kernels, dtype, row[None].copy(), weights, bias) for row in states[:40]])
    kernels.threads(3)
    for rows in ROWS:
        found = linear(kernels, dtype, states[:rows].copy(), weights, bias)
        assert np.array_equal(found[:40], alone[:rows]), rows
    assert np.array_equal(found[-1:], linear(kernels, dtype, states[-1:].copy(), weights, bias))

    expected = wide(states).astype(np.float64) @ wide(weights).T + wide(bias)
    assert np.abs(wide(found) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()
    without = linear(kernels, dtype, states[:1].copy(), weights)
    assert np.abs(wide(without) - (expected[:1] - wide(bias))).max() <= TOLERANCE[dtype] * np.abs(expected).max()


def attend(kernels, dtype, call, cache, parents, length):
    """Append a call's keys and values to a cache that holds `length`; return (rows, heads, width)."""
    keys, values = cache
    (rows, heads, width), (_, key_heads, value_width) = call[0].shape, call[2].shape
    found = np.empty((rows, heads, value_width), dtype=call[0].dtype)
    states = [part for each in call for part in (each, each.shape[2], each.shape[1] * each.shape[2])]
    sizes = rows, heads, key_heads, width, value_width, length, keys.shape[1]
    parents = np.array(parents, dtype=np.int32)
    kernels.call(f"space_attend_{dtype}", *states, keys, values, found, parents, *sizes, float(width**-0.5))
    return found


def seen_by(row, parents, length):
    slots = []
    while row >= 0:
        slots.append(length + row)
        row = parents[row]
    return [*range(length), *reversed(slots)]


def attended(call, keys, values, parents, length):
    """What (rows, heads, width) of attention is, in double precision."""
    query, group = wide(call[0]), call[0].shape[1] // keys.shape[0]
    found = np.empty((*query.shape[:2], values.shape[2]))
    for row, head in np.ndindex(*query.shape[:2]):
        seen = seen_by(row, parents, length)
        scores = wide(keys)[head // group, seen] @ query[row, head].astype(np.float64) * query.shape[2] ** -0.5
        probs = np.exp(scores - scores.max())
        found[row, head] = probs / probs.sum() @ wide(values)[head // group, seen]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (48, 16), (128, 80)])
def test_attention_is_right_and_a_prompt_in_one_call_has_the_bits_of_calls_of_any_size(
    kernels, dtype, width, value_width
):
    random, length, rows, heads, key_heads = np.random.default_rng(width), 37, 128, 6, 2
    call = tuple(
        stored(random.standard_normal((rows, count, size)), dtype)
        for count, size in ((heads, width), (key_heads, width), (key_heads, value_width))
    )
    before = [stored(random.standard_normal((key_heads, 200, size)), dtype) for size in (width, value_width)]

    def in_calls_of(some):
        cache, found = [each.copy() for each in before], []
        for start in range(0, rows, some):
            part = tuple(each[start : start + some].copy() for each in call)
            chain = range(-1, len(part[0]) - 1)
            found.append(attend(kernels, dtype, part, cache, chain, length + start))
        return np.concatenate(found), cache

    kernels.threads(3)
    whole, cache = in_calls_of(rows)
    for some in (1, 5, 40):
        assert np.array_equal(in_calls_of(some)[0], whole), some

    for held, own in zip(cache, call[1:], strict=True):
        assert np.array_equal(held[:, length : length + rows], own.transpose(1, 0, 2))
    expected = attended(call, *cache, range(-1, rows - 1), length)
    assert np.abs(wide(whole) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_of_a_tree_sees_its_ancestors_alone(kernels, dtype):
    random, length, width = np.random.default_rng(0), 21, 64
    parents = [-1, 0, 0, 2, 1, 3, 3, 0, 7]
    call = tuple(stored(random.standard_normal((len(parents), count, width)), dtype) for count in (6, 2, 2))
    cache = [stored(random.standard_normal((2, 40, width)), dtype) for _ in range(2)]

    found = attend(kernels, dtype, call, cache, parents, length)

    expected = attended(call, *cache, parents, length)
    assert np.abs(wide(found) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64, 1003])
def test_the_most_probable_tokens_and_their_probabilities(kernels, dtype, width):
    random = np.random.default_rng(width)
    logits = stored(4 * random.standard_normal((40, width)), dtype)
    logits[0, :3] = logits[0].max()  # of equal ones the first

    tokens, probs = np.empty((40, TOP_K), dtype=np.int64), np.empty((40, TOP_K), dtype=np.float32)
    kernels.call(f"space_likely_{dtype}", logits, tokens, probs, 40, width)

    own = wide(logits).astype(np.float64)
    order = np.argsort(-own, axis=1, kind="stable")[:, :TOP_K]
    known = order.shape[1]
    assert np.array_equal(tokens[:, :known], order)
    softmax = np.exp(own) / np.exp(own).sum(axis=1, keepdims=True)
    assert not probs[:, known:].any()  # a vocabulary smaller than that
    assert np.allclose(probs[:, :known], np.take_along_axis(softmax, order, axis=1), rtol=1e-5)


def blocks_of(weight_type, outputs, width, random):
    """Random blocks of a type, with scales that keep weights near one, and the weights in them."""
    kind = gguf.GGMLQuantizationType(int(weight_type))
    if weight_type is WeightType.F16:
        raw = random.standard_normal((outputs, width)).astype(np.float16)
        return raw, raw.astype(np.float32)
    if weight_type is WeightType.BF16:
        raw = narrowed(random.standard_normal((outputs, width)))
        return raw, wide(raw)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (outputs * width // size, num_bytes), dtype=np.uint8)
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,))
    for place in places:
        scales = random.uniform(0.001, 0.01, len(raw)).astype(np.float16)
        raw[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(outputs, -1), gguf.dequantize(raw.reshape(outputs, -1), kind)


def rounded(states):
    """Rows as the kernels round them: to 8 bits, in chunks of 32."""
    chunks = states.reshape(len(states), -1, 32)
    largest = np.abs(chunks).max(axis=2, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return (np.rint(chunks * factor) * (largest / np.float32(127))).reshape(states.shape)


@pytest.mark.parametrize("weight_type", WeightType, ids=lambda each: each.name)
# tiles that are filled, or not
@pytest.mark.parametrize(("width", "outputs"), [(512, 40), (1536, 64)])
def test_weights_of_few_bits_are_read_as_they_lie_and_rows_have_the_same_bits_whatever_stands_beside_them(
    kernels, weight_type, width, outputs
):
    random = np.random.default_rng(int(weight_type) + width)
    raw, weights = blocks_of(weight_type, outputs, width, random)
    order = random.permutation(outputs).astype(np.int64)
    bias = random.standard_normal(outputs).astype(np.float32)
    states = random.standard_normal((max(ROWS), width)).astype(np.float32)
    states[3, :64] = 0
    held = np.zeros(64 * 2 * width * 2, dtype=np.uint8)

    def multiplied(rows):
        found = np.empty((len(rows), outputs), dtype=np.float32)
        kernels.call(
            "space_linear_quantized", int(weight_type), rows, held, bias, found, len(rows), width, outputs, None
        )
        return found

    kernels.call("space_pack", int(weight_type), raw, order, held, outputs, width)
    read = np.empty((outputs, width), dtype=np.float32)
    kernels.call("space_rows_quantized", int(weight_type), np.arange(outputs), held, read, outputs, width)
    whole = multiplied(states)

    assert np.array_equal(read, weights[order])
    is_wide = weight_type in (WeightType.F16, WeightType.BF16)
    expected = (states if is_wide else rounded(states)).astype(np.float64) @ weights[order].T.astype(np.float64) + bias
    assert np.abs(whole - expected).max() < 1e-5 * np.abs(expected).max()
    for rows in (1, 2, 3, 4, 5, 8, 13, 32):
        assert np.array_equal(multiplied(states[5 : 5 + rows].copy()), whole[5 : 5 + rows])


def in_8_bits(kernels, weights):
    """Weights as a type Q8_0 holds them, and packed."""
    raw = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    held = np.zeros(-(-len(weights) // 16) * (weights.shape[1] // 32 * 544 + 64), dtype=np.uint8)
    kernels.call("space_pack", int(WeightType.Q8_0), raw, None, held, *weights.shape)
    return gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0), held


@pytest.mark.parametrize("weight_type", [WeightType.Q4_1, WeightType.F16], ids=lambda each: each.name)
# rows that are no masks, and that are; few outputs are left to one thread
@pytest.mark.parametrize(("width", "ends", "first"), [(64, (32, 48), 3), (576, (576, 768, 960), 0), (576, (576,), 31)])
def test_an_update_is_added_to_the_rows_that_are_masks_and_to_no_others(kernels, weight_type, width, ends, first):
    random = np.random.default_rng(width + first)
    rank, outputs = 64, ends[-1]
    raw, _ = blocks_of(weight_type, outputs, width, random)
    packed_weights = np.zeros(outputs * width * 2, dtype=np.uint8)
    kernels.call("space_pack", int(weight_type), raw, None, packed_weights, outputs, width)
    down, packed_down = in_8_bits(kernels, random.standard_normal((len(ends) * rank, width)).astype(np.float32))
    up, packed_up = in_8_bits(kernels, random.standard_normal((outputs, rank)).astype(np.float32))
    states = random.standard_normal((32, width)).astype(np.float32)

    def multiplied(rows, *, masks_from=None):
        update = packed_down, packed_up, np.array(ends), len(ends), rank, masks_from
        found = np.empty((len(rows), outputs), dtype=np.float32)
        arguments = rows, packed_weights, None, found, len(rows), width, outputs
        kernels.call("space_linear_quantized", int(weight_type), *arguments, None if masks_from is None else update)
        return found

    kernels.threads(2)
    base, found = multiplied(states), multiplied(states, masks_from=first)
    kernels.threads(1)
    alone = multiplied(states[-1:].copy(), masks_from=0)

    assert np.array_equal(found[:first], base[:first])
    assert np.array_equal(found[-1:], alone)
    inner = (rounded(states[first:]) @ down.T).reshape(-1, rank)
    inner = rounded(inner.astype(np.float32)).reshape(-1, len(ends), rank)
    layer = np.searchsorted(ends, np.arange(outputs), side="right")
    added = np.einsum("mor,or->mo", inner[:, layer], up)
    assert np.abs(found[first:] - base[first:] - added).max() < 2e-3 * np.abs(added).max()
