#!/usr/bin/env python3
"""ONNX Runtime's MatMulNBits, for bench_cpu.py, which starts it in an environment that has onnx and onnxruntime."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime
from _cpu_turns import distinct_rows, options, repeated, serve
from onnx import TensorProto, helper, numpy_helper

BITS = 4
BLOCKS = (32, 128)
INT8_COMPUTE = 4  # accuracy_level: activations are rounded to 8 bits


def rounded(W, block):
    """(codes uint8 [R, C / block, block / 2], scales float32 [R, C / block], zero points uint8 [R, ceil(C / block / 2)])."""
    groups = W.reshape(len(W), -1, block)  # [R, C] -> [R, G, block]
    low, high = groups.min(2), groups.max(2)
    scale = (high - low) / (2**BITS - 1)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, 2**BITS - 1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale, nibbles(zero.astype(np.uint8))


def nibbles(zero):
    """[R, G] -> [R, ceil(G / 2)], the first in the low half."""
    padded = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
    return padded[:, 0::2] | padded[:, 1::2] << 4


def model(args, tensors, block):
    """One MatMulNBits from x [T, C] to y [T, R]."""
    names = ("codes", "scales", "zeros")
    held = [numpy_helper.from_array(tensor, name) for name, tensor in zip(names, tensors)]
    sizes = {"K": args.channels, "N": args.rows, "bits": BITS, "block_size": block, "accuracy_level": INT8_COMPUTE}
    node = helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **sizes)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])
        for name, width in (("x", args.channels), ("y", args.rows))
    ]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], initializer=held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def contender(args, W, block):
    tensors = [repeated(tensor) for tensor in rounded(W, block)]
    how = onnxruntime.SessionOptions()
    how.intra_op_num_threads, how.inter_op_num_threads = args.threads, 1
    # Else its threads look for work after a call, and whether they still do decides how fast the next one is.
    how.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model(args, tensors, block), how, providers=["CPUExecutionProvider"])
    return sum(tensor.nbytes for tensor in tensors), lambda x: lambda: session.run(None, {"x": x})[0]


def main():
    args = options()
    W = distinct_rows(args)
    serve(args, {f"onnxruntime 4 bits, blocks of {block}": contender(args, W, block) for block in BLOCKS})


if __name__ == "__main__":
    main()
