"""The types of requests and answers, as /openapi.json describes them."""

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    code: str
    message: str


class Error(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail


class Evidence(BaseModel):
    """The image that the network got, and how much each patch adds to the logits of the predicted classes."""

    seen: str
    maps: list[list[list[float]]] | None


class Prediction(BaseModel):
    """The likeliest classes of one image, in descending order."""

    classes: list[str]
    probabilities: list[float]
    evidence: Evidence | None = None


class Predictions(BaseModel):
    """One prediction per image, in the order of the images."""

    predictions: list[Prediction]
    milliseconds: float


class ModelInfo(BaseModel):
    """The model that is served."""

    name: str
    version: str
    classes: list[str]
    preprocessing: dict[str, Any]
    precision: str
    samples: list[str]
    authorisation: bool
    limits: dict[str, float]


REFUSALS = {
    400: "empty or malformed body",
    401: "no or wrong bearer token",
    403: "the request comes from a page of another origin",
    408: "the request arrived too slowly",
    413: "too many bytes, pixels or images",
    415: "not an image type",
    421: "the Host header is not one of this server's names",
    422: "not a readable image, or a bad parameter",
    429: "this client sends too much at once; see Retry-After",
    431: "the head is too large",
    500: "the model failed, or its output is NaN or infinite",
    503: "busy; see Retry-After",
    504: "no answer in time",
}
BODY = {
    "requestBody": {
        "required": True,
        "description": "One image as the body, or several as files of a multipart form (any names), "
        "which may hold `topk` and `explain` too.",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "topk": {"type": "integer"},
                        "explain": {"type": "boolean"},
                    },
                    "required": ["image"],
                }
            },
        },
    }
}
