"""Types of elements that arguments may have."""

from __future__ import annotations

import torch

#: Of ids and boundaries; not bool, which is a mask, nor the wider unsigned ones, which int64 cannot hold.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

#: Of what kernels read.
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
