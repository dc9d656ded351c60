"""Triton kernels: one file an op, kernel and launcher. They import triton and torch, nothing of rapidin.

`rapidin.ops.triton` brings the tables and calls them. With TRITON_INTERPRET=1 in the environment before the
first import they run on the CPU, slowly: that is how they are tested where there is no GPU.
"""
