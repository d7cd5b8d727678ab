"""Benchmarks, one module each; every figure is a number measured in the call, every ratio against a named baseline."""
