"""Triton attention kernels and the element-wise kernels of a decoder layer (needs torch and triton)."""
