"""The C++ kernels for CPUs, reached through a C ABI by ctypes; `native.library()` is None where they were not built."""
