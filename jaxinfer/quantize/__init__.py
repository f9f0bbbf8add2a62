"""Making quantised checkpoints: round-to-nearest, AWQ, GPTQ, and static scales of the KV cache.

`run.quantize` goes through a model layer by layer and writes a standard folder. The methods (rtn,
awq, gptq) know matrices alone, layers.py runs the model, formats.py packs, folder.py and partial.py
own the files.
"""
