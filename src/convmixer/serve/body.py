"""Reads a request's body within limits of time and size, and splits it if it is a multipart form."""

import asyncio
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from convmixer.serve.admission import Slot
from convmixer.serve.http import Refusal, drain
from convmixer.serve.limits import Limits

PART_HEAD_BYTES = 4096  # limit on a part's headers, and on the Content-Type
BOUNDARY_BYTES = 200  # limit on the boundary; the standard allows 70
FIELDS = ("topk", "explain")
FIELD_BYTES = 100


@dataclass(frozen=True)
class Form:
    """The contents of a body: image files, and the text of form fields by name."""

    images: list[bytes]
    fields: dict[str, str]


async def read_form(request: Request, limits: Limits, slot: Slot) -> Form:
    """Return the contents of a request's body.

    Raises:
        Refusal: The body has an unsupported type, or is too large, too slow, malformed or empty.
    """
    try:
        kind = _check_type(request)
        body = await read_body(request, limits, slot)
    except Refusal as refusal:
        if refusal.status != 408:
            await drain(request)
        raise
    if kind != "multipart/form-data":
        return Form([body], {})
    return await asyncio.to_thread(split_form, body, request.headers["content-type"], limits.images)


def _check_type(request: Request) -> str:
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if not (kind.startswith("image/") or kind in ("application/octet-stream", "multipart/form-data")):
        taken = "image/..., application/octet-stream or multipart/form-data"
        raise Refusal(415, "unsupported_type", f"Content-Type {kind[:80] or '(none)'!r} is not {taken}")
    if len(given) > PART_HEAD_BYTES:
        raise Refusal(400, "bad_multipart", "the Content-Type is too long")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(
            415, "unsupported_encoding", "send the body without Content-Encoding: images are compressed already"
        )
    return kind


async def read_body(request: Request, limits: Limits, slot: Slot) -> bytes:
    """Return the body of a request; its bytes are counted in the slot as they arrive.

    Raises:
        Refusal: 400 if the body is empty or its length is not a number; 408 if it arrives too slowly; 413 if it is
            too large; 429 or 503 if there is no room for it.
    """
    too_large = Refusal(413, "body_too_large", f"the body may have at most {limits.body_bytes} bytes")
    if _declared_length(request) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.send_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.body_bytes:
                    raise too_large
                slot.charge(len(chunk))
                body += chunk
    except TimeoutError:
        text = f"the body did not arrive within {limits.send_seconds:g} s"
        raise Refusal(408, "too_slow", text, {"connection": "close"}) from None
    except ClientDisconnect:
        raise Refusal(400, "disconnected", "the client closed the connection") from None
    if not body:
        raise Refusal(400, "empty", "the body is empty: send an image")
    return bytes(body)


def _declared_length(request: Request) -> int:
    """Return the Content-Length, 0 if there is none."""
    try:
        return int(request.headers.get("content-length", 0))
    except ValueError:
        raise Refusal(400, "bad_length", "Content-Length is not a number") from None


def split_form(body: bytes, content_type: str, max_images: int) -> Form:
    """Return the contents of a multipart body. A part with a file name is an image; the name is not used.

    The work grows only with the size of the body, and ends at the first error.

    Raises:
        Refusal: 400 if the body is malformed or has no images; 413 if it has too many; 422 if it has other fields.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary or len(boundary) > BOUNDARY_BYTES:
        raise Refusal(400, "bad_multipart", "the multipart Content-Type has no valid boundary")
    form = Form([], {})
    mark = b"--" + boundary
    place = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    if place == 1:
        raise _malformed()
    while body[(place := place + len(mark)) : place + 2] != b"--":
        head = body.find(b"\r\n\r\n", place, place + PART_HEAD_BYTES)
        end = body.find(b"\r\n" + mark, head + 4)
        if body[place : place + 2] != b"\r\n" or min(head, end) < 0:
            raise _malformed()
        _add_part(form, body[place:head], body[head + 4 : end], max_images)
        place = end + 2
    if not form.images:
        raise Refusal(400, "empty", "the multipart body has no files: send at least one image")
    return form


def _malformed() -> Refusal:
    return Refusal(400, "bad_multipart", "the multipart body is malformed or truncated")


def _add_part(form: Form, head: bytes, content: bytes, max_images: int) -> None:
    """Add one part of a multipart body: a file, or a field."""
    headers = {}
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    about = parse_options_header(headers.get(b"content-disposition"))[1]
    kind = headers.get(b"content-type", b"").lower()
    if b"filename" in about or b"filename*" in about or kind.startswith((b"image/", b"application/octet-stream")):
        if len(form.images) == max_images:
            raise Refusal(413, "too_many_images", f"a request may have at most {max_images} images")
        form.images.append(content)
        return
    field = about.get(b"name", b"").decode(errors="replace")
    if field not in FIELDS or field in form.fields or len(content) > FIELD_BYTES:
        text = f"form field {field[:40]!a} is not taken: send images as files, {' and '.join(FIELDS)} once as fields"
        raise Refusal(422, "bad_field", text)
    form.fields[field] = content.decode(errors="replace").strip()


def chosen(fields: dict[str, str], topk: int | None, explain: bool | None, classes: int) -> tuple[int, bool]:
    """Return `topk` and `explain` from the query or from the form's fields; otherwise their defaults.

    Args:
        fields: The form's fields.
        topk, explain: Values from the query, or None.
        classes: Number of classes of the model.

    Raises:
        Refusal: A value is invalid, or is in both the query and the form.
    """
    for name, given in (("topk", topk), ("explain", explain)):
        if name in fields and given is not None:
            raise Refusal(422, "bad_parameter", f"{name} is in the query and in the form: give it once")
    if "topk" in fields:
        text = fields["topk"]
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= classes):
            raise Refusal(422, "bad_parameter", f"topk must be a number from 1 to {classes}")
        topk = int(text)
    if "explain" in fields:
        if fields["explain"].lower() not in ("true", "false", "1", "0"):
            raise Refusal(422, "bad_parameter", "explain must be true or false")
        explain = fields["explain"].lower() in ("true", "1")
    return topk or min(5, classes), bool(explain)
