"""Run a compressed model that need not fit into memory: its blocks stay on disk, and each is there while it computes.

As in ZeRO-Inference (arXiv 2207.00032) and FlexGen (arXiv 2303.06865) one pass over the file serves all sequences of a batch, so that
tokens a second grow with the batch; a thread reads the next block, and lays it out for the kernels, while this one computes.
Embeddings, final norm, head and the grids of activations stay in memory, and the packed cache grows there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lowbit.micro_batches import in_micro_batches
from lowbit.modules import ActivationQuantizer, Linear
from torch import nn

from ptq.architectures import Spec
from ptq.blocks import skeleton
from ptq.checkpoint import is_compressed
from ptq.consistency import check_grids, check_names, check_packed
from ptq.errors import BadInput
from ptq.hf_quantizer import PtqConfig, PtqQuantizer, run_block_on_integers, run_head_on_integers, skip_zeros, spec_of
from ptq.native_decode import decode_natively
from ptq.source import Checkpoint, read_headers

# What a block holds inside is bounded by what these many tokens need, or one sequence.
MICRO_BATCH_TOKENS = 1024


class BlockStream:
    """The blocks of a model on "meta": at most two have their tensors, the one that computes and the next, in a circle.

    prepare: called with a block's number when its tensors are there, on the reading thread. forget: called before they are dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        checkpoint: Checkpoint,
        *,
        prepare: Callable[[int], None],
        forget: Callable[[int], None],
    ):
        self.blocks, self._path, self._checkpoint = list(model.get_submodule(path)), path, checkpoint
        self._prepare, self._forget = prepare, forget
        self._empty = [_streamed(block) for block in self.blocks]
        # one thread, which ends when the stream is collected; an error in it comes out where the block is waited for
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ptq-stream")
        self._coming: tuple[int, Future] | None = None

    @contextmanager
    def visit(self, i: int) -> Iterator[None]:
        """Within, block i has its tensors, and the next one gets its own.

        Raises:
            BadInput: a file is gone, damaged, or another one than when the model was loaded.
        """
        self._wait_for(i)
        try:
            yield
        finally:
            self._drop(i)

    def _wait_for(self, i: int) -> None:
        if self._coming is not None and self._coming[0] != i:  # a pass was broken off
            wait([self._coming[1]])
            self._drop(self._coming[0])
            self._coming = None
        if self._coming is None:
            self._begin(i)
        try:
            self._coming[1].result()
        except Exception:
            self._coming = None
            raise
        self._coming = None
        if len(self.blocks) > 1:
            self._begin((i + 1) % len(self.blocks))

    def _begin(self, i: int) -> None:
        self._coming = i, self._thread.submit(self._read, i)

    @torch.no_grad()
    def _read(self, i: int) -> None:
        block, prefix = self.blocks[i], f"{self._path}.{i}"
        try:
            fill(block, prefix, self._empty[i], self._checkpoint)
            check_packed(block, f"{self._checkpoint.folder}: {prefix}")
            self._prepare(i)
        except BaseException:
            self._drop(i)
            raise

    def _drop(self, i: int) -> None:
        self._forget(i)
        for local, empty in self._empty[i].items():
            put(self.blocks[i], local, empty)
        for module in self.blocks[i].modules():
            if isinstance(module, Linear):
                module.planar = module.tiles = None


def _streamed(block: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors, on "meta", that a block gives back: all but the grids of activations, which are small and make the cache."""
    stay = {name for name, module in block.named_modules() if isinstance(module, ActivationQuantizer)}
    return {local: t for local, t in block.state_dict().items() if local.rpartition(".")[0] not in stay}


def fill(module: nn.Module, prefix: str, wanted: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Read the tensors `wanted` of `module`, local name -> its empty tensor, which gives shape and dtype.

    They are copies: a tensor of the mapped file would be read when it is used, and stay resident with the whole file.

    Raises:
        BadInput: a tensor that cannot be read, or is of another shape or kind.
    """
    for local, empty in wanted.items():
        name = f"{prefix}.{local}" if prefix else local
        tensor = checkpoint.read_part(name)
        both_floating = tensor.is_floating_point() and empty.is_floating_point()
        if tensor.shape != empty.shape or not (both_floating or tensor.dtype == empty.dtype):
            found, want = (f"{t.dtype} {list(t.shape)}" for t in (tensor, empty))
            raise BadInput(f"{checkpoint.where[name]}: {name} is {found}, the config says {want}")
        put(module, local, tensor.to(empty.dtype, copy=True))


def put(module: nn.Module, local: str, tensor: torch.Tensor) -> None:
    """Let `tensor` be the buffer or parameter `local` of `module`."""
    path, _, leaf = local.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:  # whether a gradient could be asked for decides which product PyTorch takes, so that stays as it is
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=owner._parameters[leaf].requires_grad)


def load_streamed(path: Path, config: Any, *, device: str, dtype: torch.dtype | str) -> nn.Module:
    """The model of a compressed folder whose format is known, its blocks streaming; see `ptq.checkpoint.load`.

    Raises:
        BadInput: not compressed, another device or dtype than float32 on the CPU, or tensors that do not fit the config.
    """
    if not is_compressed(config):
        raise BadInput(f"{path}: only what ptq has compressed and packed can stream; load it whole")
    if torch.device(device).type != "cpu" or dtype != torch.float32:
        raise BadInput(f"streaming runs on the CPU in float32, not on {device} in {dtype}; choose cpu, and no dtype")
    model, checkpoint = _empty_model(path, config)
    spec = spec_of(config)
    absent = check_names(model, checkpoint.shapes, path)
    drop = {
        f"{spec.blocks}.{i}.{local}" for i, b in enumerate(model.get_submodule(spec.blocks)) for local in _streamed(b)
    }
    fill(model, "", {name: t for name, t in model.state_dict().items() if name not in drop | absent}, checkpoint)
    model.tie_weights(missing_keys=set(absent))
    check_grids(model, path)
    check_packed(model.get_output_embeddings(), path)
    _stream_blocks(model, spec, checkpoint)
    return model


def _empty_model(path: Path, config: Any) -> tuple[nn.Module, Checkpoint]:
    """The float32 model on "meta" with its lowbit modules."""
    from transformers import GenerationConfig

    checkpoint = Checkpoint(path, config, *read_headers(path))
    config.dtype = torch.float32
    model = skeleton(checkpoint)
    model.hf_quantizer = PtqQuantizer(PtqConfig(**dict(config.quantization_config)))
    model.hf_quantizer.preprocess_model(model)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, checkpoint


def _stream_blocks(model: nn.Module, spec: Spec, checkpoint: Checkpoint) -> None:
    """Attach to the model, whose resident tensors are there, what it needs to run, and the stream."""
    from lowbit.decode_stream import StreamedDecoder

    blocks, made = list(model.get_submodule(spec.blocks)), []

    def prepare(i: int) -> None:
        skip_zeros(blocks[i])
        run_block_on_integers(blocks[i], spec)
        for decoder in made:
            decoder.read(i)

    def forget(i: int) -> None:
        for decoder in made:
            decoder.forget(i)

    stream = BlockStream(model, spec.blocks, checkpoint, prepare=prepare, forget=forget)

    def decoder(*args) -> StreamedDecoder:
        made.append(StreamedDecoder(*args, visit=stream.visit))
        return made[0]

    run_head_on_integers(model)
    model.hf_quantizer.attach(model)
    if decode_natively(model, spec, make=decoder) is not None:
        made.clear()
    for i, block in enumerate(blocks):
        block.forward = partial(_forward, stream, i, block.forward)


def _forward(stream: BlockStream, i: int, run: Callable, *args, **kwargs) -> Any:
    with torch.no_grad(), stream.visit(i):  # a graph would hold on to every block
        return in_micro_batches(run, args, kwargs, layer=i, tokens=MICRO_BATCH_TOKENS)
