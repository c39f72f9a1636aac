# syntax=docker/dockerfile:1
#
# docker build --tag progidiff-label .
# docker build --tag progidiff-label:cuda --build-arg DEVICE=cuda .
#
# Every step is a script under packaging/image, which `make test-image` runs without a container engine.

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG DEVICE=cpu
# What to hand to `pip install` for PyTorch; empty for the device's.
ARG TORCH=
ENV PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY . .
RUN TORCH="${TORCH}" packaging/image/build.sh /opt/progidiff "${DEVICE}"

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="ProGiDiff Label" \
      org.opencontainers.image.description="Type a prompt, get proposals of a mask, keep one. For research, not for diagnosis." \
      org.opencontainers.image.licenses="Apache-2.0 AND LicenseRef-Research-Use-Only"
COPY packaging/image/prepare.sh /usr/local/sbin/prepare.sh
RUN /usr/local/sbin/prepare.sh && rm /usr/local/sbin/prepare.sh
COPY --from=build /opt/progidiff /opt/progidiff
# USER: libraries ask for the account's name, which a number given with --user, or by a cluster, does not have.
ENV PATH=/opt/progidiff/bin:$PATH \
    USER=progidiff \
    PYTHONUNBUFFERED=1 \
    HOME=/data/home \
    PROGIDIFF_HOME=/data/home \
    PROGIDIFF_PORT=8000
USER 10001:10001
WORKDIR /data
VOLUME ["/data", "/studies"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
  CMD ["/opt/progidiff/bin/python", "/opt/progidiff/healthcheck.py"]
ENTRYPOINT ["/opt/progidiff/bin/progidiff"]
CMD ["serve", "--studies", "/studies", "--host", "0.0.0.0", "--port", "8000", "--conf", "users_file=/data/users.json"]
