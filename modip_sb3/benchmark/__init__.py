"""Benchmarks, each run as `python -m modip_sb3.benchmark.<name>`."""
