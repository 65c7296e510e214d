"""CuTe DSL kernels, one operation a file."""
