"""What each quantisation costs in accuracy: perplexity and agreement with the float model. See
--help."""

import argparse
import dataclasses
import datetime
import gc
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy_readme, accuracy_texts, command_line, machine, toy
from benchmarks.accuracy_texts import Part
from benchmarks.report import BenchmarkError, Report, earlier, result_path, run_main, table
from jaxinfer import LLM, SamplingParams, evaluate
from jaxinfer.errors import JaxInferError
from jaxinfer.evaluate import Scores

FLOAT = "float"
WINDOW, STRIDE, NUM_TOP = 1024, 896, 20
_DECODE_ROWS, _DECODE_TOKENS, _DECODE_PROMPT = 8, 64, 16


@dataclasses.dataclass(frozen=True, slots=True)
class Configuration:
    """A row: how the engine is set up beside what all rows share."""

    name: str
    label: str
    options: dict[str, Any]


def _int4(name: str, group: int) -> dict[str, Any]:
    return {"quantization": name, "quantization_group_size": group}


CONFIGURATIONS = (
    Configuration(FLOAT, "float", {}),
    Configuration("int8", "int8, weights and activations", {"quantization": "int8"}),
    Configuration(
        "int8-head",
        "int8, the output head too",
        {"quantization": "int8", "quantize_lm_head": True},
    ),
    Configuration("int8-weight-only", "int8, weights alone", {"quantization": "int8_weight_only"}),
    Configuration("fp8", "fp8 (e4m3), weights and activations", {"quantization": "fp8"}),
    Configuration("int4-64", "int4, groups of 64", _int4("int4", 64)),
    Configuration("int4-32", "int4, groups of 32", _int4("int4", 32)),
    Configuration(
        "int4-asymmetric-64", "int4 with zero points, groups of 64", _int4("int4_asymmetric", 64)
    ),
    Configuration(
        "int4-asymmetric-32", "int4 with zero points, groups of 32", _int4("int4_asymmetric", 32)
    ),
    Configuration("gguf", "the GGUF file's own blocks", {"quantization": "gguf"}),
    Configuration("kv-int8", "float, K/V cache int8", {"kv_cache_dtype": "int8"}),
    Configuration("kv-fp8", "float, K/V cache fp8", {"kv_cache_dtype": "fp8"}),
)

HELP = f"""Scores one text with the float model and with each quantised one, all by the engine
itself (see jaxinfer/evaluate.py), and says how far they are apart.

The text is {accuracy_texts.SOURCES}. The archives are looked for in
{str(accuracy_texts.FOLDER).replace(str(Path.home()), "~")} (--downloads).

Slow machines take it in parts; the float model comes first, the others are compared with it:

    python -m benchmarks.accuracy --only float
    python -m benchmarks.accuracy --only int8 int4-64 --merge
    python -m benchmarks.accuracy --only awq-64 --checkpoint awq-64=FOLDER --merge --update-readme

A run that was cut short goes on with --resume, from the last part of the text that was scored.

configurations:
"""


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {c.name:<22}{c.label}" for c in CONFIGURATIONS)
    made = command_line.parser("accuracy", HELP + names)
    made.add_argument(
        "--only",
        nargs="*",
        metavar="NAME",
        help="these rows; default: all; no name: the table alone",
    )
    made.add_argument("--model", help="the float model; default: the embedded one")
    made.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="LABEL=DIR",
        help="a row for a folder with quantised weights of the same model; may be repeated",
    )
    made.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="other text, UTF-8")
    made.add_argument("--downloads", type=Path, default=accuracy_texts.FOLDER, metavar="DIR")
    made.add_argument("--dtype", default="auto", help='as of LLM; default: "auto"')
    made.add_argument("--merge", action="store_true", help="keep the file's rows not run now")
    made.add_argument("--resume", action="store_true", help="go on where the last run ended")
    command_line.add_update_readme(made)
    made.add_argument("--toy", action="store_true", help="tiny model and text: only shows it runs")
    return made


def chosen(options: argparse.Namespace) -> list[Configuration]:
    """What is to be run, the float model first."""
    known = {c.name: c for c in CONFIGURATIONS}
    for entry in options.checkpoint:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder) or name in known:
            raise BenchmarkError(
                f"--checkpoint {entry}: needs LABEL=DIR with a label of its own, like awq-64=out"
            )
        known[name] = Configuration(name, name, {"model": folder})
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        raise BenchmarkError(
            f"no configuration is called {', '.join(unknown)}; there are: {', '.join(known)}"
        )
    return [c for c in known.values() if options.only is None or c.name in options.only]


class Store:
    """Scores of finished parts of the text, in files, and the float model's of all of it."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        content = json.dumps(settings, sort_keys=True)
        self._folder = folder / hashlib.sha256(content.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, row: str, part: str) -> Path:
        return self._folder / f"{row}.{part}.npz"

    def save(self, row: str, part: str, scores: Scores) -> None:
        path = self.path(row, part)
        unfinished = path.with_name(f".{path.name}")
        values = {k: v for k, v in dataclasses.asdict(scores).items() if v is not None}
        with unfinished.open("wb") as file:
            np.savez(file, **values)
        os.replace(unfinished, path)

    def load(self, row: str, part: str) -> Scores | None:
        """None where there is none."""
        try:
            with np.load(self.path(row, part), allow_pickle=False) as found:
                values = {k: v if v.ndim else int(v) for k, v in found.items()}
        except FileNotFoundError:
            return None
        return Scores(**{"num_bytes": None, **values})

    def forget(self, row: str) -> None:
        for path in self._folder.glob(f"{row}.*.npz"):
            path.unlink()


def join(scores: Sequence[Scores]) -> Scores:
    """Of several texts, as if they had been scored together."""
    first = scores[0]
    arrays = ("targets", "context", "logprobs", "top_ids", "top_logprobs")
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(s, name) for s in scores]) for name in arrays
    }
    for name in ("num_tokens", "num_windows"):
        joined[name] = sum(getattr(s, name) for s in scores)
    known = [s.num_bytes for s in scores if s.num_bytes is not None]
    return dataclasses.replace(
        first, **joined, num_bytes=sum(known) if len(known) == len(scores) else None
    )


class Bench:
    """Runs rows. `shared`: engine options of all rows; `how`: the arguments of `evaluate.score`."""

    def __init__(
        self,
        parts: list[Part],
        shared: dict[str, Any],
        how: dict[str, Any],
        store: Store,
        *,
        resume: bool,
    ):
        self.parts = parts
        self.shared = shared
        self.how = how
        self.store = store
        self.resume = resume

    def row(self, configuration: Configuration) -> dict[str, Any]:
        """Measure one configuration.

        Raises JaxInferError where the engine cannot be made so, BenchmarkError where there are no
        scores of the float model to compare with.
        """
        name = configuration.name
        reference = None if name == FLOAT else self._reference()
        load = machine.load()
        if not self.resume:
            self.store.forget(name)
        with _engine({**self.shared, **configuration.options}) as llm:
            scores = [self._score(llm, name, part) for part in self.parts]
            figures = {
                "weight_bytes": llm.memory_plan.weights,
                "decode_tok_s": round(decode_rate(llm), 1),
            }
        whole = evaluate.summary(join(scores))
        row = {"name": name, "label": configuration.label, **whole}
        kinds = dict.fromkeys(part.kind for part in self.parts)
        for kind in kinds if len(kinds) > 1 else ():
            of_kind = [s for s, p in zip(scores, self.parts, strict=True) if p.kind == kind]
            row[f"perplexity_{kind.lower()}"] = evaluate.summary(join(of_kind))["perplexity"]
        if reference is not None:
            row |= evaluate.compare(join(scores), join(reference))
            self.store.forget(name)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {**row, **figures, "load_at_start": load, "date": now}

    def _reference(self) -> list[Scores]:
        found = [self.store.load(FLOAT, part.name) for part in self.parts]
        whole = [scores for scores in found if scores is not None]
        if len(whole) < len(found):
            raise BenchmarkError(
                "there are no scores of the float model to compare with; run --only float first"
            )
        return whole

    def _score(self, llm: LLM, row: str, part: Part) -> Scores:
        found = self.store.load(row, part.name)
        if found is None:
            begun = time.perf_counter()
            found = evaluate.score(llm, [part.text], **self.how)
            self.store.save(row, part.name, found)
            took = time.perf_counter() - begun
            print(
                f"{row}, {part.name}: {len(found.targets):,} tokens, "
                f"{found.num_tokens / took:.0f} tok/s",
                file=sys.stderr,
                flush=True,
            )
        return found


@contextmanager
def _engine(options: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**options) as llm:
        yield llm
    gc.collect()


def decode_rate(llm: LLM) -> float:
    """Output tokens per second of eight requests at once, the second time: rough."""
    rng = np.random.default_rng(0)
    vocab = llm.model.config.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=_DECODE_TOKENS, ignore_eos=True)
    for _ in range(2):
        prompts = rng.integers(0, vocab, (_DECODE_ROWS, _DECODE_PROMPT)).tolist()
        begun = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begun
    return _DECODE_ROWS * _DECODE_TOKENS / took


def toy_parts() -> list[Part]:
    return [
        Part("help", "English", HELP[:300]),
        Part("code", "code", Path(__file__).read_text()[:300]),
    ]


def measure(bench: Bench, configurations: Sequence[Configuration], report: Report) -> None:
    order = [c.name for c in CONFIGURATIONS]
    for configuration in configurations:
        try:
            row = bench.row(configuration)
        except JaxInferError as error:
            report.note(f"not measured: {configuration.name} ({error})")
            continue
        report.add(row)
        print(table(accuracy_readme.lines([row]), accuracy_readme.COLUMNS), flush=True)
    report.rows.sort(key=lambda r: order.index(r["name"]) if r["name"] in order else len(order))
    missing = [name for name in order if all(row["name"] != name for row in report.rows)]
    load = max((row["load_at_start"] or 0 for row in report.rows), default=0)
    if load > machine.num_cores() / 2:
        report.note(
            f"other work ran beside (load up to {load:.1f}): the decode rates are not usable"
        )
    if missing:
        report.note(f"no row yet: {', '.join(missing)}")
    else:
        report.finish()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    configurations = chosen(options)
    command_line.check_update_readme(options, "accuracy")
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "model": options.model,
            "dtype": options.dtype,
            "max_num_seqs": _DECODE_ROWS,
            "max_logprobs": NUM_TOP,
        }
        if options.toy:
            model = toy.write_model(Path(folder))
            toy.write_tokenizer(model)
            shared |= {"model": str(model), "load_format": "dummy", "num_pages": 64}
            parts = toy_parts()
        elif options.text:
            parts = accuracy_texts.files(options.text)
        else:
            parts = accuracy_texts.default_parts(options.downloads)
        how: dict[str, Any] = {"window": WINDOW, "stride": STRIDE, "num_top": NUM_TOP}
        if options.toy:
            how |= {"window": 48, "stride": 32}
        default = not (options.text or options.toy)
        settings = {
            "model": "toy" if options.toy else Path(options.model or "embedded SmolLM2").name,
            "dtype": options.dtype,
            "text": accuracy_texts.SOURCES if default else ", ".join(p.name for p in parts),
            "text_sha256": accuracy_texts.sha256(parts),
            **how,
        }
        output = options.output or result_path("accuracy")
        names = {c.name for c in configurations}
        kept = earlier(output, "accuracy", settings) if options.merge else []
        report = Report("accuracy", output=output, settings=settings)
        report.keep([row for row in kept if row["name"] not in names], "name")
        of = {**settings, "model": options.model, "device": machine.device()}
        store = Store(options.downloads, of)
        bench = Bench(parts, shared, how, store, resume=options.resume)
        measure(bench, configurations, report)
    print("\n" + table(accuracy_readme.lines(report.rows), accuracy_readme.COLUMNS))
    print(f"\nresults: {report.path}")
    if options.update_readme is not None:
        accuracy_readme.update(options.update_readme, report.content)
        print(f"table: {options.update_readme}")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    run_main(main)
