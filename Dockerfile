# The control plane as an image: stage `build` has the compilers, stage `runtime` has none.
#
#   docker build -t clawker-cp .
#
# Works with and without BuildKit. Where no registry is reachable: bases that hold the packages of
# tools/toolchain.txt already (tools/image_base.py makes them), and wheels in build/image/wheels
# (`make image` does both). Nothing of either reaches the result but what was installed from it.
ARG BUILD_BASE=debian:12-slim
ARG RUNTIME_BASE=debian:12-slim
# Images that have the program as /usr/bin/<name>, linked for Debian's C library or statically; empty = none.
ARG HYDRA_IMAGE=
ARG KRATOS_IMAGE=
ARG OATHKEEPER_IMAGE=

FROM ${BUILD_BASE} AS build
ENV PIP_CONFIG_FILE=/build/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
WORKDIR /src
COPY tools/toolchain.txt tools/image_packages.sh tools/
RUN tools/image_packages.sh build
# The brackets let a context without the directory pass; LICENSE is there so that something always matches.
COPY LICENSE build/image/wheel[s] /wheels/
COPY pyproject.toml ./
RUN python3 -m venv /build \
 && if ls /wheels/*.whl >/dev/null 2>&1; then printf '[global]\nno-index = true\nfind-links = /wheels\n' >/build/pip.conf; fi \
 && python3 -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))' \
  | /build/bin/pip install -r /dev/stdin
COPY . .
RUN /build/bin/pip wheel --no-deps --no-build-isolation -w /wheel . \
 && python3 -m venv --without-pip /opt/clawker-cp \
 && /build/bin/pip --python /opt/clawker-cp/bin/python install --no-compile /wheel/*.whl \
 # Some wheels bring the sources that they were compiled from.
 && find /opt/clawker-cp -type f -regex '.*\.\(c\|cc\|cpp\|h\|pyx\|pxd\|a\)' -delete \
 && python3 -m compileall -q -j 0 /opt/clawker-cp/lib

# Where the other makers' servers come from: their images, or nowhere.
FROM ${RUNTIME_BASE} AS none
FROM ${HYDRA_IMAGE:-none} AS hydra
FROM ${KRATOS_IMAGE:-none} AS kratos
FROM ${OATHKEEPER_IMAGE:-none} AS oathkeeper

FROM ${RUNTIME_BASE} AS runtime
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="clawker-cp" \
      org.opencontainers.image.description="Control plane of a host that runs AI agents in containers" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      dev.clawker.managed="true" \
      dev.clawker.purpose="controlplane"
# Directories of contract 1.5 and 1.6 as the container has them; /etc/clawker/config and auth are mounted.
ENV PATH=/opt/clawker-cp/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    CLAWKER_CONFIG_DIR=/etc/clawker/config \
    CLAWKER_DATA_DIR=/usr/local/share/clawker \
    CLAWKER_STATE_DIR=/var/lib/clawker \
    CLAWKER_CACHE_DIR=/var/cache/clawker \
    TZ=UTC PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY tools/toolchain.txt tools/image_packages.sh /usr/share/doc/clawker-cp/
RUN /usr/share/doc/clawker-cp/image_packages.sh image \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
 && mkdir -p -m 0755 /etc/clawker /var/log/clawker /usr/local/share/clawker /var/lib/clawker /run/clawker
COPY LICENSE /usr/share/doc/clawker-cp/
COPY --from=hydra /etc/passwd /usr/bin/hydr[a] /usr/local/bin/
COPY --from=kratos /etc/passwd /usr/bin/krato[s] /usr/local/bin/
COPY --from=oathkeeper /etc/passwd /usr/bin/oathkeepe[r] /usr/local/bin/
COPY --from=build /opt/clawker-cp /opt/clawker-cp
RUN rm -f /usr/local/bin/passwd && clawker-cp --version
# Root, because attaching BPF programs, nftables and other processes' namespaces are root's; what it
# may do beyond that is taken away where the container is made (`clawkerctl up`, docs/operations.md).
EXPOSE 7443 7444 7080 7081 4444
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=4s --start-period=90s --retries=3 \
  CMD ["python3", "-ISc", "import urllib.request as r; r.urlopen('http://127.0.0.1:7080/healthz', timeout=3)"]
ENTRYPOINT ["clawker-cp"]
CMD ["serve", "--log-dir", "/var/log/clawker"]
