"""`convmixer serve`: the page, and an HTTP API for programs, on one model.

    GET  /             the page                     GET  /v1/model     what is served
    POST /v1/predict   images -> classes            GET  /docs         this API, offline
    GET  /healthz      the process runs             GET  /readyz       the model answers
    GET  /metrics      Prometheus                   GET  /openapi.json

A request holds one image as its body, or up to 32 as multipart parts. Limits (see `Limits`): 16 MiB a body, 50
million pixels an image, 32 images a request, 256 images waiting, 512 MiB of bodies at once, 10 s to send it, 30 s to
answer it. No more than 100 million pixels are decoded at once. Every refusal is JSON: {"error": {"code", "message"}}.
Requests that arrive together are computed together. Names and paths in a request are never used, and logs hold
nothing of an image. What is no HTTP at all gets a plain 400.
"""

import asyncio
import ctypes
import hmac
import io
import ipaddress
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from convmixer._version import __version__
from convmixer.errors import RequestError
from convmixer.exported.samples import choose_samples
from convmixer.exported.web import data_uri
from convmixer.inference import Classifier, load_classifier, ranked, softmax
from convmixer.preprocess import ImageError, load_image, normalise, read_header, resize_and_crop
from convmixer.run_folder import sample_files
from convmixer.serve.batching import Batcher, QueueFull
from convmixer.serve.http import (
    HEADERS,
    Guard,
    Protocol,
    Refusal,
    declared_length,
    drain,
    read_body,
    reason,
    split_parts,
)

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "docs.js": "text/javascript",
}
DECODING_PIXELS = 100_000_000  # of all images being decoded at once; a pixel takes up to 12 bytes meanwhile
LARGE_PIXELS = 4_000_000  # after an image of this size, freed memory is handed back to the system
logger = logging.getLogger("convmixer.serve")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        body_bytes: Size of a body.
        pixels: Pixels of one image, width times height, as its header says.
        images: Images in one request.
        queue: Images waiting to be computed, and requests being read or decoded.
        batch: Images computed at once.
        send_seconds: Time for a request's head, and again for its body, to arrive.
        answer_seconds: Time from a whole request to its answer.
        held_bytes: Bodies being read or decoded, together.
    """

    body_bytes: int = 16 << 20
    pixels: int = 50_000_000
    images: int = 32
    queue: int = 256
    batch: int = 32
    send_seconds: float = 10.0
    answer_seconds: float = 30.0
    held_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise RequestError(f"the limit {name} must be above 0, not {value:g}")
        if self.images > self.queue or self.body_bytes > self.held_bytes:
            raise RequestError(
                f"a request of {self.images} images in {self.body_bytes} bytes would never be taken: at most "
                f"{self.queue} images wait, and {self.held_bytes} bytes are held"
            )


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    code: str
    message: str


class Error(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


class Evidence(BaseModel):
    """What the network saw, and how much each patch adds to the logits of the classes predicted."""

    seen: str
    maps: list[list[list[float]]] | None


class Prediction(BaseModel):
    """The likeliest classes of one image, in falling order."""

    classes: list[str]
    probabilities: list[float]
    evidence: Evidence | None = None


class Predictions(BaseModel):
    """One prediction per image, in the order sent."""

    predictions: list[Prediction]
    milliseconds: float


class ModelInfo(BaseModel):
    """What is served."""

    name: str
    version: str
    classes: list[str]
    preprocessing: dict[str, Any]
    precision: str
    samples: list[str]
    authorisation: bool
    limits: dict[str, float]


_REFUSALS = {
    400: "empty or malformed body",
    401: "no or wrong bearer token",
    408: "the request came too slowly",
    413: "too many bytes, pixels or images",
    415: "not an image type",
    422: "not a readable image, or a bad parameter",
    500: "the model failed, or its answer is not a number",
    503: "busy; see Retry-After",
    504: "no answer in time",
}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "One image as the body, or several as parts of a multipart form (any names).",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["image"],
                }
            },
        },
    }
}


class Service:
    """One model behind a queue, with its limits, its metrics and the threads that decode.

    Args:
        classifier: The model.
        limits: What a request may ask for.
        samples: PNG or JPEG files that the page offers, as bytes.
    """

    def __init__(self, classifier: Classifier, limits: Limits, samples: Sequence[bytes] = ()) -> None:
        self.classifier, self.limits = classifier, limits
        self.samples = [data_uri(sample) for sample in samples]
        self.decoders = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="decode")
        self.reading = self.held_bytes = 0
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

    async def predict(self, request: Request, topk: int, explain: bool) -> Predictions:
        """Return the answer to one request.

        Raises:
            Refusal: It is not served; says why.
        """
        try:
            async with asyncio.timeout(None) as limit:
                async with self._admitted(request):
                    files = await self._read(request)
                    start = time.perf_counter()
                    limit.reschedule(asyncio.get_running_loop().time() + self.limits.answer_seconds)
                    seen = await self._decode(files)
                    del files
                inputs = [normalise(image, self.classifier.preprocessing) for image in seen]
                answers = await self.batcher.submit(inputs, explain)
        except TimeoutError:
            text = f"no answer within {self.limits.answer_seconds:g} s"
            raise Refusal(504, "too_late", text, {"retry-after": "5"}) from None
        except QueueFull:
            raise self._busy() from None
        self.images.inc(len(answers))
        self.seconds.observe(time.perf_counter() - start)
        predictions = [self._prediction(*a, image, topk, explain) for a, image in zip(answers, seen, strict=True)]
        return Predictions(predictions=predictions, milliseconds=round(1000 * (time.perf_counter() - start), 3))

    def _busy(self) -> Refusal:
        return Refusal(503, "busy", "too many images are waiting: try again later", {"retry-after": "1"})

    @asynccontextmanager
    async def _admitted(self, request: Request) -> AsyncIterator[None]:
        """Let a request in, and count what it may hold, while there is room."""
        size = min(declared_length(request) or self.limits.body_bytes, self.limits.body_bytes)
        full = max(self.reading, self.batcher.waiting.qsize()) >= self.limits.queue
        if full or self.held_bytes + size > self.limits.held_bytes:
            await drain(request)
            raise self._busy()
        self.reading += 1
        self.held_bytes += size
        try:
            yield
        finally:
            self.reading -= 1
            self.held_bytes -= size

    async def _read(self, request: Request) -> list[bytes]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind in ("application/octet-stream", "multipart/form-data")):
            await drain(request)
            text = (
                f"Content-Type {kind or '(none)'!r} is not image/..., application/octet-stream or multipart/form-data"
            )
            raise Refusal(415, "unsupported_type", text)
        body = await read_body(request, self.limits.body_bytes, self.limits.send_seconds)
        if kind != "multipart/form-data":
            return [body]
        return split_parts(body, request.headers["content-type"], self.limits.images)

    async def _decode(self, files: list[bytes]) -> list[Image.Image]:
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(self.decoders, self._square, file, n) for n, file in enumerate(files, 1)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return done  # type: ignore[return-value]

    def _square(self, file: bytes, number: int) -> Image.Image:
        """Return what the network sees of an image."""
        p = self.classifier.preprocessing
        try:
            _, (width, height) = read_header(file)
            if width * height > self.limits.pixels:
                text = f"image {number} is {width} x {height}: at most {self.limits.pixels} pixels are taken"
                raise Refusal(413, "too_many_pixels", text)
            with self._room_for(width * height):
                image = resize_and_crop(load_image(file, p.in_chans), p)
        except ImageError as error:
            raise Refusal(422, "bad_image", f"image {number} cannot be read: {error}") from None
        if width * height > LARGE_PIXELS:
            _trim_memory()
        return image

    @contextmanager
    def _room_for(self, pixels: int) -> Iterator[None]:
        """Wait until an image of this size may be decoded beside the others: small files can hold large images."""
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
        probabilities = softmax(logits[None])[0]
        if not np.isfinite(probabilities).all():
            raise Refusal(500, "not_a_number", "the model's answer is not a number: are its weights damaged?")
        order = ranked(probabilities, topk)
        evidence = None
        if explain:
            rows = None if maps is None else np.round(maps, 4).tolist()
            evidence = Evidence(seen=data_uri(_png(seen)), maps=rows)
        names = [self.classifier.classes[i] for i in order]
        return Prediction(classes=names, probabilities=probabilities[order].tolist(), evidence=evidence)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _trim_memory() -> None:
    """Hand freed memory back to the system where the C library can (glibc); elsewhere do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def create_app(
    classifier: Classifier, limits: Limits | None = None, token: str | None = None, samples: Sequence[bytes] = ()
) -> FastAPI:
    """Return the application. The model is run once: what does not work fails here, before anything listens.

    Args:
        classifier: The model to serve.
        limits: What a request may ask for; None: the defaults.
        token: Bearer token that /v1 and /metrics ask for; None: open.
        samples: PNG or JPEG files that the page offers, as bytes.
    """
    _warm(classifier)
    service = Service(classifier, limits or Limits(), samples)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        app.state.ready = True
        yield
        app.state.ready = False
        await service.batcher.stop()
        service.decoders.shutdown()

    app = FastAPI(
        title="convmixer",
        version=__version__,
        description="Classify images with one ConvMixer.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.ready, app.state.service = False, service
    _refuse_in_json(app)
    app.add_middleware(Guard, count=lambda path, status: service.requests.labels(path, status).inc())
    _add_pages(app)
    _add_api(app, service, _guard(token), token is not None)
    _add_health(app)
    return app


def _guard(token: str | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            await drain(request)
            raise Refusal(
                401, "unauthorised", "send the header Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
            )

    return check


def _refuse_in_json(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refusal(request: Request, error: Refusal) -> JSONResponse:
        return JSONResponse(reason(error.code, error.message), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return JSONResponse(reason(code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse(reason("bad_parameter", f"{first['loc'][-1]}: {first['msg']}"), 422)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # starlette sends this one outside of Guard
        return JSONResponse(reason("internal", "the request failed; the server's log says why"), 500, HEADERS)


def _add_pages(app: FastAPI) -> None:
    page = (HERE / "page.html").read_text(encoding="utf-8")
    page = page.replace("<!-- scripts -->", '<script defer src="api.js"></script>')
    files = {"/": (page, "text/html"), "/docs": ((HERE / "docs.html").read_text(encoding="utf-8"), "text/html")}
    files |= {f"/{name}": ((HERE / name).read_text(encoding="utf-8"), kind) for name, kind in STATIC.items()}

    def add(path: str, content: str, kind: str) -> None:
        @app.get(path, include_in_schema=False)
        async def static() -> Response:
            return Response(content, media_type=kind)

    for path, (content, kind) in files.items():
        add(path, content, kind)


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz", summary="Whether the process runs")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether the model answers", responses={503: {"model": Error}})
    async def readyz() -> dict[str, str]:
        if not app.state.ready:
            raise Refusal(503, "not_ready", "the model is being loaded", {"retry-after": "1"})
        return {"status": "ready"}


def _add_api(app: FastAPI, service: Service, guard: Callable[[Request], Awaitable[None]], guarded: bool) -> None:
    classes = len(service.classifier.classes)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": text} for status, text in _REFUSALS.items()
    }

    @app.post(
        "/v1/predict",
        summary="Classify one or many images",
        dependencies=[Depends(guard)],
        response_model=Predictions,
        response_model_exclude_none=True,
        responses=refusals,
        openapi_extra=_BODY,
    )
    async def predict(
        request: Request,
        topk: Annotated[int, Query(ge=1, le=classes, description="classes per image")] = min(5, classes),
        explain: Annotated[bool, Query(description="add what the network saw, and class-activation maps")] = False,
    ) -> Response:
        # written straight to JSON: checking our own answer against its model costs as much as decoding the image
        answer = await service.predict(request, topk, explain)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @app.get("/v1/model", summary="What is served", dependencies=[Depends(guard)], responses={401: refusals[401]})
    async def model() -> ModelInfo:
        return _model_info(service, guarded)

    @app.get("/metrics", summary="Prometheus metrics", dependencies=[Depends(guard)], response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics), media_type="text/plain; version=0.0.4")


def _model_info(service: Service, guarded: bool) -> ModelInfo:
    classifier, limits = service.classifier, service.limits
    about = classifier.describe
    names = ("body_bytes", "pixels", "images", "queue", "send_seconds", "answer_seconds")
    return ModelInfo(
        name=str(about.get("name") or about.get("architecture") or "model"),
        version=__version__,
        classes=list(classifier.classes),
        preprocessing=vars(classifier.preprocessing),
        precision=str(about.get("precision", "fp32")),
        samples=service.samples,
        authorisation=guarded,
        limits={name: getattr(limits, name) for name in names},
    )


def _warm(classifier: Classifier) -> None:
    """Run the model once: it works, and the first request does not wait for what happens only once."""
    p = classifier.preprocessing
    classifier.explained(np.zeros((1, p.in_chans, p.img_size, p.img_size), np.float32), True)


def read_token(path: Path | None) -> str | None:
    """Return the bearer token in a file, else in the environment variable CONVMIXER_TOKEN, else None.

    Raises:
        RequestError: The file cannot be read, or what it holds cannot be sent in a header.
    """
    source = f"the token file {path}" if path else "CONVMIXER_TOKEN"
    try:
        text = path.read_text(encoding="utf-8") if path else os.environ.get("CONVMIXER_TOKEN", "")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from error
    if not path and not text:
        return None
    token = text.strip()
    if not token:
        raise RequestError(f"{source} is empty")
    if not (token.isascii() and token.isprintable()):
        raise RequestError(f"{source} must hold one line of ASCII: HTTP headers carry nothing else")
    return token


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    weights: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: str = "auto",
    token: str | None = None,
    limits: Limits | None = None,
    samples: str | None = None,
) -> dict[str, Any]:
    """Serve weights until SIGTERM or SIGINT; requests that were accepted are finished first.

    Args:
        weights: Whatever `load_classifier` takes.
        host: Address to listen on; anything but this machine's own is open to others.
        port: Port; 0 takes a free one, which is printed.
        precision: See `load_classifier`.
        token: Bearer token to ask for, or None.
        limits: What a request may ask for.
        samples: Pictures that the page offers: a run, a folder of images, or "none"; default: those beside the
            weights if only this machine can connect, else none.

    Raises:
        RequestError: The weights or samples cannot be loaded, or the address cannot be listened on.
    """
    limits = limits or Limits()
    if not 0 <= port <= 65535:
        raise RequestError(f"the port must be from 0 to 65535, not {port}")
    classifier = load_classifier(weights, precision)
    own = sample_files(str(classifier.describe["source"])) if is_loopback(host) else []
    pictures, said = choose_samples(samples, own)
    app = create_app(classifier, limits, token, pictures)
    Protocol.head_seconds = limits.send_seconds
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.send_seconds + limits.answer_seconds) + 5,
    )
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise RequestError(f"cannot listen on {host}:{port}: is the port taken?") from None
    address = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}"
    print(f"serving {weights} on {address} (docs: {address}/docs); stop with Ctrl-C\n{said}", flush=True)
    # uvicorn raises the signal once more after it has shut down; by then all is done, and the exit status is to be 0
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    uvicorn.Server(config).run([socket])
    return {"address": address}
