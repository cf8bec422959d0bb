# An image for a GPU cluster: torch and the wheel, nothing to compile.   make wheel && docker build -t dipkernels .
# The base carries torch for CUDA 12.8; any image with torch >= 2.10 and Python >= 3.10 does. Pin it by digest for a run that is to be repeated.
ARG BASE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime
FROM ${BASE}

# The wheel that `make wheel` left in dist/; without dependencies, so that the image's torch stays as it is.
COPY dist/dipkernels-*-py3-none-manylinux_2_28_*.whl /opt/dipkernels/
COPY tools/release/smoke.py /opt/dipkernels/
# From 2.10 on the Python of pytorch/pytorch is the system's, which pip changes only where it is told to.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -m pip install --no-cache-dir --no-index --no-deps /opt/dipkernels/*_"$(uname -m)".whl \
 && python3 /opt/dipkernels/smoke.py --expect cuda

# Nobody in particular: clusters run containers under the user's own number. Triton compiles into a folder that any may write.
ENV TRITON_CACHE_DIR=/var/tmp/triton
USER 65534:65534
CMD ["python3", "-m", "dipkernels"]
