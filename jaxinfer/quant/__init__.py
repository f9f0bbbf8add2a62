"""Quantised weights: how checkpoints pack them (host only), and how they are computed on."""
