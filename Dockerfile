# The image of the controller and of the node plugin: Debian trixie, its QEMU, and the driver in a virtual environment.
#
#   make image                                       with what this machine has, also without a registry
#   docker build -t csi-quobyte .                    on any machine that reaches a registry
#
# Two secrets may be given to a build and are in no layer: apt.conf (with sources.list, which it may name) and pip.conf
# (with ca.crt). They say how this network reaches Debian's archive and the Python packages; the packages themselves
# are the same, because apt checks signatures and pip the hashes of the locks.

ARG BASE_IMAGE=docker.io/library/debian:trixie-slim

# --- build: the stubs, the wheel, the virtual environment; the image takes only what was installed
FROM ${BASE_IMAGE} AS build
RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=sources.list \
    if [ -e /run/secrets/apt.conf ]; then export APT_CONFIG=/run/secrets/apt.conf; fi \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The locks come before the code, so that a change of the code does not fetch the packages again.
COPY deploy/build.lock deploy/requirements.lock /src/deploy/
# The kept environment has no pip: the build's own writes into it. The image's file system is read-only when it runs, so
# what Python compiles is made here; it is not tied to its source's time, which copying may change.
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    export PIP_CONFIG_FILE=/run/secrets/pip.conf \
    && python3 -m venv /build \
    && /build/bin/pip install --require-hashes --only-binary :all: -r /src/deploy/build.lock \
    && python3 -m venv --without-pip /opt/csi-quobyte \
    && /build/bin/pip --python /opt/csi-quobyte/bin/python install --no-compile --require-hashes --only-binary :all: \
        -r /src/deploy/requirements.lock \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/csi-quobyte/lib

# The driver goes below a directory of its own, so that it is a layer of its own: an upgrade fetches little.
COPY pyproject.toml README.md LICENSE /src/
COPY proto /src/proto
COPY csi_quobyte /src/csi_quobyte
RUN /build/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheels /src \
    && /build/bin/pip --python /opt/csi-quobyte/bin/python install --no-compile --no-deps --no-index \
        --root /driver /wheels/*.whl \
    && python3 -m compileall -q --invalidation-mode unchecked-hash -s /driver /driver/opt/csi-quobyte/lib

# --- the image
FROM ${BASE_IMAGE}
# qemu-utils holds qemu-img and qemu-storage-daemon; files, qcow2 and FUSE exports need no module of qemu-block-extra.
# No program lends its owner's rights (setuid): the controller needs none and the node plugin has them.
RUN --mount=type=secret,id=apt.conf --mount=type=secret,id=sources.list \
    if [ -e /run/secrets/apt.conf ]; then export APT_CONFIG=/run/secrets/apt.conf; fi \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        e2fsprogs fuse3 mount python3 qemu-utils util-linux xfsprogs \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log /var/log/alternatives.log \
    && groupadd --gid 65532 csi-quobyte \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir / --shell /usr/sbin/nologin csi-quobyte \
    && find / -xdev -type f -perm /6000 -exec chmod ug-s {} +
COPY --from=build /opt/csi-quobyte /opt/csi-quobyte
COPY --from=build /driver/ /

ENV PATH=/opt/csi-quobyte/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The controller needs no privilege; the node plugin mounts and is given runAsUser 0 and privileged by its pod.
USER 65532:65532
ENTRYPOINT ["csi-quobyte"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="csi-quobyte" \
      org.opencontainers.image.description="Kubernetes CSI driver: disks as image files on Quobyte volumes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
