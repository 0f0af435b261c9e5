# One peer or node of a run; compose.yaml starts three. The build needs a network, the container only its peers.
FROM python:3.12-slim

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt .
COPY experiments experiments

# Keys are readable by their owner alone, so compose.yaml runs containers as whoever owns the folders.
USER 1000:1000
ENV OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp NUMBA_CACHE_DIR=/tmp
WORKDIR /state
CMD ["jwins", "--help"]
