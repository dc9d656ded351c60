"""The CUDA kernels of rapidin as its extension `rapidin_cuda._cuda`, which rapidin finds by itself."""
