FROM python:3.13-slim

RUN useradd app
WORKDIR /app

COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

# Names .traffic.py, too, so that the build fails in a folder that lost its hidden files.
COPY .traffic.py . ./
# COPY keeps permissions. The user below must be able to read every file.
RUN chmod -R a+rX .

# This user cannot change the code.
USER app
# Nor could pytest write its cache here, and would warn.
ENV PYTEST_ADDOPTS="-p no:cacheprovider"

# trust_env=False: ask no proxy, which Docker may have put into the environment.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s CMD python -c \
    "import httpx; httpx.get('http://127.0.0.1:8000/health', trust_env=False).raise_for_status()"

# --no-access-log: Prometheus counts the requests, so the log is for failures.
# --workers 1: each process would have metrics of its own, and WEB_CONCURRENCY may ask for more.
# --ws none: otherwise a request that asks for a WebSocket is never answered.
# --timeout-graceful-shutdown 8: requests in flight have 8 s to end. Docker kills after 10 s.
CMD ["uvicorn", "app:app", "--host", "0.0.0.0", "--no-access-log", "--workers", "1", \
     "--ws", "none", "--timeout-graceful-shutdown", "8"]
