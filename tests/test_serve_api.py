"""The HTTP API over real sockets: right answers."""

import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from convmixer.inference import Classifier
from serving import CLASSES, Server, multipart, picture


def test_predictions_equal_those_of_the_classifier(server: Server, serve_classifier: Classifier) -> None:
    body = picture(1)
    expected = serve_classifier.predict([Image.open(io.BytesIO(body))], 3)[0]
    answer = server.post(body).json()["predictions"][0]
    assert answer["classes"] == [name for name, _ in expected]
    np.testing.assert_allclose(answer["probabilities"], [share for _, share in expected], atol=1e-6)


def test_many_images_come_back_in_order(server: Server) -> None:
    bodies = [picture(seed, kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "BMP"))]
    alone = [server.post(body).json()["predictions"][0] for body in bodies]
    files = [("image", (f"../../etc/{n}", body, "image/png")) for n, body in enumerate(bodies)]
    together = httpx.post(f"{server.address}/v1/predict", files=files).json()["predictions"]
    assert [p["classes"] for p in together] == [p["classes"] for p in alone]
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one["probabilities"], many["probabilities"], atol=1e-5)


def test_evidence_holds_what_was_seen_and_a_map_per_class(server: Server) -> None:
    answer = server.post(picture(), query="?explain=true&topk=2").json()["predictions"][0]
    assert np.array(answer["evidence"]["maps"]).shape == (3, 4, 4)
    assert answer["evidence"]["seen"].startswith("data:image/png;base64,")
    assert len(answer["classes"]) == 2


def test_model_health_metrics_and_docs_answer(server: Server) -> None:
    model = httpx.get(f"{server.address}/v1/model").json()
    assert (model["name"], model["classes"]) == ("tiny", list(CLASSES))
    assert httpx.get(f"{server.address}/healthz").json() == {"status": "ok"}
    server.post(picture())
    metrics = httpx.get(f"{server.address}/metrics").text
    assert 'convmixer_requests_total{path="/v1/predict",status="200"}' in metrics
    page = httpx.get(f"{server.address}/docs")
    assert page.status_code == 200
    assert "//" not in re.sub(r"<!doctype.*?>", "", page.text)  # no address of another host
    assert httpx.get(f"{server.address}/openapi.json").json()["paths"].keys() >= {"/v1/predict", "/v1/model"}
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_serving_an_onnx_file_imports_no_torch(serve_weights: Path) -> None:
    code = (
        "import sys\n"
        "from convmixer.inference import load_classifier\n"
        "from convmixer.serve.app import create_app\n"
        f"create_app(load_classifier({str(serve_weights)!r}))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_fuzzing_from_the_description_finds_no_server_error(server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, seed, settings

        schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 5
    quick = settings(
        max_examples=25,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:

        @seed(0)
        @quick
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            response = case.call()
            assert response.status_code < 500
            if response.status_code >= 400:
                assert set(json.loads(response.text)["error"]) == {"code", "message"}

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()


def test_head_answers_as_get_without_a_body(server: Server) -> None:
    for path in ("/", "/v1/model", "/healthz", "/metrics", "/page.css"):
        answer = httpx.head(server.address + path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers["content-length"]) > 0
        assert "nosniff" in answer.headers["x-content-type-options"]
    assert httpx.head(f"{server.address}/nope").status_code == 404


def test_form_fields_are_parameters_and_no_images(server: Server) -> None:
    files = {"image": ("a.png", picture(), "image/png")}
    answer = httpx.post(f"{server.address}/v1/predict", files=files, data={"topk": "2", "explain": "true"})
    [prediction] = answer.json()["predictions"]
    assert len(prediction["classes"]) == 2
    assert "evidence" in prediction
    for data, query, code in (
        ({"topk": "many"}, "", "bad_parameter"),
        ({"topk": "99"}, "", "bad_parameter"),
        ({"explain": "perhaps"}, "", "bad_parameter"),
        ({"topk": "2"}, "?topk=3", "bad_parameter"),
        ({"top_k": "2"}, "", "bad_field"),
    ):
        answer = httpx.post(f"{server.address}/v1/predict{query}", files=files, data=data)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
        assert set(data).pop() in answer.json()["error"]["message"]
    only = httpx.post(f"{server.address}/v1/predict", data={"topk": "2"}, files={"explain": (None, "true")})
    assert (only.status_code, only.json()["error"]["code"]) == (400, "empty")


def test_formats_that_are_decoded_in_python_are_taken(server: Server) -> None:
    answer = server.post(b"P5\n20 20\n254\n" + bytes(400))
    assert answer.status_code == 200, answer.text


def test_a_file_without_a_name_is_an_image_if_its_type_says_so(server: Server) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="x"\r\nContent-Type: image/png\r\n\r\n' + picture()
    answer = server.post(body + b"\r\n--b--", multipart(1)[1])
    assert len(answer.json()["predictions"]) == 1
