"""Triton kernels of a decoder layer: attention and the element-wise ones (needs torch, triton)."""
