"""Numerical kernels on plain arrays: no tracers here, the primitives of minigrad call these."""
