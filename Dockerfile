# vimamba on a CPU: docker build -t vimamba . && docker run --rm vimamba python -m vim.doctor
FROM python:3.13-slim AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision && pip install --no-cache-dir "setuptools>=77"
COPY . /source
RUN VIM_BUILD_NATIVE=1 pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /source

FROM python:3.13-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision
COPY --from=wheel /wheels /wheels
COPY configs /workspace/configs
RUN wheel=$(echo /wheels/*.whl) && pip install --no-cache-dir "$wheel[train,export,data]"
WORKDIR /workspace
CMD ["python", "-m", "vim"]
