# docker build -t datasetdm-fast .
# docker run --rm -v $PWD/runs:/data/runs datasetdm-fast generate --number 16 --out runs/demo
#
# torch comes from the package index as pip finds it, built for CUDA on x86: with `docker run --gpus all` it uses the GPUs.
# For CPUs alone, 4 GB smaller: --build-arg TORCH=torch==2.13.0+cpu, and --build-arg PIP_FLAGS=... with the option by which
# pip also asks PyTorch's index of builds for CPUs. All other libraries are those of requirements.lock, with their digests.
FROM python:3.11-slim

# g++ builds the extension; Triton and torch.compile need a compiler at run time, too
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/datasetdm_fast
COPY . .
ARG TORCH=torch==2.13.0
ARG PIP_FLAGS=
RUN make VENV=/opt/venv TORCH="$TORCH" PIP_FLAGS="--no-cache-dir $PIP_FLAGS" /opt/venv/.datasetdm-built

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["datasetdm-fast"]
CMD ["--help"]
