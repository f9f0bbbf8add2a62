"""`quantize`: a model in, a folder out; part by part, so that a run that was stopped goes on."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxinfer import models, tokenizer
from jaxinfer.config import ModelConfig
from jaxinfer.errors import ConfigError, JaxInferError
from jaxinfer.params import Rule, expand, is_finite
from jaxinfer.quant.config import checkpoint_format
from jaxinfer.quantize import files, folder, formats, kv, layer, settings
from jaxinfer.quantize.calibrate import Layers, Statistics, read_sequences
from jaxinfer.quantize.partial import Partial
from jaxinfer.quantize.settings import Request, Settings, stored_name
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.weights import ModelSource, open_model
from jaxinfer.weights.fields import Fields
from jaxinfer.weights.packed_reader import PackedReader
from jaxinfer.weights.safetensors import QUANTISED, open_file
from pallas_kernels.common import Spec
from pallas_kernels.dispatch import Ops, resolve

MAX_SHARD_BYTES = 5 * 10**9
_FLOATS = ("F32", "F16", "BF16")

Tensors = dict[str, np.ndarray]
Errors = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Summary:
    """What was done. `errors` are those of each layer's outputs, relative, by the matrices that
    share inputs: (of the method, of rounding to nearest); empty without calibration."""

    settings: Settings
    errors: list[Errors]

    def text(self) -> str:
        """The errors' means over the layers, a line for each kind of matrix."""
        names = list(self.errors[0]) if self.errors else []
        lines = []
        for name in names:
            own, nearest = np.mean([errors[name] for errors in self.errors], axis=0)
            lines.append(f"{name:>10}: {own:.4f} (rounding to nearest {nearest:.4f})")
        if not lines:
            return ""
        return "\n".join(["relative errors of outputs, means over the layers:", *lines])


def quantize(
    model: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    request: Request,
    *,
    calibration: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Summary:
    """Quantise `model` (as `weights.open_model` finds it) into the folder `out`.

    `calibration` is a UTF-8 text, needed by all methods but rtn. Deterministic on one machine. A
    run that was stopped (Ctrl-C, a crash) goes on when it is started again with the same arguments,
    and gives the same bytes. On an error of ours nothing is left behind.

    Raises ConfigError, ModelFormatError or TokenizerError, with the value and what to do.
    """
    with open_model(model) as source, jax.default_matmul_precision("highest"):
        run = _Run(source, request, None if calibration is None else Path(calibration))
        partial = Partial(Path(out), run.arguments())
        with _nothing_left(partial):
            return run.go(partial, progress)


@contextmanager
def _nothing_left(partial: Partial) -> Iterator[None]:
    """An error that would come again discards the run; one that would not (no disk space, Ctrl-C)
    leaves it to be gone on with."""
    try:
        yield
    except JaxInferError:
        partial.discard()
        raise


class _Run:
    """A model, checked settings, and the calibration text's tokens."""

    def __init__(self, source: ModelSource, request: Request, calibration: Path | None):
        self.source = source
        self.model = models.build(source.config, _ops(source.config), "float32")
        self.settings = settings.decide(
            request,
            source.config,
            self.model.rules,
            source.reader.infos,
            source.quantised,
            _dtype_out(source),
        )
        self.config = folder.model_config(source, self.settings)
        self.rules = expand(self.model.rules, source.config.num_layers)
        self.layers = Layers(self.model)
        self.tokenizer: Tokenizer | None = None
        if source.gguf_metadata is not None:  # to be written; a folder's files are copied
            self.tokenizer = tokenizer.from_gguf(source.gguf_metadata, source.path)
            tokenizer.check_vocab(self.tokenizer, source.config.vocab_size)
        self.tokens, self.text_hash = None, None
        if self.settings.calibrated:
            own = self.tokenizer or tokenizer.from_directory(source.path)
            tokenizer.check_vocab(own, source.config.vocab_size)
            self.tokens = read_sequences(calibration, own, self.settings)
            self.text_hash = hashlib.sha256(self.tokens.tobytes()).hexdigest()

    def arguments(self) -> dict[str, Any]:
        """What makes the result what it is, as JSON gives it back."""
        infos = {name: (i.shape, i.dtype) for name, i in self.source.reader.infos.items()}
        names = hashlib.sha256(repr((sorted(infos.items()), self.source.config)).encode())
        arguments = {
            **asdict(self.settings),
            "model": str(self.source.path.resolve()),
            "tensors": names.hexdigest(),
            "calibration": self.text_hash,
        }
        return json.loads(json.dumps(arguments))

    def go(self, partial: Partial, progress: bool) -> Summary:
        num_layers = self.source.config.num_layers
        if not partial.is_done(0):
            partial.write(0, self._unchanged(None), {})
        todo = [part for part in range(1, num_layers + 1) if not partial.is_done(part)]
        hidden = None if self.tokens is None or not todo else self._embedded(self.tokens)
        parts = tqdm(range(num_layers), disable=not progress, unit="layer", file=sys.stderr)
        parts.set_description(self.settings.method)
        with parts:
            for number in parts:
                if partial.is_done(number + 1):
                    hidden = self._passed(number, hidden, partial) if todo else None
                    continue
                hidden = self._layer(number, hidden, partial)
                todo.remove(number + 1)
        errors = [json.loads(partial.notes(p)["errors"]) for p in range(1, num_layers + 1)]
        self._finish(partial, num_layers)
        return Summary(self.settings, [e for e in errors if e])

    def _layer(self, number: int, hidden: np.ndarray | None, partial: Partial) -> np.ndarray | None:
        """Quantise a layer and keep it; what the next one is given."""
        tensors = self._read(number)
        rules = self._rules_of(number)
        statistics, after = None, None
        if hidden is not None:
            params = self.layers.params(number, rules, tensors)
            after, statistics = self.layers.run(number, params, hidden, record=True)
        stored, errors = self._stored(number, tensors, statistics)
        partial.write(number + 1, stored, {"errors": json.dumps(errors)})
        if self.settings.method == "gptq":
            return self._passed(number, hidden, partial)
        return after

    def _passed(
        self, number: int, hidden: np.ndarray | None, partial: Partial
    ) -> np.ndarray | None:
        """What comes out of a finished layer: for GPTQ the quantised one, as it is in its file.

        By the very programs of a run that was not stopped, so that the bits are the same.
        """
        if hidden is None or number + 1 == self.source.config.num_layers:
            return None
        rules, gptq = self._rules_of(number), self.settings.method == "gptq"
        tensors = self._read(number)
        if gptq:
            tensors = self._read_back(partial.path(number + 1), rules)
        params = self.layers.params(number, rules, tensors)
        return self.layers.run(number, params, hidden, record=not gptq)[0]

    def _read_back(self, path: Path, rules: list[Rule]) -> Tensors:
        """The tensors of a finished part, as whoever loads them will have them."""
        fmt = checkpoint_format(Fields(self.config))
        if fmt is None:
            raise RuntimeError("the configuration of a quantised model says that it is not")
        reader = PackedReader(open_file(path, QUANTISED), fmt, path)
        return {rule.name: reader.read(rule.name) for rule in rules}

    def _stored(
        self, number: int, tensors: Tensors, statistics: Statistics | None
    ) -> tuple[Tensors, Errors]:
        """The tensors of a layer in the folder, and its matrices' errors."""
        rules = {r.path.removeprefix(f"layers_{number}/"): r for r in self._rules_of(number)}
        if self.settings.method == "kv" and statistics is not None:
            kept = self._unchanged(number)
            return kept | kv.scales(rules["attn/k"].name, statistics), {}
        seen = {} if statistics is None else statistics.inputs
        by_leaf = {leaf: tensors[rule.name] for leaf, rule in rules.items()}
        packed = layer.quantise(by_leaf, rules, self.source.config, self.settings, seen)
        out: Tensors = {}
        for leaf, rule in rules.items():
            if leaf in packed.weights:
                parts = formats.store(packed.weights[leaf], self.settings.layout)
                module = rule.name.removesuffix(".weight")
                out |= {f"{module}.{part}": array for part, array in parts.items()}
            else:
                # A folded gain stays float32: readers that want less round it once.
                changed = packed.floats.get(leaf)
                out[rule.name] = self._kept(rule.name) if changed is None else changed
        return out, packed.errors

    def _unchanged(self, number: int | None) -> Tensors:
        """A layer's tensors, or (None) those of none, as they are stored."""
        if self.source.quantised is not None:
            return kv.stored(self.source, number)
        return {rule.name: self._kept(rule.name) for rule in self._rules_of(number)}

    def _rules_of(self, number: int | None) -> list[Rule]:
        start = "layers_" if number is None else f"layers_{number}/"
        return [r for r in self.rules if r.path.startswith(start) == (number is not None)]

    def _read(self, number: int) -> Tensors:
        """The layer's tensors by rule name, as the model has them."""
        return {rule.name: self._tensor(rule.name) for rule in self._rules_of(number)}

    def _tensor(self, name: str) -> np.ndarray:
        infos = self.source.reader.infos
        stored = stored_name(name, infos)
        if stored not in infos:
            raise ConfigError(
                f"{self.source.path} has no tensor {name}; download every file of the model",
                path=self.source.path,
                field=name,
            )
        array = self.source.reader.read(stored)
        if not is_finite(array):
            raise ConfigError(
                f"{name} of {self.source.path} holds NaN or infinity: the file is damaged",
                path=self.source.path,
                field=name,
            )
        return array

    def _kept(self, name: str) -> np.ndarray:
        """A tensor that stays float, as it is stored; out of a GGUF file's blocks, in `dtype`."""
        array = self._tensor(name)
        infos = self.source.reader.infos
        if infos[stored_name(name, infos)].dtype in _FLOATS:
            return np.array(array)
        with np.errstate(over="ignore"):  # reported below, as an error
            kept = array.astype(self.settings.dtype)
        if not is_finite(kept):
            raise ConfigError(
                f"{name} of {self.source.path} overflows {self.settings.dtype}", field=name
            )
        return kept

    def _embedded(self, tokens: np.ndarray) -> np.ndarray:
        """The calibration text as the first layer is given it, float32 [B, S, D]."""
        names = {"embed", "positions"}
        shared = {
            rule.path: rule.transform(
                self._tensor(rule.name).astype(np.float32), self.source.config
            )
            for rule in self.rules
            if rule.path in names
        }
        return self.layers.embed(shared, tokens)

    def _finish(self, partial: Partial, num_layers: int) -> None:
        final = partial.folder / "final"
        final.mkdir(exist_ok=True)
        paths = [partial.path(part) for part in range(num_layers + 1)]
        files.merge(paths, final, MAX_SHARD_BYTES)
        folder.write(final, self.source, self.config, self.tokenizer)
        partial.finish("config.json")


def _ops(config: ModelConfig) -> Ops:
    """What can attend over whole sequences in float32."""
    spec = Spec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=None,
        dtype="float32",
        page_dtype=None,
    )
    return resolve("auto", spec=spec)


def _dtype_out(source: ModelSource) -> str:
    """float16 where a GGUF file has blocks: their numbers have more digits than bfloat16 keeps."""
    blocks = any(info.dtype not in _FLOATS for info in source.reader.infos.values())
    return "float16" if source.kind == "gguf" and blocks else source.config.dtype
