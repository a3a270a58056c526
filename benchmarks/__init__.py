"""Measurements that this project answers to: `python -m benchmarks` lists them.

A benchmark is one module `benchmarks/NAME.py` with a docstring whose first line says what it
shows, and `def run(options: Options) -> Result`. See `benchmarks.harness`.
"""
