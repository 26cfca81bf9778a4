"""Triton kernels and their launchers, a file per op. The only place that imports Triton, and only when it is used."""
