"""What each technique buys: on against off inside this engine, beside what the literature states.

`python -m benchmarks.techniques`. A technique is a file with a `TECHNIQUE` and a line in
`registry.py`; `bench.py` gives it engines, prompts, interleaved repeats and its rows.
"""
