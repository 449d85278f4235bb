# The io_uring reader: raw system calls, no liburing.
flashinfer_module(_ring ring_module.cpp ring.cpp ring_kernel.cpp)
