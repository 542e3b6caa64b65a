"""Settings of torch's kernels on a GPU, for exact float32 and a fair comparison of speeds."""

import torch


def choose_kernels() -> None:
    """
    Compute products of float32 in float32, and leave cuDNN's attention out.

    Since torch 2.11, SDPA takes cuDNN's kernels first on an H100. They prepare a plan for every new shape, which would
    be part of each padded batch's time, and some of their gradients are NaN (pytorch issue 196678).
    """
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # the default, "none", may let flex attention use TF32
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cuda.enable_cudnn_sdp(False)
