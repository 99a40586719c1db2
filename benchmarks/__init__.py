"""Measurements of bypass_fx; `python -m benchmarks` lists them."""
