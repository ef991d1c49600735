"""Benchmarks of the losses: `python benchmarks/bench_losses.py --help`."""
