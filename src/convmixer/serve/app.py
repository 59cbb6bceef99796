"""`convmixer serve`: one model as a web page, and as an HTTP API for programs.

    GET  /             the page                     GET  /v1/model     what is served
    POST /v1/predict   images -> classes            GET  /docs         describes this API, offline
    GET  /healthz      the process runs             GET  /readyz       the model answers
    GET  /metrics      Prometheus                   GET  /openapi.json

The body of a request is one image, or a multipart form with up to 32 images as files. `Limits` holds the limits of a
request, `Access` decides who may send one. Every refusal is JSON: {"error": {"code", "message"}}; non-HTTP bytes get
a plain 400. Concurrent requests are batched. File names and paths in a request are never used, and no image content
is logged.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from convmixer._version import __version__
from convmixer.inference import Classifier
from convmixer.serve.access import Access, Guard
from convmixer.serve.http import HEADERS, Refusal, reason
from convmixer.serve.limits import Limits
from convmixer.serve.schema import BODY, REFUSALS, Error, ModelInfo, Predictions
from convmixer.serve.service import Service

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "docs.js": "text/javascript",
}


def create_app(
    classifier: Classifier,
    limits: Limits | None = None,
    access: Access | None = None,
    samples: Sequence[bytes] = (),
) -> FastAPI:
    """Return the application. The model is run once here, so that a broken one fails before the server listens.

    Args:
        classifier: The model to serve.
        limits: Limits of requests; None: the defaults.
        access: Who may send requests; None: anyone who can connect.
        samples: PNG or JPEG files that the page offers, as bytes.
    """
    _warm(classifier)
    service, access = Service(classifier, limits or Limits(), samples), access or Access()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        app.state.ready = True
        yield
        app.state.ready = False
        await service.stop()

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
    if access.origins:
        headers = ["authorization", "content-type"]
        app.add_middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["*"], allow_headers=headers)
    app.add_middleware(Guard, access=access, count=lambda path, status: service.requests.labels(path, status).inc())
    _add_pages(app)
    _add_api(app, service, access)
    _add_health(app)
    return app


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
        # starlette sends this answer outside of Guard, so the headers are added here
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
            raise Refusal(503, "not_ready", "the server is starting or stopping", {"retry-after": "1"})
        return {"status": "ready"}


def _add_api(app: FastAPI, service: Service, access: Access) -> None:
    guard = access.check_token
    classes = len(service.classifier.classes)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": text} for status, text in REFUSALS.items()
    }

    @app.post(
        "/v1/predict",
        summary="Classify one or many images",
        dependencies=[Depends(guard)],
        response_model=Predictions,
        response_model_exclude_none=True,
        responses=refusals,
        openapi_extra=BODY,
    )
    async def predict(
        request: Request,
        topk: Annotated[int | None, Query(ge=1, le=classes, description="classes per image; default 5")] = None,
        explain: Annotated[
            bool | None, Query(description="add what the network saw, and class-activation maps")
        ] = None,
    ) -> Response:
        # written as JSON directly: letting FastAPI validate our own answer takes as long as decoding the image
        answer = await service.predict(request, topk, explain)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @app.get("/v1/model", summary="What is served", dependencies=[Depends(guard)], responses={401: refusals[401]})
    async def model() -> ModelInfo:
        return _model_info(service, access.token is not None)

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
    """Run the model once, to check that it works, and to do its one-time setup before the first request."""
    p = classifier.preprocessing
    classifier.explained(np.zeros((1, p.in_chans, p.img_size, p.img_size), np.float32), True)
