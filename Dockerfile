FROM python:3.13-slim

RUN useradd app
WORKDIR /app

COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .

# This user cannot change the code, and pytest cannot keep a cache beside it.
USER app
ENV PYTEST_ADDOPTS="-p no:cacheprovider"

HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]

# Prometheus counts the requests, so the log is for failures. Requests in flight have 8 s to end,
# as Docker kills after 10 s.
CMD ["uvicorn", "app:app", "--host", "0.0.0.0", "--no-access-log", \
     "--timeout-graceful-shutdown", "8"]
