"""The Triton kernels for GPUs. Nothing imports them before a tensor on a GPU asks for one, so triton may be missing."""
