"""One model behind a queue: reads and decodes request bodies, and returns predictions."""

import asyncio
import ctypes
import io
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from fastapi import Request
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from convmixer.decode.errors import Apart
from convmixer.decode.worker import stop_workers
from convmixer.errors import RequestError
from convmixer.exported.web import data_uri
from convmixer.inference import Classifier, ranked, softmax
from convmixer.preprocess import ImageError, load_image, normalise, read_header, resize_and_crop
from convmixer.serve.admission import Admission, busy, client_of
from convmixer.serve.batching import Batcher, QueueFull
from convmixer.serve.body import chosen, read_form
from convmixer.serve.http import Refusal
from convmixer.serve.limits import Limits
from convmixer.serve.schema import Evidence, Prediction, Predictions

DECODING_PIXELS = 100_000_000  # pixels of all images that are decoded at once; each takes up to 12 bytes
MAX_SLOW_IMAGES = 16  # most images in or waiting for slow decoding; further ones are refused
LARGE_PIXELS = 4_000_000  # after an image of this size, freed memory is handed back to the system


class Service:
    """One model behind a queue, with limits, metrics and the threads that decode images.

    Args:
        classifier: The model.
        limits: Limits of requests.
        samples: PNG or JPEG files that the page offers, as bytes.
    """

    def __init__(self, classifier: Classifier, limits: Limits, samples: Sequence[bytes] = ()) -> None:
        self.classifier, self.limits = classifier, limits
        self.samples = [data_uri(sample) for sample in samples]
        self.decoders = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="decode")
        self.long_decoder, self.long_ones = ThreadPoolExecutor(1, thread_name_prefix="decode-long"), 0
        self.admission = Admission(limits)
        self.decoding_pixels, self.decoded = 0, threading.Condition()
        self.metrics = CollectorRegistry()
        name = "convmixer"
        self.requests = Counter(f"{name}_requests", "Requests", ["path", "status"], registry=self.metrics)
        self.images = Counter(f"{name}_images", "Images classified", registry=self.metrics)
        self.seconds = Histogram(f"{name}_request_seconds", "Time to answer a prediction", registry=self.metrics)
        buckets = [2**n for n in range(9)]
        batch = Histogram(f"{name}_batch_images", "Images computed at once", buckets=buckets, registry=self.metrics)
        self.batcher = Batcher(classifier.explained, limits.batch, limits.queue, batch.observe)
        waiting = Gauge(f"{name}_queue_images", "Images waiting", registry=self.metrics)
        waiting.set_function(self.batcher.waiting.qsize)

    async def predict(self, request: Request, topk: int | None, explain: bool | None) -> Predictions:
        """Return the answer to one request.

        Args:
            request: Its body is one image, or a form with images. A form may also have the fields topk and explain,
                which are used if the arguments of the same name are None.
            topk: Classes per image. None: the form's field, else 5.
            explain: Whether to add the evidence. None: the form's field, else no.

        Raises:
            Refusal: The request is not served; the refusal says why.
        """
        try:
            async with asyncio.timeout(None) as limit:
                with self.admission.slot(client_of(request)) as slot:
                    form = await read_form(request, self.limits, slot)
                    topk, explain = chosen(form.fields, topk, explain, len(self.classifier.classes))
                    start = time.perf_counter()
                    limit.reschedule(asyncio.get_running_loop().time() + self.limits.answer_seconds)
                    seen = await self._decode(form.images)
                    del form
                inputs = [normalise(image, self.classifier.preprocessing) for image in seen]
                answers = await self.batcher.submit(inputs, explain)
        except TimeoutError:
            text = f"no answer within {self.limits.answer_seconds:g} s"
            raise Refusal(504, "too_late", text, {"retry-after": "5"}) from None
        except QueueFull:
            raise busy() from None
        self.images.inc(len(answers))
        self.seconds.observe(time.perf_counter() - start)
        predictions = [self._prediction(*a, image, topk, explain) for a, image in zip(answers, seen, strict=True)]
        return Predictions(predictions=predictions, milliseconds=round(1000 * (time.perf_counter() - start), 3))

    async def stop(self) -> None:
        """Wait for the batch being computed, and stop all decoding."""
        await self.batcher.stop()
        stop_workers()
        for pool in (self.decoders, self.long_decoder):
            pool.shutdown(cancel_futures=True)

    async def _decode(self, files: list[bytes]) -> list[Image.Image]:
        tasks = [self._decode_one(file, number) for number, file in enumerate(files, 1)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return done  # type: ignore[return-value]

    async def _decode_one(self, file: bytes, number: int) -> Image.Image:
        """Return the resized and cropped image that the network gets.

        Images whose decoding may take long have their own queue, and are decoded one after the other.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.decoders, self._square, file, number, False)
        except Apart:
            pass
        if self.long_ones >= MAX_SLOW_IMAGES:
            raise busy()
        self.long_ones += 1
        try:
            return await loop.run_in_executor(self.long_decoder, self._square, file, number, True)
        finally:
            self.long_ones -= 1

    def _square(self, file: bytes, number: int, apart: bool) -> Image.Image:
        """Return the resized and cropped image that the network gets; for `apart` see `load_image`."""
        p = self.classifier.preprocessing
        try:
            _, (width, height) = read_header(file, apart)
            if width * height > self.limits.pixels:
                text = f"image {number} is {width} x {height}: at most {self.limits.pixels} pixels are accepted"
                raise Refusal(413, "too_many_pixels", text)
            with self._room_for(width * height):
                image = resize_and_crop(load_image(file, p.in_chans, p.bits, apart), p)
        except ImageError as error:
            raise Refusal(422, "bad_image", f"image {number} cannot be read: {error}") from None
        if width * height > LARGE_PIXELS:
            _trim_memory()
        return image

    @contextmanager
    def _room_for(self, pixels: int) -> Iterator[None]:
        """Wait until an image of this size can be decoded without too many pixels in memory at once."""
        with self.decoded:
            self.decoded.wait_for(
                lambda: not self.decoding_pixels or self.decoding_pixels + pixels <= DECODING_PIXELS
            )
            self.decoding_pixels += pixels
        try:
            yield
        finally:
            with self.decoded:
                self.decoding_pixels -= pixels
                self.decoded.notify_all()

    def _prediction(
        self, logits: np.ndarray, maps: np.ndarray | None, seen: Image.Image, topk: int, explain: bool
    ) -> Prediction:
        try:
            probabilities = softmax(logits[None])[0]
        except RequestError as error:
            raise Refusal(500, "not_a_number", str(error)) from None
        order = ranked(probabilities, topk)
        evidence = None
        if explain:
            if maps is not None and not np.isfinite(maps).all():
                raise Refusal(500, "not_a_number", "the model's class-activation maps are NaN or infinite")
            rows = None if maps is None else np.round(maps, 4).tolist()
            evidence = Evidence(seen=data_uri(_png(seen)), maps=rows)
        names = [self.classifier.classes[i] for i in order]
        return Prediction(classes=names, probabilities=probabilities[order].tolist(), evidence=evidence)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _trim_memory() -> None:
    """Return freed memory to the system, if the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
