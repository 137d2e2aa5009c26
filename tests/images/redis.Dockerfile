# A Redis for the tests where no registry is reached: Debian's, with the official image's user.
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends redis-server \
    && groupmod --gid 999 redis && usermod --uid 999 redis \
    && install -d -o redis -g redis /data
WORKDIR /data
USER 999:999
