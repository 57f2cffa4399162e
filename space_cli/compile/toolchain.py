"""The C++ compiler, the library of our kernels that it makes, and what both depend on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import transformers

from space_cli.compile.workplace import used, workplace
from space_cli.core.quantized import use_kernels
from space_cli.errors import RunFailed, writing

KERNELS = Path(__file__).parent / "kernels"
LEVELS = {"x86-64-v3": ("avx2", "fma", "bmi2"), "x86-64-v4": ("avx512f", "avx512bw", "avx512dq", "avx512vl")}
"""Instruction sets that `SPACE_CPU` may name, with what they have beyond others of their kind, as Linux lists it."""
_KERNELS_BYTES = 4 * 2**20
_loaded: dict[str, ctypes.CDLL] = {}


def machine() -> tuple[str, ...]:
    """Return versions and processor, on which compiled code depends."""
    capability = torch.backends.cpu.get_cpu_capability()
    versions = torch.__version__, transformers.__version__
    return *versions, platform.machine(), capability, instructions(), processor_field("flags")


def instructions() -> str:
    """Return the `-march` of the kernels: `SPACE_CPU`, or `native`."""
    return os.environ.get("SPACE_CPU") or "native"


def _check_processor() -> None:
    """Refuse an instruction set that this processor lacks; running it would kill the process."""
    missing = set(LEVELS.get(instructions(), ())).difference(processor_field("flags").split())
    if missing:
        raise RunFailed(
            f"SPACE_CPU={instructions()}: this processor does not have {', '.join(sorted(missing))}",
            hint="unset SPACE_CPU, or choose another",
        )


def compiler() -> str:
    """Return the C++ compiler's name: `CXX`, or `c++`."""
    return os.environ.get("CXX") or "c++"


def check_compiler() -> None:
    """Raise what a user without a C++ compiler has to know.

    Raises:
        RunFailed: there is none.
    """
    if shutil.which(compiler()) is not None:
        return
    if os.environ.get("CXX"):
        raise RunFailed(f"no C++ compiler that works: CXX={compiler()} is not there", hint="set CXX to one that is")
    raise RunFailed(
        f"no C++ compiler that works: there is no {compiler()}",
        hint="apt install g++ (Debian), dnf install gcc-c++ (Fedora) or xcode-select --install (macOS) brings one",
    )


def compiler_command(processor: str) -> list[str]:
    """Return how a library of kernels is compiled for a processor, sources and output apart."""
    # contracted or not as the compiler likes, a row could round one way alone and another way in a block
    exact = "-ffp-contract=off"
    return [
        *(compiler(), "-O3", f"-march={processor}", exact, "-fopenmp", "-fPIC", "-shared"),
        "-std=c++20",
    ]


def build_kernels(folder: Path) -> Path:
    """Return the library of our kernels; compile it into a folder if it is not there.

    Raises:
        RunFailed: there is no C++ compiler, no room, or the compiler fails; or the processor is none that `SPACE_CPU`
            names.
    """
    _check_processor()
    library = folder / f"kernels-{toolchain_digest()[:16]}.so"
    seal = library.with_suffix(".sha256")
    if (digest := _digest(library)) is not None and digest == _content(seal):
        used(library, seal)
        return library
    check_compiler()
    with workplace(folder, _KERNELS_BYTES) as place:
        unfinished = place / library.name
        _compile_kernels(unfinished)
        with writing(library):
            seal.write_bytes(_digest(unfinished) or b"")
            unfinished.replace(library)
    return library


def _compile_kernels(library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    command = [*compiler_command(instructions()), f"-I{torch_folder / 'include'}", "-o", str(library)]
    command += [*map(str, sorted(KERNELS.glob("*.cpp"))), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or _how_it_ended(command[0], error)).strip().splitlines()
        first = next((line for line in said if "error" in line), said[0])
        raise RunFailed(f"no C++ compiler that works: {first}") from error


def _how_it_ended(compiler: str, error: OSError | subprocess.CalledProcessError) -> str:
    return str(error) if isinstance(error, OSError) else f"{compiler} ends with exit code {error.returncode}"


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _digest(file: Path) -> bytes | None:
    """Return a file's hash; loading a truncated library would kill the process."""
    content = _content(file)
    return None if content is None else hashlib.sha256(content).hexdigest().encode()


def load_kernels(library: Path) -> ctypes.CDLL:
    """Return the library of our kernels; compiled models loaded later find them in it.

    Raises:
        RunFailed: it is no library for this machine, or lies where none may be loaded from.
    """
    # compiled models find what was loaded first, and all libraries of one version are alike
    if "kernels" not in _loaded:
        try:
            _loaded["kernels"] = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise RunFailed(
                f"the kernels cannot be loaded: {error}",
                hint="let XDG_CACHE_HOME name a folder that libraries may be loaded from",
            ) from error
        use_kernels(_loaded["kernels"])
    return _loaded["kernels"]


def toolchain_digest(*callers: str) -> str:
    """Return a hash of versions, machine, the kernels' sources, and those of the modules that call them.

    Args:
        callers: files, as named from the package on.
    """
    digest = hashlib.sha256(repr(machine()).encode())
    package = Path(__file__).parents[1]
    for source in (Path(__file__), *sorted(KERNELS.glob("*.[ch]*")), *(package / name for name in callers)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def processor_field(name: str) -> str:
    """Return a field of /proc/cpuinfo, as `model name` or `flags`; where there is none, what Python knows."""
    lines = (_content(Path("/proc/cpuinfo")) or b"").decode().splitlines()
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
    return next(found, "") or platform.processor() or platform.machine()
