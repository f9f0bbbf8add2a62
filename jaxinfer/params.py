"""How checkpoint tensors become the parameter tree: `Rule`, the transforms, and `assemble`.

A model is described by a table of rules, one line per weight. `assemble` first compares the table
with the checkpoint's metadata, so a wrong file fails before a byte of weights is read, and then
streams tensor by tensor. Nothing here knows a file format or a device: bytes come from a
`TensorReader`, and `put` takes them where they belong.
"""

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.errors import ModelFormatError

logger = logging.getLogger(__name__)

Transform = Callable[[np.ndarray, ModelConfig], np.ndarray]
FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
MAX_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a stored tensor; `dtype` is the file's name for it ("BF16", "Q4_1")."""

    shape: tuple[int, ...]
    dtype: str


class TensorReader(Protocol):
    """A checkpoint under Hugging Face names and layouts; `read` gives float arrays, shaped so."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """One weight: checkpoint tensor `name` -> `transform` -> leaf `path` of the parameter tree.

    `{l}` in name and path stands for every layer. Several rules may name one tensor (a fused
    projection). `axes` are the logical axes of the result; with the configuration they give its
    shape. `dtype` is None for the model's dtype; norms keep float32. `contracted` are the axes, by
    number, that the matmul with the weight sums over, along which it can be quantised; none where
    it is in no matmul.
    """

    name: str
    path: str
    transform: Transform
    axes: tuple[str, ...]
    dtype: str | None = None
    contracted: tuple[int, ...] = ()

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the leaf at `path`."""
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every logical axis that a rule may name."""
    return {
        "embed": config.hidden_size,
        "norm": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
        "position": config.max_position,
    }


def expand(rules: Iterable[Rule], num_layers: int) -> list[Rule]:
    """The rules with `{l}` written out for every layer, layer by layer, in the table's order."""
    shared, layered = [], []
    for rule in rules:
        (layered if "{l}" in rule.path else shared).append(rule)
    for layer in range(num_layers):
        number = str(layer)
        shared += [
            replace(r, name=r.name.replace("{l}", number), path=r.path.replace("{l}", number))
            for r in layered
        ]
    return shared


# Transforms. Each states the checkpoint shape it takes, so that a tensor of another shape with the
# same number of elements is refused; all but `plus_one` are views. Matrices have their outputs
# first, as checkpoints store them.


def expect(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`array`, or ValueError if it has another shape than the configuration implies."""
    if array.shape != shape:
        raise ValueError(f"expected {shape}")
    return array


def vocab_by_embed(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Embedding table or output head [V, D], as stored."""
    return expect(array, (config.vocab_size, config.hidden_size))


def query_heads(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Query projection: [N*H, D] -> [N, H, D]."""
    n, h, d = config.num_heads, config.head_dim, config.hidden_size
    return expect(array, (n * h, d)).reshape(n, h, d)


def kv_heads(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Key or value projection: [K*H, D] -> [K, H, D]."""
    k, h, d = config.num_kv_heads, config.head_dim, config.hidden_size
    return expect(array, (k * h, d)).reshape(k, h, d)


def query_bias(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Query bias: [N*H] -> [N, H]."""
    n, h = config.num_heads, config.head_dim
    return expect(array, (n * h,)).reshape(n, h)


def kv_bias(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Key or value bias: [K*H] -> [K, H]."""
    k, h = config.num_kv_heads, config.head_dim
    return expect(array, (k * h,)).reshape(k, h)


def out_heads(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Output projection of attention: [D, N*H] -> [D, N, H]."""
    n, h, d = config.num_heads, config.head_dim, config.hidden_size
    return expect(array, (d, n * h)).reshape(d, n, h)


def mlp_in(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Gate or up projection [F, D], as stored."""
    return expect(array, (config.intermediate_size, config.hidden_size))


def mlp_out(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Down projection [D, F], as stored."""
    return expect(array, (config.hidden_size, config.intermediate_size))


def unchanged(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The tensor as stored (norms, biases of one axis)."""
    del config
    return array


def plus_one(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Gemma's norm weight, stored as w and applied as 1 + w; added in float32."""
    del config
    return array.astype(np.float32) + np.float32(1.0)


def assemble(
    reader: TensorReader,
    rules: Sequence[Rule],
    config: ModelConfig,
    shapes: Mapping[str, Any],
    put: Callable[[np.ndarray, str], Any],
    *,
    hold: Callable[[str, Sequence[Rule]], list[tuple[str, Any]] | None] | None = None,
    ignored: Sequence[str] = (),
    path: object = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameter tree of a checkpoint: a nested dict whose leaves are what `put` returned.

    `shapes` is the nested dict of expected leaves (anything with `.shape` and `.dtype`, which may
    be None: as the tensor is read), `put(array, path)` takes a host array of that shape and dtype
    (perhaps a strided view) to its device, or quantises it; `hold(name, rules)` gives the leaves,
    by path, of a tensor that stays quantised, and None for others, which are read as floats.
    `ignored` are name patterns (fnmatch) that a checkpoint may hold unused, `path` names the file
    in messages, `progress(name, done, total)` is told after each tensor how many stored elements
    are done.

    Raises ModelFormatError, before anything is read, that lists every missing, unused and
    mis-shaped tensor (the first ten); and, while reading, for a tensor with NaN or infinity.
    """
    expected = flatten(shapes)
    needed, missing = by_tensor(reader.infos, rules, config)
    _check_metadata(reader.infos, needed, missing, config, expected, ignored, path)
    _warn_unused_head(reader.infos, config)

    total = sum(_num_elements(reader.infos[name].shape) for name in needed)
    done = 0
    params: dict[str, Any] = {}
    for name, tensor_rules in needed.items():
        leaves = None if hold is None else hold(name, tensor_rules)
        if leaves is None:
            leaves = _leaves(reader, name, tensor_rules, config, expected, put, path)
        for leaf_path, leaf in leaves:
            _insert(params, leaf_path, leaf)
        done += _num_elements(reader.infos[name].shape)
        if progress is not None:
            progress(name, done, total)
    return params


def by_tensor(
    infos: Mapping[str, TensorInfo], rules: Sequence[Rule], config: ModelConfig
) -> tuple[dict[str, list[Rule]], list[str]]:
    """(the rules of each stored tensor that the model needs, by its name; tensors that are
    missing)."""
    needed: dict[str, list[Rule]] = {}
    missing = []
    for rule in expand(rules, config.num_layers):
        name = _stored_name(rule.name, infos)
        if name is None:
            missing.append(rule.name)
        else:
            needed.setdefault(name, []).append(rule)
    return needed, missing


def _leaves(
    reader: TensorReader,
    name: str,
    tensor_rules: Sequence[Rule],
    config: ModelConfig,
    expected: Mapping[str, Any],
    put: Callable[[np.ndarray, str], Any],
    path: object,
) -> list[tuple[str, Any]]:
    """The leaves that tensor `name` gives; its host array dies on return, before the next."""
    array = reader.read(name)
    _check_values(array, name, reader.infos[name].shape, path)
    leaves = []
    for rule in tensor_rules:
        value = rule.transform(array, config)
        dtype = expected[rule.path].dtype
        if dtype is None:  # numpy would take it for float64
            leaves.append((rule.path, put(value, rule.path)))
            continue
        with np.errstate(over="ignore"):  # reported below, as an error
            value = value.astype(dtype, copy=False)
        if value.dtype.name == "float16" and not is_finite(value):
            raise ModelFormatError(
                f"{name} of {path} overflows float16 (largest magnitude 65504); "
                "load the model with dtype bfloat16 or float32",
                path=path,
                field=name,
            )
        leaves.append((rule.path, put(value, rule.path)))
    return leaves


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"layers_0/attn/q": leaf}, in the tree's order."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        _insert(tree, path, value)
    return tree


def is_finite(array: np.ndarray) -> bool:
    """Whether a float array holds no NaN and no infinity."""
    if (
        array.dtype.name == "bfloat16"
    ):  # the exponent test runs vectorised; ml_dtypes' isfinite does not
        exponent = np.uint16(0x7F80)
        return not ((array.view(np.uint16) & exponent) == exponent).any()
    return bool(np.isfinite(array).all())


def _insert(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def _num_elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _stored_name(name: str, infos: Mapping[str, TensorInfo]) -> str | None:
    """`name` as stored: a base model saved alone lacks the leading "model." or "transformer."."""
    if name in infos:
        return name
    bare = name.partition(".")[2]
    return bare if bare in infos and bare != "weight" else None


def _check_metadata(
    infos: Mapping[str, TensorInfo],
    by_tensor: Mapping[str, list[Rule]],
    missing: Iterable[str],
    config: ModelConfig,
    expected: Mapping[str, Any],
    ignored: Sequence[str],
    path: object,
) -> None:
    problems = [f"missing: {name}" for name in dict.fromkeys(missing)]
    for name, tensor_rules in by_tensor.items():
        problem = _metadata_problem(name, infos[name], tensor_rules, config, expected)
        if problem is not None:
            problems.append(problem)
    for name in infos:
        if name not in by_tensor and not any(fnmatch.fnmatchcase(name, p) for p in ignored):
            problems.append(f"unused: {name} {infos[name].shape}")
    if not problems:
        return
    shown = "\n  ".join(problems[:MAX_PROBLEMS])
    more = len(problems) - MAX_PROBLEMS
    rest = f"\n  and {more} more" if more > 0 else ""
    raise ModelFormatError(
        f"{path}: the tensors do not fit a {config.architecture} with this configuration "
        f"({len(problems)} problem(s)):\n  {shown}{rest}\nCheck that the configuration and the "
        "weights come from the same model and that every file of it is there.",
        path=path,
        field=problems[0].split()[1],
    )


def _metadata_problem(
    name: str,
    info: TensorInfo,
    tensor_rules: Sequence[Rule],
    config: ModelConfig,
    expected: Mapping[str, Any],
) -> str | None:
    if re.match(r"(i|u|int|uint|bool|f8|float8)(\d|_|$)", info.dtype.lower()):
        return f"dtype: {name} is {info.dtype}; floating-point weights are expected"
    # A zero-stride stand-in: the transform runs on it as on the real tensor, but owns no memory.
    stand_in = np.broadcast_to(np.zeros((), np.float32), info.shape)
    for rule in tensor_rules:
        want = tuple(expected[rule.path].shape)
        try:
            got = rule.transform(stand_in, config).shape
        except ValueError as error:
            return f"shape: {name} is {info.shape}; {error} for {rule.path} {want}"
        if got != want:
            return (
                f"shape: {name} is {info.shape}, which gives {got}; expected {want} ({rule.path})"
            )
    return None


def _check_values(array: np.ndarray, name: str, shape: tuple[int, ...], path: object) -> None:
    if array.shape != shape or array.dtype.name not in FLOAT_DTYPES:
        raise ModelFormatError(
            f"{name} of {path} was read as {array.dtype.name} {array.shape}; its header says "
            f"{shape}, and one of {', '.join(FLOAT_DTYPES)} is expected",
            path=path,
            field=name,
        )
    if not is_finite(array):
        raise ModelFormatError(
            f"{name} of {path} holds NaN or infinity: the file is damaged or was exported wrongly; "
            "download or convert it again",
            path=path,
            field=name,
        )
    if array.size and not array.any():
        logger.warning("%s of %s is all zeros; the weights may be a placeholder", name, path)


def _warn_unused_head(infos: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    head = infos.get("lm_head.weight")
    if config.tie_embeddings and head is not None:
        want = (config.vocab_size, config.hidden_size)
        if tuple(head.shape) != want:
            logger.warning(
                "lm_head.weight %s is left unused, though its shape is not the embedding's %s: "
                "the configuration ties the embeddings",
                head.shape,
                want,
            )
