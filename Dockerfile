# Images of gptd. `docker build -t gptd .` makes the one for CPUs: the program, what it links and the demo model, on nothing else.
# `docker build --target cuda -t gptd:cuda .` makes the one for NVIDIA GPUs. scripts/check_docker.py builds and runs this file's
# instructions without Docker, for the tests.

# ---- the build ----

FROM debian:bookworm AS build
WORKDIR /src
# By itself, so that a change of the sources does not install the packages again.
COPY scripts/setup.sh scripts/
RUN scripts/setup.sh run
COPY . .
RUN make -j"$(nproc)" dist

# The tarball's content is /opt/gptd. Beside it only what it takes from any Linux: the loader, the C library, and a user's name.
# What nobody says otherwise: variables and flags win over this file, another one can be mounted in its place.
RUN mkdir -p /image/opt/gptd /image/etc/gptd && \
    tar -C /image/opt/gptd --strip-components=1 -xzf build/gptd-*.tar.gz && \
    for file in $(ldd /image/opt/gptd/gptd | grep -o '[[:blank:]]/lib[^ ]*'); do install -D "$file" "/image$file"; done && \
    install -m 644 /usr/share/doc/libc6/copyright /image/opt/gptd/licenses/libc6 && \
    dpkg-query -W -f '${source:Package} ${source:Version} (${binary:Package})\n' libc6 >>/image/opt/gptd/licenses/packages.txt && \
    echo 'gptd:x:10001:10001::/:/sbin/nologin' >/image/etc/passwd && \
    echo 'gptd:x:10001:' >/image/etc/group && \
    echo '{"model": "/opt/gptd/models/demo", "host": "0.0.0.0"}' >/image/etc/gptd/config.json

# ---- for GPUs: the same with the CUDA library ----

# The toolkit that compiles it, and of which the image gets cuBLASLt: of other versions than 13 a library of that name is not found.
FROM nvidia/cuda:13.0.2-devel-ubuntu22.04 AS toolkit

FROM build AS build-cuda
COPY --from=toolkit /usr/local/cuda-13.0 /usr/local/cuda
ENV PATH=/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN rm build/gptd-*.tar.gz && make -j"$(nproc)" dist && \
    tar -C /image/opt/gptd --strip-components=1 -xzf build/gptd-*.tar.gz && \
    install /usr/local/cuda/lib64/libcublasLt.so.13 /image/opt/gptd/lib/

# cuBLASLt is NVIDIA's, under the terms of its toolkit: whoever gives the image away gives that away, too.
# Debian's smallest rather than nothing: NVIDIA's container toolkit puts the driver's libraries where a distribution has them and
# has the loader's cache made anew.
FROM debian:bookworm-slim AS cuda
COPY --from=build-cuda /image/opt /opt
COPY --from=build-cuda /image/etc/gptd /etc/gptd
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV GPTD_CONFIG=/etc/gptd/config.json
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s CMD ["/opt/gptd/gptd", "--probe"]
ENTRYPOINT ["/opt/gptd/gptd"]

# ---- for CPUs ----

FROM scratch AS cpu
COPY --from=build /image /
# Another port is best said as GPTD_PORT=9000 or in the file: a flag is not known to the health check.
ENV GPTD_CONFIG=/etc/gptd/config.json
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["/opt/gptd/gptd", "--probe"]
ENTRYPOINT ["/opt/gptd/gptd"]
