"""Tests of pallas_kernels: every operation, every implementation, against a float64 oracle."""
