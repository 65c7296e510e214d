"""Whole kernels in CuTe DSL, each with the inputs to run it on and what must come out."""
