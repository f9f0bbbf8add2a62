"""Writes goldens/*.json: what llama.cpp makes of the texts in goldens/texts.json.

Run by hand, with `llama_cpp` and `gguf` installed (the test suite needs neither):
`python make_goldens.py path/to/SmolLM2-135M-Instruct.gguf`. Small vocabularies kept beside the
texts are written as vocabulary-only GGUF files, one for each pre-tokenizer family.
"""

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp

GOLDENS = Path(__file__).parent / "goldens"
PRE = ("default", "gpt-2", "llama-bpe", "dbrx", "qwen2")
MAX_TOKENS = 10_000
SMALL_TEXTS = slice(0, None, 2)


def vocabulary(path: str):
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    return model, llama_cpp.llama_model_get_vocab(model), silent


def tokenize(path: str, texts: list[str]) -> list[list[int]]:
    """Ids with special tokens added and parsed."""
    model, vocab, _silent = vocabulary(path)
    ids = (llama_cpp.llama_token * MAX_TOKENS)()
    found = []
    for text in texts:
        data = text.encode()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, MAX_TOKENS, True, True)
        if count < 0:
            raise SystemExit(f"{path}: too many tokens in {text[:40]!r}")
        found.append(ids[:count])
    llama_cpp.llama_model_free(model)
    return found


def write_vocabulary(path: str, model: str, lists: dict, fields: dict) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(lists["tokens"])
    writer.add_token_types(lists["token_type"])
    if "merges" in lists:
        writer.add_token_merges(lists["merges"])
    if "scores" in lists:
        writer.add_token_scores(lists["scores"])
    for key, value in fields.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def small(folder: str, name: str, model: str, lists: dict, fields: dict, texts: list[str]) -> dict:
    path = str(Path(folder) / f"{name}.gguf")
    write_vocabulary(path, model, lists, fields)
    return {"model": model, "fields": fields, "ids": tokenize(path, texts)}


def main() -> None:
    texts = json.loads((GOLDENS / "texts.json").read_text())
    few = texts[SMALL_TEXTS]
    bpe = json.loads((GOLDENS / "bpe_vocabulary.json").read_text())
    spm = json.loads((GOLDENS / "spm_vocabulary.json").read_text())
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        bos = bpe["tokens"].index("<|begin_of_text|>")
        ends = {"bos_token_id": bos, "eos_token_id": bos + 1}
        for pre in PRE:
            fields = {"pre": pre, **ends}
            found[f"bpe {pre}"] = small(folder, pre, "gpt2", bpe, fields, few)
        both = {"pre": "gpt-2", **ends, "add_bos_token": True, "add_eos_token": True}
        found["bpe ends"] = small(folder, "ends", "gpt2", bpe, both, few[:40])
        ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
        found["spm"] = small(folder, "spm", "llama", spm, ends, few)
        fields = {**ends, "add_space_prefix": False, "add_bos_token": False}
        found["spm bare"] = small(folder, "bare", "llama", spm, fields, few)
    dump = {"separators": (",", ":"), "ensure_ascii": True}
    (GOLDENS / "smollm2.json").write_text(json.dumps(tokenize(sys.argv[1], texts), **dump) + "\n")
    (GOLDENS / "small.json").write_text(json.dumps(found, **dump) + "\n")


if __name__ == "__main__":
    main()
