"""What the engine costs beside others on the same records: `python -m benchmarks --help`. Nothing here asserts a time."""
