"""Host memory for what the device can't hold: batches are brought there, the next one while the device works."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


def spare_memory(device: torch.device) -> int | None:
    """Bytes on a GPU that nothing lives in now, those kept by PyTorch's allocator included; None on the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Ahead:
    """Takes rows of a host tensor to ``device``.

    A thread of its own gathers the rows that are expected next: on a GPU into one of two pinned buffers, from which a
    stream of its own copies them, so that neither the host's nor the device's work waits for the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pool")
        self._expected: Tensor | None = None
        self._fetched: Future[Tensor] | None = None
        self._lane = _Lane(device) if device.type == "cuda" else None

    def take(self, images: Tensor, rows: Tensor) -> Tensor:
        """``images[rows]`` on the device; ``rows`` int64 on the host."""
        fetched = self._fetched
        if fetched is None or self._expected is None or not torch.equal(rows, self._expected):
            fetched = self._thread.submit(self._fetch, images, rows)  # after what is under way there
        self._expected = self._fetched = None
        batch = fetched.result()
        if self._lane is not None:
            self._lane.hand_over(batch)
        return batch

    def expect(self, images: Tensor, rows: Tensor | None) -> None:
        """Begin to fetch ``rows``; None: nothing is known of the next batch. ``images`` must stay until ``forget``."""
        self._expected = rows
        self._fetched = None if rows is None else self._thread.submit(self._fetch, images, rows)

    def forget(self) -> None:
        """Wait for what is under way and drop it: the tensor is about to change."""
        if self._fetched is not None:
            self._fetched.result()
        self._expected = self._fetched = None

    def _fetch(self, images: Tensor, rows: Tensor) -> Tensor:
        return images[rows] if self._lane is None else self._lane.copy(images, rows)


class _Lane:
    """Pinned buffers and a stream for copies to one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor | None] = [None, None]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def copy(self, images: Tensor, rows: Tensor) -> Tensor:
        """Gather and start the copy; the batch is ready when the stream is."""
        self._turn = 1 - self._turn
        event, buffer = self._copied[self._turn], self._buffers[self._turn]
        event.synchronize()  # the copy before the last one has left the buffer
        # Whatever the main thread has set, a new thread's device is GPU 0; memory is pinned for the current device.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if buffer is None or buffer.shape[0] < rows.shape[0] or buffer.shape[1:] != images.shape[1:]:
                buffer = torch.empty((rows.shape[0], *images.shape[1:]), dtype=images.dtype, pin_memory=True)
                self._buffers[self._turn] = buffer
            staged = torch.index_select(images, 0, rows, out=buffer[: rows.shape[0]])
            batch = staged.to(self._device, non_blocking=True)
            event.record()
        return batch

    def hand_over(self, batch: Tensor) -> None:
        """Let the stream that computes use ``batch`` when it has arrived."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        batch.record_stream(computing)
