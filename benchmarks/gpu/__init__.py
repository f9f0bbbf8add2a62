"""`python -m benchmarks.gpu`: a whole model on one GPU; see `__main__`."""
