"""The HTTP API under load on loopback: 32 clients for a minute, beside one client, and `predict` one at a time.

    python benchmarks/serve_load.py WEIGHTS IMAGES_FOLDER [--seconds 60] [--clients 32]

Appends a record to benchmarks/records/serve_load.jsonl. Expect no error but the stated 503, and a printed ratio of
images per second, 32 clients over one. About 100 s. Client and server share the machine's cores.
"""

import argparse
import asyncio
import collections
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from convmixer import records
from convmixer.inference import load_classifier
from convmixer.preprocess import load_image


async def client(port: int, bodies: list[bytes], until: float, statuses: collections.Counter, times: list) -> None:
    """Send one image after the other over one connection until the time is up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = 0
    while time.perf_counter() < until:
        body = bodies[number % len(bodies)]
        number += 1
        start = time.perf_counter()
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(re.search(r"content-length: (\d+)", answer)[1])
        await reader.readexactly(length)
        times.append(time.perf_counter() - start)
        statuses[int(answer.split()[1])] += 1
    writer.close()


async def load(port: int, bodies: list[bytes], clients: int, seconds: float) -> dict:
    """Return throughput, latencies and statuses of a number of clients."""
    statuses: collections.Counter = collections.Counter()
    times: list[float] = []
    start = time.perf_counter()
    tasks = [client(port, bodies[n:] + bodies[:n], start + seconds, statuses, times) for n in range(clients)]
    await asyncio.gather(*tasks)
    elapsed = time.perf_counter() - start
    cuts = statistics.quantiles(times, n=100)
    return {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "images_per_second": round(statuses[200] / elapsed, 1),
        "p50_ms": round(1000 * cuts[49], 2),
        "p99_ms": round(1000 * cuts[98], 2),
        "statuses": dict(statuses),
    }


def one_at_a_time(weights: str, bodies: list[bytes], seconds: float) -> float:
    """Return the images per second of `predict` in this process, one image at a time, decoding included."""
    classifier = load_classifier(weights)
    classifier.predict([load_image(bodies[0])])
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        classifier.predict([load_image(bodies[done % len(bodies)])])
        done += 1
    return round(done / (time.perf_counter() - start), 1)


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights")
    parser.add_argument("images", type=Path, help="folder of PNG files")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    bodies = [path.read_bytes() for path in sorted(args.images.glob("*.png"))[:64]]
    command = [sys.executable, "-m", "convmixer", "serve", args.weights, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    port = int(re.search(r"http://[\d.]+:(\d+)", server.stdout.readline())[1])
    time.sleep(2)
    asyncio.run(load(port, bodies, 4, 3))  # warm up
    alone = asyncio.run(load(port, bodies, 1, args.seconds / 5))
    many = asyncio.run(load(port, bodies, args.clients, args.seconds))
    server.send_signal(signal.SIGTERM)
    status = server.wait(timeout=60)
    predict = one_at_a_time(args.weights, bodies, 5)
    ratio = round(many["images_per_second"] / alone["images_per_second"], 2)
    results = {"many": many, "alone": alone, "predict_images_per_second": predict, "ratio": ratio, "exit": status}
    record = records.RunRecord("serve-load", records.command_line(), {"weights": args.weights}, {}, results)
    records.append(Path(__file__).parent / "records" / "serve_load.jsonl", record)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
