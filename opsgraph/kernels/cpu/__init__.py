"""The CPU: C++ kernels, GEMMs in the layout measured to be fastest, memory that is kept."""
