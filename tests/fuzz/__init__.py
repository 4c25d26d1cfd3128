"""A differential fuzzer of the rewrites: `python -m tests.fuzz --seconds N --seed S`."""
