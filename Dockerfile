# `convmixer serve` in a container:
#     docker build -t convmixer . && docker run --rm -p 8000:8000 -v "$PWD/runs/flowers:/model:ro" convmixer
# Without a mounted model it serves the weights that ship in the package. PyTorch has an index of wheels for the CPU
# alone, a tenth of the size: --build-arg PIP_OPTIONS="--index-url URL" takes torch from there.
FROM python:3.11-slim AS build
ARG PIP_OPTIONS=""
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir $PIP_OPTIONS torch torchvision
COPY . /source
RUN /venv/bin/pip install --no-cache-dir "/source[serve]"

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 convmixer
COPY --from=build /venv /venv
USER convmixer
WORKDIR /home/convmixer
ENV PATH=/venv/bin:$PATH
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# exec, so that SIGTERM reaches the server
ENTRYPOINT ["sh", "-c", "if [ -e /model ]; then set -- /model \"$@\"; fi; exec convmixer serve --host 0.0.0.0 \"$@\"", "serve"]
