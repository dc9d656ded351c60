"""The ops on the Triton kernels of rapidin.kernels. Arguments have been checked; each function is one op."""

from __future__ import annotations
