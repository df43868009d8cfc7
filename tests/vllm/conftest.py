"""Settings of vLLM on a CPU, before anything imports it."""

import os

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # `auto` pins all threads to one core
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
