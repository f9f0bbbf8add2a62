"""What an unfinished run keeps in OUT/.partial: its arguments, and a file for every part done.

A part is one layer, or what stands outside the layers. Its file appears by rename, so what is there
is whole: a run that was stopped goes on after the last one.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.quantize.files import read_header, write_tensors, write_text

FOLDER = ".partial"
_ARGUMENTS = "arguments.json"


class Partial:
    """OUT/.partial, made or taken up; `arguments` (JSON) say which run it belongs to.

    Raises ConfigError where OUT holds something else, or the run of other arguments.
    """

    def __init__(self, out: Path, arguments: Mapping[str, Any]):
        self.out = out
        self.folder = out / FOLDER
        self._made_out = not out.exists()
        if (self.folder / _ARGUMENTS).is_file():
            self._compare(json.loads((self.folder / _ARGUMENTS).read_text()), arguments)
            return
        if not self._made_out and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"{out} exists and is no unfinished run of this: nothing is overwritten; name a "
                "folder that is empty or not there",
                field="out",
            )
        self.folder.mkdir(parents=True)
        write_text(self.folder / _ARGUMENTS, json.dumps(arguments, indent=1))

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        if differing:
            shown = ", ".join(
                f"{k} {before.get(k)!r:.80}, now {now.get(k)!r:.80}" for k in differing
            )
            raise ConfigError(
                f"{self.out} holds an unfinished run with other arguments ({shown}); finish it "
                f"with those, or delete {self.folder}",
                field="out",
            )

    def path(self, part: int) -> Path:
        """The file of a part: 0 is what stands outside the layers, 1 + l layer l."""
        return self.folder / f"part-{part:05d}.safetensors"

    def is_done(self, part: int) -> bool:
        return self.path(part).exists()

    def write(self, part: int, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
        """Keep the tensors of a part that is done; `notes` go into the file's metadata."""
        write_tensors(self.path(part), tensors, notes)

    def notes(self, part: int) -> dict[str, str]:
        return read_header(self.path(part))[0].get("__metadata__", {})

    def discard(self) -> None:
        """Leave nothing behind of the run."""
        shutil.rmtree(self.folder)
        if self._made_out and not any(self.out.iterdir()):
            self.out.rmdir()

    def finish(self, last: str) -> None:
        """Move the files of `final` into OUT, `last` after all others; then nothing else is left.

        A run stopped in between ends so when it is started again.
        """
        final = self.folder / "final"
        for path in sorted(final.iterdir(), key=lambda path: (path.name == last, path.name)):
            path.rename(self.out / path.name)
        shutil.rmtree(self.folder)
