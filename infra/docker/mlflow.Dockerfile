# The MLflow server: on Postgres, with a bucket for artifacts, behind a password.
#
#   docker build -f infra/docker/mlflow.Dockerfile -t gdl_ray-mlflow:0.1.0 .

ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

COPY constraints.txt /opt/mlflow/
RUN pip install --no-cache-dir -c /opt/mlflow/constraints.txt \
    'mlflow[auth]==3.17.2' 'boto3==1.44.5' 'psycopg[binary]==3.3.9' \
    && useradd --uid 1000 --create-home app

COPY infra/docker/mlflow-auth.ini /etc/mlflow/auth.ini
COPY --chmod=755 infra/docker/entrypoint.sh /usr/local/bin/entrypoint

# hadolint ignore=DL3064
ENV HOME=/home/app \
    MLFLOW_AUTH_CONFIG_PATH=/etc/mlflow/auth.ini \
    MLFLOW_DISABLE_TELEMETRY=true \
    # The server's own job queue, for judging language models, would be nine more processes.
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    # The service is told of the registry's events by plain HTTP, on a private network.
    MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https \
    MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true \
    # A hook is heeded from the first event on, not a minute later.
    MLFLOW_WEBHOOK_CACHE_TTL=0 \
    MLFLOW_WEBHOOK_REQUEST_TIMEOUT=5 \
    PYTHONUNBUFFERED=1

WORKDIR /home/app
ENTRYPOINT ["entrypoint"]
CMD ["mlflow", "server", "--help"]
