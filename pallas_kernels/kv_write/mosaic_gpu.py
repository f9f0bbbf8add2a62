"""The write on GPUs: XLA's scatter of T tokens into the token-major layout, in place when donated.

XLA fuses the quantisation, and what made k and v, into it; a kernel would only add a launch.
"""

from pallas_kernels.kv_write.reference import kv_write

__all__ = ["kv_write"]
