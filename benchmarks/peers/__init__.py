"""jaxinfer beside transformers, llama.cpp and vLLM on the same work: `python -m benchmarks.peers`.

One worker process per engine and workload, each run by the Python of its own environment. What runs
in a worker (protocol.py, run_*.py) imports the standard library, numpy and its engine, nothing else
of this repository but jaxinfer in its own adapter.
"""
