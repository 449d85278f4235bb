# The CPU kernels, once for every instruction set; which one runs is chosen at run time.
flashinfer_module(_kernels kernels_module.cpp)
