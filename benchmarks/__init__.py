"""The suites of `mmkernels.bench` under pytest-benchmark, their results, and what is published."""
