"""Benchmarks: cases, what their results must be, how they are timed, and the rows that record it."""
