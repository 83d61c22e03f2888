"""Benchmarks whose scorers run outside of this package: images out in their layout, their result files in, and intervals."""
