"""CUDA graphs of rounds: one launch for all kernels of a program, without Python in between.

A program runs eagerly the first time, which loads its kernels. The second time it is captured. From then on it is
replayed, over optimizer steps and rollouts, as long as the tensors it reads stay where they are. Programs are padded
to a few batch sizes and numbers of slots; the padding rows are inactive and emit nothing. All graphs share one memory
pool.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from trl_selfspec.sampling.logits_processing import BatchedLogitsProcessor


logger = logging.get_logger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
BATCH_SIZE_STEP = 64  # above the largest of these
MIN_SLOTS = 512
MAX_PROCESSORS = 4  # logits processors whose graphs are held: training, evaluation, and what a user tries


class Program(NamedTuple):
    """A part of a round, and the sizes that its graph depends on."""

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
        required: raise if a program can't be captured. Otherwise all programs run eagerly after one warning.

    Attributes:
        steady_state: no program of the current round was warmed up or captured.
    """

    def __init__(self, capture: Capture | None = None, required: bool = False) -> None:
        self._capture, self._required = capture, required
        self._graphs: dict[str, dict[Program, tuple[Replay | None, Function]]] = {}  # by processor
        self._processors: dict[str, BatchedLogitsProcessor] = {}
        self._processor = ""
        self._most_rows = self._most_slots = 0
        self.steady_state = True

    def begin_rollout(
        self, logits_processor: BatchedLogitsProcessor, max_rows: int, row_capacity: int
    ) -> BatchedLogitsProcessor:
        """Announces rounds with this logits processor, for a state and a cache of this size.

        Returns:
            The logits processor to run: an equal one whose programs have run before, if there is one. Some processors
            are prepared on the host in their first round, which a capture must not include.
        """
        if self._capture is None:
            return logits_processor
        self._most_rows, self._most_slots = max_rows, row_capacity
        self._processor = logits_processor.signature
        self._graphs.setdefault(self._processor, {})
        if len(self._graphs) > MAX_PROCESSORS:
            self.clear()
            self._graphs, self._processors = {self._processor: {}}, {}
        return self._processors.setdefault(self._processor, logits_processor)

    def begin_round(self) -> None:
        self.steady_state = True

    def run(self, program: Program, function: Function) -> Tensor:
        """Runs `function`, or replays it, for at least the program's rows and slots."""
        if self._capture is None:
            return function(program)
        program = self.padded(program)
        graphs = self._graphs[self._processor]
        replay, captured = graphs.get(program, (None, None))
        if replay is not None:
            return replay()
        self.steady_state = False
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
        """The program with its rows and slots rounded up, so that graphs are few."""
        steps = -(-program.num_rows // BATCH_SIZE_STEP)
        num_rows = next((size for size in BATCH_SIZES if size >= program.num_rows), steps * BATCH_SIZE_STEP)
        num_slots = max(MIN_SLOTS, 1 << (program.num_slots - 1).bit_length())
        return program._replace(num_rows=min(num_rows, self._most_rows), num_slots=min(num_slots, self._most_slots))

    def clear(self) -> None:
        """Drops all graphs, because a tensor that they use has moved."""
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

    Attributes:
        nbytes: of the pool, as far as captures made it grow.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.nbytes = device, 0
        self._stream = torch.cuda.Stream(device)  # torch's default one is shared with everybody's graphs
        self._pool: Any = None

    def renew(self) -> None:
        """Takes another pool; torch does not capture again into one whose graphs are gone."""
        self._pool, self.nbytes = None, 0

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:  # other threads (a data loader that pins memory) may use CUDA meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved(self.device)
                result = function()
        except BaseException:
            self._end_failed_capture()
            torch.cuda.set_stream(current)  # `torch.cuda.graph` leaves its own one current
            raise
        self.nbytes += torch.cuda.memory_reserved(self.device) - before

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _end_failed_capture(self) -> None:
        """Takes back what torch leaves behind where a capture is invalidated (a host sync in the model's code).

        `capture_end` raises before it takes the allocator out of the capture, so that `empty_cache`, which training
        needs, fails from then on. In torch 2.11 the random generator stays in the capture too, and the next dropout
        fails, until another capture succeeds. There is no public way to do the first.
        """
        with contextlib.suppress(RuntimeError):  # the capture was ended properly
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)
            torch._C._cuda_releasePool(self.device.index or 0, self._pool)
        self.renew()
        with contextlib.suppress(RuntimeError):
            other = torch.cuda.CUDAGraph()
            with torch.cuda.graph(other, stream=self._stream, capture_error_mode="thread_local"):
                torch.zeros((), device=self.device)
