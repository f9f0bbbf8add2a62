"""Quantised weights: how checkpoints pack them, and how they are computed on."""
