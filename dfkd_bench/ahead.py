"""Host memory for what the device can't hold: batches are brought there, the next one while the device works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest

import torch
from torch import Tensor

_Host = Tensor | tuple[Tensor, ...]


def spare_memory(device: torch.device) -> int | None:
    """Bytes on a GPU that nothing lives in now, those kept by PyTorch's allocator included; None on the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class HostImages:
    """uint8 images [n, C, H, W] that ``device`` can't hold: in host memory, or mapped from files."""

    def __init__(self, parts: Sequence[Tensor], device: torch.device) -> None:
        """``parts``: on the host, of one shape but for their lengths; their rows count on. They are not copied."""
        self._parts = tuple(parts)
        self._ahead = Ahead(device)

    def __len__(self) -> int:
        return sum(part.shape[0] for part in self._parts)

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        return torch.Size((len(self), *self._parts[0].shape[1:]))

    def __getitem__(self, rows: Tensor) -> Tensor:
        """These images on the device."""
        return self.take(rows)

    def take(self, rows: Tensor, then: Tensor | None = None) -> Tensor:
        """These images on the device; those of ``then`` are fetched meanwhile, if it is known what comes next."""
        batch = self._ahead.take(self._parts, rows.cpu())
        self._ahead.expect(self._parts, None if then is None else then.cpu())
        return batch


Images = Tensor | HostImages


def place(
    parts: Sequence[Tensor],
    device: torch.device,
    spare: Callable[[torch.device], int | None] = spare_memory,
) -> Images:
    """uint8 images [n, C, H, W] of all ``parts``, which lie on the host, where ``device`` gets at them.

    They come onto the device if they take no more than half of what is free there, and else stay where they are. Where
    the device's memory is the host's, a single part is not copied. Where they lie changes no bit of a batch.
    """
    room = spare(device)
    if room is not None and 2 * sum(part.numel() for part in parts) > room:
        return HostImages(parts, device)
    if len(parts) == 1:
        return parts[0].to(device)
    images = parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), device=device)
    for part, here in zip(parts, images.split([part.shape[0] for part in parts]), strict=True):
        here.copy_(part)
    return images


def taken(images: Images, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of each of the ``batches`` of rows, one batch after the other."""
    if isinstance(images, Tensor):
        for rows in batches:
            yield images[rows]
        return
    on_host = [rows.cpu() for rows in batches]  # all at once: each of them waits for the device
    for rows, then in zip_longest(on_host, on_host[1:]):
        yield images.take(rows, then)


class Ahead:
    """Takes rows of a host tensor, or of several one after the other, to ``device``.

    A thread of its own gathers the rows that are expected next: on a GPU into one of two pinned buffers, from which a
    stream of its own copies them, so that neither the host's nor the device's work waits for the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pool")
        self._expected: Tensor | None = None
        self._fetched: Future[Tensor] | None = None
        self._lane = _Lane(device) if device.type == "cuda" else None

    def take(self, images: _Host, rows: Tensor) -> Tensor:
        """``images[rows]`` on the device; ``rows`` int64 on the host."""
        fetched = self._fetched
        if fetched is None or self._expected is None or not torch.equal(rows, self._expected):
            fetched = self._thread.submit(self._fetch, images, rows)  # after what is under way there
        self._expected = self._fetched = None
        batch = fetched.result()
        if self._lane is not None:
            self._lane.hand_over(batch)
        return batch

    def expect(self, images: _Host, rows: Tensor | None) -> None:
        """Begin to fetch ``rows``; None: nothing is known of the next batch. ``images`` must stay until ``forget``."""
        self._expected = rows
        self._fetched = None if rows is None else self._thread.submit(self._fetch, images, rows)

    def forget(self) -> None:
        """Wait for what is under way and drop it: the tensor is about to change."""
        if self._fetched is not None:
            self._fetched.result()
        self._expected = self._fetched = None

    def _fetch(self, images: _Host, rows: Tensor) -> Tensor:
        if self._lane is not None:
            return self._lane.copy(images, rows)
        return images[rows] if isinstance(images, Tensor) else _gather(images, rows)


def _gather(images: _Host, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows, in ``out`` if it is given. Rows of several tensors count on from one to the next."""
    parts = (images,) if isinstance(images, Tensor) else images
    if len(parts) == 1:
        return torch.index_select(parts[0], 0, rows, out=out)
    gathered = parts[0].new_empty((rows.shape[0], *parts[0].shape[1:])) if out is None else out
    start = 0
    for part in parts:
        here = ((rows >= start) & (rows < start + part.shape[0])).nonzero().flatten()
        gathered[here] = part[rows[here] - start]
        start += part.shape[0]
    return gathered


class _Lane:
    """Pinned buffers and a stream for copies to one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor | None] = [None, None]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def copy(self, images: _Host, rows: Tensor) -> Tensor:
        """Gather and start the copy; the batch is ready when the stream is."""
        self._turn = 1 - self._turn
        event, buffer = self._copied[self._turn], self._buffers[self._turn]
        like = images if isinstance(images, Tensor) else images[0]
        event.synchronize()  # the copy before the last one has left the buffer
        # Whatever the main thread has set, a new thread's device is GPU 0; memory is pinned for the current device.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if buffer is None or buffer.shape[0] < rows.shape[0] or buffer.shape[1:] != like.shape[1:]:
                buffer = torch.empty((rows.shape[0], *like.shape[1:]), dtype=like.dtype, pin_memory=True)
                self._buffers[self._turn] = buffer
            staged = _gather(images, rows, buffer[: rows.shape[0]])
            batch = staged.to(self._device, non_blocking=True)
            event.record()
        return batch

    def hand_over(self, batch: Tensor) -> None:
        """Let the stream that computes use ``batch`` when it has arrived."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        batch.record_stream(computing)
