#!/usr/bin/env python3
"""ggml's products with quantized weights, for bench_cpu.py, which starts it in an environment that has llama-cpp-python."""

import ctypes
import sys
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from _cpu_turns import REPEATED, distinct_rows, options, serve

# Names of ggml_type, with their numbers in ggml.h.
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q3_K": 11, "Q4_K": 12}
FLOAT32 = 0
REPACKED = ("Q4_0", "Q4_K")  # of these ggml has kernels for rows that lie interleaved
SUCCESS = 0


class InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Ggml:
    """The functions of ggml's libraries that are needed here, with their types."""

    def __init__(self):
        folder = Path(find_spec("llama_cpp").origin).parent / "lib"
        libraries = [ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu", "ggml")]
        signatures = {
            "ggml_init": (c_void_p, InitParams),
            "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
            "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
            "ggml_new_graph": (c_void_p, c_void_p),
            "ggml_build_forward_expand": (None, c_void_p, c_void_p),
            "ggml_get_data": (c_void_p, c_void_p),
            "ggml_nbytes": (c_size_t, c_void_p),
            "ggml_row_size": (c_size_t, c_int, c_int64),
            "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
            "ggml_backend_cpu_init": (c_void_p,),
            "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
            "ggml_backend_cpu_buffer_type": (c_void_p,),
            "ggml_backend_cpu_reg": (c_void_p,),
            "ggml_backend_get_device": (c_void_p, c_void_p),
            "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
            "ggml_backend_buft_name": (c_char_p, c_void_p),
            "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
            "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
            "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
        }
        for name, (result, *arguments) in signatures.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def repacking_buffer(self, backend):
        """The buffer type whose tensors are interleaved as they are set, None if there is none."""
        found = self.backend_reg_get_proc_address(self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(found)(self.backend_get_device(backend)) if found else []
        for kind in kinds:
            if kind is None:
                return None
            if b"REPACK" in self.backend_buft_name(kind):
                return kind
        return None


def pointer(array):
    return array.ctypes.data_as(c_void_p)


def quantized(ggml, kind, W):
    """W float32 [r, C] -> bytes uint8 [r REPEATED, bytes of a row]."""
    rows, channels = W.shape
    out = np.empty((rows, ggml.row_size(kind, channels)), dtype=np.uint8)
    ggml.quantize_chunk(kind, pointer(W), pointer(out), 0, rows, channels, None)
    return np.concatenate([out] * REPEATED)


def placed(ggml, tensors_of, buffer):
    """(context, tensors) of tensors_of(context), in memory of a buffer type."""
    context = ggml.init(InitParams(1 << 20, None, True))
    tensors = tensors_of(context)
    if not ggml.backend_alloc_ctx_tensors_from_buft(context, buffer):
        raise MemoryError(f"ggml has no memory for {len(tensors)} tensors")
    return context, tensors


def contender(ggml, backend, kind, stored, shape, buffer):
    """stored: bytes of W [R, C], shape: (R, C)."""
    rows, channels = shape
    _, (weight,) = placed(ggml, lambda context: [ggml.new_tensor_2d(context, kind, channels, rows)], buffer)
    ggml.backend_tensor_set(weight, pointer(stored), 0, stored.nbytes)

    def make(x):
        def tensors(context):
            entry = ggml.new_tensor_2d(context, FLOAT32, channels, len(x))
            return entry, ggml.mul_mat(context, weight, entry)

        context, (entry, product) = placed(ggml, tensors, ggml.backend_cpu_buffer_type())
        ggml.backend_tensor_set(entry, pointer(x), 0, x.nbytes)
        graph = ggml.new_graph(context)
        ggml.build_forward_expand(graph, product)
        found = (ctypes.c_float * (len(x) * rows)).from_address(ggml.get_data(product))
        y = np.frombuffer(found, dtype=np.float32).reshape(len(x), rows)

        def run():
            if ggml.backend_graph_compute(backend, graph) != SUCCESS:
                raise RuntimeError("ggml could not compute the product")
            return y

        return run

    return stored.nbytes, make


def main():
    args = options()
    ggml = Ggml()
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, args.threads)
    W, contenders, repacking = distinct_rows(args), {}, ggml.repacking_buffer(backend)
    for name, kind in TYPES.items():
        stored, shape = quantized(ggml, kind, W), (args.rows, args.channels)
        contenders[f"ggml {name}"] = contender(ggml, backend, kind, stored, shape, ggml.backend_cpu_buffer_type())
        if repacking and name in REPACKED:
            contenders[f"ggml {name} repacked"] = contender(ggml, backend, kind, stored, shape, repacking)
    serve(args, contenders)


if __name__ == "__main__":
    main()
