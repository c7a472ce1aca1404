"""Benchmarks: the built-in model's training and what it scores. Not collected by the test run, nothing here ships."""
