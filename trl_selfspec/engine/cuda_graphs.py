"""Rounds captured as CUDA graphs: the GPU runs a whole program of kernels without waiting for Python.

A program runs eagerly the first time, which loads its kernels, is captured the second time, and replayed from then on:
over optimizer steps and rollouts, as long as the tensors it reads stay where they are. Graphs exist for a few numbers
of rows and slots; the rows beyond the active ones are parked. All share one memory pool.
"""

import contextlib
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from trl_selfspec.sampling.logits_processing import BatchedLogitsProcessor


logger = logging.get_logger(__name__)

LANES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
LANE_STEP = 64  # beyond
FEWEST_SLOTS = 512
MAX_LAWS = 4  # sampling laws whose graphs are kept: training, evaluation, and what a user tries


class Program(NamedTuple):
    """What tells one captured part of a round from another."""

    kind: str
    num_rows: int
    num_slots: int
    gamma: int = 0


Function = Callable[[Program], Tensor]
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


class CaptureError(RuntimeError):
    """A round can't be captured; the message names the reason."""


class GraphPool:
    """Runs programs, captured where `capture` is given.

    Args:
        capture: turns a function into one that replays it; `None` runs every program eagerly.
        required: raise where a program can't be captured instead of running it eagerly after one warning.

    Attributes:
        typical: nothing in the current round ran for the first time.
    """

    def __init__(self, capture: Capture | None = None, required: bool = False) -> None:
        self._capture, self._required = capture, required
        self._graphs: dict[Hashable, dict[Program, tuple[Replay | None, Function]]] = {}  # by law
        self._processors: dict[Hashable, BatchedLogitsProcessor] = {}
        self._processor: Hashable = None  # None: one that can't be captured
        self._most_rows = self._most_slots = 0
        self.typical = True

    def begin_rollout(
        self, logits_processor: BatchedLogitsProcessor, max_rows: int, row_capacity: int
    ) -> BatchedLogitsProcessor:
        """Announces rounds under `law`, for a state and a cache of this size.

        Returns the law to run: an equal one whose programs have run before, since some processors are prepared on
        the host when they first run, or the one given.

        Raises:
            CaptureError: capture is required and the law needs the host.
        """
        if self._capture is None:
            return logits_processor
        if logits_processor.needs_host and self._required:
            raise CaptureError(
                "These sampling parameters need the host in every round, so rounds can't be captured; use "
                '`cuda_graphs="auto"`, or leave out the n-gram, bias, forced-token and encoder parameters, `top_h` '
                "and `eta_cutoff`."
            )
        self._most_rows, self._most_slots = max_rows, row_capacity
        self._processor = None if logits_processor.needs_host else logits_processor.signature
        if self._processor is None:
            return logits_processor
        self._graphs.setdefault(self._processor, {})
        if len(self._graphs) > MAX_LAWS:
            self.clear()
            self._graphs, self._processors = {self._processor: {}}, {}
        return self._processors.setdefault(self._processor, logits_processor)

    def begin_round(self) -> None:
        self.typical = True

    def run(self, program: Program, function: Function) -> Tensor:
        """Runs `function`, or replays it, for at least the program's rows and slots."""
        if self._capture is None or self._processor is None:
            return function(program)
        program = self.padded(program)
        graphs = self._graphs[self._processor]
        replay, captured = graphs.get(program, (None, None))
        if replay is not None:
            return replay()
        self.typical = False
        if captured is None:
            result = function(program)
            graphs[program] = None, function  # not before it has come to its end
            return result
        try:
            replay = self._capture(lambda: function(program))
        except RuntimeError as error:
            self._give_up(error)
            return function(program)
        graphs[program] = replay, function  # the function holds the tensors that the graph uses
        return replay()

    def padded(self, program: Program) -> Program:
        """The program that stands for this one: few numbers of rows and slots, so that graphs are few."""
        num_rows = next((n for n in LANES if n >= program.num_rows), -(-program.num_rows // LANE_STEP) * LANE_STEP)
        num_slots = max(FEWEST_SLOTS, 1 << (program.num_slots - 1).bit_length())
        return program._replace(num_rows=min(num_rows, self._most_rows), num_slots=min(num_slots, self._most_slots))

    def clear(self) -> None:
        """Forgets all graphs: a tensor that they use has moved."""
        for graphs in self._graphs.values():
            graphs.clear()
        if isinstance(self._capture, CudaCapture):
            self._capture.renew()

    @property
    def nbytes(self) -> int:
        """Bytes of the pool that the graphs share."""
        return self._capture.nbytes if isinstance(self._capture, CudaCapture) else 0

    def __len__(self) -> int:
        return sum(replay is not None for graphs in self._graphs.values() for replay, _ in graphs.values())

    def _give_up(self, error: RuntimeError) -> None:
        if self._required:
            raise CaptureError(
                f'A round could not be captured as a CUDA graph: {error}. Use `cuda_graphs="auto"` to run such a '
                "model eagerly."
            ) from error
        logger.warning_once(f"Rounds run without CUDA graphs, more slowly: capturing one failed with {error!r}.")
        self.clear()
        self._capture = None


class CudaCapture:
    """Captures functions of one device as CUDA graphs that share a memory pool and a stream of their own.

    torch's own `torch.cuda.graph` shares its stream with everybody's graphs, whose end takes cuBLAS workspaces along
    that ours still use; it empties torch's cache for every capture; and one that fails leaves its stream current.

    Attributes:
        nbytes: of the pool, as far as captures made it grow.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.nbytes = device, 0
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def renew(self) -> None:
        """A pool for other graphs, all former ones being gone: theirs can't be captured into again."""
        self._pool, self.nbytes = None, 0

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        with contextlib.suppress(RuntimeError):
            return self._captured(function)
        torch.cuda.empty_cache()  # torch lets go of no memory during a capture, and not all errors tell of a lack
        return self._captured(function)

    def _captured(self, function: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._pool is None:
                for dtype in (torch.float32, torch.bfloat16):  # cuBLAS' workspace of this stream, outside of the pool
                    square = torch.ones(16, 16, dtype=dtype, device=self.device)
                    square.mm(square)
                self._pool = torch.cuda.graph_pool_handle()
            before = torch.cuda.memory_reserved(self.device)
            try:
                # Other threads (a data loader that pins memory) may use CUDA meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = function()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
            self.nbytes += torch.cuda.memory_reserved(self.device) - before
        current.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed.

        Where even that fails, torch 2.11 leaves the allocator capturing, which breaks `empty_cache`, and the random
        generator, which breaks the next dropout. A capture that succeeds resets the latter.
        """
        try:
            with warnings.catch_warnings(action="ignore"):  # of a graph without kernels
                graph.capture_end()
            if self.nbytes:  # the pool holds other graphs
                return
        except RuntimeError:
            with contextlib.suppress(RuntimeError, AttributeError):  # newer releases have done it
                torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)
                torch._C._cuda_releasePool(self.device.index or 0, self._pool)
            with contextlib.suppress(RuntimeError):
                other = torch.cuda.CUDAGraph()
                other.capture_begin(capture_error_mode="thread_local")
                torch.zeros((), device=self.device)
                other.capture_end()
        self.renew()
