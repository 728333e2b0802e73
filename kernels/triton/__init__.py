"""The bundled Triton kernels and what they share."""
