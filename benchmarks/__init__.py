"""Benchmarks: `make bench` measures, `python -m benchmarks.report` renders what was measured."""
