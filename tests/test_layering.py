"""Who may import whom, as data. Reads the source only: no module is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
"""Packages that mean the device."""

HOST = {"errors", "request", "sampling_params", "config"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_gc": set(),
    "sampling_params": {"errors"},
    "request": {"sampling_params"},
    "config": {"errors"},
    "metrics": {"request"},
    "interrupts": set(),
    "profiling": {"errors", "metrics", "jax"},
    "scheduling": HOST,
    "speculative": HOST,
    "params": {"config", "errors"},
    "quant": {"config", "errors", "params", "jax", "pallas_kernels"},
    "chat_template": HOST,
    "gguf_tokenizer": HOST | {"tokenizer_files"},
    "tokenizer": HOST | {"chat_template", "gguf_tokenizer", "tokenizer_files"},
    "tokenizer_files": HOST,
    "detokenizer": HOST | {"tokenizer"},
    "intake": HOST | {"tokenizer"},
    "weights": {"config", "errors", "params", "quant"},
    "bias": {"request", "sampling_params"},
    "models": {"config", "errors", "params", "quant", "jax", "flax", "pallas_kernels"},
    "buckets": {"request"},
    "batch": {"buckets", "request", "jax", "pallas_kernels"},
    "kv_cache": {"config", "errors", "models", "jax"},
    "sampling": {"batch", "jax"},
    "step": {"batch", "sampling", "kv_cache", "models", "jax", "pallas_kernels"},
    "draft": {"batch", "kv_cache", "models", "sampling", "step", "jax", "pallas_kernels"},
    "runner": {
        "request",
        "step",
        "batch",
        "buckets",
        "kv_cache",
        "models",
        "errors",
        "jax",
    },
    "aot": {
        "batch",
        "buckets",
        "kv_cache",
        "models",
        "quant",
        "step",
        "weights",
        "jax",
        "pallas_kernels",
    },
    "generate": {
        "batch",
        "bias",
        "errors",
        "kv_cache",
        "models",
        "sampling_params",
        "sampling",
        "jax",
        "pallas_kernels",
    },
    "outputs": HOST | {"batch", "detokenizer", "tokenizer"},
    "outbox": HOST | {"metrics", "outputs", "tokenizer"},
    "engine": HOST
    | {
        "batch",
        "bias",
        "intake",
        "metrics",
        "outbox",
        "outputs",
        "runner",
        "scheduling",
        "speculative",
        "tokenizer",
        "jax",
    },
    "setup_model": HOST
    | {"models", "params", "quant", "tokenizer", "weights", "jax", "pallas_kernels"},
    "setup_draft": HOST
    | {
        "batch",
        "buckets",
        "draft",
        "kv_cache",
        "models",
        "runner",
        "scheduling",
        "setup_model",
        "speculative",
        "tokenizer",
        "weights",
    },
    "setup": HOST
    | {
        "batch",
        "buckets",
        "bias",
        "engine",
        "intake",
        "kv_cache",
        "models",
        "runner",
        "scheduling",
        "setup_draft",
        "setup_model",
        "speculative",
        "tokenizer",
        "jax",
    },
    "quantize": {
        "config",
        "errors",
        "models",
        "params",
        "quant",
        "tokenizer",
        "weights",
        "jax",
        "pallas_kernels",
    },
    "mailbox": {"engine", "interrupts", "request"},
    "calls": HOST | {"engine", "intake", "interrupts", "mailbox", "outputs"},
    "llm": HOST | {"calls", "intake", "mailbox", "profiling", "runner", "setup", "tokenizer"},
    "cli_commands": HOST,
    "evaluate": HOST | {"llm", "tokenizer"},
    "cli": HOST | {"cli_commands", "evaluate", "llm", "profiling"},
    "__main__": {"cli"},
    "__init__": HOST | {"_gc", "llm", "generate"},
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            if node.module == "jaxinfer":  # `from jaxinfer import setup` imports jaxinfer.setup
                yield from ((node.lineno, f"jaxinfer.{alias.name}") for alias in node.names)


def group_of(path: Path) -> str:
    return path.relative_to(ROOT / "jaxinfer").parts[0].removesuffix(".py")


def violations(path: Path, group: str, allowed: set[str]) -> Iterator[str]:
    where = path.relative_to(ROOT)
    for line, name in imports(path):
        if name.startswith("."):
            yield f"{where}:{line}: relative import {name!r}; write the full name"
            continue
        top, _, rest = name.partition(".")
        if top == "jaxinfer":
            target = rest.partition(".")[0]
        elif top in JAX:
            target = "flax" if top == "flax" and "flax" in allowed else "jax"
        elif top == "pallas_kernels":
            target = top
        else:
            continue
        if target and target != group and target not in allowed:
            yield f"{where}:{line}: {group} must not import {target}"


def test_jaxinfer_layers():
    files = sorted((ROOT / "jaxinfer").rglob("*.py"))
    assert len(files) > 20
    unknown = {group_of(p) for p in files} - MAY_IMPORT.keys()
    assert not unknown, f"give {unknown} a place in MAY_IMPORT"
    found = [v for p in files for v in violations(p, group_of(p), MAY_IMPORT[group_of(p)])]
    assert not found, "\n" + "\n".join(found)


def test_pallas_kernels_stand_alone():
    files = sorted((ROOT / "pallas_kernels").rglob("*.py"))
    assert len(files) > 5
    found = [v for p in files for v in violations(p, "pallas_kernels", {"jax"})]
    assert not found, "\n" + "\n".join(found)


def test_a_forbidden_import_is_found(tmp_path):
    bad = ROOT / "jaxinfer" / "scheduling" / "scheduler.py"
    assert not list(violations(bad, "scheduling", MAY_IMPORT["scheduling"]))
    assert list(violations(bad, "scheduling", set()))
    assert list(violations(ROOT / "jaxinfer" / "runner.py", "runner", {"step"}))


def test_jit_is_only_in_the_runner():
    """`jax.jit` appears in runner.py alone (and training/loop.py once it exists), but for those in
    layers.py, through which equal layers share a trace and one is run alone, and the quantisers,
    which run no step."""
    allowed = {"runner.py", "loop.py", "layers.py"}
    found = [
        str(p.relative_to(ROOT))
        for p in (ROOT / "jaxinfer").rglob("*.py")
        if "jax.jit" in _code(p) and p.name not in allowed and group_of(p) != "quantize"
    ]
    assert not found


def _code(path: Path) -> str:
    """The file's code without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                n
                for n in body
                if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.unparse(tree)


FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "torch"}


def test_no_code_from_data():
    """No pickle, eval or torch.load anywhere that is installed or run by users."""
    found = []
    for folder in ("jaxinfer", "pallas_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for line, name in imports(path):
                if name.split(".")[0] in FORBIDDEN_MODULES:
                    found.append(f"{path}:{line}: imports {name}")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = node.func.id if isinstance(node.func, ast.Name) else ""
                    if called in FORBIDDEN_CALLS:
                        found.append(f"{path}:{node.lineno}: calls {called}")
                    for keyword in node.keywords:
                        value = getattr(keyword.value, "value", None)
                        if keyword.arg in ("allow_pickle", "trust_remote_code") and value is True:
                            found.append(f"{path}:{node.lineno}: {keyword.arg}=True")
    assert not found, "\n".join(found)


def test_no_assert_guards_input():
    """`assert` vanishes under python -O; only check_invariants(), which finds our own faults, has
    it."""
    found = []
    for folder in ("jaxinfer", "pallas_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            own_faults = {
                inner
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and "invariants" in node.name
                for inner in ast.walk(node)
            }
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Assert)
                and node not in own_faults
                and path.name != "invariants.py"
            ]
    assert not found, found
