"""Benchmarks: `make bench` measures, `make bench-report` publishes what was measured."""
