"""Training on an accelerator: the images are in its memory, and one call trains for many steps.

A split's pixels go there once, where they fit (resident). Otherwise they follow in shards, each copied while the one
before is trained on (streamed). A batch is a vector of positions: it is gathered, degraded, cropped, warped and trained
on without Python.

What an epoch shows is planned by `Batches`, as on the CPU: the same order, the same changes, the same batches.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal

import keras
import numpy as np

from deepfake_core.errors import DeviceError
from deepfake_core.training.augmentation import crop_side
from deepfake_core.training.batches import Batches
from deepfake_core.training.devices import count_replicas, read_free_bytes, sees_only_cpus
from deepfake_core.training.steps import make_steps

log = logging.getLogger(__name__)

Feeding = Literal["resident", "streamed", "host"]
"""Where images are changed: on the accelerator, which has the whole split or gets it in shards; or on the CPU."""

REPORTS_PER_EPOCH = 10
"""In each epoch of a resident split: how often progress is reported."""

SHARD_BYTES = 2**28
READ_ROWS = 128

MAX_RESIDENT_SHARE = 0.5
"""Of the free memory. The rest is for the network, its activations and the changes of a batch."""

MAX_WAITING_SHARE = 0.1


@dataclass(frozen=True)
class Block:
    """What one call trains on: a number of batches.

    Attributes:
        pixels: uint8 (m, size, size, 3), on the accelerator.
        batches: `positions` int32 (k, n) in the pixels, `labels` and `weights` float32 (k, n), and the fields of
            `Changes` where images are changed. A weight of 0 fills up a batch.
        steps: how many of the k batches are there; the rest fills up.
    """

    pixels: Any
    batches: dict[str, np.ndarray]
    steps: int


class Feed:
    """The blocks of each epoch that `batches` starts."""

    def __init__(self, batches: Batches, feeding: Feeding, steps: Any) -> None:
        self.batches, self._feeding, self._steps = batches, feeding, steps
        self._array, self._rows = batches.images.locate()
        self._pixels = steps.put(self._array) if feeding == "resident" else None
        replicas = count_replicas()
        self._width = -(-batches.batch_size // replicas) * replicas
        fitting = SHARD_BYTES // int(np.prod(self._array.shape[1:])) // self._width
        self._size = (
            -(-len(batches) // REPORTS_PER_EPOCH) if feeding == "resident" else min(max(1, fitting), len(batches))
        )

    def blocks(self) -> Iterator[Block]:
        """Yield the epoch's blocks, all of one shape."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for first in range(0, len(self.batches), self._size):
                chosen, weights = self._plan(first)
                positions = np.arange(chosen.size).reshape(chosen.shape)
                changes = self.batches.changes
                if self._feeding == "resident":
                    pixels, positions = self._pixels, self._rows[chosen]
                elif self._feeding == "streamed":
                    pixels = self._steps.put(_gather(self._array, self._rows[chosen.ravel()], pool))
                else:
                    pixels, changes = self._steps.put(self._change(first, pool)), None
                batches = {
                    "positions": positions.astype(np.int32),
                    "labels": self.batches.images.labels[chosen].astype(np.float32),
                    "weights": weights,
                }
                if changes:
                    taken = changes.take(chosen)
                    batches |= {field.name: getattr(taken, field.name) for field in fields(taken)}
                yield Block(pixels, batches, min(self._size, len(self.batches) - first))

    def _change(self, first: int, pool: ThreadPoolExecutor) -> np.ndarray:
        """Return the images of the batches from one on, changed by the CPU."""
        made = pool.map(self.batches.__getitem__, range(first, min(first + self._size, len(self.batches))))
        filled = [np.pad(pixels, ((0, self._width - len(pixels)), *[(0, 0)] * 3)) for pixels, _ in made]
        return np.concatenate(filled + [np.zeros_like(filled[0])] * (self._size - len(filled)))

    def _plan(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the images (k, n) of the batches from one on, each batch sorted, and their weights."""
        size, none = self.batches.batch_size, np.iinfo(np.int64).max
        order = self.batches.order[first * size : (first + self._size) * size]
        chosen = np.pad(order, (0, self._size * size - len(order)), constant_values=none)
        chosen = np.sort(chosen.reshape(self._size, size), axis=1)
        chosen = np.pad(chosen, ((0, 0), (0, self._width - size)), constant_values=none)
        there = chosen != none
        return np.where(there, chosen, 0), there.astype(np.float32)


def choose_feeding(train: Batches, val: Batches) -> Feeding:
    """Return where images are changed: on an accelerator if there is one, from its memory where both splits fit."""
    if sees_only_cpus():
        return "host"
    arrays, free = [batches.images.locate()[0] for batches in (train, val)], read_free_bytes()
    needed = sum(array.nbytes for array in arrays)
    on_disk = all(isinstance(array, np.ndarray) for array in arrays)
    resident = on_disk and free is not None and needed <= MAX_RESIDENT_SHARE * free
    log.info(
        "pixels: %.1f GB; free on the accelerator: %s; they are %s",
        needed / 1e9,
        f"{free / 1e9:.1f} GB" if free is not None else "unknown",
        "put there once" if resident else "streamed in shards",
    )
    return "resident" if resident else "streamed"


def fit(
    model: keras.Model, train: Batches, val: Batches, feeding: Feeding, callbacks: Sequence[Any], epochs: int
) -> None:
    """Train a compiled model as Keras's `fit` does, and call the same callbacks.

    Args:
        feeding: resident falls back to streamed where memory turns out to be too small.
        epochs: the number of the last one; a callback may set the first as `model._initial_epoch`.

    Raises:
        DeviceError: if the accelerator fails, or has too little memory.
    """
    steps = make_steps(model, train.augmentation, crop_side(train.images.pixels.shape[1], train.augmentation))
    calls = keras.callbacks.CallbackList(list(callbacks), model=model, epochs=epochs, steps=len(train))
    try:
        feeds = _make_feeds(train, val, feeding, steps)
        model.optimizer.build(model.trainable_variables)
        model.stop_training = warned = False
        calls.on_train_begin()
        for epoch in range(model._initial_epoch, epochs):
            calls.on_epoch_begin(epoch)
            logs = _run_epoch(steps, *feeds, calls)
            if logs["waiting_share"] > MAX_WAITING_SHARE and not warned:
                warned = True
                log.warning(
                    "The accelerator waited for images for %.0f%% of an epoch. Give the machine more CPU cores or a "
                    "faster disk, or train on fewer or smaller images, so that they fit into the accelerator's memory.",
                    100 * logs["waiting_share"],
                )
            calls.on_epoch_end(epoch, logs)
            if model.stop_training:
                break
        calls.on_train_end()
    except steps.failure as exc:
        raise DeviceError(
            "An accelerator must work throughout a training, and hold the network and one batch. Received: "
            f"{str(exc).splitlines()[0][:300]}. Run the flow again: the training continues after its last finished "
            "epoch. If memory is too small, lower training.batch_size."
        ) from exc


def _run_epoch(steps: Any, train: Feed, val: Feed, calls: Any) -> dict[str, float]:
    """Train on each batch, validate, and return Keras's logs and `waiting_share`."""
    started, done = time.perf_counter(), 0

    def report(block: Block) -> None:
        nonlocal done
        done += block.steps
        calls.on_train_batch_end(done - 1)

    steps.begin()
    loss, accuracy, waited = _run(steps.train, train, report)
    steps.end()
    waiting_share = waited / (time.perf_counter() - started)
    calls.on_test_begin()
    val_loss, val_accuracy, _ = _run(steps.test, val, lambda _: None)
    return {
        "loss": loss,
        "accuracy": accuracy,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "waiting_share": waiting_share,
    }


def _run(
    call: Callable[[Block], np.ndarray], feed: Feed, report: Callable[[Block], None]
) -> tuple[float, float, float]:
    """Call for each block; return the mean loss, the accuracy, and the seconds for which no block was ready."""
    totals, waited = np.zeros(2), 0.0
    blocks = _fetch_ahead(feed.blocks())
    while True:
        asked = time.perf_counter()
        block = next(blocks, None)
        waited += time.perf_counter() - asked
        if block is None:
            break
        totals += call(block)
        report(block)
    loss, right = totals / len(feed.batches.images)
    return loss, right, waited


def _fetch_ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield each block while a thread makes the next one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while block := coming.result():
            coming = pool.submit(next, blocks, None)
            yield block


def _make_feeds(train: Batches, val: Batches, feeding: Feeding, steps: Any) -> tuple[Feed, Feed]:
    if feeding == "resident":
        try:
            return Feed(train, feeding, steps), Feed(val, feeding, steps)
        except steps.failure as exc:
            log.warning("The pixels did not fit into the accelerator's memory (%s): they are streamed", exc)
            feeding = "streamed"
    return Feed(train, feeding, steps), Feed(val, feeding, steps)


def _gather(array: np.ndarray, rows: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    """Return rows of an array on disk, or of images that are decoded now, read by the threads of a pool."""
    out = np.empty((len(rows), *array.shape[1:]), array.dtype)

    def read(start: int) -> None:
        part = slice(start, start + READ_ROWS)
        if isinstance(array, np.ndarray):
            array.take(rows[part], axis=0, out=out[part], mode="clip")  # any other mode copies `out`
        else:
            out[part] = array[rows[part]]

    list(pool.map(read, range(0, len(rows), READ_ROWS)))
    return out
