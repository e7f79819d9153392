# A tensorswarm node. The store is on the volume /data:
#
#     docker build -t tensorswarm .
#     docker run -v tensorswarm:/data -p 4001:4001 tensorswarm
#     docker run -v tensorswarm:/data tensorswarm ls --json

FROM python:3.12-slim AS build
# fastecdsa, one of libp2p's requirements, is compiled on installation.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tensorswarm
WORKDIR /src
COPY . .
RUN /opt/tensorswarm/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgmp10 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home tensorswarm \
    && install -d -o tensorswarm -g tensorswarm /data /swarm
COPY --from=build /opt/tensorswarm /opt/tensorswarm
COPY deploy/note.py /opt/tensorswarm/note.py
ENV PATH=/opt/tensorswarm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TENSORSWARM_HOME=/data
USER tensorswarm
WORKDIR /data
VOLUME /data
EXPOSE 4001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tensorswarm"]
CMD ["node", "--listen", "/ip4/0.0.0.0/tcp/4001"]
